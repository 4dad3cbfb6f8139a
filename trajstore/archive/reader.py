"""Reading an archive: entries and payloads of a trajectory, from the packs that its manifest names."""

import os
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.archive.archived import Archived
from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import Piece, ReadEntry, decode_entries, payload_array
from trajstore.archive.pack_arrays import PackArrays, Span
from trajstore.archive.record import FileDigest
from trajstore.archive.root import ArchiveInfo, ArchiveRoot
from trajstore.entries import Buffer, EntryStamp, Event, Extent, check_payload, partition_of
from trajstore.errors import Corrupt, NotFound, SchemaError
from trajstore.events import EventId, Tokens, UnknownEvent
from trajstore.routing import RoutingArray
from trajstore.summary import Summary

__all__ = ["ArchiveReader", "Extents", "resolve", "shared_runs"]

_READ_BYTES = 16 << 20

_PACK = re.compile(r"([0-9]{2,9})/([0-9]{8,18})-.+")

Place: TypeAlias = tuple[str, str]
"""(pack, array)."""


class ArchiveReader:
    """Everything that was published, found through the manifests. Thread-safe.

    Attributes:
        root, info: of the archive.
        packs: its packs' arrays.
    """

    def __init__(self, root: ArchiveRoot, info: ArchiveInfo) -> None:
        self.root = root
        self.info = info
        self._begin()
        _readers.add(self)

    def _begin(self) -> None:
        self.packs = PackArrays(self.root.storage, self._files_of)
        self._manifests = [
            Manifest(self.root.storage, partition, self.packs, incarnation=self.info.incarnation)
            for partition in range(self.info.partitions)
        ]

    def manifest(self, partition: int) -> Manifest:
        """A partition's manifest, as last refreshed."""
        return self._manifests[partition]

    def find(self, id: str) -> Archived:
        """What the archive holds of a trajectory, from a fresh manifest."""
        return self._fresh(id).find(id)

    def read(self, id: str) -> tuple[list[ReadEntry], list[ReadEntry]]:
        """Entries and notes of a trajectory by id, from a fresh manifest; both empty if it was never archived.

        Raises:
            NotFound: retention has dropped it.
            Corrupt: a pack that the manifest names cannot be read.
        """
        manifest = self._fresh(id)
        while True:
            archived = manifest.find(id)
            if archived.dropped:
                raise _dropped(id)
            try:
                found = self.read_parts(id, archived.kept)
                break
            except Corrupt:
                manifest.refresh()
                if all(manifest.is_live(record.number) for record, _ in archived.parts):
                    raise  # else a compaction has just written it anew elsewhere
        entries = {entry.at: entry for entry in found if not entry.note}
        notes = {entry.at: entry for entry in found if entry.note}
        return [entries[at] for at in sorted(entries)], [notes[at] for at in sorted(notes)]

    def read_parts(self, id: str, archived: Archived) -> list[ReadEntry]:
        """Entries and notes of these parts, as they stand in the packs; every event with its extents.

        Raises:
            Corrupt: a pack cannot be read.
        """
        found: list[ReadEntry] = []
        for record, line in archived.parts:
            try:
                lines = self.packs.text(record.pack, "events", line.offset, line.offset + line.length)
            except Corrupt as error:
                raise Corrupt(f"trajectory {id}: {error}") from error
            found += decode_entries(lines, pack=record.pack, id=id)
        return resolve(found)

    def payloads(self, id: str, events: Sequence[Event]) -> Iterator[Buffer | None]:
        """Payload bytes of archived events, in order; what lies together is read together, and not copied again.

        None where a compaction has moved them: read the trajectory again.

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

    def routed(
        self, id: str, event: Event, runs: Sequence[tuple[int, int]], layers: slice | None = None
    ) -> RoutingArray | None:
        """Some rows of an archived recording, one run `[first, stop)` after the other, `[rows, layers, K]`; to be kept.

        None where a compaction has moved them. Where that is all of the recording, it is compared with its header.
        What is read is the chunks that hold these rows; runs that lie far apart are best asked for apart.

        Raises:
            Corrupt: naming the pack and the trajectory.
        """
        held = Extents(event.extents)
        extents = [extent for first, stop in runs for extent in held.cut(first, stop - first)]
        wanted: dict[str, list[Extent]] = {}
        try:
            for extent in _require_there(event, extents):
                wanted.setdefault(extent.pack, []).append(extent)
            if sum(extent.rows for extent in extents) != sum(stop - first for first, stop in runs):
                raise Corrupt(f"the payload of event {event.id} ends before row {max(stop for _, stop in runs)}")
            read = self._read_rows({(pack, "routed"): some for pack, some in wanted.items()}, layers)
        except Corrupt as error:
            if self._moved(id, extents):
                return None
            raise Corrupt(f"trajectory {id}: {error}") from error
        parts = [read["routed", extent] for extent in extents]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if event.payload is not None and rows.nbytes == event.payload.nbytes:
            check_payload(
                _bytes(rows), event.payload, what=f"{id}: the payload of event {event.id} in pack {event.stored}"
            )
        return rows

    def summaries(self, partition: int, *, on_corrupt: Callable[[Corrupt], None] | None = None) -> list[Summary]:
        """The newest archived summary of every trajectory of a partition.

        Args:
            on_corrupt: as for `Manifest.summaries`; a partition whose manifest cannot be read counts as empty.

        Raises:
            Corrupt: without `on_corrupt`, if something cannot be read.
        """
        manifest = self._manifests[partition]
        try:
            manifest.refresh()
        except Corrupt as error:
            if on_corrupt is None:
                raise
            on_corrupt(Corrupt(f"what partition {partition:02} has in the archive cannot be told: {error}"))
            return []
        return manifest.summaries(on_corrupt=on_corrupt)

    def is_dropped(self, id: str) -> bool:
        """Retention has dropped a trajectory, as far as its manifest was read before."""
        return self._manifests[partition_of(id, self.info.partitions)].is_dropped(id)

    # What a writer asks when its entry is no longer in the hot log (see `trajstore.log.resolve.ArchiveIndex`). Each
    # raises NotFound where retention has dropped the trajectory: it is not to be written on.

    def entry(self, id: str, at: EventId) -> EntryStamp | None:
        """What an archived entry was written as, None if it is not archived."""
        last = self._kept(id).last
        return self._stamp(id, at, note=False) if last is not None and at <= last else None

    def note(self, id: str, at: EventId) -> EntryStamp | None:
        """Likewise for a note."""
        return self._stamp(id, at, note=True) if at.epoch <= self.last_note(id) else None

    def last_note(self, id: str) -> int:
        """Number of the newest archived note, 0 for none."""
        return self._kept(id).last_note

    def last_entry(self, id: str) -> EventId | None:
        """Id of the newest archived entry."""
        return self.find(id).last

    def _stamp(self, id: str, at: EventId, *, note: bool) -> EntryStamp | None:
        entries = self.read(id)[note]
        return next((EntryStamp(entry.nonce, entry.digest) for entry in entries if entry.at == at), None)

    def _kept(self, id: str) -> Archived:
        archived = self.find(id)
        if archived.dropped:
            raise _dropped(id)
        return archived

    def _fresh(self, id: str) -> Manifest:
        manifest = self._manifests[partition_of(id, self.info.partitions)]
        manifest.refresh()
        return manifest

    def _files_of(self, pack: str) -> Mapping[str, FileDigest] | None:
        """What a pack's record says of its files; None where none that can be read is its record."""
        match = _PACK.fullmatch(pack)
        if match is None or int(match[1]) >= len(self._manifests):
            return None
        try:
            record = self._manifests[int(match[1])].record(int(match[2]))
        except (Corrupt, SchemaError):  # an error for whoever needs the record
            return None
        return record.files if record.pack == pack else None

    def _read_page(self, id: str, events: Sequence[Event]) -> Iterator[Buffer | None]:
        wanted: dict[Place, list[Extent]] = {}
        try:
            for event in events:
                extents = _require_there(event, event.extents)
                for array in _arrays_of(event):
                    for extent in extents:
                        wanted.setdefault((extent.pack, array), []).append(extent)
            read = self._read_rows(wanted)
        except Corrupt as error:
            if self._moved(id, [extent for event in events for extent in event.extents]):
                yield from (None for _ in events)
                return
            raise Corrupt(f"trajectory {id}: {error}") from error
        for event in events:
            parts = [_bytes(read[array, extent]) for array in _arrays_of(event) for extent in event.extents]
            yield parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_rows(
        self, wanted: Mapping[Place, Sequence[Extent]], layers: slice | None = None
    ) -> dict[tuple[str, Extent], npt.NDArray[Any]]:
        """Rows by array and extent; those of neighbours are views of what was read together."""
        runs = [
            (place, run)
            for place, extents in wanted.items()
            for run in neighbours(extents, within=self.packs.chunk_rows(*place))
        ]
        spans = [Span(*place, run[0].row, max(extent.row + extent.rows for extent in run)) for place, run in runs]
        found: dict[tuple[str, Extent], npt.NDArray[Any]] = {}
        for (place, run), rows in zip(runs, self.packs.rows_of_all(spans, layers), strict=True):
            for extent in run:
                first = extent.row - run[0].row
                part = rows if extent.rows == len(rows) else rows[first : first + extent.rows]
                found[place[1], extent] = part
        return found

    def _moved(self, id: str, extents: Iterable[Extent]) -> bool:
        """True if a pack that these lie in has been replaced or dropped since."""
        manifest = self._fresh(id)
        numbers = {int(extent.pack.partition("/")[2].partition("-")[0]) for extent in extents if extent.pack}
        return not all(manifest.is_live(number) for number in numbers)


