"""Reading an archive: entries and payloads of a trajectory, from the packs that its manifest names."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import zarr

from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import ReadEntry, decode_entries, payload_array
from trajstore.archive.root import ArchiveInfo, ArchiveRoot
from trajstore.entries import EntryStamp, Event, partition_of
from trajstore.errors import Corrupt
from trajstore.events import EventId, Tokens, UnknownEvent
from trajstore.summary import Summary

__all__ = ["ArchiveReader"]

_OPEN_ARRAYS = 256
_READ_BYTES = 16 << 20

Place: TypeAlias = tuple[str, str]
"""(pack, array)."""

Extent: TypeAlias = tuple[int, int]
"""`[row, count]` in an array."""


class ArchiveReader:
    """Everything that was published, found through the manifests. Thread-safe."""

    def __init__(self, root: ArchiveRoot, info: ArchiveInfo) -> None:
        self.root = root
        self.info = info
        self._manifests = [Manifest(root, partition) for partition in range(info.partitions)]
        self._open: OrderedDict[Place, zarr.Array[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def manifest(self, partition: int) -> Manifest:
        """A partition's manifest, as last refreshed."""
        return self._manifests[partition]

    def read(self, id: str) -> tuple[list[ReadEntry], list[ReadEntry]]:
        """Entries and notes of a trajectory by id, from a fresh manifest; both empty if it was never archived.

        Raises:
            Corrupt: a pack that the manifest names cannot be read.
        """
        found: list[ReadEntry] = []
        for pack, packed in self._fresh(id).packs_of(id):
            found += self._entries(pack, packed.offset, packed.length, id)
        entries = {entry.at: entry for entry in found if not entry.note}
        notes = {entry.at: entry for entry in found if entry.note}
        return [entries[at] for at in sorted(entries)], [notes[at] for at in sorted(notes)]

    def payloads(self, id: str, events: Sequence[Event]) -> Iterator[bytes]:
        """Payload bytes of archived events, in order; what lies together is read together.

        Raises:
            Corrupt: naming the pack and the trajectory.
        """
        page: list[Event] = []
        nbytes = 0
        for event in events:
            page.append(event)
            nbytes += event.payload.nbytes if event.payload else 0
            if nbytes >= _READ_BYTES:
                yield from self._read_page(id, page)
                page, nbytes = [], 0
        yield from self._read_page(id, page)

    def summaries(self, partition: int) -> list[Summary]:
        """The newest archived summary of every trajectory of a partition."""
        manifest = self._manifests[partition]
        manifest.refresh()
        return manifest.summaries()

    # What a writer asks when its entry is no longer in the hot log (see `trajstore.log.resolve.ArchiveIndex`)

    def entry(self, id: str, at: EventId) -> EntryStamp | None:
        """What an archived entry was written as, None if it is not archived."""
        return self._find(id, at, note=False)

    def note(self, id: str, at: EventId) -> EntryStamp | None:
        """Likewise for a note."""
        return self._find(id, at, note=True)

    def last_note(self, id: str) -> int:
        """Number of the newest archived note, 0 for none."""
        return self._fresh(id).last_note(id)

    def last_entry(self, id: str) -> EventId | None:
        """Id of the newest archived entry."""
        return self._fresh(id).last_entry(id)

    def _find(self, id: str, at: EventId, *, note: bool) -> EntryStamp | None:
        last = EventId(self.last_note(id), 0) if note else self.last_entry(id)
        if last is None or at > last:
            return None
        entries = self.read(id)[note]
        return next((EntryStamp(entry.nonce, entry.digest) for entry in entries if entry.at == at), None)

    def _fresh(self, id: str) -> Manifest:
        manifest = self._manifests[partition_of(id, self.info.partitions)]
        manifest.refresh()
        return manifest

    def _entries(self, pack: str, offset: int, length: int, id: str) -> list[ReadEntry]:
        lines = self._slice(pack, "events", offset, offset + length, id).tobytes()
        if len(lines) != length:
            raise Corrupt(f"pack {pack} holds {len(lines)} of {length} event bytes of trajectory {id}")
        return decode_entries(lines, pack=pack, id=id)

    def _read_page(self, id: str, events: Sequence[Event]) -> Iterator[bytes]:
        wanted: dict[Place, list[Extent]] = {}
        for event in events:
            for array in _arrays_of(event, id):
                wanted.setdefault((event.stored, array), []).extend(event.extents)
        read = {place: self._read_extents(place, extents, id) for place, extents in wanted.items()}
        for event in events:
            yield b"".join(
                read[event.stored, array][extent] for array in _arrays_of(event, id) for extent in event.extents
            )

    def _read_extents(self, place: Place, extents: Sequence[Extent], id: str) -> dict[Extent, bytes]:
        """Bytes of each extent of one array."""
        found: dict[Extent, bytes] = {}
        for run in adjacent_runs(extents):
            first = run[0][0]
            rows = self._slice(*place, first, run[-1][0] + run[-1][1], id)
            for row, count in run:
                found[row, count] = rows[row - first : row - first + count].tobytes()
        return found

    def _slice(self, pack: str, array: str, start: int, stop: int, id: str) -> np.ndarray[Any, Any]:
        try:
            return np.asarray(self._array(pack, array)[start:stop])
        except (OSError, KeyError, ValueError, RuntimeError) as error:  # what zarr raises for damage
            raise Corrupt(
                f"pack {pack} is damaged: {array}[{start}:{stop}] of trajectory {id} cannot be read: {error}"
            ) from error

    def _array(self, pack: str, name: str) -> "zarr.Array[Any]":
        with self._lock:
            array = self._open.get((pack, name))
            if array is None:
                array = zarr.open_array(self.root.pack_path(pack) / name, mode="r", zarr_format=3)
                self._open[pack, name] = array
                if len(self._open) > _OPEN_ARRAYS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end((pack, name))
            return array


def adjacent_runs(extents: Iterable[Extent]) -> list[list[Extent]]:
    """Extents by row, those that follow each other without a gap together."""
    runs: list[list[Extent]] = []
    for row, count in sorted(set(extents)):
        if runs and sum(runs[-1][-1]) == row:
            runs[-1].append((row, count))
        else:
            runs.append([(row, count)])
    return runs


def _arrays_of(event: Event, id: str) -> tuple[str, ...]:
    """Arrays whose pieces make up an event's payload, in order."""
    header = event.header
    if isinstance(header, UnknownEvent):
        raise Corrupt(f"{id}: event {event.id} of pack {event.stored} is of unknown type and has no payload")
    array = payload_array(header)
    if event.payload is None or array is None:
        return ()
    return ("tokens", "logprobs") if isinstance(header, Tokens) and header.logprobs else (array,)
