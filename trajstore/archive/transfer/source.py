"""All that a place holds of a trajectory, hot log and archive as one, to be copied: entries as they were written.

`trajstore.view` gives events to be folded; here entries keep what a copy is told by, nonces and digests.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from trajstore.archive.pack import ReadEntry
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.writer import StagedEntry
from trajstore.entries import Buffer, Event, entry_digest
from trajstore.errors import Corrupt, NotFound, SchemaError
from trajstore.events import EventId, Header, TrajectoryOpened, UnknownEvent
from trajstore.history import find_tombstone
from trajstore.log.reader import HotEntry, HotReader
from trajstore.log.stream import nonce_of
from trajstore.routing import RoutingSpec

__all__ = ["Source", "Whole", "payload_bytes", "routing_of"]

_STAGE_BYTES = 16 << 20
_ATTEMPTS = 4
"""An archiver and a compaction may each move a payload once while it is copied."""


class Whole(NamedTuple):
    """All that a place holds of one trajectory.

    Attributes:
        entries: by id, then the notes by number, each once; empty where it is unknown or gone.
        in_hot: the hot log holds some of them.
        gone: it was deleted, or dropped by retention.
    """

    entries: list[ReadEntry]
    in_hot: bool = False
    gone: bool = False

    @property
    def last(self) -> EventId | None:
        """Newest entry."""
        return max((entry.at for entry in self.entries if not entry.note), default=None)


class Source:
    """Where trajectories are copied from: an archive, a hot log, or both as one.

    Args:
        hot, archive: either may be None.
    """

    def __init__(self, hot: HotReader | None, archive: ArchiveReader | None) -> None:
        self._hot = hot
        self._archive = archive

    def read(self, id: str) -> Whole:
        """Every entry and note of a trajectory, hot log first, then a fresh manifest.

        Raises:
            Corrupt: hot log and archive hold different entries of one id, or a pack cannot be read.
        """
        hot, hot_notes = self._hot.read(id) if self._hot is not None else ([], [])
        try:
            old, old_notes = self._archive.read(id) if self._archive is not None else ([], [])
        except NotFound:
            return Whole([], gone=True)
        entries = _merged(id, [_decoded(entry) for entry in hot], old)
        if entries and find_tombstone(entries[-1].events) is not None:
            return Whole([], gone=True)
        notes = _merged(id, [_decoded(note, note=True) for note in hot_notes], old_notes)
        return Whole(entries + notes if entries else [], in_hot=bool(hot or hot_notes))

    def stage(self, id: str, entries: Sequence[ReadEntry]) -> Iterator[StagedEntry]:
        """Entries with their payloads, some MiB at a time.

        Raises:
            SchemaError: an event that this version does not know, so cannot write as it was.
            Corrupt: a payload is in neither part.
        """
        left, attempts = list(entries), 0
        while left:
            batch = _batch(left)
            payloads = self._payloads(id, [event for entry in batch for event in entry.events])
            if payloads is None:
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise Corrupt(f"{id}: payloads of entry {batch[0].at} are in neither hot log nor archive")
                now = {(entry.note, entry.at): entry for entry in self.read(id).entries}
                if any((entry.note, entry.at) not in now for entry in left):
                    raise NotFound(f"trajectory {id!r} was deleted while it was copied")
                left = [now[entry.note, entry.at] for entry in left]
                continue
            del left[: len(batch)]
            attempts = 0
            given = iter(payloads)
            for entry in batch:
                staged = [next(given) for _ in entry.events]
                headers = [_known(id, event) for event in entry.events]
                yield StagedEntry(entry.at, entry.note, entry.nonce, entry.digest, entry.time, headers, staged)

    def _payloads(self, id: str, events: Sequence[Event]) -> list[Buffer] | None:
        """Payload bytes of events that lie in one part; None if some have been moved since they were read."""
        for event in events:
            _known(id, event)
        part = self._hot if events[0].stored == "hot" else self._archive
        assert part is not None
        found = list(part.payloads(id, events))
        return None if None in found else [data for data in found if data is not None]


def routing_of(id: str, entries: Iterable[ReadEntry]) -> RoutingSpec | None:
    """A trajectory's routing, as its first event has it.

    Raises:
        Corrupt: that is not among its entries.
    """
    first = next((entry.events[0].header for entry in entries if entry.at == (1, 0) and not entry.note), None)
    if not isinstance(first, TrajectoryOpened):
        raise Corrupt(f"trajectory {id}: its first event is neither in the hot log nor in the archive")
    return first.routing


def payload_bytes(entries: Iterable[ReadEntry]) -> int:
    """Bytes of all payloads of these entries."""
    return sum(event.payload.nbytes for entry in entries for event in entry.events if event.payload is not None)


def _decoded(entry: HotEntry, *, note: bool = False) -> ReadEntry:
    events = entry.events(note=note)
    return ReadEntry(
        entry.at, nonce_of(entry.data), entry_digest(entry.data), note, events[0].time if events else 0.0, events, []
    )


def _merged(id: str, hot: Sequence[ReadEntry], old: Sequence[ReadEntry]) -> list[ReadEntry]:
    found = {entry.at: entry for entry in hot}
    for entry in old:
        copy = found.get(entry.at, entry)
        if (copy.nonce, copy.digest) != (entry.nonce, entry.digest):
            raise Corrupt(
                f"{id}: {'note' if entry.note else 'entry'} {entry.at} differs between the hot log and the archive; "
                "the hot log was lost and written anew above what had been archived"
            )
        found[entry.at] = entry
    return [found[at] for at in sorted(found)]


def _batch(entries: Sequence[ReadEntry]) -> list[ReadEntry]:
    """The first of these entries: of one part, and not more bytes than are well held at once."""
    batch: list[ReadEntry] = []
    nbytes = 0
    for entry in entries:
        nbytes += payload_bytes([entry])
        if batch and (nbytes > _STAGE_BYTES or _is_hot(entry) != _is_hot(batch[0])):
            break
        batch.append(entry)
    return batch


def _is_hot(entry: ReadEntry) -> bool:
    return entry.events[0].stored == "hot"


def _known(id: str, event: Event) -> Header:
    if isinstance(event.header, UnknownEvent):
        raise SchemaError(f"{id}: event {event.id} is a {event.type} that this trajstore does not know; upgrade it")
    return event.header
