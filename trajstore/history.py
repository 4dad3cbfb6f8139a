"""Events in order → what happened: segments, surviving token spans, status. Pure; reads headers only.

The first half of the fold, shared with everything else that asks about a trajectory's state (`get`, summaries,
overlaps). Which recording wins a row is decided in `fold.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from trajstore.entries import Event
from trajstore.errors import NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import (
    EventId,
    Header,
    LateRouting,
    Rewarded,
    Routing,
    RoutingAbsent,
    RoutingObserved,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
    TrajectoryDeleted,
    TrajectoryOpened,
    UnknownEvent,
    WeightVersionSpan,
)
from trajstore.routing import Origin

__all__ = [
    "History",
    "Recording",
    "Segment",
    "TokenSpan",
    "Walk",
    "deleted_error",
    "find_tombstone",
    "leading_rows",
    "merge_spans",
    "read_history",
]


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A block of routed-expert rows `[start, stop)`, made by a segment or observed by another party.

    Attributes:
        segment: index of the segment that made it, -1 for an observation.
        event: id of the event that carries it, e.g. "3-2" or "note 1-0".
        start, stop: absolute token positions.
        origin: see `trajstore.routing.Origin`; "unknown" for observations.
        weight_version: of the segment, or of the observation.
        source: "" for a segment's own recording, "late" for one that came after its epoch, else who observed it.
        epoch: of the segment; of an observation the newest one that its writer knew, 0 where it did not say.
    """

    segment: int
    event: str
    start: int
    stop: int
    origin: Origin
    weight_version: str = ""
    source: str = ""
    epoch: int = 0


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One engine call. Spans `[base, end)`; positions from `kept` on were rewound by a later segment.

    Attributes:
        index: 0-based, as in `segment_ids` and `routing_source`.
        epoch: its epoch in the log.
        base: tokens of the trajectory that its input began with.
        context: tokens that its input added (prompt, tool or environment tokens).
        output: tokens that it sampled.
        kept: first position of it, if any, that no longer belongs to the trajectory; `end` if none.
        counts: its rows below this position count: no later segment began below them.
        engine, sampling, input_digest: as given when it opened.
        weight_version: as given when it opened; where nothing was, the one that its close gives to all of its output.
        weight_versions: spans over its output, where the engine told them.
        finish_reason: stop, length, abort or error; "lost" if a later epoch took over before it closed; "" while open.
        cached_tokens, retractions: as the engine told.
        absent: reasons for routing that is not there.
        recordings: its recordings, oldest first, late ones last.
    """

    index: int
    epoch: int
    base: int
    context: int
    output: int = 0
    kept: int = 0
    counts: int = 0
    engine: str = ""
    weight_version: str = ""
    weight_versions: tuple[WeightVersionSpan, ...] = ()
    sampling: dict[str, Any] = {}
    input_digest: str = ""
    finish_reason: str = ""
    cached_tokens: int | None = None
    retractions: int = 0
    absent: tuple[str, ...] = ()
    recordings: tuple[Recording, ...] = ()

    @property
    def end(self) -> int:
        """Position after its last token: base + context + output."""
        return self.base + self.context + self.output


class TokenSpan(NamedTuple):
    """Positions `[start, stop)` of the trajectory are the first `stop - start` tokens of an event's payload."""

    start: int
    stop: int
    segment: int
    sampled: bool
    event: Event


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What a trajectory's events say up to its last one.

    Attributes:
        opened: how it was created.
        segments: all of them, rewound ones too.
        spans: the surviving tokens, in order, without gap or overlap: `[0, length)`.
        length: T, tokens in the trajectory.
        status: open, or the status of the close that nothing followed.
        reward, components: the newest, None where there is none.
        observations: recordings of other parties.
        carriers: the event of each recording, by its id.
        last: id of the last event.
        closes: how often it was closed, the `version` of a publication.
    """

    opened: TrajectoryOpened
    segments: tuple[Segment, ...]
    spans: tuple[TokenSpan, ...]
    length: int
    status: str
    reward: float | None
    components: dict[str, float]
    observations: tuple[Recording, ...]
    carriers: dict[str, Event]
    last: EventId
    closes: int

    @property
    def has_open_segment(self) -> bool:
        """True while the newest epoch is a segment that has not closed."""
        return bool(self.segments) and not self.segments[-1].finish_reason

    @property
    def held(self) -> list[tuple[int, int]]:
        """Rows that some counting recording has, as `merge_spans` gives them."""
        return merge_spans(
            (recording.start, min(recording.stop, segment.counts))
            for segment in self.segments
            for recording in segment.recordings
        )

    @property
    def rows_held(self) -> int:
        """Leading rows that some counting recording has, without a hole."""
        return leading_rows(self.held)


def read_history(events: Sequence[Event], *, notes: Iterable[Event] = (), until: EventId | None = None) -> History:
    """Walk the events of one trajectory.

    Args:
        events: all of them, by id, without repeats.
        notes: observations and late recordings, by id. A late recording counts once its segment is over, and does not
            where a server has lost that segment or its end.
        until: stop after this event.

    Raises:
        SequenceGap: an id is missing and no later segment starts at or below what was known there.
        SchemaError: an event of unknown type or of a newer schema.
        RoutingError: a recording reaches past its segment's end.
        NotFound: there is no event `until`, or the trajectory was deleted.
    """
    tombstone = find_tombstone(events)
    if tombstone is not None:
        raise deleted_error("the trajectory", tombstone)
    if until is not None:
        cut = [event for event in events if event.at <= until]
        if not cut or cut[-1].at != until:
            last = f"; the last is {events[-1].at}" if events else ""
            raise NotFound(f"there is no event {until} in this trajectory{last}")
        events = cut
    walk = Walk()
    for event in events:
        walk.take(event)
    return walk.result(notes)


def merge_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans `[start, stop)` in order, those that meet or overlap as one; without empty ones."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def leading_rows(held: Sequence[tuple[int, int]]) -> int:
    """How many rows of merged spans there are before the first hole."""
    return held[0][1] if held and held[0][0] == 0 else 0


def find_tombstone(events: Sequence[Event]) -> Event | None:
    """The event that deleted a trajectory, None if there is none. It is the newest: no writer can go on above it."""
    return events[-1] if events and isinstance(events[-1].header, TrajectoryDeleted) else None


def deleted_error(what: str, tombstone: Event) -> NotFound:
    """The error of whoever reads a deleted trajectory."""
    when = datetime.fromtimestamp(tombstone.time, UTC).isoformat(" ", "seconds")
    reason = tombstone.header.reason if isinstance(tombstone.header, TrajectoryDeleted) else ""
    return NotFound(
        f"{what} was deleted at {when} (event {tombstone.id}{', ' if reason else ''}{reason}); what it held is not "
        "readable any more, and its id is not used again"
    )


class _OpenSegment:
    """A segment while it is being read."""

    def __init__(self, event: Event, opened: SegmentOpened, index: int) -> None:
        self.index = index
        self.epoch = event.at.epoch
        self.turn = f"{event.nonce:016x}"
        self.opened = opened
        self.output = 0
        self.closed: SegmentClosed | None = None
        self.superseded = False
        self.absent: list[str] = []
        self.recordings: list[Recording] = []

    @property
    def end(self) -> int:
        return self.opened.base + self.opened.context + self.output

    def recording(self, event: Event, start: int, rows: int, origin: Origin, source: str = "") -> Recording:
        """Rows that an event says are of this segment."""
        stop = start + rows
        if start < 0 or stop > self.end:
            raise RoutingError(
                f"{event.type} {event.id} has rows {start} to {stop - 1}, but segment {self.index} ends at {self.end}"
            )
        return Recording(
            segment=self.index,
            event=event.id,
            start=start,
            stop=stop,
            origin=origin,
            weight_version=self.weight_version,
            source=source,
            epoch=self.epoch,
        )

    def is_of(self, note: LateRouting) -> bool:
        """True unless a server has lost what the note is about: then another's segment stands here, or less of it."""
        return not note.turn or (note.turn == self.turn and note.start + note.rows <= self.end)

    @property
    def weight_version(self) -> str:
        """Some engines name their weights only with the output: one span over all of it is as good as a label."""
        spans = self.closed.weight_versions if self.closed else ()
        if not self.opened.weight_version and len(spans) == 1 and (spans[0].start, spans[0].end) == (0, self.output):
            return spans[0].version
        return self.opened.weight_version

    def close(self, closed: SegmentClosed) -> None:
        """Its end, which may name the weights of what was recorded before."""
        self.closed = closed
        version = self.weight_version
        if version != self.opened.weight_version:
            self.recordings = [msgspec.structs.replace(one, weight_version=version) for one in self.recordings]

    def freeze(self, counts: int, late: Sequence[Recording]) -> Segment:
        closed = self.closed
        return Segment(
            index=self.index,
            epoch=self.epoch,
            base=self.opened.base,
            context=self.opened.context,
            output=self.output,
            kept=max(counts, self.opened.base),
            counts=counts,
            engine=self.opened.engine,
            weight_version=self.weight_version,
            weight_versions=closed.weight_versions if closed else (),
            sampling=self.opened.sampling,
            input_digest=self.opened.input_digest,
            finish_reason=closed.finish_reason if closed else ("lost" if self.superseded else ""),
            cached_tokens=closed.cached_tokens if closed else None,
            retractions=closed.retractions if closed else 0,
            absent=tuple(self.absent),
            recordings=(*self.recordings, *late),
        )


