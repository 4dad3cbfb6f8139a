"""A trajectory event by event: how it stood after each, and what the event changed. Reads headers only."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.entries import Event
from trajstore.errors import NotFound, RoutingError, SchemaError, SequenceGap, TrajstoreError
from trajstore.events import (
    EventId,
    LateRouting,
    Rewarded,
    RoutingAbsent,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
)
from trajstore.fold import Placement, Plan, Policy, decide
from trajstore.history import Recording, Walk
from trajstore.reading import Archive

__all__ = [
    "Changes",
    "Replay",
    "RowChange",
    "Step",
    "is_note",
    "plan_at",
    "row_segments",
    "timeline",
    "token_segments",
]

_NOTE = "note "


class RowChange(NamedTuple):
    """Rows `[start, stop)` come from `after` since the event, and came from `before`; None for missing."""

    start: int
    stop: int
    before: Recording | None
    after: Recording | None


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What one event changed.

    Attributes:
        tokens: positions `[start, stop)` of the tokens that it brought, None for none.
        rewound: positions `[start, stop)` that left the trajectory, None for none.
        lost: the segment that this event found unclosed and took over from, None for none.
        rows: rows whose recording is another than before; those of rewound positions are left out.
    """

    tokens: tuple[int, int] | None = None
    rewound: tuple[int, int] | None = None
    lost: int | None = None
    rows: tuple[RowChange, ...] = ()


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory when one event had just happened.

    Attributes:
        index, total: which step of how many, from 0.
        event: what happened.
        plan: the fold of everything until then; None where it has none.
        changes: against the step before (after a hole in the log: against the newest state before the hole).
        problem: why there is no fold, "" if there is one.
    """

    index: int
    total: int
    event: Event
    plan: Plan | None
    changes: Changes
    problem: str = ""


class Replay:
    """Steps through the events and notes of one trajectory, as they are now; begins at the first.

    To go forward costs one event and a fold of the headers so far, or, where the event changes no row, what it has of
    segments; to go back or to jump, a walk over the headers from the beginning. No payload is ever read.

    Args:
        store: a store or an archive.
        id: of the trajectory.
        policy: of the folds.
        until: the last event to step to, `"3-7"` or `"note 1-0"`; default the newest.

    Raises:
        NotFound: no such trajectory or event, or the trajectory was deleted.
        Corrupt: hot log and archive contradict each other.
    """

    def __init__(
        self, store: Archive, id: str, *, policy: Policy = "last_segment_wins", until: str | EventId | None = None
    ) -> None:
        self.id = id
        self.policy = policy
        self._timeline = timeline(store.events(id), store.notes(id))
        if until is not None:
            del self._timeline[self._index(until) + 1 :]
        self._state = _State(policy)
        self._step = self._go(0)

    @property
    def step(self) -> Step:
        """The step that it stands at."""
        return self._step

    def next(self) -> Step | None:
        """Go on to the next event; None, and no move, at the last one."""
        return self._move(self._step.index + 1)

    def back(self) -> Step | None:
        """Go back to the event before; None, and no move, at the first one."""
        return self._move(self._step.index - 1)

    def goto(self, event: str | EventId) -> Step:
        """Go to an event, `"3-7"`, or a note, `"note 1-0"`.

        Raises:
            NotFound: there is none among the steps.
            SchemaError: not an event's id.
        """
        self._step = self._go(self._index(event))
        return self._step

    def __len__(self) -> int:
        return len(self._timeline)

    def __iter__(self) -> Iterator[Step]:
        """Every step from the first; the replay moves along."""
        step: Step | None = self._move(0)
        while step is not None:
            yield step
            step = self.next()

    def _move(self, index: int) -> Step | None:
        if not 0 <= index < len(self._timeline):
            return None
        self._step = self._go(index)
        return self._step

    def _index(self, event: str | EventId) -> int:
        return _place(self._timeline, event, self.id)

    def _go(self, index: int) -> Step:
        if self._state.taken != index:
            self._state = self._walked(index)
        before = self._state.plan
        event = self._timeline[index]
        self._state.take(event)
        plan = self._state.decide()
        return Step(
            index=index,
            total=len(self._timeline),
            event=event,
            plan=plan,
            changes=Changes() if plan is None else _changes(before, plan, event),
            problem=str(self._state.problem or ""),
        )

    def _walked(self, count: int) -> "_State":
        """The state after some events, with the newest fold until then."""
        state = _State(self.policy)
        for event in self._timeline[:count]:
            state.take(event)
        if count and state.decide() is None and isinstance(state.problem, SequenceGap) and state.problem.last_good:
            state.plan = self._walked(self._index(state.problem.last_good) + 1).plan
        return state


class _State:
    """A walk over the timeline.

    Attributes:
        taken: how many of it.
        plan: the newest fold that there was; through a hole in the log it stays what it was before.
        problem: why there is none now.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._walk = Walk()
        self._notes: list[Event] = []
        self._broken: TrajstoreError | None = None
        self._is_settled = False
        self.taken = 0
        self.plan: Plan | None = None
        self.problem: TrajstoreError | None = None

    def take(self, event: Event) -> None:
        self.taken += 1
        self._is_settled = self._is_settled and self._moves_no_row(event)
        if event.note:
            self._notes.append(event)
        elif self._broken is None:
            try:
                self._walk.take(event)
            except (SchemaError, RoutingError) as error:
                self._broken = error

    def decide(self) -> Plan | None:
        """The fold of what was taken, None if there is none."""
        self.problem = self._broken
        if self.problem is None:
            try:
                history = self._walk.result(self._notes)
                if self._is_settled and self.plan is not None:
                    self.plan = msgspec.structs.replace(self.plan, history=history)
                else:
                    self.plan = decide(history, self._policy)
                self._is_settled = True
                return self.plan
            except (SequenceGap, SchemaError, RoutingError, NotFound) as error:
                self.problem = error
        self._is_settled = False
        return None

    def _moves_no_row(self, event: Event) -> bool:
        """True for an event after which every placement is what it was before.

        Under `as_sampled` a token decides who the row before it belongs to; a late recording counts once its segment is
        over; a close may name the weights of what was recorded.
        """
        if self._notes or event.note:
            return False
        if isinstance(event.header, Tokens):
            return self._policy == "last_segment_wins"
        return isinstance(event.header, RoutingAbsent | Rewarded | TrajectoryClosed)