_readers: weakref.WeakSet[ArchiveReader] = weakref.WeakSet()


def _begin_anew() -> None:
    """In a forked child: another thread may have held any lock at the fork."""
    for reader in list(_readers):
        reader._begin()


os.register_at_fork(after_in_child=_begin_anew)


def resolve(entries: Sequence[ReadEntry]) -> list[ReadEntry]:
    """Give every event its extents: pieces that refer to another event of the trajectory are looked up in it.

    What refers to an event that is not there gets an extent in no pack, an error only for whoever reads it.
    """
    refers = any(len(piece) > 2 for entry in entries for some in entry.pieces for piece in some)
    pieces = {
        event.id: (event.stored, some)
        for entry in (entries if refers else ())
        for event, some in zip(entry.events, entry.pieces, strict=True)
    }
    known: dict[str, Extents] = {}

    def extents_of(event: str) -> Extents:
        if event not in known:
            known[event] = Extents(())  # while it is looked up: a circle finds nothing
            pack, some = pieces.get(event, ("", ()))
            known[event] = Extents(extent for piece in some for extent in extents_at(pack, piece))
        return known[event]

    def all_of(event: Event, some: Sequence[Piece]) -> tuple[Extent, ...]:
        if refers:
            return extents_of(event.id).all
        return tuple(Extent(event.stored, int(piece[0]), piece[1]) for piece in some)

    def extents_at(pack: str, piece: Piece) -> Iterable[Extent]:
        if len(piece) == 2:
            return (Extent(pack, piece[0], piece[1]),)
        event, first, count = piece
        found = extents_of(event).cut(first, count)
        missing = count - sum(extent.rows for extent in found)
        return found if not missing else (*found, Extent("", 0, missing))

    return [
        entry._replace(
            events=[
                msgspec.structs.replace(event, extents=all_of(event, some)) if some else event
                for event, some in zip(entry.events, entry.pieces, strict=True)
            ]
            if any(entry.pieces)
            else entry.events
        )
        for entry in entries
    ]


