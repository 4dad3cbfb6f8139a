"""Manifest records made anew from the packs of one partition. What is there and sound is never touched.

Why nothing that was published is lost, though a pack without a record may be a published one or a leftover:

- A number that has no record gets the newest of its packs: where an archiver was killed before its record was written,
  its successor's pack is the newer one.
- Every other pack without a record is looked at entry by entry. Where each of its entries lies in packs that have
  records, nothing of it is needed. Else it is written again under a number of its own, after all others.
- So a leftover may come to be published. It holds what an archiver was about to publish, and an entry that lies in two
  packs, or in a pack and the hot log, is one entry.

A record that names no pack (retention) leaves no trace but in a lookup table that covers it, or in packs of which only
the list of trajectories is left. Where neither tells, its number is filled and reported.
"""

import time
from collections.abc import Collection, Mapping, Sequence

import msgspec
from ulid import ULID

from trajstore.archive.index import Table
from trajstore.archive.manifest import Manifest
from trajstore.archive.pack_arrays import PackArrays
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.rebuild.checks import faults, is_belied, is_needed
from trajstore.archive.rebuild.found_packs import (
    FoundPack,
    PackAbout,
    describe,
    find_packs,
    read_about,
    table_of,
)
from trajstore.archive.rebuild.planned import PlannedStorage
from trajstore.archive.rebuild.tables import lines_told, remove_tables, stored_tables
from trajstore.archive.record import RECORD_FORMAT, Record, encode_record, record_path, require_listed
from trajstore.archive.root import ArchiveInfo, ArchiveRoot
from trajstore.archive.storage.protocol import Storage
from trajstore.archive.verify.pack_check import check_files
from trajstore.archive.verify.place_check import check_record, record_numbers
from trajstore.errors import Conflict, Corrupt

__all__ = ["Rebuilt", "rebuild_records", "set_aside"]

FILLER = "rebuild"
"""Writer of the records that fill a gap."""


class Rebuilt(msgspec.Struct, kw_only=True):
    """What was made anew, and what was found.

    Attributes:
        identity: `archive.json` was.
        records: how many were.
        tables: likewise.
        set_aside: damaged files, under their new names.
        renumbered: packs that were written again under another number, for their own was taken.
        leftovers: packs without a record of which nothing is needed; `trajstore gc` removes them.
        dropped: records whose packs retention had dropped, as was found out, "<pp>/<nnnnnnnn>".
        gaps: records of which nothing is left: they may have named a pack that is gone, or dropped others.
        undone: damaged packs that were given up: the packs that they were compacted from are live again.
        foreign: packs of another run or incarnation, left alone.
        damaged: what cannot be read in packs that got a record.
        unreadable: packs without a record whose list of trajectories cannot be read; their partitions were left alone.
    """

    identity: bool = False
    records: int = 0
    tables: int = 0
    set_aside: list[str] = []
    renumbered: list[str] = []
    leftovers: list[str] = []
    dropped: list[str] = []
    gaps: list[str] = []
    undone: list[str] = []
    foreign: list[str] = []
    damaged: list[str] = []
    unreadable: list[str] = []


def rebuild_records(
    storage: Storage,
    info: ArchiveInfo,
    partition: int,
    done: Rebuilt,
    *,
    digests: bool,
    without: Collection[str],
    undone: Collection[int] = (),
) -> dict[int, Table]:
    """Write the records of a partition that are missing or damaged.

    Args:
        done: the account to keep.
        digests: compare the content of every pack with its record, too.
        without: packs to pass over, though no record has their number and nothing of them can be read.
        undone: numbers of records that are to be taken back: they replaced packs, and now replace none.

    Returns:
        The lookup table of each record, but of those whose pack cannot be read.

    Raises:
        Conflict: an archiver is writing records meanwhile.
        SchemaError: a record of a newer version.
    """
    work = _Partition(storage, info, partition, done, undone)
    work.read(digests=digests)
    if not work.plan(without):
        return {}
    work.write()
    return work.tables()


def set_aside(storage: Storage, path: str, done: Rebuilt) -> None:
    """Keep a damaged file under another name, and make room for a new one."""
    data = storage.read(path)
    number = 0
    while True:
        number += 1
        name = f"{path}.damaged" + (f"-{number}" if number > 1 else "")
        try:
            storage.create(name, data)
        except FileExistsError:
            if storage.read(name) != data:
                continue
        break
    storage.remove([path])
    done.set_aside.append(name)


