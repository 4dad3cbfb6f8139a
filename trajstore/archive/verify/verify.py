"""Checking an archive from end to end, and against the hot log where there is one. Changes nothing.

It streams: what it holds is one pack per worker, however large the archive. Writers, archivers and compactions may go
on meanwhile.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from trajstore.archive.archived import Archived
from trajstore.archive.index import Table
from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import decode_entries
from trajstore.archive.reader import ArchiveReader, resolve
from trajstore.archive.record import Record
from trajstore.archive.root import ArchiveRoot
from trajstore.archive.verify.agreement import check_agreement
from trajstore.archive.verify.findings import Finding
from trajstore.archive.verify.pack_check import OpenPack, check_files
from trajstore.archive.verify.payload_check import ReadRows
from trajstore.archive.verify.place_check import (
    Tables,
    check_identity,
    check_record,
    check_strays,
    names_own_pack,
    record_numbers,
)
from trajstore.archive.verify.trajectory_check import check_trajectory
from trajstore.entries import partition_of
from trajstore.errors import Corrupt, NotFound, SchemaError
from trajstore.log.reader import HotReader

__all__ = ["Run", "verify"]

_RESTORE = "restore the pack from a copy"


class Run(Protocol):
    """A run as `trajstore.Store` is one: its hot log, and its archive if it has one."""

    @property
    def hot(self) -> HotReader: ...

    @property
    def archive(self) -> ArchiveReader | None: ...

    @property
    def partitions(self) -> int: ...


def verify(
    place: str | os.PathLike[str] | Run,
    *,
    options: Mapping[str, str] | None = None,
    ids: Collection[str] = (),
    packs: Collection[str] = (),
    quick: bool = False,
    workers: int = 1,
    on_record: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Finding]:
    """Check that everything archived is there, is what was written, and makes sense.

    Args:
        place: folder or URL of an archive, folder of an embedded store (its archive alone is checked), or an open
            store, whose hot log is compared with the archive.
        options: of an object store, see `trajstore.open`.
        ids: check these trajectories only.
        packs: check these packs only, named as in records: "07/00000012-01M8...".
        quick: only records, and that the packs' files are there and have their sizes; no digests, no content.
        workers: packs that are checked at a time.
        on_record: hears how many records of how many are done.

    Raises:
        NotFound: there is no archive, or no such trajectory or pack.
        Unavailable: the archive or the server does not answer.
    """
    run = None if isinstance(place, str | os.PathLike) else place
    archive = run.archive if run is not None else None
    root = archive.root if archive is not None else None
    if isinstance(place, str | os.PathLike):
        root = _root(place, options)
    if root is not None:
        bad = list(check_identity(root))
        yield from bad
        if any(finding.severity == "error" for finding in bad):
            return  # without knowing its partitions, nothing can be told about the rest
        reader = ArchiveReader(root, root.require())
        if ids:
            for id in ids:
                yield from _check_id(reader, id, anywhere=run is None or not run.hot.exists(id))
        else:
            yield from _check_all(reader, packs=packs, quick=quick, workers=workers, on_record=on_record)
    if run is not None and not packs and not quick:
        yield from check_agreement(run.hot, archive, ids or _hot_ids(run))


def _root(place: str | os.PathLike[str], options: Mapping[str, str] | None) -> ArchiveRoot:
    root = ArchiveRoot.at(place, options)
    if root.is_local:
        inner = ArchiveRoot.at(os.path.join(root.location, "archive"))
        if not _holds(root, "archive.json") and _holds(inner, "archive.json"):
            return inner
    return root


def _holds(root: ArchiveRoot, path: str) -> bool:
    try:
        root.storage.size(path)
    except FileNotFoundError:
        return False
    return True


def _hot_ids(run: Run) -> Iterator[str]:
    for partition in range(run.partitions):
        yield from sorted(set(run.hot.ids(partition)))


def _check_id(reader: ArchiveReader, id: str, *, anywhere: bool) -> Iterator[Finding]:
    """One trajectory, wherever its parts lie."""
    manifest = reader.manifest(partition_of(id, reader.info.partitions))
    try:
        manifest.refresh()
        archived = manifest.find(id)
    except (Corrupt, SchemaError) as error:
        yield _unreadable(id, error)
        return
    if archived.dropped:
        raise NotFound(f"trajectory {id!r} was in the archive and has been dropped by retention")
    if not archived.parts and anywhere:
        raise NotFound(f"there is no trajectory {id!r} in {reader.root.location}")
    yield from _check_parts(id, archived, reader.packs.rows)


def _check_all(
    reader: ArchiveReader,
    *,
    packs: Collection[str],
    quick: bool,
    workers: int,
    on_record: Callable[[int, int], None],
) -> Iterator[Finding]:
    partitions = range(reader.info.partitions)
    storage = reader.root.storage
    wanted = {int(pack.partition("/")[0]) for pack in packs if pack.partition("/")[0].isdigit()}
    numbers = {p: record_numbers(storage, p) for p in partitions if not packs or p in wanted}
    total = sum(max(found, default=0) for found in numbers.values())
    missing = set(packs)
    done = 0
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="trajstore-verify") as pool:
        for partition, there in numbers.items():
            for count, findings in _check_partition(reader, partition, there, pool, workers, missing, packs, quick):
                yield from findings
                done += count
                on_record(done, total)
    if missing:
        raise NotFound(f"{reader.root.location} has no pack {', '.join(sorted(missing))}")
    if not packs:
        yield from check_strays(reader.root, {p: reader.manifest(p) for p in partitions}, numbers)


def _check_partition(
    reader: ArchiveReader,
    partition: int,
    numbers: Collection[int],
    pool: ThreadPoolExecutor,
    workers: int,
    missing: set[str],
    packs: Collection[str],
    quick: bool,
) -> Iterator[tuple[int, Sequence[Finding]]]:
    """Findings record by record, oldest first; each with how many records they are of."""
    storage, manifest = reader.root.storage, reader.manifest(partition)
    newest = max(numbers, default=0)
    ended: dict[int, Record] = {}
    for number in range(1, newest + 1):
        yield 0, list(check_record(storage, manifest, partition, number))
        record = _record(manifest, number)
        if record is not None and (record.replaces or record.drops):
            ended[number] = record
    gone = {other for record in ended.values() for other in (*record.replaces, *record.drops)}
    lost = {other: record for record in ended.values() for other in record.lost}
    tables = Tables(storage, partition, newest, incarnation=reader.info.incarnation)
    running: deque[Future[list[Finding]]] = deque()
    for number in range(1, newest + 1):
        if not packs:
            yield 0, list(tables.enter(number, ended))
        record = _record(manifest, number)
        wanted = record is not None and (record.pack in packs if packs else True)
        if record is None or not wanted or not names_own_pack(record):
            yield 1, ()
            continue
        missing.discard(record.pack)
        if number in lost:
            yield 1, [_given_up(record, lost[number])]
        elif number in gone:
            running.append(pool.submit(_check_ended, reader, record))
        else:
            running.append(pool.submit(_check_pack, reader, manifest, record, tables.covering(number), quick))
        while len(running) > workers:
            yield 1, running.popleft().result()
    while running:
        yield 1, running.popleft().result()


def _record(manifest: Manifest, number: int) -> Record | None:
    try:
        return manifest.record(number)
    except (Corrupt, SchemaError):
        return None  # told by `check_record`


def _check_pack(
    reader: ArchiveReader, manifest: Manifest, record: Record, tables: Sequence[Table], quick: bool
) -> list[Finding]:
    """Everything about one pack, and about the trajectories whose newest part it holds."""
    findings = list(check_files(reader.root.storage, record, digests=not quick))
    if not quick:
        pack = OpenPack(reader, record)
        findings += pack.check_arrays()
        findings += pack.check_lines()
        findings += pack.check_tables(tables)
        findings += _check_trajectories(reader, manifest, pack)
    if findings and _has_ended(manifest, record.number):
        return []  # a compaction or retention has just removed it
    return findings


def _check_ended(reader: ArchiveReader, record: Record) -> list[Finding]:
    """What stays of a pack that was replaced or dropped."""
    return list(check_files(reader.root.storage, record, digests=True, ended=True))


def _given_up(record: Record, by: Record) -> Finding:
    return Finding(
        kind="given-up",
        severity="information",
        pack=record.pack,
        what=f"the pack was damaged, and record {by.number} has given it up: {record.counts.trajectories} trajectories "
        "had a part in it",
        what_to_do="",
    )


def _check_trajectories(reader: ArchiveReader, manifest: Manifest, pack: OpenPack) -> Iterator[Finding]:
    try:
        manifest.refresh()
    except (Corrupt, SchemaError) as error:
        if pack.lines:
            yield Finding(
                kind="unchecked",
                severity="warning",
                pack=pack.record.pack,
                what=f"the pack's trajectories could not be checked, for their other packs cannot be found: {error}",
                what_to_do="mend what is told of this partition, then verify again",
            )
        return
    for line in pack.lines:
        try:
            archived = manifest.find(line.id)
        except (Corrupt, SchemaError) as error:
            yield _unreadable(line.id, error)
            continue
        if archived.dropped:
            continue
        if not any(record.number == pack.record.number for record, _ in archived.parts):
            if not _has_ended(manifest, pack.record.number):
                yield _lost(line.id, pack.record)
        elif max(record.number for record, _ in archived.parts) == pack.record.number:
            yield from _check_parts(line.id, archived, pack.read)


def _check_parts(id: str, archived: Archived, read: ReadRows) -> Iterator[Finding]:
    entries = []
    try:
        for record, line in archived.parts:
            text = read(record.pack, "events", line.offset, line.offset + line.length).tobytes()
            entries += decode_entries(text, pack=record.pack, id=id)
    except (Corrupt, SchemaError) as error:
        yield _unreadable(id, error)
        return
    yield from check_trajectory(id, archived.parts, resolve(entries), read)


def _has_ended(manifest: Manifest, number: int) -> bool:
    try:
        manifest.refresh()
    except (Corrupt, SchemaError):
        return False
    return not manifest.is_live(number)


def _lost(id: str, record: Record) -> Finding:
    return Finding(
        kind="lookup-table",
        severity="error",
        pack=record.pack,
        trajectory=id,
        what="the lookup tables do not lead from the trajectory to this pack, which holds a part of it",
        what_to_do="`trajstore rebuild` makes the tables anew",
    )


def _unreadable(id: str, error: Exception) -> Finding:
    return Finding(kind="payload", severity="error", trajectory=id, what=str(error), what_to_do=_RESTORE)
