"""What wants compaction: packs with data of deleted trajectories, and many small packs. The work is in `compaction.py`.

A run that is archived every few seconds leaves thousands of small packs. They are merged once there are enough of them
and the largest does not outweigh the others: so each byte is written anew a few times, and not at every merge.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from trajstore.archive.archived import Archived
from trajstore.archive.pack import PackedTrajectory
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import Record
from trajstore.errors import Corrupt

__all__ = ["PACK_BYTES", "Candidate", "Candidates", "due"]

log = logging.getLogger(__name__)

PACK_BYTES = 64 << 20
"""Payload bytes up to which packs are merged."""

_SMALL = 4
"""A pack is small below this fraction of `PACK_BYTES`."""

_FEWEST = 8
"""Small packs that are worth a merge."""

_AT_ONCE = 64
"""Records that one look takes in, so that a lease can be renewed between two."""

Shape: TypeAlias = tuple[int | str, ...]
"""L, K and dtype of recordings."""


class Candidate(NamedTuple):
    """A live pack.

    Attributes:
        number: of its record.
        shape: of its recordings, None if it has no array for them.
        nbytes: payload bytes in it, repeated rows too.
        unwanted: it holds data of deleted or dropped trajectories.
    """

    number: int
    shape: Shape | None
    nbytes: int
    unwanted: bool


def due(candidates: Iterable[Candidate], *, pack_bytes: int) -> list[int]:
    """Numbers of the records whose packs want to be written anew as one, next; none for nothing to do."""
    sizes = sorted(candidates, key=lambda one: (one.nbytes, one.number))
    unwanted = [one for one in sizes if one.unwanted]
    if unwanted:
        shape = next((one.shape for one in unwanted if one.shape is not None), None)
        return sorted(one.number for one in _fitting(unwanted, shape, pack_bytes))
    small = [one for one in sizes if one.nbytes < pack_bytes // _SMALL]
    for shape in dict.fromkeys([*(one.shape for one in small if one.shape is not None), None]):
        chosen = _fitting(small, shape, pack_bytes)
        while chosen and chosen[-1].nbytes > sum(one.nbytes for one in chosen[:-1]):
            chosen.pop()
        if len(chosen) >= _FEWEST:
            return sorted(one.number for one in chosen)
    return []


def _fitting(candidates: Sequence[Candidate], shape: Shape | None, pack_bytes: int) -> list[Candidate]:
    """At least one, and as many as fit into a pack; those without routing go along with any shape."""
    chosen: list[Candidate] = []
    nbytes = 0
    for one in candidates:
        if one.shape in (shape, None) and (not chosen or nbytes + one.nbytes <= pack_bytes):
            chosen.append(one)
            nbytes += one.nbytes
    return chosen


class Candidates:
    """Packs of one partition that may want compaction: small ones, and those with unwanted data. Remembers no others.

    Args:
        reader: of the archive.
        partition: whose.
        pack_bytes: payload bytes up to which packs are merged.
        since: records up to this one are not looked at. Packs among them count if a later tombstone is about them.
        remnants: packs that hold something of a dropped trajectory count, too. Looks up every trajectory.

    Attributes:
        faults: why packs take part in no compaction.
    """

    def __init__(
        self,
        reader: ArchiveReader,
        partition: int,
        *,
        pack_bytes: int = PACK_BYTES,
        since: int = 0,
        remnants: bool = False,
    ) -> None:
        self._reader = reader
        self._manifest = reader.manifest(partition)
        self._pack_bytes = pack_bytes
        self._seen = since
        self._remnants = remnants
        self._found: dict[int, Candidate] = {}
        self._refused: set[int] = set()
        self.faults: list[Corrupt] = []

    def look(self) -> bool:
        """Look at some of the records written since; True once there are no more.

        Raises:
            Corrupt, SchemaError: the manifest cannot be read to its end.
        """
        newest = self._manifest.refresh()
        stop = min(newest, self._seen + _AT_ONCE)
        for number in range(self._seen + 1, stop + 1):
            if self._manifest.is_live(number):
                try:
                    record = self._manifest.record(number)
                    if record.pack:
                        self._look_at(record)
                except Corrupt as error:
                    log.error("the pack of record %d takes part in no compaction: %s", number, error)
                    self._refused.add(number)
                    self.faults.append(error)
            self._seen = number
        return self._seen == newest

    def due(self) -> list[Record]:
        """Records to be compacted together next, of what was looked at; none for nothing to do."""
        live = {number: one for number, one in self._found.items() if self._manifest.is_live(number)}
        self._found = live
        usable = [one for number, one in live.items() if number not in self._refused]
        return [self._manifest.record(number) for number in due(usable, pack_bytes=self._pack_bytes)]

    def pass_over(self, records: Iterable[Record]) -> None:
        """These could not be compacted: leave them alone."""
        self._refused.update(record.number for record in records)

    def _look_at(self, record: Record) -> None:
        candidate = self._candidate(record)
        if candidate.nbytes < self._pack_bytes // _SMALL:
            self._found.setdefault(record.number, candidate)
        for line in self._manifest.lines(record):
            deleted = line.summary is None or line.summary.status == "deleted"  # notes alone do not tell
            if not deleted and not self._remnants:
                continue
            archived = self._manifest.find(line.id, listed=[record.number])
            if archived.dropped and self._remnants:
                self._found[record.number] = candidate._replace(unwanted=True)
            elif archived.summary is not None and archived.summary.status == "deleted":
                for other, part in archived.parts:
                    if not _is_tombstone(part, archived):
                        self._found[other.number] = self._candidate(other)._replace(unwanted=True)

    def _candidate(self, record: Record) -> Candidate:
        stored = sum(file.size for file in record.files.values())
        if "routed/zarr.json" not in record.files:
            return Candidate(record.number, None, max(stored, 8 * record.counts.tokens), False)
        none = self._reader.packs.rows(record.pack, "routed", 0, 0)
        row_bytes = math.prod(none.shape[1:]) * none.itemsize
        nbytes = 8 * record.counts.tokens + row_bytes * record.counts.recorded_rows
        return Candidate(record.number, (*none.shape[1:], none.dtype.str), max(stored, nbytes), False)


def _is_tombstone(line: PackedTrajectory, archived: Archived) -> bool:
    """A deleted trajectory's line that holds its tombstone and nothing else."""
    return line.first == line.last == str(archived.last) and not line.last_note
