"""Retention: which packs may go for good, by age or by name, and the record that drops them.

It works by pack and not by trajectory: one record per partition drops any number of packs, and with them every
trajectory that has a part in one. Their files go later (`garbage.py`); their ids stay taken.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from trajstore.archive.manifest import Manifest
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import RECORD_FORMAT, Record
from trajstore.errors import Conflict, Fenced, NotFound
from trajstore.log.keys import Keys
from trajstore.log.wire import Wire

__all__ = ["Busy", "drop", "expired", "named", "nothing_hot", "still_hot"]

_AT_ONCE = 1000

Busy: TypeAlias = Callable[[Sequence[str]], set[str]]
"""Which of these trajectories the hot log still holds something of."""


def expired(manifest: Manifest, *, before: float, busy: Busy) -> list[Record]:
    """Live packs all of whose trajectories have come to their end before a moment, in this and in every other pack.

    A trajectory that the hot log still holds something of, an aborted one that is being resumed say, keeps its packs.

    Args:
        before: Unix seconds, compared with the writers' clocks.

    Raises:
        Corrupt: a pack's list of trajectories cannot be read.
    """
    manifest.refresh()
    found = []
    for record in manifest.live():
        if max(record.newest, record.created) >= before:  # a writer's clock may be far behind
            continue
        ids = _settled(manifest, record, before)
        if ids is not None and not busy(ids):
            found.append(record)
    return found


def named(reader: ArchiveReader, packs: Iterable[str], *, whole: bool, busy: Busy) -> list[Record]:
    """Live packs by their names, if they may go.

    Args:
        whole: also where trajectories in them have parts in packs that stay: these are dropped, too.

    Raises:
        NotFound: there is no such live pack.
        Conflict: a trajectory has a part in a pack that stays, or in the hot log.
    """
    records = [_live_record(reader, pack) for pack in sorted(set(packs))]
    going = {record.pack for record in records}
    for record in records:
        manifest = reader.manifest(record.partition)
        ids = [line.id for line in manifest.lines(record)]
        for id in ids if not whole else ():
            stays = next((other.pack for other, _ in manifest.find(id).parts if other.pack not in going), None)
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
    return records


def drop(reader: ArchiveReader, partition: int, records: Sequence[Record], *, writer: str) -> Record:
    """Drop packs of one partition for good, all in one record.

    Raises:
        Fenced: a record was written meanwhile, or one of them has been replaced or dropped; look again.
    """
    manifest = reader.manifest(partition)
    number = manifest.refresh() + 1
    ended = [record.number for record in records if not manifest.is_live(record.number)]
    if ended:
        raise Fenced(f"the packs of records {ended} of partition {partition} have been replaced or dropped meanwhile")
    record = Record(
        format=RECORD_FORMAT,
        number=number,
        partition=partition,
        created=time.time(),
        writer=writer,
        drops=sorted(record.number for record in records),
    )
    manifest.append(record, [])
    return record


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


def _settled(manifest: Manifest, record: Record, before: float) -> list[str] | None:
    """Ids of a pack's trajectories if the newest archived entry of each is old enough, else None."""
    ids = []
    for line in manifest.lines(record):
        if line.summary is not None and line.summary.updated >= before:
            return None
        summary = manifest.find(line.id).summary
        if summary is not None and summary.updated >= before:
            return None
        ids.append(line.id)
    return ids


def _live_record(reader: ArchiveReader, pack: str) -> Record:
    folder, _, name = pack.partition("/")
    text = name.partition("-")[0]
    partition, number = (int(part) if part.isdecimal() and part.isascii() else -1 for part in (folder, text))
    if 0 <= partition < reader.info.partitions and number > 0:
        manifest = reader.manifest(partition)
        if number <= manifest.refresh() and manifest.is_live(number):
            record = manifest.record(number)
            if record.pack == pack:
                return record
    raise NotFound(
        f"{reader.root.location} has no live pack {pack!r}; packs are named <partition>/<number>-<ULID>, as in the "
        "manifest's records"
    )
