"""Events → trajectory: which rows of which recording go where, under a named policy.

`plan` reads headers and decides; `Plan.apply` fetches the payloads that won, and no others, and copies each once. Both
are pure, and the only fold there is: `load`, the materializer, provenance and audits cannot disagree.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.entries import Buffer, Event
from trajstore.errors import Corrupt, SchemaError
from trajstore.events import EventId, SegmentOpened, Tokens
from trajstore.history import History, Recording, Segment, read_history
from trajstore.routing import RoutingArray
from trajstore.trajectory import RoutedRows, Trajectory

__all__ = [
    "POLICIES",
    "Candidate",
    "Fetch",
    "Placement",
    "Plan",
    "Policy",
    "ReadRows",
    "WantedRows",
    "decide",
    "input_digest",
    "plan",
    "row_version_pieces",
    "split_tokens",
    "version_pieces",
]

Policy = Literal["last_segment_wins", "as_sampled"]
POLICIES: tuple[str, ...] = get_args(Policy)

Fetch: TypeAlias = Callable[[Sequence[Event]], Iterable[Buffer]]
"""Payload bytes of events, in the order asked for; a generator keeps one at a time in memory. Who gives a view of an
array that is all there is of it gives the array away."""


Room: TypeAlias = Callable[[int], RoutingArray]
"""Where rows go, by their number of layers: `[rows, layers, K]`, uninitialized."""


class WantedRows(NamedTuple):
    """Rows `[first, stop)` of an event's payload, and room for them."""

    event: Event
    first: int
    stop: int
    room: Room


ReadRows: TypeAlias = Callable[[Sequence[WantedRows]], Iterable[RoutingArray | None]]
"""Rows for each, in order; None if they are in the room. What owns its memory is given away."""


class Placement(NamedTuple):
    """Rows `[start, stop)` of the trajectory come from `recording`."""

    start: int
    stop: int
    recording: Recording


