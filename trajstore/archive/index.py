"""Lookup tables of a partition: in which packs, and where in them, a trajectory's lines lie. Derived from the packs.

A table is sorted by a hash of the id and mapped from its file, so a lookup is a binary search, and what a process holds
does not grow with the run. Each record has one; sixteen are merged into one of 16 records, sixteen of those into one of
256, and so on: a fresh reader opens a handful. A table that is missing, damaged or another partition's is made up for
by those below it, or by the packs.
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from mmap import mmap
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from trajstore.errors import UNREADABLE, Corrupt, SchemaError

__all__ = [
    "FAN_OUT",
    "Hit",
    "Line",
    "Table",
    "decode_table",
    "encode_table",
    "hash_of",
    "make_table",
    "merge_tables",
    "spans",
]

FAN_OUT = 16
"""Tables of one level that the next level merges."""

_FORMAT = "2"
"""Those of format 1 do not say whose they are, so nobody can know that they are right: they are not read."""


class Line(NamedTuple):
    """A line of a pack's `trajectories`: of which trajectory, and which bytes."""

    id: str
    offset: int
    length: int


class Hit(NamedTuple):
    """A line found: in the pack of record `number`, at these bytes of `trajectories`. The hash may be another id's."""

    number: int
    offset: int
    length: int


class Table:
    """Lines of the packs of records `[first, last]`, by hash; and the records that these records ended.

    Attributes:
        first, last: numbers of the records that it covers.
        replaced: numbers of records whose packs a compaction wrote anew.
        dropped: numbers of records whose packs, and all their trajectories, are gone for good.
    """

    def __init__(
        self,
        first: int,
        last: int,
        columns: Sequence[npt.NDArray[Any]],
        *,
        replaced: frozenset[int],
        dropped: frozenset[int],
        backing: object = None,
    ) -> None:
        self.first = first
        self.last = last
        self.replaced = replaced
        self.dropped = dropped
        self._hashes, self._numbers, self._offsets, self._lengths = columns
        self._backing = backing  # the mapping that the columns look into

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def columns(self) -> Sequence[npt.NDArray[Any]]:
        """hashes uint64, numbers uint32, offsets uint64, lengths uint32, each `[n]`, sorted by (hash, number)."""
        return self._hashes, self._numbers, self._offsets, self._lengths

    def find(self, id: str) -> list[Hit]:
        """Lines whose hash is that of `id`."""
        return self.find_hash(hash_of(id))

    def find_hash(self, wanted: int) -> list[Hit]:
        """Lines with this hash, for whoever looks into several tables."""
        found = []
        at = int(self._hashes.searchsorted(np.uint64(wanted)))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            found.append(Hit(int(self._numbers[at]), int(self._offsets[at]), int(self._lengths[at])))
            at += 1
        return found


def hash_of(id: str) -> int:
    """BLAKE2b-64 of an id."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def make_table(
    number: int, lines: Iterable[Line], *, replaced: Iterable[int] = (), dropped: Iterable[int] = ()
) -> Table:
    """The table of one record."""
    rows = [(hash_of(line.id), line.offset, line.length) for line in lines]
    hashes = np.array([row[0] for row in rows], "<u8")
    columns = [
        hashes,
        np.full(len(rows), number, "<u4"),
        np.array([row[1] for row in rows], "<u8"),
        np.array([row[2] for row in rows], "<u4"),
    ]
    order = np.argsort(hashes, kind="stable")
    return Table(
        number,
        number,
        [column[order] for column in columns],
        replaced=frozenset(replaced),
        dropped=frozenset(dropped),
    )


def merge_tables(tables: Sequence[Table]) -> Table:
    """One table for several that follow each other; lines of replaced packs are left out."""
    parts = list(zip(*(table.columns for table in tables), strict=True))
    replaced = frozenset[int]().union(*(table.replaced for table in tables))
    numbers = np.concatenate(parts[1])
    order = np.lexsort((numbers, np.concatenate(parts[0])))
    if replaced:
        order = order[~np.isin(numbers[order], np.fromiter(replaced, "<u4"))]
    return Table(
        tables[0].first,
        tables[-1].last,
        [np.concatenate(column)[order] for column in parts],  # one at a time: a table may be large
        replaced=replaced,
        dropped=frozenset[int]().union(*(table.dropped for table in tables)),
    )


def encode_table(table: Table, *, incarnation: str, partition: int) -> bytes:
    """A table as a safetensors file, which says whose it is."""
    data = dict(zip(_COLUMNS, table.columns, strict=True))
    about = {
        "format": _FORMAT,
        "incarnation": incarnation,
        "partition": str(partition),
        "first": str(table.first),
        "last": str(table.last),
        "replaced": msgspec.json.encode(sorted(table.replaced)).decode(),
        "dropped": msgspec.json.encode(sorted(table.dropped)).decode(),
    }
    crc = 0
    for name in sorted(about):
        crc = zlib.crc32(about[name].encode(), crc)
    for column in data.values():
        crc = zlib.crc32(np.ascontiguousarray(column).data.cast("B") if len(column) else b"", crc)
    return safetensors.numpy.save(data, metadata={**about, "crc": str(crc)})


def decode_table(buffer: memoryview | mmap, *, incarnation: str, partition: int, path: str) -> Table:
    """A table of a partition over a mapped file, without a copy.

    Raises:
        Corrupt: it is damaged, no such table, or another partition's or incarnation's.
        SchemaError: of another format than this version writes; do without it.
    """
    view = memoryview(buffer)
    try:
        size = int.from_bytes(view[:8], "little")
        header = msgspec.json.decode(view[8 : 8 + size], type=dict[str, Any])
        about = {name: str(value) for name, value in header.pop("__metadata__").items()}
        crc = int(about.pop("crc"))
        columns = [
            np.frombuffer(view, dtype, header[name]["shape"][0], 8 + size + header[name]["data_offsets"][0])
            for name, dtype in _COLUMNS.items()
        ]
        found = 0
        for name in sorted(about):
            found = zlib.crc32(about[name].encode(), found)
        for column in columns:
            found = zlib.crc32(column.data.cast("B") if len(column) else b"", found)
        if found != crc:
            raise ValueError("its checksum does not match")
        if about["format"] == _FORMAT:
            if (about["incarnation"], about["partition"]) != (incarnation, str(partition)):
                raise ValueError(
                    f"it says that it is of partition {about['partition']} of incarnation {about['incarnation']}: "
                    "somebody has copied it"
                )
            return Table(
                int(about["first"]),
                int(about["last"]),
                columns,
                replaced=msgspec.json.decode(about["replaced"], type=frozenset[int]),
                dropped=msgspec.json.decode(about["dropped"], type=frozenset[int]),
                backing=buffer,
            )
    except (*UNREADABLE, ValueError, KeyError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise Corrupt(f"the lookup table {path} is damaged: {error}") from error
    raise SchemaError(f"the lookup table {path} has format {about['format']}, and this trajstore reads {_FORMAT}")


def spans(position: int) -> list[tuple[int, int]]:
    """Spans `(first, last)` of the tables that can begin after record `position`, the largest first."""
    found = []
    size = 1
    while position % size == 0 and size <= _LARGEST:
        found.append((position + 1, position + size))
        size *= FAN_OUT
    return found[::-1]


_COLUMNS: dict[str, np.dtype[Any]] = {
    "hashes": np.dtype("<u8"),
    "numbers": np.dtype("<u4"),
    "offsets": np.dtype("<u8"),
    "lengths": np.dtype("<u4"),
}
_LARGEST = FAN_OUT**6