def is_note(event: str | EventId) -> bool:
    """Whether `"note 1-0"` is meant, and not an event."""
    return isinstance(event, str) and event.startswith(_NOTE)


def plan_at(store: Archive, id: str, event: str | EventId, *, policy: Policy = "last_segment_wins") -> Plan:
    """The fold of what had happened when an event, or a note, had just come: that of `Replay` there, or its error.

    Raises:
        NotFound: no such trajectory, event or note; or the trajectory was deleted.
        SequenceGap, SchemaError, RoutingError: there is no fold.
    """
    events = timeline(store.events(id), store.notes(id))
    state = _State(policy)
    for one in events[: _place(events, event, id) + 1]:
        state.take(one)
    plan = state.decide()
    if plan is None:
        assert state.problem is not None
        raise state.problem
    return plan


def timeline(events: Sequence[Event], notes: Sequence[Event]) -> list[Event]:
    """Events in order, and each note where it arrived among them, by the clocks of those who wrote.

    Notes have an order of their own, and no place among the events: a note stands behind the last event that is not
    younger than it, a late recording at the earliest where its segment is over, and notes never change their order.
    """
    over = _ends(events)
    places: list[int] = []
    for note in notes:
        place = next((i for i in range(len(events), 0, -1) if events[i - 1].time <= note.time), 1)
        if isinstance(note.header, LateRouting):
            place = max(place, over.get(note.header.segment, len(events)))
        places.append(max([place, *places[-1:]]))
    merged: list[Event] = []
    waiting = list(zip(places, notes, strict=True))
    for i, event in enumerate(events, 1):
        merged.append(event)
        while waiting and waiting[0][0] == i:
            merged.append(waiting.pop(0)[1])
    return merged