class Walk:
    """The state between two events: `take` the next one, ask for the `result` after any. Errors as `read_history`."""

    def __init__(self) -> None:
        self.opened: TrajectoryOpened | None = None
        self.segments: list[_OpenSegment] = []
        self.spans: list[TokenSpan] = []
        self.length = 0
        self.status = "open"
        self.reward: float | None = None
        self.components: dict[str, float] = {}
        self.last: EventId | None = None
        self.closes = 0
        self.gap: SequenceGap | None = None
        self.carriers: dict[str, Event] = {}

    def take(self, event: Event) -> None:
        """Go on by one event."""
        before = self.last
        self._follow(event)
        header = event.header
        if isinstance(header, UnknownEvent):
            raise SchemaError(
                f"event {event.id} is a {header.type} of schema version {header.version}, which this trajstore does "
                "not know; upgrade trajstore, or load an earlier state with until="
            )
        if self.gap is not None and not self._goes_on_below(header):
            return  # nothing above a hole can be placed
        match header:
            case TrajectoryOpened():
                self.opened = header
            case SegmentOpened():
                if header.base <= self.length:
                    self._open_segment(event, header)
                else:
                    self._miss(before, f"event {event.id} resumes from {header.base} tokens of {self.length}")
            case Tokens():
                segment = self._current(event)
                if header.start == self.length:
                    self._extend(event, header.count, segment.index, sampled=True)
                    segment.output += header.count
                else:
                    self._miss(
                        before, f"tokens of event {event.id} start at {header.start}, after {self.length} tokens"
                    )
            case Routing():
                self.carriers[event.id] = event
                segment = self._current(event)
                segment.recordings.append(segment.recording(event, header.start, header.rows, header.origin))
            case RoutingAbsent():
                self._current(event).absent.append(header.reason)
            case SegmentClosed():
                self._current(event).close(header)
            case Rewarded():
                self.reward, self.components = header.reward, header.components
            case TrajectoryClosed():
                self.status = header.status
                self.closes += 1
            case LateRouting() | RoutingObserved():
                raise SchemaError(f"event {event.id} is a note ({event.type}) among the trajectory's events")

    def _goes_on_below(self, header: Header) -> bool:
        """True for a segment that needs nothing from above a hole."""
        return self.opened is not None and isinstance(header, SegmentOpened) and header.base <= self.length

    def _follow(self, event: Event) -> None:
        """Check the id against the one before it."""
        at, last = event.at, self.last
        if last is None:
            fits = at == (1, 0) and isinstance(event.header, TrajectoryOpened | UnknownEvent)
        else:
            fits = at == (last.epoch, last.seq + 1) or at == (last.epoch + 1, 0)
        if not fits and self.gap is None:
            after = f"events are missing after {last}" if last else "the first events are missing"
            self._miss(last, f"{after}: the next one is {at}")
        if last is not None and at.epoch != last.epoch and self.segments:
            self.segments[-1].superseded = True
        self.last = at

    def _miss(self, good: EventId | None, what: str) -> None:
        """Events or tokens are missing: only a later segment whose base lies below the hole can go on."""
        how = f"; until='{good}' loads the state before the gap" if good else ""
        self.gap = SequenceGap(what + how, last_good=str(good) if good else "")

    def _open_segment(self, event: Event, header: SegmentOpened) -> None:
        self.gap = None
        self.status = "open"
        self._rewind(header.base)
        segment = _OpenSegment(event, header, len(self.segments))
        self.segments.append(segment)
        if header.context:
            self._extend(event, header.context, segment.index, sampled=False)

    def _rewind(self, base: int) -> None:
        while self.spans and self.spans[-1].start >= base:
            self.spans.pop()
        if self.spans and self.spans[-1].stop > base:
            self.spans[-1] = self.spans[-1]._replace(stop=base)
        self.length = base

    def _extend(self, event: Event, count: int, segment: int, *, sampled: bool) -> None:
        self.spans.append(TokenSpan(self.length, self.length + count, segment, sampled, event))
        self.length += count

    def _current(self, event: Event) -> _OpenSegment:
        segment = self.segments[-1] if self.segments else None
        if segment is None or segment.epoch != event.at.epoch or segment.closed is not None:
            raise SchemaError(f"event {event.id} ({event.type}) stands outside of any open segment")
        return segment

    def result(self, notes: Iterable[Event]) -> History:
        """What the events so far say, and these notes."""
        if self.gap is not None:
            raise self.gap.with_traceback(None)  # it may be raised again and again
        if self.opened is None or self.last is None:
            raise NotFound("the trajectory has no events")
        observations = []
        late: dict[int, list[Recording]] = {}
        carriers = self.carriers.copy()
        for note in notes:
            header = note.header
            if isinstance(header, LateRouting):
                if header.segment >= len(self.segments):
                    continue  # of a segment after `until`
                segment = self.segments[header.segment]
                if (segment.closed is not None or segment.superseded) and segment.is_of(header):
                    carriers[note.id] = note
                    found = segment.recording(note, header.start, header.rows, header.origin, "late")
                    late.setdefault(segment.index, []).append(found)
            elif isinstance(header, RoutingObserved):
                carriers[note.id] = note
                observations.append(
                    Recording(
                        segment=-1,
                        event=note.id,
                        start=header.start,
                        stop=header.start + header.rows,
                        origin="unknown",
                        weight_version=header.weight_version,
                        source=header.source,
                        epoch=header.epoch,
                    )
                )
            else:
                raise SchemaError(f"note {note.at} is a {note.type}, which this trajstore does not know; upgrade it")
        return History(
            opened=self.opened,
            segments=self._segments(late),
            spans=tuple(self.spans),
            length=self.length,
            status=self.status,
            reward=self.reward,
            components=self.components,
            observations=tuple(observations),
            carriers=carriers,
            last=self.last,
            closes=self.closes,
        )

    def _segments(self, late: Mapping[int, Sequence[Recording]]) -> tuple[Segment, ...]:
        """Each with the rows of it that count: those below the base of every later segment."""
        frozen: list[Segment] = []
        limit = self.segments[-1].end if self.segments else 0
        for segment in reversed(self.segments):
            frozen.append(segment.freeze(min(limit, segment.end), late.get(segment.index, ())))
            limit = min(limit, segment.opened.base)
        return tuple(reversed(frozen))
