"""What all records of a partition say, each read once: for work that looks at every one of them.

Of a record it keeps a line, not the digests of its files; packs of one shape share the names of their files.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from trajstore.archive.manifest import Manifest
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import Record
from trajstore.archive.upkeep.originals import replaced_by
from trajstore.errors import Corrupt

__all__ = ["Ledger", "Ledgers", "Noted", "noted", "numbers_of"]


class Noted(NamedTuple):
    """A record without its digests.

    Attributes:
        partition, number, pack, created, newest: as in the record.
        trajectories: parts of trajectories in its pack.
        nbytes: of the pack's files.
        files: their paths in the pack.
    """

    partition: int
    number: int
    pack: str
    created: float
    newest: float
    trajectories: int
    nbytes: int
    files: frozenset[str]


class Ledger:
    """The records of one partition.

    Args:
        manifest: of the partition.
        without: records whose packs are about to be given up, see `Manifest.refresh`.

    Attributes:
        manifest: of the partition.
        newest: number of the newest record that was read.
        ended: by record, when its pack was replaced or dropped. What damaged records ended is not among it.
        damaged: by number, why a record cannot be read.
        failure: why the manifest cannot be read to its end, None if it can.
    """

    def __init__(self, manifest: Manifest, *, without: Collection[int] = ()) -> None:
        self.manifest = manifest
        self._without = without
        self.newest = 0
        self.ended: dict[int, float] = {}
        self.damaged: dict[int, Corrupt] = {}
        self.failure: Corrupt | None = None
        self._noted: dict[int, Noted] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}

    @property
    def errors(self) -> list[Corrupt]:
        """All that could not be read."""
        return [*self.damaged.values(), *([self.failure] if self.failure is not None else [])]

    def read(self) -> int:
        """Read the records written since; returns the number of the newest.

        Raises:
            SchemaError: a record of a newer format.
        """
        self.failure = None
        try:
            newest = self.manifest.refresh(without=self._without)
        except Corrupt as error:
            self.failure = error
            return self.newest
        for number in range(self.newest + 1, newest + 1):
            try:
                self._note(self.manifest.record(number))
            except Corrupt as error:
                self.damaged[number] = error
        self.newest = newest
        return newest

    def get(self, number: int) -> Noted | None:
        """A record, None if it is damaged or was not read."""
        return self._noted.get(number)

    def spared(self) -> set[int]:
        """Records whose packs those replaced that are about to be given up: they may be all that is left.

        Raises:
            Corrupt: the record of one that is given up cannot be read.
        """
        found = (replaced_by(self.manifest, self.manifest.record(number)) for number in self._without)
        return set[int]().union(*found)

    def live(self) -> list[Noted]:
        """Records whose packs count, oldest first, but for damaged ones."""
        found = (self._noted.get(number) for number in self.manifest.live_numbers())
        return [one for one in found if one is not None and one.pack]

    def _note(self, record: Record) -> None:
        one = noted(record)
        self._noted[record.number] = one._replace(files=self._names.setdefault(one.files, one.files))
        self.ended |= dict.fromkeys((*record.replaces, *record.drops), record.created)


class Ledgers:
    """Those of all partitions of an archive, each begun when it is asked for.

    Args:
        reader: of the archive.
        without: names of packs that are about to be given up.
    """

    def __init__(self, reader: ArchiveReader, *, without: Collection[str] = ()) -> None:
        self._reader = reader
        self._without = without
        self._ledgers: dict[int, Ledger] = {}

    def of(self, partition: int) -> Ledger:
        """That of one partition, as it was last read."""
        if partition not in self._ledgers:
            without = numbers_of(self._without, partition)
            self._ledgers[partition] = Ledger(self._reader.manifest(partition), without=without)
        return self._ledgers[partition]


def noted(record: Record) -> Noted:
    """What a ledger keeps of a record."""
    return Noted(
        partition=record.partition,
        number=record.number,
        pack=record.pack,
        created=record.created,
        newest=record.newest,
        trajectories=record.counts.trajectories,
        nbytes=sum(file.size for file in record.files.values()),
        files=frozenset(record.files),
    )


def numbers_of(packs: Iterable[str], partition: int) -> set[int]:
    """Numbers by the names of those packs that are a partition's."""
    names = (name for folder, _, name in (pack.partition("/") for pack in packs) if folder == f"{partition:02}")
    numbers = (name.partition("-")[0] for name in names)
    return {int(number) for number in numbers if number.isdecimal() and number.isascii()}
