"""What writers asked for, and what they were told of it. Kept beside the run, by hand of the simulation."""

import weakref
from collections.abc import Callable
from typing import Any

import msgspec

from trajstore.events import Header
from trajstore.log.batch import Turn
from trajstore.log.lane import Lane

__all__ = ["Issue", "Ledger"]


class Issue(msgspec.Struct, eq=False):
    """One event that a writer handed in.

    Attributes:
        id, note: where to.
        nonce, number: whose turn, and its place in it.
        header, payload: what.
        lane: key of the handle's queue.
        ms: when, by the server's clock.
        acknowledged: the writer was told that it is in the log.
    """

    id: str
    note: bool
    nonce: int
    number: int
    header: Header
    payload: bytes
    lane: int
    ms: int
    acknowledged: bool = False


class Ledger:
    """All issues of a run.

    Args:
        now: milliseconds, by the server's clock.

    Attributes:
        turns: of entries, by trajectory and nonce, in order.
        notes: by trajectory.
        errors: what stopped a lane, by its key.
        largest: bytes that one event took in a buffer, at most.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self.turns: dict[tuple[str, int], list[Issue]] = {}
        self.notes: dict[str, list[Issue]] = {}
        self.by_lane: dict[int, list[Issue]] = {}
        self.errors: dict[int, BaseException] = {}
        self.largest = 0
        self._lanes = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._owners: dict[int, Any] = {}

    def own(self, lane: Any, owner: Any) -> None:
        """A lane belongs to a process."""
        self._owners[self.key_of(lane)] = owner

    def owner_of(self, lane: int) -> Any:
        """The process that a lane belongs to."""
        return self._owners.get(lane)

    def lanes_of(self, owner: Any) -> set[int]:
        """Keys of a process's lanes."""
        return {key for key, one in self._owners.items() if one is owner}

    def key_of(self, lane: Any) -> int:
        """A number for a lane, which does not keep it alive."""
        key: int | None = getattr(lane, "simulated_key", None)
        if key is None:
            self._lanes += 1
            key = lane.simulated_key = self._lanes
            self._alive[key] = weakref.ref(lane)
        return key

    def lane_of(self, key: int) -> Any:
        """The lane, as long as somebody holds it, who can be told."""
        return self._alive[key]() if key in self._alive else None

    def issue(self, lane: Lane, turn: Turn, header: Header, payload: Any) -> Issue:
        """An event is handed in."""
        key = self.key_of(lane)
        mine = self.turns.setdefault((lane.id, turn.nonce), [])
        issue = Issue(lane.id, lane.note, turn.nonce, len(mine), header, bytes(payload or b""), key, self._now())
        if lane.note:
            self.notes.setdefault(lane.id, []).append(issue)
        else:
            mine.append(issue)
        self.by_lane.setdefault(key, []).append(issue)
        self.largest = max(self.largest, 256 + len(issue.payload))
        return issue

    def withdraw(self, issue: Issue) -> None:
        """It was refused at once."""
        (self.notes[issue.id] if issue.note else self.turns[issue.id, issue.nonce]).remove(issue)
        self.by_lane[issue.lane].remove(issue)

    def acknowledge(self, lane: Lane, count: int) -> None:
        """The first `count` events of a lane are in the log."""
        for issue in self.by_lane.get(self.key_of(lane), ())[:count]:
            issue.acknowledged = True

    def all_of(self, id: str) -> list[Issue]:
        """Every event of a trajectory's entries."""
        return [issue for (one, _), issues in self.turns.items() if one == id for issue in issues]
