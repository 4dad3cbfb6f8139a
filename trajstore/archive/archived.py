"""What the archive holds of one trajectory, as its manifest finds it."""

from typing import NamedTuple, Protocol

from trajstore.archive.pack import PackedTrajectory
from trajstore.archive.record import Record
from trajstore.events import EventId
from trajstore.summary import Summary

__all__ = ["Archived", "OfPack"]


class OfPack(Protocol):
    """What says which pack, and its record's number: a record, or what is kept of one."""

    @property
    def number(self) -> int: ...

    @property
    def pack(self) -> str: ...


class Archived(NamedTuple):
    """What the archive holds of one trajectory.

    Attributes:
        parts: (record, line) of each pack that it lies in, by the record's number.
        dropped: retention has removed a part of it, and with that the whole.
    """

    parts: list[tuple[Record, PackedTrajectory]]
    dropped: bool

    @property
    def kept(self) -> "Archived":
        """What counts of it: of a deleted trajectory the part with its tombstone, whatever became of the others."""
        summary = self.summary
        if summary is None or summary.status != "deleted":
            return self
        return Archived([part for part in self.parts if part[1].last == summary.last], self.dropped)

    @property
    def last(self) -> EventId | None:
        """Newest archived entry."""
        return max((EventId.parse(line.last) for _, line in self.parts if line.last), default=None)

    @property
    def last_note(self) -> int:
        """Number of its newest archived note, 0 for none."""
        return max((line.last_note for _, line in self.parts), default=0)

    @property
    def summary(self) -> Summary | None:
        """As of the newest archived entry."""
        newest = [line for _, line in self.parts if line.summary is not None]
        return max(newest, key=lambda line: EventId.parse(line.last)).summary if newest else None