class Extents:
    """The extents of one payload, to be cut. A recording that drifted has one for every few rows: found by bisection.

    Attributes:
        all: of the whole payload, in order.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        self.all = tuple(extents)

    @cached_property
    def _ends(self) -> list[int]:
        """Rows of the payload up to the end of each."""
        return list(accumulate(extent.rows for extent in self.all))

    def cut(self, first: int, count: int) -> list[Extent]:
        """The extents of rows `[first, first + count)`; fewer rows where the payload ends before."""
        found = []
        at = bisect_right(self._ends, first)
        while count > 0 and at < len(self.all):
            extent = self.all[at]
            skip = first - (self._ends[at] - extent.rows)
            take = min(extent.rows - skip, count)
            if take > 0:
                found.append(Extent(extent.pack, extent.row + skip, take))
            first, count, at = first + take, count - take, at + 1
        return found


def shared_runs(one: Sequence[Extent], other: Sequence[Extent]) -> list[tuple[int, int]]:
    """Which rows of two payloads are stored once for both: as runs `[first, stop)`, counted from where both begin."""
    found: list[tuple[int, int]] = []
    at = i = j = skip_one = skip_other = 0
    while i < len(one) and j < len(other):
        a, b = one[i], other[j]
        count = min(a.rows - skip_one, b.rows - skip_other)
        if a.pack and a.pack == b.pack and a.row + skip_one == b.row + skip_other and count:
            if found and found[-1][1] == at:
                found[-1] = found[-1][0], at + count
            else:
                found.append((at, at + count))
        at, skip_one, skip_other = at + count, skip_one + count, skip_other + count
        if skip_one == a.rows:
            i, skip_one = i + 1, 0
        if skip_other == b.rows:
            j, skip_other = j + 1, 0
    return found


def neighbours(extents: Iterable[Extent], *, within: int) -> list[list[Extent]]:
    """Extents by row, together where a gap is so short that reading over it decodes no further chunk."""
    runs: list[list[Extent]] = []
    end = 0
    for extent in sorted(set(extents)):
        if runs and extent.row - end <= within:
            runs[-1].append(extent)
        else:
            runs.append([extent])
            end = 0
        end = max(end, extent.row + extent.rows)
    return runs


def _dropped(id: str) -> NotFound:
    return NotFound(f"trajectory {id!r} was in the archive and has been dropped by retention")


def _require_there(event: Event, extents: Sequence[Extent]) -> Sequence[Extent]:
    if any(not extent.pack for extent in extents):
        raise Corrupt(f"the payload of event {event.id} repeats rows of an event that is not in the archive")
    return extents


def _bytes(rows: npt.NDArray[Any]) -> Buffer:
    return rows.data.cast("B") if rows.size else b""


def _arrays_of(event: Event) -> tuple[str, ...]:
    """Arrays whose pieces make up an event's payload, in order."""
    header = event.header
    if isinstance(header, UnknownEvent):
        raise Corrupt(f"event {event.id} of pack {event.stored} is of unknown type and has no payload")
    array = payload_array(header)
    if event.payload is None or array is None:
        return ()
    return ("tokens", "logprobs") if isinstance(header, Tokens) and header.logprobs else (array,)
