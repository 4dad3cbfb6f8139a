"""The lookup tables of a partition, as files: found, opened, written, and put in the place of those that they merge.

What a table holds is in `index.py`. None of them is needed: what a missing or damaged one says is read from the packs,
and whoever writes the next record writes it anew.
"""

import logging
from collections.abc import Sequence

from trajstore.archive.index import FAN_OUT, Table, decode_table, encode_table, merge_tables, spans
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import Corrupt, SchemaError

__all__ = ["StoredTables"]

log = logging.getLogger(__name__)


class StoredTables:
    """Of one partition of the archive of an incarnation."""

    def __init__(self, storage: Storage, partition: int, *, incarnation: str) -> None:
        self._storage = storage
        self._partition = partition
        self._incarnation = incarnation

    def after(self, position: int) -> Table | None:
        """The largest table that begins after record `position`, if there is one."""
        found = (self.open(first, last) for first, last in spans(position))
        return next((table for table in found if table is not None), None)

    def open(self, first: int, last: int) -> Table | None:
        """The table of records `first` to `last`; None where it is not there, damaged, or of another format."""
        path = self._path(first, last)
        try:
            table = decode_table(
                self._storage.open_map(path), incarnation=self._incarnation, partition=self._partition, path=path
            )
        except (FileNotFoundError, SchemaError):
            return None
        except Corrupt as error:
            log.warning("%s; what it says is read from the packs until an archiver writes it anew", error)
            return None
        return table if (table.first, table.last) == (first, last) else None

    def write(self, table: Table) -> None:
        """Store a table, in the place of one that cannot be used. One that cannot be stored is slower to do without."""
        path = self._path(table.first, table.last)
        data = encode_table(table, incarnation=self._incarnation, partition=self._partition)
        try:
            if self._create(path, data) or self.open(table.first, table.last) is not None:
                return
            self._storage.remove([path])
            self._create(path, data)
        except OSError as error:
            log.warning("a lookup table of partition %d could not be written: %s", self._partition, error)

    def consolidated(self, tables: Sequence[Table], newest: int, *, write: bool) -> list[Table]:
        """The tables of records 1 to `newest`, with one in the place of those that it merges.

        Args:
            write: make the merged ones that are missing, and remove those that they replace.
        """
        found = list(tables)
        size = FAN_OUT
        while size <= newest:
            small = {(table.first - 1) // size * size for table in found if table.last - table.first + 1 < size}
            for before in sorted(small):
                first, last = before + 1, before + size
                if last > newest:
                    continue
                covered = [table for table in found if first <= table.first and table.last <= last]
                merged = self.open(first, last)
                if merged is None and write:
                    self.write(merge_tables(covered))
                    merged = self.open(first, last)
                if merged is not None:
                    where = found.index(covered[0])
                    found[where : where + len(covered)] = [merged]
                    if write:
                        self._remove(covered)
            size *= FAN_OUT
        return found

    def _create(self, path: str, data: bytes) -> bool:
        """False if there is one: a damaged one, or another archiver's a moment ago."""
        try:
            self._storage.create(path, data)
        except FileExistsError:
            return False
        return True

    def _remove(self, tables: Sequence[Table]) -> None:
        """Others in whose place a larger one stands; whoever has them open keeps them."""
        try:
            self._storage.remove(self._path(table.first, table.last) for table in tables)
        except OSError as error:
            log.warning("lookup tables of partition %d could not be removed: %s", self._partition, error)

    def _path(self, first: int, last: int) -> str:
        return f"index/{self._partition:02}/{first:08}-{last:08}.safetensors"
