"""Retention: which packs may go for good, by age, by name or as damaged, and the record that drops them.

It works by pack and not by trajectory: one record per partition drops any number of packs, and with them every
trajectory that has a part in one. Their files go later (`garbage.py`); their ids stay taken.

A trajectory may be gone on with at any moment. Until the record is there, that keeps its packs: the hot log is asked
after the manifest was read, and again right before the record, and a record written since by an archiver makes the drop
`Fenced`. Once the record is there the trajectory is gone, and with it what a writer that came too late has appended:
`free_dropped` removes that, as the archiver does that finds it, and the writer's next append is refused.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from trajstore.archive.manifest import Manifest
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import RECORD_FORMAT, Record
from trajstore.archive.trim import free
from trajstore.archive.upkeep.ledger import Ledger, Noted, noted, numbers_of
from trajstore.archive.upkeep.originals import originals_of
from trajstore.archive.verify.pack_check import check_files
from trajstore.errors import Conflict, Corrupt, Fenced, NotFound
from trajstore.log.keys import Keys
from trajstore.log.reader import HotReader
from trajstore.log.wire import Wire

__all__ = [
    "Busy",
    "drop",
    "expired",
    "free_dropped",
    "given_up",
    "held_by",
    "named",
    "nothing_hot",
    "still_hot",
]

log = logging.getLogger(__name__)

_AT_ONCE = 1000

Busy: TypeAlias = Callable[[Sequence[str]], set[str]]
"""Which of these trajectories the hot log still holds something of."""


def expired(
    ledger: Ledger, *, before: float, busy: Busy, on_corrupt: Callable[[Corrupt], None] | None = None
) -> list[Noted]:
    """Live packs all of whose trajectories have come to their end before a moment, in this and in every other pack.

    An open trajectory keeps its packs however old it is, and so does one that the hot log still holds something of, an
    aborted one that is being resumed say.

    Args:
        ledger: of the partition; it is read on.
        before: Unix seconds, compared with the writers' clocks.
        on_corrupt: hears which records and packs cannot be read; these stay, and the packs of trajectories in them.

    Raises:
        Corrupt: without `on_corrupt`, if a record or a pack's list of trajectories cannot be read.
    """
    ledger.read()

    def tell(error: Corrupt) -> None:
        if on_corrupt is None:
            raise error
        on_corrupt(error)

    for error in ledger.errors:
        tell(error)
    if ledger.failure is not None:
        return []
    found, unfinished = [], []
    for one in ledger.live():
        if max(one.newest, one.created) >= before:  # a writer's clock may be far behind
            continue
        try:
            ids, still_open = _settled(ledger.manifest, one, before)
        except Corrupt as error:
            tell(error)
            continue
        if still_open:
            unfinished.append(still_open)
        elif ids is not None and not busy(ids):
            found.append(one)
    if unfinished:
        log.warning(
            "%d packs stay however old they are, for trajectories in them are open, %s among them. Close or delete it, "
            "or drop packs by name",
            len(unfinished),
            unfinished[0],
        )
    return found


def named(reader: ArchiveReader, packs: Iterable[str], *, whole: bool, busy: Busy) -> list[Noted]:
    """Live packs by their names, if they may go.

    Args:
        whole: also where trajectories in them have parts in packs that stay: these are dropped, too.

    Raises:
        NotFound: there is no such live pack.
        Conflict: a trajectory has a part in a pack that stays, or in the hot log.
        Corrupt: a pack's list of trajectories cannot be read.
    """
    records = [_record_of(reader, pack) for pack in sorted(set(packs))]
    going = {record.pack for record in records}
    for record in records:
        manifest = reader.manifest(record.partition)
        ids = [line.id for line in manifest.lines(record)]
        for id in ids if not whole else ():
            parts = manifest.find(id, listed=[record.number]).parts
            stays = next((other.pack for other, _ in parts if other.pack not in going), None)
            if stays is not None:
                raise Conflict(
                    f"trajectory {id} lies in pack {record.pack} and also in {stays}, which would stay. Drop both, or "
                    "drop such trajectories as a whole (--whole-trajectories)"
                )
        hot = busy(ids)
        if hot:
            raise Conflict(
                f"pack {record.pack} cannot be dropped: the hot log still holds something of trajectory {min(hot)}. "
                "Close it and let an archiver archive it, or delete it"
            )
    return [noted(record) for record in records]


def given_up(reader: ArchiveReader, packs: Collection[str]) -> list[Noted]:
    """Packs by their names that are damaged and to be given up: live ones, and dropped ones for their lists.

    Raises:
        NotFound: there is no such live pack, nor a dropped one that was not given up before.
        Conflict: the files of one are what its record says, or the packs that it was compacted from are still there.
        Corrupt: the manifest cannot be read, or another pack than these keeps it from being read.
    """
    found = []
    for pack in sorted(set(packs)):
        record = _record_of(reader, pack, giving_up=packs)
        manifest = reader.manifest(record.partition)
        dropped = manifest.has_dropped(record.number)
        findings = check_files(reader.root.storage, record, digests=True, ended=dropped)
        if not any(finding.severity == "error" for finding in findings):
            raise Conflict(
                f"pack {pack} is not damaged: its files are what its record says. A sound pack is dropped without "
                "--lost, and then nothing is dropped that is still being written"
            )
        originals = originals_of(reader.root.storage, manifest, record).packs if not dropped else ()
        if originals:
            raise Conflict(
                f"pack {pack} is damaged, but {len(originals)} packs that it was compacted from are still there and "
                f"sound, {originals[0]} among them. `trajstore rebuild {reader.root.location} --without {pack}` gives "
                "it up and makes them live again; stop the run's archivers before"
            )
        found.append(noted(record))
    return found


def held_by(reader: ArchiveReader, one: Noted) -> list[str] | None:
    """Ids of the trajectories that have a part in a pack; None where its list cannot be read."""
    manifest = reader.manifest(one.partition)
    try:
        return [line.id for line in manifest.lines(one)]
    except Corrupt:
        return None


def drop(
    reader: ArchiveReader,
    partition: int,
    records: Sequence[Noted],
    *,
    number: int,
    writer: str,
    busy: Busy,
    lost: Collection[int] = (),
) -> Record:
    """Drop packs of one partition for good, all in one record.

    Args:
        number: of the record, one above the newest that was known when the packs were chosen.
        busy: asked once more right before the record is written.
        lost: numbers of those among them that are damaged and given up, whatever the hot log holds of them.

    Raises:
        Fenced: a record was written meanwhile, one of them has been replaced or dropped, or a trajectory in one is gone
            on with; look again.
        Corrupt: the manifest cannot be read.
    """
    manifest = reader.manifest(partition)
    manifest.refresh(without=lost)
    ended = [
        record.number
        for record in records
        if not manifest.is_live(record.number) and not (record.number in lost and manifest.has_dropped(record.number))
    ]
    if ended:
        raise Fenced(f"the packs of records {ended} of partition {partition} have been replaced or dropped meanwhile")
    for one in records:
        hot = busy([line.id for line in manifest.lines(one)]) if one.number not in lost else ()
        if hot:
            raise Fenced(f"trajectory {min(hot)} in pack {one.pack} has been gone on with meanwhile")
    record = Record(
        format=RECORD_FORMAT,
        number=number,
        partition=partition,
        created=time.time(),
        writer=writer,
        drops=sorted(record.number for record in records),
        lost=sorted(lost),
    )
    manifest.append(record, [])
    return record


def free_dropped(wire: Wire, keys: Keys, hot: HotReader, manifest: Manifest, partition: int) -> list[str]:
    """Remove what a hot log holds of a partition's dropped trajectories; returns their ids.

    Raises:
        Unavailable: the server did not answer; do it again.
    """
    manifest.refresh()
    gone = [summary.id for summary in hot.summaries(partition) if manifest.is_dropped(summary.id)]
    free(wire, keys, gone)
    return gone


def nothing_hot(ids: Sequence[str]) -> set[str]:
    """For an archive whose server is gone."""
    return set()


def still_hot(wire: Wire, keys: Keys) -> Busy:
    """Asks a run's hot log, a thousand trajectories in one round trip.

    What it returns raises Unavailable where the server does not answer.
    """

    def busy(ids: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            lengths = wire.call_all([("XLEN", key) for id in some for key in (keys.entries(id), keys.notes(id))])
            found.update(id for id, *held in zip(some, lengths[::2], lengths[1::2], strict=True) if any(held))
        return found

    return busy


def _settled(manifest: Manifest, one: Noted, before: float) -> tuple[list[str] | None, str]:
    """Ids of a pack's trajectories if the newest archived entry of each is old enough, else None; and an open one's."""
    ids = []
    still_open = ""
    for line in manifest.lines(one):
        if line.summary is not None and line.summary.updated >= before:
            return None, ""
        summary = manifest.find(line.id, listed=[one.number]).summary
        if summary is not None and summary.updated >= before:
            return None, ""
        if summary is not None and summary.status == "open":
            still_open = still_open or line.id
        ids.append(line.id)
    return ids, still_open


def _record_of(reader: ArchiveReader, pack: str, *, giving_up: Collection[str] = ()) -> Record:
    """The record of a live pack; of one to be given up also where it was dropped before."""
    folder, _, name = pack.partition("/")
    text = name.partition("-")[0]
    partition, number = (int(part) if part.isdecimal() and part.isascii() else -1 for part in (folder, text))
    if 0 <= partition < reader.info.partitions and number > 0:
        manifest = reader.manifest(partition)
        newest = manifest.refresh(without=numbers_of(giving_up, partition))
        wanted = manifest.is_live(number) or (
            giving_up and manifest.has_dropped(number) and not manifest.is_given_up(number)
        )
        if number <= newest and wanted:
            try:
                record = manifest.record(number)
            except Corrupt as error:
                raise Corrupt(
                    f"{error}. `trajstore rebuild` makes the record anew from its pack, or says how to go on without"
                ) from error
            if record.pack == pack:
                return record
    raise NotFound(
        f"{reader.root.location} has no live pack {pack!r}; packs are named <partition>/<number>-<ULID>, as in the "
        "manifest's records"
    )
