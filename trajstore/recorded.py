"""The recordings of one trajectory, read in part: any rows of any of them, and which rows two of them share in storage.

What a comparison of recordings needs: the events are read once, rows that the archive stores once for both recordings
are known to be equal without being read, and what a compaction moves meanwhile is found again.
"""

from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.archive.reader import Extents, shared_runs
from trajstore.entries import Buffer, Event
from trajstore.errors import Corrupt, NotFound
from trajstore.fold import Plan, plan
from trajstore.history import History, Recording
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore.trajectory import Trajectory
from trajstore.view import View

__all__ = ["RecordedRows"]

_MOVES = 8
"""How often a trajectory is read again because a compaction has moved what was asked for."""

_KEPT = 2
"""Hot payloads that are kept: a recording is usually compared with two others, one after the other."""


class RecordedRows:
    """Made by `Archive.recordings`.

    Attributes:
        id: of the trajectory.
        plan: its fold, decided, under `last_segment_wins`.
        events, notes: by id, each once.
    """

    def __init__(self, view: View, id: str) -> None:
        self._view = view
        self.id = id
        self._hot: OrderedDict[str, Buffer] = OrderedDict()
        self._extents: dict[str, Extents] = {}
        self._read_again()

    def _read_again(self) -> None:
        log = self._view.read(self.id)
        self.events, self.notes = log.events, log.notes
        self.plan: Plan = plan(log.events, notes=log.notes)
        self._extents.clear()

    @property
    def history(self) -> History:
        """Its events, read."""
        return self.plan.history

    @property
    def spec(self) -> RoutingSpec:
        """Of the trajectory's routing.

        Raises:
            NotFound: it was created without.
        """
        spec = self.history.opened.routing
        if spec is None:
            raise NotFound(f"{self.id} was created without a routing spec and has no recordings")
        return spec

    def shared(self, first: Recording, second: Recording, start: int, stop: int) -> list[tuple[int, int]]:
        """Positions `[start, stop)` at which both recordings are the same stored rows, as runs in order. Reads nothing.

        What lies in the hot log shares nothing.
        """
        one = self._held(first).cut(start - first.start, stop - start)
        other = self._held(second).cut(start - second.start, stop - start)
        return [(start + low, start + high) for low, high in shared_runs(one, other)]

    def rows(self, recording: Recording, runs: Sequence[tuple[int, int]]) -> RoutingArray:
        """Rows at some positions, one run `[start, stop)` after the other, `[rows, L, K]`, and no others.

        Runs are best near each other: what lies between them is read, too, where it is short.

        Raises:
            Corrupt: stored bytes are damaged or gone.
        """
        if not runs:
            return self.spec.empty(0)
        own = [(start - recording.start, stop - recording.start) for start, stop in runs]
        for _ in range(_MOVES):
            event = self._event(recording)
            if event.stored == "hot":
                rows = self.spec.from_bytes(self._hot_payload(event))
                return rows[own[0][0] : own[0][1]] if len(own) == 1 else np.concatenate([rows[a:b] for a, b in own])
            found = self._view.runs(self.id, event, own)
            if found is not None:
                return found
            self._read_again()
        raise Corrupt(f"{self.id}: the payload of event {recording.event} is neither in the hot log nor in the archive")

    def without_routing(self) -> Trajectory:
        """The folded trajectory, but for its routing: tokens, logprobs, masks.

        Raises:
            Corrupt: stored bytes are damaged or gone.
        """
        opened = msgspec.structs.replace(self.history.opened, routing=None)
        history = msgspec.structs.replace(self.history, opened=opened)
        bare = msgspec.structs.replace(self.plan, history=history, placements=())
        return bare.apply(lambda events: self._view.payloads(self.id, [event.id for event in events]), id=self.id)

    def token_ids(self, recording: Recording) -> npt.NDArray[np.int32]:
        """The trajectory's tokens when a recording was made, int32 `[T]`: those that its rows are of."""
        at = self.history.last if self._event(recording).note else self._event(recording).at
        return self._view.token_ids(self.id, at)

    def _held(self, recording: Recording) -> Extents:
        known = self._extents.get(recording.event)
        if known is None:
            known = self._extents[recording.event] = Extents(self._event(recording).extents)
        return known

    def _event(self, recording: Recording) -> Event:
        event = self.history.carriers.get(recording.event)
        if event is None:
            raise NotFound(f"{self.id} has no recording {recording.event}")
        return event

    def _hot_payload(self, event: Event) -> Buffer:
        data = self._hot.pop(event.id, None)
        if data is None:
            (data,) = self._view.payloads(self.id, [event.id])
        self._hot[event.id] = data
        if len(self._hot) > _KEPT:
            self._hot.popitem(last=False)
        return data