def token_segments(plan: Plan) -> npt.NDArray[np.int16]:
    """int16 `[T]`: index of the segment that brought each token."""
    found = np.full(plan.history.length, -1, np.int16)
    for span in plan.history.spans:
        found[span.start : span.stop] = span.segment
    return found


def row_segments(plan: Plan) -> npt.NDArray[np.int16]:
    """int16 `[T]`: index of the segment whose recording gives each row, -1 for none."""
    found = np.full(plan.history.length, -1, np.int16)
    for placement in plan.placements:
        found[placement.start : placement.stop] = placement.recording.segment
    return found


def _place(events: Sequence[Event], event: str | EventId, id: str) -> int:
    """Where an event or a note, as people name it, stands among these of trajectory `id`."""
    at = EventId.parse(event.removeprefix(_NOTE) if isinstance(event, str) else event)
    for index, one in enumerate(events):
        if one.at == at and one.note == is_note(event):
            return index
    raise NotFound(f"there is no event {event} among those of {id}; the last of them is {events[-1].id}")


def _ends(events: Sequence[Event]) -> dict[int, int]:
    """For each segment how many events there are until it is over."""
    ends: dict[int, int] = {}
    opened = [(i, event.at.epoch) for i, event in enumerate(events) if isinstance(event.header, SegmentOpened)]
    for index, (first, epoch) in enumerate(opened):
        for i in range(first, len(events)):
            if events[i].at.epoch != epoch or isinstance(events[i].header, SegmentClosed):
                ends[index] = i + 1
                break
    return ends


def _changes(before: Plan | None, after: Plan, event: Event) -> Changes:
    header = event.header
    tokens: tuple[int, int] | None = None
    rewound: tuple[int, int] | None = None
    length = before.history.length if before is not None else 0
    if isinstance(header, Tokens) and header.count:
        tokens = (header.start, header.start + header.count)
    elif isinstance(header, SegmentOpened):
        tokens = (header.base, header.base + header.context) if header.context else None
        rewound = (header.base, length) if header.base < length else None
        length = min(length, header.base)
    lost = _lost(before, after)
    old = before.placements if before is not None else ()
    if old is after.placements:
        return Changes(tokens=tokens, rewound=rewound, lost=lost)
    rows = tuple(_row_changes(old, after.placements, length))
    return Changes(tokens=tokens, rewound=rewound, lost=lost, rows=rows)


def _lost(before: Plan | None, after: Plan) -> int | None:
    """The segment that was open, and is so no more without a close of its own."""
    if before is None or not before.history.has_open_segment:
        return None
    index = len(before.history.segments) - 1
    return index if after.history.segments[index].finish_reason == "lost" else None


def _row_changes(old: Sequence[Placement], new: Sequence[Placement], length: int) -> Iterator[RowChange]:
    """Where two foldings differ; old rows from `length` on count as never there."""
    pairs = enumerate(zip(old, new, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), min(len(old), len(new)))
    old, new = old[same:], new[same:]  # mostly all that there was
    kept = [one._replace(stop=min(one.stop, length)) for one in old if one.start < length]
    edges = sorted({edge for one in (*kept, *new) for edge in (one.start, one.stop)})
    last: RowChange | None = None
    at = [0, 0]
    for start, stop in pairwise(edges):
        sides: list[Recording | None] = []
        for which, placements in enumerate((kept, new)):
            while at[which] < len(placements) and placements[at[which]].stop <= start:
                at[which] += 1
            here = placements[at[which]] if at[which] < len(placements) else None
            sides.append(here.recording if here is not None and here.start <= start else None)
        first, second = sides
        if (first and first.event) == (second and second.event):
            continue
        if last is not None and (last.stop, last.before, last.after) == (start, first, second):
            last = last._replace(stop=stop)
            continue
        if last is not None:
            yield last
        last = RowChange(start, stop, first, second)
    if last is not None:
        yield last
