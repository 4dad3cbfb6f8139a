"""The commands that look: `ls`, `show`, `events`, `tail`. None of them creates or changes anything."""

from collections.abc import Sequence

import click
import msgspec

from trajstore.cli.damage import Damage
from trajstore.cli.documents import event_document, summary_document, trajectory_document
from trajstore.cli.following import follow
from trajstore.cli.page import SEGMENT_COLUMNS, header_fields, segment_row, strips, token_runs
from trajstore.cli.place import Place, open_reading, open_run, place_argument, store_argument
from trajstore.cli.seconds import SECONDS
from trajstore.cli.signals import graceful_stop
from trajstore.cli.statuses import ENDS, StatusChoice
from trajstore.cli.strips import print_strips, strip_width
from trajstore.cli.terminal import (
    STATUS_STYLES,
    diagnostics,
    local_time,
    print_fields,
    print_json,
    print_table,
    print_text,
)
from trajstore.entries import Event
from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import UnknownEvent
from trajstore.fold import POLICIES, Policy
from trajstore.reading import ALL_STATUSES, Archive
from trajstore.standing import details, standing, supersessions
from trajstore.summary import Summary
from trajstore.trajectory import Trajectory

__all__ = ["events", "ls", "show", "tail"]

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")

_UNFOLDED = (NotFound, SequenceGap, SchemaError, RoutingError, Corrupt)

_WHY_COLUMNS = ("id", "status", "group", "tokens", "why")
_LS_COLUMNS = ("id", "status", "group", "segments", "tokens", "rows", "reward", "finish", "weights", "updated")


@click.command()
@store_argument
@click.option("--status", multiple=True, type=StatusChoice(ALL_STATUSES), help="Only these; repeatable.")
@click.option("--group", help="Only members of this group.")
@click.option("--mixed", is_flag=True, help="Only those with a segment that more than one weight version sampled.")
@click.option(
    "--finish",
    multiple=True,
    type=click.Choice(ENDS),
    help="Only those whose last segment ended so; lost: its writer vanished. Repeatable.",
)
@click.option(
    "--superseded",
    is_flag=True,
    help="Only those with rewound tokens, or a lost segment that was gone on from; reads headers.",
)
@click.option("--why", "explained", is_flag=True, help="Also say why each stands as it does; reads headers.")
@_as_json
def ls(
    store: str,
    status: tuple[str, ...],
    group: str | None,
    mixed: bool,
    finish: tuple[str, ...],
    superseded: bool,
    explained: bool,
    as_json: bool,
) -> None:
    """List trajectories, oldest id first.

    `rows` counts the routing rows of all recordings together, `tokens` what is left after rewinds. With --why: fewer
    columns, and why each stands as it does: aborted, lost, failed, superseded. With --json: an array of summaries. What
    is damaged is named on stderr, and what can be read is listed; the exit code is 1 then.

    \b
    Examples:
      trajstore ls runs/exp1 --status open --status aborted
      trajstore ls runs/exp1 --finish lost --finish error --why
      trajstore ls --group prompt-17 --json | jq '.[].reward'
    """
    damage = Damage()
    reasons: dict[str, str] = {}
    with open_reading(store) as archive:
        found = archive.list(status=status or None, group=group, mixed=mixed, on_corrupt=damage.hear)
        if finish:
            found = [summary for summary in found if summary.finish_reason in finish]
        if superseded:
            found = [summary for summary in found if summary.segments > 1 and _is_superseded(archive, summary)]
        if explained:
            reasons = {summary.id: _reason(archive, summary) for summary in found}
    if as_json:
        more = ({"why": reasons[summary.id]} if explained else {} for summary in found)
        print_json([summary_document(summary) | one for summary, one in zip(found, more, strict=True)])
    elif found:
        columns = _WHY_COLUMNS if explained else _LS_COLUMNS
        print_table(
            columns,
            [_summary_row(summary, columns, reasons.get(summary.id, "")) for summary in found],
            right=("segments", "tokens", "rows", "reward"),
            flexible=("group", "weights", "why"),
            styles=STATUS_STYLES,
        )
    else:
        like = status or mixed or finish or superseded or group is not None
        diagnostics().print("no trajectories" + (" like that" if like else ""))
    damage.fail("trajectories that have a part there are not listed, or only as the hot log knows them")


