"""Lookup tables made anew: those of a partition that are missing, damaged, or say something else than the packs."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from trajstore.archive.index import FAN_OUT, Table, decode_table, encode_table, make_table, merge_tables, spans
from trajstore.archive.record import Record
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import Corrupt, SchemaError

__all__ = ["lines_told", "rebuild_tables", "remove_tables", "stored_tables"]

_TABLE = re.compile(r"index/[0-9]{2,}/([0-9]{8,})-([0-9]{8,})\.safetensors")


def stored_tables(storage: Storage, partition: int, *, incarnation: str) -> dict[tuple[int, int], Table]:
    """The tables of a partition that can be read and are its own, by what they cover; the largest last."""
    found = {}
    for file in storage.list(f"index/{partition:02}"):
        match = _TABLE.fullmatch(file.path)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2])
        try:
            table = decode_table(
                storage.open_map(file.path), incarnation=incarnation, partition=partition, path=file.path
            )
        except (Corrupt, FileNotFoundError, SchemaError):
            continue
        if (table.first, table.last) == (first, last) and (first, last) in spans(first - 1):
            found[first, last] = table
    return dict(sorted(found.items(), key=lambda item: item[0][1] - item[0][0]))


def lines_told(stored: Mapping[tuple[int, int], Table], record: Record) -> Table:
    """The table of a record as far as those over it tell: for a pack whose list cannot be read any more.

    Args:
        stored: as `stored_tables` gives them.
    """
    over = (table for (first, last), table in stored.items() if first <= record.number <= last)
    columns = next((table.columns for table in over), None)
    table = make_table(record.number, (), replaced=record.replaces, dropped=record.drops)
    if columns is None:
        return table
    own = columns[1] == record.number
    return Table(
        record.number,
        record.number,
        [column[own] for column in columns],
        replaced=table.replaced,
        dropped=table.dropped,
    )


def rebuild_tables(storage: Storage, partition: int, singles: Mapping[int, Table], *, incarnation: str) -> int:
    """Write the tables that are not there as they should be; returns how many.

    A table is derived, so a wrong one is removed and made anew.

    Args:
        singles: the table of each record; one whose pack cannot be read is missing, and with it every table over it.
    """
    stored = stored_tables(storage, partition, incarnation=incarnation)
    written = covered = 0
    for table in sorted(_all(singles), key=lambda table: (table.first, -table.last)):
        span = table.first, table.last
        wanted = table.last > covered  # else a longer one stands in its place
        covered = max(covered, table.last)
        right = span in stored and _equal(stored[span], table)
        if right or (not wanted and span not in stored):
            continue
        path = _path(partition, table.first, table.last)
        storage.remove([path])
        if wanted:
            with contextlib.suppress(FileExistsError):  # an archiver's, a moment ago
                storage.create(path, encode_table(table, incarnation=incarnation, partition=partition))
            written += 1
    return written


def remove_tables(storage: Storage, partition: int, stored: Iterable[tuple[int, int]], *, over: int) -> None:
    """Remove those that cover a record: it is about to say something else.

    Args:
        stored: what the tables of the partition cover.
        over: number of the record.
    """
    storage.remove(_path(partition, first, last) for first, last in stored if first <= over <= last)


def _path(partition: int, first: int, last: int) -> str:
    return f"index/{partition:02}/{first:08}-{last:08}.safetensors"


def _all(singles: Mapping[int, Table]) -> Iterator[Table]:
    """Every table that there can be over these records."""
    level = dict(singles)
    size = 1
    while level:
        yield from level.values()
        above = {}
        for first in range(1, max(level) + 1, size * FAN_OUT):
            parts = [level[at] for at in range(first, first + size * FAN_OUT, size) if at in level]
            if len(parts) == FAN_OUT:
                above[first] = merge_tables(parts)
        level = above
        size *= FAN_OUT


def _equal(one: Table, other: Table) -> bool:
    return (one.replaced, one.dropped) == (other.replaced, other.dropped) and all(
        np.array_equal(ours, theirs) for ours, theirs in zip(one.columns, other.columns, strict=True)
    )
