"""The backlog: what the hot log holds that is not archived yet, how long it has waited, and how full the server is.

Everything is read from where it stands, at the cost of one pass over the summaries and one over the hints that wait.
Nothing is counted on the side, so there is nothing that a crash could put wrong.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec

from trajstore.archive.manifest import Manifest
from trajstore.archive.reader import ArchiveReader
from trajstore.events import EventId
from trajstore.log.feed import ARCHIVER, Hint, parse_stream
from trajstore.log.keys import Keys
from trajstore.log.reader import HotReader
from trajstore.log.wire import Wire, fullest, reply_fields
from trajstore.summary import Summary

__all__ = ["Backlog", "PartitionBacklog", "measure_backlog"]

_PAGE = 1000


class PartitionBacklog(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in one partition.

    Attributes:
        trajectories: with events or notes that are not archived.
        nbytes: payload bytes of those events and notes.
        seconds: age of the oldest hint that no archiver has acknowledged, by the server's clock; 0 for none. An open
            segment gives no hint before it closes.
    """

    trajectories: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What `store.backlog` returns.

    Attributes:
        partitions: each one's, by number.
        used_memory: bytes that the server uses, the fullest of a cluster; writers stop at 90 % of `maxmemory`. 0 if it
            does not say.
        maxmemory: bytes that it may use, 0 for no limit.
    """

    partitions: tuple[PartitionBacklog, ...]
    used_memory: int = 0
    maxmemory: int = 0

    @property
    def trajectories(self) -> int:
        """Of all partitions."""
        return sum(partition.trajectories for partition in self.partitions)

    @property
    def nbytes(self) -> int:
        """Payload bytes of all partitions."""
        return sum(partition.nbytes for partition in self.partitions)

    @property
    def seconds(self) -> float:
        """The longest that anything has waited."""
        return max((partition.seconds for partition in self.partitions), default=0.0)


def measure_backlog(wire: Wire, keys: Keys, hot: HotReader, archive: ArchiveReader | None) -> Backlog:
    """Look at all partitions of a run.

    Args:
        archive: None while the run has none: then everything waits.

    Raises:
        Unavailable: the server or the archive did not answer.
        Corrupt: something cannot be read.
    """
    used, limit = fullest([one.exchange([("INFO", "memory")])[0] for one in wire.servers()])
    return Backlog(
        partitions=tuple(
            _measure(wire, keys, hot, None if archive is None else archive.manifest(partition), partition)
            for partition in range(keys.partitions)
        ),
        used_memory=used,
        maxmemory=limit,
    )


def _measure(wire: Wire, keys: Keys, hot: HotReader, manifest: Manifest | None, partition: int) -> PartitionBacklog:
    waiting = dict(_waiting_entries(wire, keys, manifest, hot.summaries(partition)))
    oldest = ""
    noted: set[str] = set()
    for hint in _waiting_hints(wire, keys, partition):
        oldest = oldest or hint.at
        if hint.is_note:
            noted.add(hint.id)
    for id in noted:
        notes, nbytes = _waiting_notes(hot, manifest, id)
        if notes:
            waiting[id] = waiting.get(id, 0) + nbytes
    seconds = _age(wire, oldest) if oldest else 0.0
    return PartitionBacklog(trajectories=len(waiting), nbytes=sum(waiting.values()), seconds=seconds)


def _waiting_entries(
    wire: Wire, keys: Keys, manifest: Manifest | None, summaries: Iterator[Summary]
) -> Iterator[tuple[str, int]]:
    """Trajectories with events that are not archived, and their payload bytes; one may come twice."""
    while page := list(islice(summaries, _PAGE)):
        lengths = wire.exchange([("XLEN", keys.entries(summary.id)) for summary in page])
        if manifest is not None:
            manifest.refresh()  # after the hot log was read: what is archived meanwhile does not wait
        for summary, length in zip(page, lengths, strict=True):
            if length == 0:  # all of it was archived and trimmed; or its keys have expired
                continue
            archived = None if manifest is None else manifest.find(summary.id).summary
            if archived is None:
                yield summary.id, summary.nbytes
            elif EventId.parse(archived.last) < EventId.parse(summary.last):
                yield summary.id, max(0, summary.nbytes - archived.nbytes)


def _waiting_notes(hot: HotReader, manifest: Manifest | None, id: str) -> tuple[int, int]:
    """Notes of a trajectory that are not archived, and their payload bytes."""
    _, notes = hot.read(id)
    if manifest is not None:
        manifest.refresh()
    last = 0 if manifest is None else manifest.find(id).last_note
    fresh = [note for note in notes if note.at.epoch > last]
    payloads = [event.payload for note in fresh for event in note.events(note=True)]
    return len(fresh), sum(payload.nbytes for payload in payloads if payload is not None)


def _waiting_hints(wire: Wire, keys: Keys, partition: int) -> Iterator[Hint]:
    """Hints from the oldest that the archiver has not acknowledged on, oldest first."""
    feed = keys.feed(partition)
    groups, pending = wire.call_all([("XINFO", "GROUPS", feed), ("XPENDING", feed, ARCHIVER)])
    delivered = _last_delivered(groups)
    start = f"({delivered}" if pending[1] is None else pending[1].decode()
    while entries := parse_stream(wire.call("XRANGE", feed, start, "+", "COUNT", _PAGE)):
        for at, fields in entries:
            yield Hint(partition, at, *(fields.get(name, b"").decode(errors="replace") for name in (b"t", b"k", b"e")))
        start = f"({entries[-1][0]}"


def _age(wire: Wire, at: str) -> float:
    """Seconds since the server gave this feed id, by its own clock."""
    seconds, micros = wire.call("TIME")
    return max(0.0, int(seconds) + int(micros) / 1e6 - int(at.partition("-")[0]) / 1e3)


def _last_delivered(groups: Iterable[Sequence[Any]]) -> str:
    """Newest id that the archiver's group was given, from XINFO GROUPS."""
    fields = map(reply_fields, groups)
    return next(str(group[b"last-delivered-id"].decode()) for group in fields if group[b"name"] == ARCHIVER.encode())