@click.command()
@place_argument
@click.option(
    "--policy", type=click.Choice(POLICIES), default="last_segment_wins", show_default=True, help="Of the fold."
)
@click.option("--until", metavar="E", help="The state at this event, e.g. 3-7 (see `trajstore events`).")
@click.option(
    "--routing", is_flag=True, help="With --json: also routed_experts, [T][L][K], 0 where routing_mask is false."
)
@_as_json
def show(place: Place, policy: Policy, until: str | None, routing: bool, as_json: bool) -> None:
    """Show one trajectory, folded.

    Its header, its segments, and for each token whose routing won. With --json: an object with the arrays, per token,
    of `trajstore.Trajectory`.

    \b
    Examples:
      trajstore show runs/exp1 01JD3Z... --policy as_sampled
      trajstore show 01JD3Z... --until 3-7 --json | jq .routing_source
    """
    if routing and not as_json:
        raise click.UsageError("--routing goes with --json")
    with open_reading(place.store) as archive:
        trajectory = archive.load(place.id, policy=policy, until=until)
    if as_json:
        print_json(trajectory_document(trajectory, routing=routing))
    else:
        _print_trajectory(trajectory)


@click.command()
@place_argument
@click.option("--notes", is_flag=True, help="Also observations and late recordings, after the events.")
@_as_json
def events(place: Place, notes: bool, as_json: bool) -> None:
    """List the events of one trajectory.

    Everything that ever happened to it, in order. An event's id is what `show --until` takes. With --json: an array
    of objects with the fields of each header.

    \b
    Examples:
      trajstore events runs/exp1 01JD3Z...
      trajstore events 01JD3Z... --notes --json | jq '.[] | select(.type == "Routing")'
    """
    with open_reading(place.store) as archive:
        found = archive.events(place.id) + (archive.notes(place.id) if notes else [])
    if as_json:
        print_json([event_document(event) for event in found])
    else:
        columns = ("event", "type", "time", "bytes", "stored", "what")
        print_table(columns, [_event_row(event) for event in found], right=("bytes",), flexible=("stored", "what"))


@click.command()
@store_argument
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many lines.")
@click.option("--seconds", type=SECONDS, metavar="S", help="End after so many seconds.")
@click.option("--from-start", is_flag=True, help="Begin with what the feed still holds, not with what comes now.")
@_as_json
def tail(store: str, count: int | None, seconds: float | None, from_start: bool, as_json: bool) -> None:
    """Follow a run live.

    Prints a line whenever a segment or trajectory closes, is scored, or is noted on. Status, tokens and segments are
    those of the moment, not of the event; lines may repeat. Ends on Ctrl-C or SIGTERM. With --json: an array, one
    element to a line as it comes, closed at the end.

    \b
    Examples:
      trajstore tail runs/exp1
      trajstore tail --from-start --seconds 60 --json > feed.json
    """
    with graceful_stop() as stopped, open_run(store) as run:
        follow(run, stopped, count=count, seconds=seconds, from_start=from_start, as_json=as_json)


def _is_superseded(archive: Archive, summary: Summary) -> bool:
    """It has tokens that left it, or a lost segment that was gone on from. What cannot be folded tells of neither."""
    try:
        return any(supersessions(archive.plan(summary.id).history))
    except _UNFOLDED:
        return False


def _reason(archive: Archive, summary: Summary) -> str:
    told = [standing(summary)]
    if summary.status != "deleted":
        try:
            told += details(archive.plan(summary.id).history)
        except _UNFOLDED as error:
            told.append(str(error))
    return "; ".join(told)


def _summary_row(summary: Summary, columns: Sequence[str], why: str) -> tuple[str, ...]:
    cells = {
        "id": summary.id,
        "status": summary.status,
        "group": summary.group or "",
        "segments": str(summary.segments),
        "tokens": str(summary.tokens),
        "rows": str(summary.rows),
        "reward": "" if summary.reward is None else f"{summary.reward:g}",
        "finish": summary.finish_reason,
        "weights": summary.weight_version,
        "updated": local_time(summary.updated, form="%Y-%m-%d %H:%M"),
        "why": why,
    }
    return tuple(cells[name] for name in columns)


def _event_row(event: Event) -> tuple[str, ...]:
    header = event.header
    if isinstance(header, UnknownEvent):
        fields = {"schema_version": header.version, **header.fields}
    else:
        names = [name for name in header.__struct_fields__ if name != "payload"]
        fields = {name: getattr(header, name) for name in names}
    shown = (f"{name}={_value(value)}" for name, value in fields.items() if value not in (None, "", {}, ()))
    nbytes = str(event.payload.nbytes) if event.payload else ""
    return event.id, event.type, local_time(event.time), nbytes, event.stored, " ".join(shown)


def _value(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def _print_trajectory(trajectory: Trajectory) -> None:
    print_fields(trajectory.id, header_fields(trajectory))
    if trajectory.segments:
        print_table(
            SEGMENT_COLUMNS,
            [segment_row(segment) for segment in trajectory.segments],
            right=("segment", "epoch", "base", "context", "output"),
            flexible=("engine", "weights", "finish", "recordings", "absent"),
        )
    print_strips(strips(trajectory, strip_width()), routed=trajectory.routing is not None)
    for name, text in token_runs(trajectory):
        print_text(f"{name:<10}  {text}")