class Candidate(NamedTuple):
    """A recording that has a certain row, and what became of it.

    `outcome`: "wins", or why not: "overridden", "rewound", "recomputed", "did not sample the next token".
    """

    recording: Recording
    outcome: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A fold, decided but not yet carried out.

    Attributes:
        history: the events, read.
        policy: see `POLICIES`.
        placements: where each known row comes from; ascending, without overlap.
    """

    history: History
    policy: Policy
    placements: tuple[Placement, ...]

    def needed(self) -> list[Event]:
        """Events whose payloads `apply` will fetch, each once, in the order in which it asks for them."""
        return [*self._token_events(), *self._routing_events()]

    def apply(self, fetch: Fetch, *, id: str = "") -> Trajectory:
        """Fetch the winning payloads and fill the arrays.

        Args:
            fetch: gives payload bytes, already checked against their CRC.
            id: of the trajectory, for the result and the errors.

        Raises:
            Corrupt: a payload has the wrong length, or a segment's input is not what the log holds before it.
        """
        history = self.history
        length, spec = history.length, history.opened.routing
        token_ids = np.empty(length, np.int32)
        logprobs = np.full(length, np.nan, np.float32)
        loss_mask = np.zeros(length, np.bool_)
        segment_ids = np.full(length, -1, np.int16)
        nonfinite = 0
        payloads = iter(fetch(self.needed()))
        for span, buffer in zip(history.spans, islice(payloads, len(history.spans)), strict=True):
            at, n = slice(span.start, span.stop), span.stop - span.start
            ids, probs = split_tokens(span.event, buffer)
            token_ids[at] = ids[:n]
            segment_ids[at] = span.segment
            loss_mask[at] = span.sampled
            if probs is not None:
                logprobs[at] = probs[:n]
                nonfinite += n - int(np.count_nonzero(np.isfinite(probs[:n])))
        _check_inputs(history.segments, token_ids, id)
        version_ids, versions = _weight_versions(history.segments, length)

        routing_mask = np.zeros(length, np.bool_)
        routing_source = np.full(length, -1, np.int16)
        routed = None if spec is None else np.empty((length, spec.num_layers, spec.top_k), spec.dtype)
        if routed is not None and spec is not None:
            by_event: dict[str, list[Placement]] = {}
            for placement in self.placements:
                by_event.setdefault(placement.recording.event, []).append(placement)
            for event, buffer in zip(self._routing_events(), payloads, strict=True):
                for start, stop, recording in by_event[event.id]:
                    if len(buffer) != (recording.stop - recording.start) * spec.row_bytes:
                        raise Corrupt(f"{id}: the payload of event {event.id} has {len(buffer)} bytes")
                    first, last = start - recording.start, stop - recording.start
                    given = _given_array(buffer) if last - first == length else None
                    if given is not None and (given.shape, given.dtype) == (routed.shape, routed.dtype):
                        routed = given
                    else:
                        routed[start:stop] = spec.from_bytes(buffer)[first:last]
                    routing_mask[start:stop] = True
                    routing_source[start:stop] = recording.segment
            for start, stop in self._holes():
                routed[start:stop] = 0
        return Trajectory(
            id=id,
            token_ids=token_ids,
            logprobs=logprobs,
            loss_mask=loss_mask,
            segment_ids=segment_ids,
            weight_version_ids=version_ids,
            weight_versions=versions,
            routed_experts=routed,
            routing_mask=routing_mask,
            routing_source=routing_source,
            policy=self.policy,
            at=str(history.last),
            status=history.status,
            finish_reason=history.segments[-1].finish_reason if history.segments else "",
            reward=history.reward,
            reward_components=history.components,
            group=history.opened.group,
            group_size=history.opened.group_size,
            metadata=history.opened.metadata,
            routing=spec,
            segments=history.segments,
            nonfinite_logprobs=nonfinite,
            version=history.closes,
        )

    def token_ids(self, fetch: Fetch, *, id: str = "") -> npt.NDArray[np.int32]:
        """The token ids alone, int32 `[T]`; no routing is fetched. Otherwise as `apply`."""
        token_ids = np.empty(self.history.length, np.int32)
        for span, buffer in zip(self.history.spans, fetch(self._token_events()), strict=True):
            ids, _ = split_tokens(span.event, buffer)
            token_ids[span.start : span.stop] = ids[: span.stop - span.start]
        _check_inputs(self.history.segments, token_ids, id)
        return token_ids

    def routed(self, start: int, stop: int, read: ReadRows) -> RoutedRows:
        """The routing of rows `[start, stop)` alone; nothing else is fetched.

        Args:
            read: gives wanted rows, `[stop - first, layers, K]`, all with the same layers; or puts them where there is
                room for them. Called once.

        Raises:
            SchemaError: the trajectory has no routing, or no such rows.
        """
        spec, length = self.history.opened.routing, self.history.length
        if spec is None:
            raise SchemaError("the trajectory was created without a routing spec and has no routing")
        if not 0 <= start <= stop <= length:
            raise SchemaError(f"rows [{start}, {stop}) do not lie in the trajectory's [0, {length})")
        shape, dtype = (stop - start, spec.top_k), spec.dtype
        mask = np.zeros(stop - start, np.bool_)
        source = np.full(stop - start, -1, np.int16)
        routed: RoutingArray | None = None

        def room(at: slice, layers: int) -> RoutingArray:
            nonlocal routed
            if routed is None:
                routed = np.empty((shape[0], layers, shape[1]), dtype)
            return routed[at]

        places, wanted = [], []
        for placement in self.placements:
            low, high = max(placement.start, start), min(placement.stop, stop)
            if low >= high:
                continue
            recording, at = placement.recording, slice(low - start, high - start)
            event = self.history.carriers[recording.event]
            places.append(at)
            wanted.append(WantedRows(event, low - recording.start, high - recording.start, partial(room, at)))
            mask[at] = True
            source[at] = recording.segment
        for at, rows in zip(places, read(wanted), strict=True):
            if rows is not None and len(rows) == stop - start and rows.flags.owndata:
                routed = rows
            elif rows is not None:
                room(at, rows.shape[1])[:] = rows
        if routed is None:
            routed = spec.empty(stop - start)
        routed[~mask] = 0
        return RoutedRows(start=start, routed_experts=routed, routing_mask=mask, routing_source=source)

    def why(self, row: int) -> list[Candidate]:
        """Every recording of row `row` (a token position), newest segment first, and what became of it.

        Observations are left out: they never enter a fold.
        """
        winner = next((p.recording for p in self.placements if p.start <= row < p.stop), None)
        found = []
        for segment in reversed(self.history.segments):
            for recording in reversed(segment.recordings):
                if recording.start <= row < recording.stop:
                    found.append(Candidate(recording, self._outcome(row, segment, recording, winner)))
        return found

    def _outcome(self, row: int, segment: Segment, recording: Recording, winner: Recording | None) -> str:
        if recording is winner:
            return "wins"
        if row >= segment.counts:
            return "rewound"
        if self.policy == "as_sampled":
            owner = next((s.segment for s in self.history.spans if s.start <= row + 1 < s.stop), None)
            if owner != segment.index:
                return "did not sample the next token"
            if recording.origin == "recomputed":
                return "recomputed"
        return "overridden"

    def _holes(self) -> Iterator[tuple[int, int]]:
        """Rows that no placement fills, as `[start, stop)`."""
        filled = 0
        for placement in self.placements:
            if filled < placement.start:
                yield filled, placement.start
            filled = placement.stop
        if filled < self.history.length:
            yield filled, self.history.length

    def _token_events(self) -> list[Event]:
        return [span.event for span in self.history.spans]

    def _routing_events(self) -> list[Event]:
        return [self.history.carriers[event] for event in dict.fromkeys(p.recording.event for p in self.placements)]


def plan(
    events: Sequence[Event],
    policy: Policy = "last_segment_wins",
    *,
    notes: Iterable[Event] = (),
    until: EventId | None = None,
) -> Plan:
    """Decide a fold from headers alone.

    `last_segment_wins`: row *p* comes from the newest segment that has a counting row for it, within a segment from its
    later recording. `as_sampled`: row *p* comes from the segment that brought token *p + 1*; if that segment did not
    record it, or says it was `recomputed`, the row is missing. A row counts if no later segment began at or below it.

    Args:
        events: of one trajectory, by id.
        policy: see above.
        notes: late recordings and observations, by id.
        until: fold the state at this event.

    Raises:
        SequenceGap, SchemaError, RoutingError, NotFound: see `trajstore.history.read_history`.
    """
    return decide(read_history(events, notes=notes, until=until), policy)


def decide(history: History, policy: Policy = "last_segment_wins") -> Plan:
    """Decide a fold from a history. As `plan`, which reads it first."""
    if policy not in POLICIES:
        raise SchemaError(f"there is no fold policy {policy!r}; policies are {' and '.join(POLICIES)}")
    if len(history.segments) > np.iinfo(np.int16).max:
        raise SchemaError(f"{len(history.segments)} segments in one trajectory; segment_ids holds 32767")
    place = _last_segment_wins if policy == "last_segment_wins" else _as_sampled
    return Plan(history=history, policy=policy, placements=tuple(sorted(place(history), key=lambda p: p.start)))


def _last_segment_wins(history: History) -> list[Placement]:
    placements: list[Placement] = []
    holes = [(0, history.length)]
    for segment in reversed(history.segments):
        for recording in reversed(segment.recordings):
            holes = _fill(holes, recording, segment.counts, placements)
    return placements


def _as_sampled(history: History) -> list[Placement]:
    placements: list[Placement] = []
    owned: dict[int, list[tuple[int, int]]] = {}
    for span in history.spans:  # row p decides token p + 1; position 0 has no row before it
        if span.stop - 1 > max(span.start - 1, 0):
            owned.setdefault(span.segment, []).append((max(span.start - 1, 0), span.stop - 1))
    for index, holes in owned.items():
        segment = history.segments[index]
        for recording in reversed(segment.recordings):
            holes = _fill(holes, recording, segment.counts, placements)
    return [placement for placement in placements if placement.recording.origin != "recomputed"]


def _fill(
    holes: list[tuple[int, int]], recording: Recording, limit: int, placements: list[Placement]
) -> list[tuple[int, int]]:
    """Give a recording the holes that it covers below `limit`; return what stays open."""
    left = []
    for start, stop in holes:
        low, high = max(start, recording.start), min(stop, recording.stop, limit)
        if low >= high:
            left.append((start, stop))
            continue
        placements.append(Placement(low, high, recording))
        if start < low:
            left.append((start, low))
        if high < stop:
            left.append((high, stop))
    return left


def input_digest(token_ids: npt.NDArray[np.int32]) -> str:
    """BLAKE2b-128 (hex) over token ids as little-endian int32: `SegmentOpened.input_digest`."""
    return hashlib.blake2b(token_ids.astype("<i4", copy=False).data, digest_size=16).hexdigest()


def split_tokens(event: Event, buffer: Buffer) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
    """Token ids and logprobs of a `SegmentOpened` or `Tokens` payload."""
    header = event.header
    if isinstance(header, Tokens):
        count, has_logprobs = header.count, header.logprobs
    elif isinstance(header, SegmentOpened):
        count, has_logprobs = header.context, False
    else:
        raise Corrupt(f"event {event.id} ({event.type}) brings no tokens")
    if len(buffer) != count * (8 if has_logprobs else 4):
        raise Corrupt(f"the payload of event {event.id} has {len(buffer)} bytes for {count} tokens")
    ids = np.frombuffer(buffer, "<i4", count)
    return ids, np.frombuffer(buffer, "<f4", count, offset=count * 4) if has_logprobs else None


def _given_array(buffer: Buffer) -> npt.NDArray[Any] | None:
    """The array behind a payload, if it is given away with it: to be kept instead of copied."""
    array = buffer.obj if isinstance(buffer, memoryview) else None
    return array if isinstance(array, np.ndarray) and array.flags.owndata and array.flags.writeable else None


def _check_inputs(segments: Sequence[Segment], token_ids: npt.NDArray[np.int32], id: str) -> None:
    """Each surviving input must hash to what its writer said. One pass over the tokens, however many segments."""
    running, done = hashlib.blake2b(digest_size=16), 0
    inputs = sorted(
        (s.base + s.context, s.index, s.input_digest)
        for s in segments
        if s.input_digest and s.base + s.context <= s.counts
    )
    for stop, index, digest in inputs:
        running.update(token_ids[done:stop].astype("<i4", copy=False).data)
        done = stop
        if running.copy().hexdigest() != digest:
            raise Corrupt(
                f"{id}: the input of segment {index} is not tokens[:{stop}] of the log; the engine was given "
                "something else, or another writer's tokens lie below it"
            )


def _weight_versions(segments: Sequence[Segment], length: int) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Per token the index of its weight version, -1 where not sampled, and the versions in order of appearance."""
    names: dict[str, int] = {}
    result = np.full(length, -1, np.int32)
    for segment in segments:
        for start, stop, version in version_pieces(segment):
            if start < min(stop, segment.kept):
                result[start : min(stop, segment.kept)] = names.setdefault(version, len(names))
    return result, tuple(names)


def version_pieces(segment: Segment) -> Iterator[tuple[int, int, str]]:
    """Positions `[start, stop)` of a segment's output by the version that sampled them; spans override the label."""
    first = at = segment.base + segment.context
    for span in segment.weight_versions:
        yield at, first + span.start, segment.weight_version
        yield first + span.start, first + span.end, span.version
        at = first + span.end
    yield at, segment.end, segment.weight_version


def row_version_pieces(segment: Segment) -> Iterator[tuple[int, int, str]]:
    """Rows `[start, stop)` of a segment, `[0, end)`, by the version of the weights that computed them.

    That is the version of the output token that the row decided: with k tokens sampled when the weights changed in
    mid-request, the rows below base + context + k - 1 are the old weights'. Rows of the input were computed before the
    first output token; the row of the last token, which has decided none, goes with the last.
    """
    pieces = [piece for piece in version_pieces(segment) if piece[0] < piece[1]]
    if not pieces:
        yield 0, segment.end, segment.weight_version
    for i, (start, stop, version) in enumerate(pieces):
        yield start - 1 if i else 0, stop - 1 if i < len(pieces) - 1 else segment.end, version
