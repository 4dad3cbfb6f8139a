"""Compares what two segments, or two trajectories, say of the same positions: tokens, logprobs, routing.

A side is the sequence as it was when its segment was over (or a whole trajectory), with the rows that the segment
itself recorded (or those that won its fold). Rows are compared below the first token that differs: above it they belong
to other sequences.
"""

import builtins
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError
from trajstore.events import EventId
from trajstore.fold import Placement, Policy, decide, split_tokens
from trajstore.history import History, Recording, Segment, read_history
from trajstore.reading import Archive
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore_audit import differing_sets, order_changes
from trajstore_replay.differences import Difference, LogprobDifference, RoutingDifference, TokenDifference

__all__ = ["Side", "compare", "segment_side", "trajectory_side"]

_PAGE = 1 << 16
"""Rows that are compared at a time."""

ReadRows = Callable[[Recording, int, int], RoutingArray]


class Side(NamedTuple):
    """One of the two that are compared.

    Attributes:
        name: what it is, for people.
        token_ids: int32 `[T]`.
        logprobs: float32 `[T]`, NaN where not sampled or not recorded.
        sampled: bool `[T]`.
        events: per token the event that brought it, as an index into `event_ids`; int32 `[T]`.
        event_ids: of the log that `log` names.
        spec: None without routing.
        placements: which recording gives which rows.
        read: gives rows `[start, stop)`, as positions, of a recording.
        log: which store and trajectory it is of: events of the same log and id are the same.
    """

    name: str
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    sampled: npt.NDArray[np.bool_]
    events: npt.NDArray[np.int32]
    event_ids: tuple[str, ...]
    spec: RoutingSpec | None
    placements: tuple[Placement, ...]
    read: ReadRows
    log: tuple[int, str]


def trajectory_side(
    store: Archive, id: str, *, policy: Policy = "last_segment_wins", until: str | EventId | None = None, name: str = ""
) -> Side:
    """A whole trajectory, with the rows that win its fold.

    Args:
        policy, until: as `store.load`.
        name: default the id.

    Raises:
        NotFound, SequenceGap, Corrupt, SchemaError: as `store.load`.
    """
    plan = store.plan(id, policy=policy, until=until)
    return _side(store, id, plan.history, plan.placements, name or id)


def segment_side(store: Archive, id: str, segment: int, *, name: str = "") -> Side:
    """One segment: its whole input and output as they were, with the rows that it recorded itself.

    Args:
        segment: index, as in `t.segments`; from the end if negative.
        name: default the id and the index.

    Raises:
        SchemaError: there is no such segment.
        NotFound, SequenceGap, Corrupt: as `store.load`.
    """
    events, notes = store.events(id), store.notes(id)
    segments = read_history(events, notes=notes).segments
    index = segment + len(segments) if segment < 0 else segment
    if not 0 <= index < len(segments):
        raise SchemaError(f"{id} has {len(segments)} segments, counted from 0; there is no segment {segment}")
    last = max(event.at for event in events if event.at.epoch == segments[index].epoch)
    history = read_history(events, notes=notes, until=last)
    return _side(store, id, history, _own_rows(history, segments[index]), name or f"{id} segment {index}")


def compare(first: Side, second: Side, *, tolerance: float = 1e-3) -> Difference:
    """Compare two sides. Holds their tokens, and a page of rows.

    Args:
        tolerance: nats by which logprobs may differ.
    """
    tokens = _tokens(first, second)
    routing, note = _routing(first, second, tokens.equal)
    return Difference(
        first=first.name,
        second=second.name,
        tokens=tokens,
        logprobs=_logprobs(first, second, tokens, tolerance),
        routing=routing,
        routing_note=note,
    )


def _own_rows(history: History, segment: Segment) -> tuple[Placement, ...]:
    """What a segment recorded itself, its later recording first."""
    alone = msgspec.structs.replace(
        history,
        segments=tuple(
            msgspec.structs.replace(one, recordings=segment.recordings if one.index == segment.index else ())
            for one in history.segments
        ),
    )
    return decide(alone, "last_segment_wins").placements


def _side(store: Archive, id: str, history: History, placements: tuple[Placement, ...], name: str) -> Side:
    length, spans = history.length, history.spans
    token_ids, events = np.empty(length, np.int32), np.empty(length, np.int32)
    logprobs, sampled = np.full(length, np.nan, np.float32), np.zeros(length, np.bool_)
    payloads = store.payloads(id, [span.event.id for span in spans])
    for i, (span, payload) in enumerate(zip(spans, payloads, strict=True)):
        ids, probs = split_tokens(span.event, payload)
        at, n = slice(span.start, span.stop), span.stop - span.start
        token_ids[at], events[at], sampled[at] = ids[:n], i, span.sampled
        if probs is not None:
            logprobs[at] = probs[:n]
    return Side(
        name=name,
        token_ids=token_ids,
        logprobs=logprobs,
        sampled=sampled,
        events=events,
        event_ids=tuple(span.event.id for span in spans),
        spec=history.opened.routing,
        placements=placements,
        read=lambda recording, start, stop: store.recorded_rows(id, recording, rows=(start, stop)),
        log=(builtins.id(store), id),
    )


def _tokens(first: Side, second: Side) -> TokenDifference:
    both = min(len(first.token_ids), len(second.token_ids))
    equal = _leading(first.token_ids[:both] == second.token_ids[:both])
    diverges = equal < both
    return TokenDifference(
        first_length=len(first.token_ids),
        second_length=len(second.token_ids),
        shared=_leading(_same_events(first, second, both)),
        equal=equal,
        first_divergence=equal if diverges else None,
        first_token=int(first.token_ids[equal]) if diverges else None,
        second_token=int(second.token_ids[equal]) if diverges else None,
    )


