"""What is derived from the packs, made anew from them: `archive.json`, manifest records, lookup tables.

Nothing is deleted but wrong lookup tables: a damaged file gets another name. Whatever is there and sound stays. It may
be interrupted at any moment and run again.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from trajstore.archive.pack_arrays import PackArrays
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.rebuild.checks import faults
from trajstore.archive.rebuild.found_packs import describe, find_packs, lines_of, pack_names, read_about
from trajstore.archive.rebuild.records import Rebuilt, rebuild_records, set_aside
from trajstore.archive.rebuild.tables import rebuild_tables
from trajstore.archive.record import Record
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.archive.sealed import seal
from trajstore.archive.storage.protocol import Storage
from trajstore.archive.upkeep.originals import is_sound, known, originals_of
from trajstore.archive.verify.place_check import check_identity, record_numbers
from trajstore.entries import partition_of
from trajstore.errors import Conflict, Corrupt, NotFound
from trajstore.limits import MAX_PARTITIONS

__all__ = ["Rebuilt", "rebuild_archive"]

_INFO = "archive.json"


def rebuild_archive(
    root: ArchiveRoot,
    *,
    digests: bool = False,
    without: Collection[str] = (),
    partitions: int | None = None,
    on_partition: Callable[[int, int], None] = lambda done, total: None,
) -> Rebuilt:
    """Make anew what is missing or damaged. No archiver may work on the archive meanwhile.

    Args:
        digests: compare the content of every pack with its record, too: finds a record whose digest is wrong.
        without: packs to be given up, "07/00000012-01M8...": those that no record names and that cannot be read, and
            damaged ones whose compaction can be taken back, so that the packs that they replaced are live again.
        partitions: P, needed only where neither `archive.json` nor a pack tells.
        on_partition: hears how many partitions of how many are done.

    Raises:
        NotFound: nothing here is an archive's, or there is no such pack as one of `without`.
        Conflict: packs of several runs, and no `archive.json` to tell whose archive this is; `partitions` is needed, or
            is not what the archive says; one of `without` need not be given up; an archiver is at work.
        SchemaError: written by a newer trajstore.
    """
    done = Rebuilt()
    info = _sound_identity(root)
    said = _Said.by_packs(root.storage, info)
    if info is not None and said.runs:
        info = None
    found = info or said.identity(root, partitions)
    if partitions not in (None, found.partitions):
        raise Conflict(f"{root.location} has {found.partitions} partitions, not {partitions}; leave out --partitions")
    undone: dict[int, set[int]] = {}
    for pack in sorted(without):
        numbers = _without(root, found, pack)
        undone.setdefault(int(pack.partition("/")[0]), set()).update(numbers)
    for partition in range(found.partitions):
        back = undone.get(partition, ())
        tables = rebuild_records(root.storage, found, partition, done, digests=digests, without=without, undone=back)
        done.tables += rebuild_tables(root.storage, partition, tables, incarnation=found.incarnation)
        on_partition(partition + 1, found.partitions)
    if info is None:  # last: until then a lost manifest is not taken for a whole one
        with contextlib.suppress(FileNotFoundError):
            set_aside(root.storage, _INFO, done)
        try:
            root.storage.create(_INFO, seal(found))
        except FileExistsError as error:
            raise Conflict(f"somebody else has written {root.location}/{_INFO} meanwhile; rebuild again") from error
        done.identity = True
    return done


def _without(root: ArchiveRoot, info: ArchiveInfo, name: str) -> set[int]:
    """Numbers of the records of compactions that are taken back with a pack; none for one that nothing is known of.

    Raises:
        NotFound: there is no such pack.
        Conflict: it need not be given up, or there is another way.
    """
    folder = name.partition("/")[0]
    partition = int(folder) if folder.isdecimal() and folder.isascii() else -1
    is_there = 0 <= partition < info.partitions
    reader = ArchiveReader(root, info)
    records = _records(reader, partition) if is_there else []
    packs = find_packs(root.storage, partition) if is_there else []
    named = next((one for one in records if one.pack == name), None)
    pack = next((one for one in packs if one.name == name), None)
    record = named
    if pack is not None and record is None:
        try:
            record = describe(root.storage, PackArrays(root.storage), pack)
        except Corrupt:
            return set()
    if record is None:
        raise NotFound(f"{root.location} has no pack {name!r} to be rebuilt without; packs are named as below packs/")
    is_ended = any(record.number in (*other.replaces, *other.drops) for other in records)
    if not is_ended and (not is_sound(root.storage, record) if named else faults(reader, record)):
        originals = originals_of(root.storage, reader.manifest(partition), record)
        if originals.packs:  # but for what a rebuild that was killed has done already
            return originals.undone - {one.number for one in records if not one.pack}
    if named:
        raise Conflict(
            f"pack {name} has a record, and is not a damaged pack that others which it was compacted from can stand "
            "in for, so nothing is rebuilt without it. A damaged one is given up with "
            f"`trajstore gc {root.location} --pack {name} --lost`"
        )
    raise Conflict(f"pack {name} can be read, so a rebuild takes it in if it is needed; leave out --without")


def _records(reader: ArchiveReader, partition: int) -> list[Record]:
    """Those of a partition that can be read."""
    found = (known(reader.manifest(partition), one) for one in record_numbers(reader.root.storage, partition))
    return [record for record in found if record is not None]


def _sound_identity(root: ArchiveRoot) -> ArchiveInfo | None:
    """`archive.json`, None if it is missing or damaged."""
    try:
        info = root.info()
    except Corrupt:
        return None
    if info is None or any(finding.severity == "error" for finding in check_identity(root)):
        return None
    return info


class _Said(NamedTuple):
    """What the packs say about whose archive this is.

    Attributes:
        runs: (run, incarnation).
        partitions: P by their word; packs of version 1 do not tell.
        samples: a pack of each partition.
    """

    runs: set[tuple[str, str]]
    partitions: set[int]
    samples: dict[int, str]

    @classmethod
    def by_packs(cls, storage: Storage, info: ArchiveInfo | None) -> "_Said":
        """What all packs say; nothing, if one of them agrees with `archive.json`."""
        said = cls(set(), set(), {})
        for pack in pack_names(storage):
            about = read_about(storage, pack)
            if about is None:
                continue
            if (
                info is not None
                and (about.run, about.incarnation) == (info.run, info.incarnation)
                and about.partitions in (0, info.partitions)
            ):
                return cls(set(), set(), {})
            said.runs.add((about.run, about.incarnation))
            said.partitions.update({about.partitions} - {0})
            said.samples[int(pack.partition("/")[0])] = pack
        return said

    def identity(self, root: ArchiveRoot, partitions: int | None) -> ArchiveInfo:
        """`archive.json` by their word.

        Raises:
            NotFound: there are none.
            Conflict: they contradict each other, or P cannot be known.
        """
        if not self.runs:
            raise NotFound(
                f"there is no archive in {root.location}: neither archive.json nor packs that say whose they are"
            )
        if len(self.runs) > 1 or len(self.partitions) > 1:
            raise Conflict(
                f"{root.location} holds packs of several runs or incarnations: {sorted(self.runs)}; restore "
                "archive.json from a copy, or move away the packs that do not belong here"
            )
        known = self.partitions or set(_possible(root.storage, self.samples))
        if partitions is not None:
            known &= {partitions}
            if not known:
                raise Conflict(
                    f"--partitions {partitions}: the packs in {root.location} lie where they would not be then"
                )
        if len(known) != 1:
            raise Conflict(
                f"the packs in {root.location} are of version 1 and do not tell the run's number of partitions; give "
                f"it, --partitions: it may be {', '.join(map(str, sorted(known)[:8]))}"
            )
        ((run, incarnation),) = self.runs
        return ArchiveInfo(format=ARCHIVE_FORMAT, run=run, incarnation=incarnation, partitions=min(known))


def _possible(storage: Storage, samples: Mapping[int, str]) -> Iterator[int]:
    """Numbers of partitions by which the trajectories of these packs lie where they lie."""
    packs = PackArrays(storage)
    places = [(line.id, partition) for partition, pack in samples.items() for _, line in lines_of(packs, pack)]
    for count in range(max(samples) + 1, MAX_PARTITIONS + 1):
        if all(partition_of(id, count) == partition for id, partition in places):
            yield count
