"""The command `replay`: steps through what happened to a trajectory, showing it as it was."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt

from trajstore.cli.documents import event_document
from trajstore.cli.page import SEGMENT_COLUMNS, Strip, letter_strips, positions, runs, segment_row, segment_runs
from trajstore.cli.place import Place, open_reading, place_argument
from trajstore.cli.strips import print_strips, strip_width
from trajstore.cli.terminal import local_time, print_json, print_table, print_text, results, say
from trajstore.entries import Event
from trajstore.errors import NotFound, SchemaError
from trajstore.events import (
    LateRouting,
    Rewarded,
    Routing,
    RoutingAbsent,
    RoutingObserved,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
    TrajectoryOpened,
)
from trajstore.fold import POLICIES, Plan, Policy
from trajstore.history import Recording
from trajstore_replay.steps import Replay, RowChange, Step, row_segments, token_segments

__all__ = ["replay"]

_KEYS = "n next, b back, g EVENT go to it, s segments, q quit"
_PROMPT = "n b g s q"
_SHOWN = 6


class _Drawing(NamedTuple):
    """Who brought each token and who gives its row: letter by letter, or of a long trajectory in runs."""

    strips: list[Strip]
    lines: list[str]


_BLANK = _Drawing([], [])


@click.command()
@place_argument
@click.option(
    "--policy", type=click.Choice(POLICIES), default="last_segment_wins", show_default=True, help="Of the folds."
)
@click.option("--until", metavar="E", help="The last event to show, e.g. 3-7; in a terminal, where to begin.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def replay(place: Place, policy: Policy, until: str | None, as_json: bool) -> None:
    """Step through what happened to a trajectory.

    Each event, what it changed, and the trajectory as it was then. In a terminal one step at a time: n (or Enter) goes
    on, b back, g 3-7 to an event, s shows the segments, q ends. Elsewhere every step is printed once, and of the tokens
    the lines that changed. Notes (late routing, observations) stand where they arrived by the clocks of those who wrote
    them. With --json: an array of steps.

    \b
    Examples:
      trajstore replay runs/exp1 01JD3Z...
      trajstore replay runs/exp1 01JD3Z... --until 3-7 | tail -20
      trajstore replay 01JD3Z... --json | jq '.[] | select(.changes.rewound)'
    """
    by_hand = not as_json and results().is_terminal and sys.stdin.isatty()
    with open_reading(place.store) as archive:
        steps = Replay(archive, place.id, policy=policy, until=None if by_hand else until)
        if by_hand and until is not None:
            steps.goto(until)
    if as_json:
        print_json([_document(step) for step in steps])
    elif by_hand:
        _by_hand(steps)
    else:
        shown = _BLANK
        for step in steps:
            shown = _print(step, place.id, shown)


def _by_hand(steps: Replay) -> None:
    """One step at a time, as asked for on stdin."""
    moved = True
    while True:
        if moved:
            _print(steps.step, steps.id)
        try:
            asked = input(f"{steps.step.event.id} ({_PROMPT}) > ").split()
        except EOFError:
            click.echo()
            return
        moved = _obey(steps, asked)
        if asked[:1] in (["q"], ["quit"]):
            return


def _obey(steps: Replay, asked: list[str]) -> bool:
    """Do what was typed; True if another step is to be shown."""
    match asked:
        case [] | ["n" | "next" | "\x1b[C"]:  # the arrow, as a terminal without line editing sends it
            if steps.next() is None:
                return _refuse("that was the last event; q ends")
        case ["b" | "back" | "\x1b[D"]:
            if steps.back() is None:
                return _refuse("that was the first event")
        case ["g" | "go", *event] if event:
            try:
                steps.goto(" ".join(event))
            except (NotFound, SchemaError) as error:
                return _refuse(str(error))
        case ["s" | "segments"]:
            _print_segments(steps.step.plan)
            return False
        case ["q" | "quit"]:
            return False
        case _:
            return _refuse(_KEYS)
    return True


def _refuse(text: str) -> bool:
    """Say why no other step is shown."""
    say(text)
    return False


def _print(step: Step, id: str, shown: _Drawing = _BLANK) -> _Drawing:
    """Print a step.

    Args:
        shown: what stands above it already of the drawing, and is not printed again.

    Returns:
        Its own, or, without a state, what stands above it.
    """
    event = step.event
    width = len(str(step.total))
    head = f"{step.index + 1:>{width}}/{step.total}  {event.id}  {event.type}"
    print_text((head, "bold"), f"  {local_time(event.time)}  {id}")
    print_text(f"  {_happened(event)}")
    for line in _changes(step):
        print_text(f"  {line}")
    if step.plan is None:
        print_text((f"  no state: {step.problem}", "red"))
        drawing = shown
    else:
        print_text(f"  {_state(step.plan)}")
        drawing = _draw(step.plan)
        new = [one for one in drawing.strips if one not in shown.strips]
        print_strips(new, routed=_routed(step.plan), legend=not shown.strips)
        for line in drawing.lines:
            if line not in shown.lines:
                print_text(f"  {line}")
    click.echo()
    return drawing


def _draw(plan: Plan) -> _Drawing:
    brought, rows_of = token_segments(plan), row_segments(plan)
    strips = letter_strips(brought, rows_of, strip_width())
    if strips or not len(brought):
        return _Drawing(strips, [])
    told = segment_runs(brought, rows_of)[: 2 if _routed(plan) else 1]
    return _Drawing([], [f"{name:<9}  {text}" for name, text in told])


def _routed(plan: Plan) -> bool:
    return plan.history.opened.routing is not None


def _print_segments(plan: Plan | None) -> None:
    if plan is None or not plan.history.segments:
        say("there is no segment yet")
        return
    print_table(
        SEGMENT_COLUMNS,
        [segment_row(segment) for segment in plan.history.segments],
        right=("segment", "epoch", "base", "context", "output"),
        flexible=("engine", "weights", "finish", "recordings", "absent"),
    )


def _happened(event: Event) -> str:
    """What an event says, in words."""
    match event.header:
        case TrajectoryOpened() as opened:
            spec = opened.routing
            routing = (
                f"routing of {spec.num_layers} layers, top {spec.top_k} of {spec.num_experts} experts"
                if spec
                else "no routing"
            )
            return f"created{f' in group {opened.group}' if opened.group else ''}; {routing}"
        case SegmentOpened() as one:
            who = f"{one.engine or 'an unnamed engine'} under {one.weight_version or 'unnamed weights'}"
            return f"{who} begins with {one.base} tokens and {one.context} new ones of context"
        case Tokens() as tokens:
            bad = f", {tokens.nonfinite} logprobs not finite" if tokens.nonfinite else ""
            return f"{tokens.count} tokens sampled at {positions(tokens.start, tokens.start + tokens.count)}{bad}"
        case Routing() as rows:
            return f"rows {positions(rows.start, rows.start + rows.rows)} recorded, {rows.origin}"
        case LateRouting() as rows:
            span = positions(rows.start, rows.start + rows.rows)
            return f"late: rows {span} of segment {rows.segment}, {rows.origin}"
        case RoutingObserved() as rows:
            span = positions(rows.start, rows.start + rows.rows)
            return f"{rows.source} observed rows {span} under {rows.weight_version or 'unnamed weights'}"
        case RoutingAbsent() as absent:
            return f"no routing: {absent.reason}"
        case SegmentClosed() as closed:
            spans = ", ".join(f"{positions(one.start, one.end)} {one.version}" for one in closed.weight_versions)
            more = f", output {spans}" if spans else ""
            again = f", {closed.retractions} retractions" if closed.retractions else ""
            return f"the segment ends: {closed.finish_reason}{again}{more}"
        case Rewarded() as scored:
            return f"reward {scored.reward:g}"
        case TrajectoryClosed() as end:
            return f"closed as {end.status}"
        case _:
            return f"an event that this trajstore does not know ({event.type})"


def _changes(step: Step) -> Iterator[str]:
    changes = step.changes
    if changes.lost is not None:
        yield f"segment {changes.lost} was lost: its writer had not closed it"
    if changes.rewound is not None:
        yield f"rewound: tokens {positions(*changes.rewound)} leave the trajectory"
    if changes.tokens is not None:
        yield f"new tokens: {positions(*changes.tokens)}"
    for change in changes.rows[:_SHOWN]:
        yield _row_change(change)
    if len(changes.rows) > _SHOWN:
        yield f"and rows of {len(changes.rows) - _SHOWN} more spans"


def _row_change(change: RowChange) -> str:
    rows = f"rows {positions(change.start, change.stop)}"
    if change.after is None:
        return f"{rows}: missing again, were of {_who(change.before)}"
    before = f", instead of {_who(change.before)}" if change.before is not None else ", which were missing"
    return f"{rows}: now of {_who(change.after)}{before}"


def _who(recording: Recording | None) -> str:
    return "nobody" if recording is None else f"segment {recording.segment} ({recording.event})"


def _state(plan: Plan) -> str:
    history = plan.history
    sampled = sum(span.stop - span.start for span in history.spans if span.sampled)
    told = [
        f"{history.status}, {history.length} tokens ({sampled} sampled)",
        f"{len(history.segments)} segments" + (" (one open)" if history.has_open_segment else ""),
    ]
    if _routed(plan):
        told.append(f"{sum(one.stop - one.start for one in plan.placements)} rows")
    if history.reward is not None:
        told.append(f"reward {history.reward:g}")
    return "then: " + ", ".join(told)


def _document(step: Step) -> dict[str, Any]:
    plan, changes = step.plan, step.changes
    history = plan.history if plan is not None else None
    return {
        "step": step.index,
        "event": event_document(step.event),
        "changes": {
            "tokens": changes.tokens,
            "rewound": changes.rewound,
            "lost": changes.lost,
            "rows": [
                {
                    "start": one.start,
                    "stop": one.stop,
                    "before": _source(one.before),
                    "after": _source(one.after),
                }
                for one in changes.rows
            ],
        },
        "problem": step.problem or None,
        "status": history.status if history else None,
        "finish_reason": history.segments[-1].finish_reason if history and history.segments else None,
        "reward": history.reward if history else None,
        "tokens": history.length if history else None,
        "segments": len(history.segments) if history else None,
        "tokens_of": _runs(token_segments(plan)) if plan else None,
        "rows_of": _runs(row_segments(plan)) if plan else None,
    }


def _source(recording: Recording | None) -> dict[str, Any] | None:
    return None if recording is None else {"segment": recording.segment, "event": recording.event}


def _runs(segments: npt.NDArray[np.int16]) -> list[dict[str, int]]:
    """Runs of positions by segment; -1 for none."""
    return [{"start": start, "stop": stop, "segment": value} for start, stop, value in runs(segments)]