def _same_events(first: Side, second: Side, count: int) -> npt.NDArray[np.bool_]:
    """bool `[count]`: both sides have the token from the same event."""
    if not count or first.log != second.log:
        return np.zeros(count, np.bool_)
    places = {event: i for i, event in enumerate(second.event_ids)}
    known = np.array([places.get(event, -1) for event in first.event_ids], np.int32)
    same: npt.NDArray[np.bool_] = known[first.events[:count]] == second.events[:count]
    return same


def _logprobs(first: Side, second: Side, tokens: TokenDifference, tolerance: float) -> LogprobDifference:
    n = tokens.equal
    apart = ~_same_events(first, second, n)
    one, other = first.logprobs[:n], second.logprobs[:n]
    wanted = first.sampled[:n] & second.sampled[:n] & apart
    finite = wanted & np.isfinite(one) & np.isfinite(other)
    left_out = wanted & ~finite
    found = LogprobDifference(
        compared=int(np.count_nonzero(finite)),
        tolerance=tolerance,
        nonfinite=int(np.count_nonzero(left_out)),
        nonfinite_differing=int(np.count_nonzero(left_out & (one != other) & ~(np.isnan(one) & np.isnan(other)))),
        sampled_once=int(np.count_nonzero((first.sampled[:n] ^ second.sampled[:n]) & apart)),
    )
    places = np.flatnonzero(finite)
    if not len(places):
        return found
    delta = np.abs(second.logprobs[places].astype(np.float64) - first.logprobs[places])
    above = np.flatnonzero(delta > tolerance)
    return msgspec.structs.replace(
        found,
        max_abs=float(delta.max()),
        mean_abs=float(delta.mean()),
        max_at=int(places[delta.argmax()]),
        above=len(above),
        first_above=int(places[above[0]]) if len(above) else None,
    )


def _routing(first: Side, second: Side, limit: int) -> tuple[RoutingDifference | None, str]:
    one, other = first.spec, second.spec
    if one is None and other is None:
        return None, ""
    if one is None or other is None:
        return None, "there is no routing to compare: a side was created without a routing spec"
    if (one.top_k, one.num_experts) != (other.top_k, other.num_experts):
        return None, (
            f"the routings are of different models: top {one.top_k} of {one.num_experts} experts, and top "
            f"{other.top_k} of {other.num_experts}"
        )
    layers = tuple(layer for layer in one.layer_ids if layer in other.layer_ids)
    columns = [[spec.layer_ids.index(layer) for layer in layers] for spec in (one, other)]
    by_layer = np.zeros(len(layers), np.int64)
    rows = shared = orders = rows_differing = 0
    where: tuple[int, int, tuple[int, ...], tuple[int, ...]] | None = None
    for start, stop, mine, theirs in _common(first.placements, second.placements, limit):
        rows += stop - start
        if first.log == second.log and mine.event == theirs.event:
            shared += stop - start
            continue
        given = first.read(mine, start, stop)[:, columns[0]]
        taken = second.read(theirs, start, stop)[:, columns[1]]
        sets = differing_sets(given, taken)
        by_layer += np.count_nonzero(sets, axis=0)
        orders += int(np.count_nonzero(order_changes(given, taken)))
        rows_differing += int(np.count_nonzero(sets.any(axis=1)))
        if where is None and sets.any():
            row, layer = divmod(int(sets.argmax()), len(layers))
            where = (start + row, layers[layer], _ids(given[row, layer]), _ids(taken[row, layer]))
    return RoutingDifference(
        layers=layers,
        layers_first=tuple(layer for layer in one.layer_ids if layer not in layers),
        layers_second=tuple(layer for layer in other.layer_ids if layer not in layers),
        rows=rows,
        shared=shared,
        only_first=_covered(first.placements, limit) - rows,
        only_second=_covered(second.placements, limit) - rows,
        cells=rows * len(layers),
        sets=int(by_layer.sum()),
        orders=orders if one.order == other.order == "engine" else None,
        rows_differing=rows_differing,
        sets_by_layer=tuple(by_layer.tolist()),
        first_row=where[0] if where else None,
        first_layer=where[1] if where else None,
        first_experts=where[2] if where else (),
        second_experts=where[3] if where else (),
    ), ""


def _common(
    first: tuple[Placement, ...], second: tuple[Placement, ...], limit: int
) -> Iterator[tuple[int, int, Recording, Recording]]:
    """Rows `[start, stop)` below `limit` that both have, a page at a time, ascending."""
    i = j = 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i].start, second[j].start), min(first[i].stop, second[j].stop, limit)
        for low in range(start, stop, _PAGE):
            yield low, min(low + _PAGE, stop), first[i].recording, second[j].recording
        if first[i].stop <= second[j].stop:
            i += 1
        else:
            j += 1


def _covered(placements: tuple[Placement, ...], limit: int) -> int:
    return sum(max(0, min(one.stop, limit) - one.start) for one in placements)


def _ids(experts: RoutingArray) -> tuple[int, ...]:
    return tuple(experts.tolist())


def _leading(flags: npt.NDArray[np.bool_]) -> int:
    """How many are True before the first that is not."""
    return int(flags.argmin()) if not flags.all() else len(flags)
