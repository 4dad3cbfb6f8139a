"""The commands that look: `ls`, `show`, `events`, `tail`. None of them creates or changes anything."""

from collections.abc import Sequence

import click
import msgspec

from trajstore.cli.damage import Damage
from trajstore.cli.documents import event_document, summary_document, trajectory_document
from trajstore.cli.following import follow
from trajstore.cli.page import SEGMENT_COLUMNS, Strip, header_fields, segment_row, strips, token_runs
from trajstore.cli.place import Place, open_reading, open_run, place_argument, store_argument
from trajstore.cli.seconds import SECONDS
from trajstore.cli.signals import graceful_stop
from trajstore.cli.terminal import (
    STATUS_STYLES,
    diagnostics,
    local_time,
    print_fields,
    print_json,
    print_table,
    print_text,
    results,
)
from trajstore.entries import Event
from trajstore.events import UnknownEvent
from trajstore.fold import POLICIES, Policy
from trajstore.reading import ALL_STATUSES
from trajstore.summary import Summary
from trajstore.trajectory import Trajectory

__all__ = ["events", "ls", "show", "tail"]

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")

_LS_COLUMNS = ("id", "status", "group", "segments", "tokens", "rows", "reward", "finish", "weights", "updated")
_SEGMENT_STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")


@click.command()
@store_argument
@click.option("--status", multiple=True, type=click.Choice(ALL_STATUSES), help="Only these; repeatable.")
@click.option("--group", help="Only members of this group.")
@click.option("--mixed", is_flag=True, help="Only those with a segment that more than one weight version sampled.")
@_as_json
def ls(store: str, status: tuple[str, ...], group: str | None, mixed: bool, as_json: bool) -> None:
    """List trajectories, oldest id first.

    `rows` counts the routing rows of all recordings together, `tokens` what is left after rewinds. With --json: an
    array of summaries. What is damaged is named on stderr, and what can be read is listed; the exit code is 1 then.

    \b
    Examples:
      trajstore ls runs/exp1 --status open --status aborted
      trajstore ls --group prompt-17 --json | jq '.[].reward'
    """
    damage = Damage()
    with open_reading(store) as archive:
        found = archive.list(status=status or None, group=group, mixed=mixed, on_corrupt=damage.hear)
    if as_json:
        print_json([summary_document(summary) for summary in found])
    elif found:
        print_table(
            _LS_COLUMNS,
            [_summary_row(summary) for summary in found],
            right=("segments", "tokens", "rows", "reward"),
            flexible=("group", "weights"),
            styles=STATUS_STYLES,
        )
    else:
        diagnostics().print("no trajectories" + (" like that" if status or mixed or group is not None else ""))
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


def _summary_row(summary: Summary) -> tuple[str, ...]:
    return (
        summary.id,
        summary.status,
        summary.group or "",
        str(summary.segments),
        str(summary.tokens),
        str(summary.rows),
        "" if summary.reward is None else f"{summary.reward:g}",
        summary.finish_reason,
        summary.weight_version,
        local_time(summary.updated, form="%Y-%m-%d %H:%M"),
    )


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
    width = max(10, min(100, results().width - 10) // 10 * 10)
    for strip in strips(trajectory, width):
        _print_strip(strip, ruled=strip.start == 0, routed=trajectory.routing is not None)
    for name, text in token_runs(trajectory):
        print_text(f"{name:<10}  {text}")


def _print_strip(strip: Strip, *, ruled: bool, routed: bool) -> None:
    """Two lines, or one without routing; above the first strip a legend."""
    if ruled:
        below = "; below it the segment whose recording gave its routing row, · for none" if routed else ""
        print_text(f"one letter per token: the segment that brought it{below}")
    for label, letters in ((str(strip.start), strip.brought), ("", strip.routed)):
        if label or routed:
            print_text(f"{label:>8}  ", *_coloured(letters))


def _coloured(letters: str) -> Sequence[tuple[str, str]]:
    return [
        (letter, _SEGMENT_STYLES[ord(letter) % len(_SEGMENT_STYLES)] if letter != "·" else "dim") for letter in letters
    ]