class _Partition:
    """The work on one partition, in the order `read`, `plan`, `write`."""

    def __init__(
        self, storage: Storage, info: ArchiveInfo, partition: int, done: Rebuilt, undone: Collection[int]
    ) -> None:
        self._storage = storage
        self._info = info
        self._partition = partition
        self._done = done
        self._undone = frozenset(undone)
        self._revived: set[int] = set()
        self._packs = PackArrays(storage)
        self._abouts: dict[str, PackAbout | None] = {}
        self._found: list[FoundPack] = []
        self._sound: dict[int, Record] = {}
        self._damaged: set[int] = set()
        self._new: dict[int, Record] = {}
        self._again: list[FoundPack] = []
        self._stored: dict[tuple[int, int], Table] = {}
        self._digests = False

    def read(self, *, digests: bool) -> None:
        """What is there: sound records, damaged ones, packs."""
        self._digests = digests
        for pack in find_packs(self._storage, self._partition):
            about = read_about(self._storage, pack.name)
            if about is not None and (about.run, about.incarnation) != (self._info.run, self._info.incarnation):
                self._done.foreign.append(pack.name)
            elif pack.number in self._undone:  # also the one that is there where a rebuild was killed
                self._done.undone.append(pack.name)
                self._revived.update(about.replaces if about is not None else ())
            else:
                self._abouts[pack.name] = about
                self._found.append(pack)
        manifest = Manifest(self._storage, self._partition, self._packs, incarnation=self._info.incarnation)
        reader = ArchiveReader(ArchiveRoot(self._storage), self._info)
        by_name = {pack.name: pack for pack in self._found}
        for number in sorted(record_numbers(self._storage, self._partition)):
            findings = list(check_record(self._storage, manifest, self._partition, number))
            try:
                record = manifest.record(number)
            except Corrupt:
                self._damaged.add(number)
                continue
            if number in self._undone:
                if record.pack not in self._done.undone:  # nothing of it is there
                    self._done.undone.append(record.pack)
                self._revived.update(record.replaces)
                self._damaged.add(number)
                continue
            wrong = any(finding.severity == "error" for finding in findings)
            about = self._abouts.get(record.pack)
            if wrong or is_belied(reader, record, by_name, about, digests=digests):
                self._damaged.add(number)
            else:
                self._sound[number] = record

    def plan(self, without: Collection[str]) -> bool:
        """Decide on every missing number and every pack without a record; False where that cannot be done."""
        free, unreadable = self._described({record.pack for record in self._sound.values()})
        self._stored = stored_tables(self._storage, self._partition, incarnation=self._info.incarnation)
        whole = [number for number, records in free.items() if any(_is_whole(record) for record in records)]
        newest = max([*self._sound, *self._damaged, *whole, *(last for _, last in self._stored)], default=0)
        for number in range(1, newest + 1):
            if number not in self._sound and number in free:
                self._new[number] = max(free[number], key=lambda record: (_is_whole(record), record.pack))
        for pack, error in unreadable:
            if self._was_given_up(pack):
                self._done.leftovers.append(pack.name)
            elif pack.number > newest or pack.number in self._sound or pack.number in self._new:
                self._done.damaged.append(f"pack {pack.name} has no record and cannot be read: {error}")
            elif pack.name not in without:
                self._done.unreadable.append(f"{pack.name}: {error}")
        if any(name.startswith(f"{self._partition:02}/") for name in self._done.unreadable):
            return False
        self._fill(newest)
        named = {record.pack for record in (*self._sound.values(), *self._new.values())}
        broken = {pack.name for pack, _ in unreadable}
        rest = [pack for pack in self._found if pack.name not in named and pack.name not in broken]
        if not self._new and not rest:
            return True
        reader = self._as_planned()
        dropped = {number for record in self._new.values() for number in record.drops}
        revived = [self._sound[number] for number in sorted(self._revived - dropped) if number in self._sound]
        for record in (*self._new.values(), *revived):
            self._done.damaged += faults(reader, record)
        for pack in rest:
            if is_needed(reader, pack) and not (self._was_given_up(pack) and self._is_broken(reader, pack, free)):
                self._again.append(pack)
            else:
                self._done.leftovers.append(pack.name)
        return True

    def write(self) -> None:
        """Write the records, oldest first; whoever is killed in between goes on where it was.

        Compactions are taken back before, the newest first: it leads to the others.
        """
        back = sorted(self._undone & self._new.keys(), reverse=True)
        for number in (*back, *sorted(self._new.keys() - self._undone)):
            record = self._new[number]
            if number in self._undone:  # whoever reads meanwhile must not go by what it replaced
                remove_tables(self._storage, self._partition, self._stored, over=number)
            if number in self._damaged:
                set_aside(self._storage, record_path(self._partition, number), self._done)
            self._create(record)
        number = max([*self._sound, *self._new], default=0)
        for pack in self._again:
            number += 1
            record = self._written_again(pack, number)
            self._create(record)
            self._new[number] = record
            self._done.renumbered.append(f"{pack.name} -> {record.pack}")

    def tables(self) -> dict[int, Table]:
        """The lookup table of each record, but of those whose pack cannot be read or is not the record's."""
        records = {**self._sound, **self._new}
        ended = {number for record in records.values() for number in (*record.replaces, *record.drops)}
        lost = {number for record in records.values() for number in record.lost}
        found = {}
        for number, record in sorted(records.items()):
            if number in self._sound and record.pack and number not in lost:
                findings = check_files(self._storage, record, digests=self._digests, ended=number in ended)
                self._done.damaged += [f"pack {record.pack}: {finding.what}" for finding in findings]
            try:
                require_listed(self._storage, record)
                found[number] = table_of(self._packs, record)
            except Corrupt as error:
                if number in lost:
                    found[number] = lines_told(self._stored, record)
                else:
                    self._done.damaged.append(str(error))
        return found

    def _was_given_up(self, pack: FoundPack) -> bool:
        """An earlier rebuild has filled its number."""
        record = self._sound.get(pack.number)
        return record is not None and record.writer == FILLER and not record.pack

    @staticmethod
    def _is_broken(reader: ArchiveReader, pack: FoundPack, free: Mapping[int, Sequence[Record]]) -> bool:
        """Not all of it can be read, though its list can."""
        return any(faults(reader, record) for record in free.get(pack.number, ()) if record.pack == pack.name)

    def _described(self, named: Collection[str]) -> tuple[dict[int, list[Record]], list[tuple[FoundPack, Corrupt]]]:
        """By number the records that packs without one can have; and the packs that can have none."""
        free: dict[int, list[Record]] = {}
        unreadable: list[tuple[FoundPack, Corrupt]] = []
        for pack in self._found:
            if pack.name not in named:
                try:
                    record = describe(self._storage, self._packs, pack)
                    free.setdefault(pack.number, []).append(record)
                except Corrupt as error:
                    unreadable.append((pack, error))
        return free, unreadable

    def _fill(self, newest: int) -> None:
        """Records without a pack for numbers of which none is left, with what can be known of what they dropped."""
        planned = {**self._sound, **self._new}
        replaced = {number for record in planned.values() for number in record.replaces}
        dropped = {number for record in planned.values() for number in record.drops}
        named = {record.pack for record in planned.values()}
        ended = {pack.number for pack in self._found if pack.ended and pack.name in named} - replaced - dropped
        gaps = [number for number in range(1, newest + 1) if number not in planned]
        told: dict[int, set[int]] = {number: set() for number in gaps}
        for (first, last), table in self._stored.items():
            within = [number for number in gaps if first <= number <= last]
            for number in table.dropped - dropped:
                later = [gap for gap in within if gap > number]
                if later:
                    told[later[-1]].add(number)
                    dropped.add(number)
        for number in sorted(ended - dropped):
            later = [gap for gap in gaps if gap > number] or [newest + 1]
            told.setdefault(later[-1], set()).add(number)
            dropped.add(number)
        for number, drops in sorted(told.items()):
            self._new[number] = Record(
                format=RECORD_FORMAT,
                number=number,
                partition=self._partition,
                created=time.time(),
                writer=FILLER,
                drops=sorted(drops),
            )
            self._done.dropped += [f"{self._partition:02}/{one:08}" for one in sorted(drops)]
            if not drops and number not in self._undone and number not in replaced and number not in dropped:
                self._done.gaps.append(f"{self._partition:02}/{number:08}")

    def _as_planned(self) -> ArchiveReader:
        """The archive with the planned records; one whose pack cannot be read counts as without."""
        records = []
        for record in {**self._sound, **self._new}.values():
            try:
                table_of(self._packs, record)
                records.append(record)
            except Corrupt:
                records.append(msgspec.structs.replace(record, pack="", files={}))
        reader = ArchiveReader(ArchiveRoot(PlannedStorage(self._storage, records)), self._info)
        reader.manifest(self._partition).refresh()
        return reader

    def _written_again(self, pack: FoundPack, number: int) -> Record:
        """Copy a pack under another number; returns its record."""
        name = f"{self._partition:02}/{number:08}-{ULID()}"
        files = {path: self._storage.read(f"packs/{pack.name}/{path}") for path in pack.files}
        about = self._abouts[pack.name]
        if about is not None and about.number:
            group = msgspec.json.decode(files["zarr.json"])
            group["attributes"]["trajstore"]["number"] = number
            files["zarr.json"] = msgspec.json.format(msgspec.json.encode(group))
        self._storage.publish(f"packs/{name}", files, lambda _: None)
        sizes = {path: len(data) for path, data in files.items()}
        copy = FoundPack(name, number, name.rpartition("-")[2], sizes)
        return describe(self._storage, self._packs, copy)

    def _create(self, record: Record) -> None:
        try:
            self._storage.create(record_path(record.partition, record.number), encode_record(record))
        except FileExistsError as error:
            raise Conflict(
                f"record {record.number} of partition {record.partition} was written meanwhile; stop the archivers of "
                "the run and rebuild again"
            ) from error
        self._done.records += 1


def _is_whole(record: Record) -> bool:
    """What its pack holds is there, too, not only the list of trajectories."""
    return any(name.startswith("events/") for name in record.files)
