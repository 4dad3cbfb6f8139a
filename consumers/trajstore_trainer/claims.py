"""What the consumers of a group have in hand: kept fresh by its holder, and taken over from the dead.

A dataset's consumer is named after its place in the job, `rank-3.0:` (rank and DataLoader worker) and a ULID, so that
whoever starts in a place again finds what was in hand there, and takes it from a predecessor that is still alive, too.
The server decides each time who has an entry:

- To keep is XREADGROUP over the consumer's own pending entries. It makes them fresh again and tells which they are, and
  cannot touch what others have claimed meanwhile.
- To take over is XCLAIM with the least idle time that the entry must have: the lease for what is another's, the idle
  time just seen for what was a predecessor's. Of two that try, one gets it, and a holder that came back keeps it.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ulid import ULID

from trajstore.log.groups import sign_off
from trajstore.log.keys import Keys
from trajstore.log.wire import Command, Wire, reply_fields
from trajstore.ready import Delivery, EntryPlace, parse_deliveries

__all__ = ["Claims", "Slot", "consumer_name", "slot_of"]

log = logging.getLogger(__name__)

_PAGE = 500
_ROUNDS = 20
_NAME = re.compile(r"rank-(\d+)\.(\d+):")


class Slot(NamedTuple):
    """A consumer's place in the job."""

    rank: int
    worker: int


class _Consumer(NamedTuple):
    partition: int
    name: str
    pending: int
    idle: float


def consumer_name(slot: Slot) -> str:
    """A name in this place that nobody had."""
    return f"rank-{slot.rank}.{slot.worker}:{ULID()}"


def slot_of(name: str) -> Slot | None:
    """The place of a dataset's consumer; None for any other consumer."""
    found = _NAME.match(name)
    return None if found is None else Slot(int(found[1]), int(found[2]))


class Claims:
    """One consumer's dealings with the claims of its group.

    Args:
        group: consumer group, which exists.
        consumer: name.
        lease: seconds after which a silent consumer counts as dead.
    """

    def __init__(self, wire: Wire, keys: Keys, *, group: str, consumer: str, lease: float) -> None:
        self._wire = wire
        self._keys = keys
        self._group = group
        self._consumer = consumer
        self._lease = lease

    def keep(self) -> set[EntryPlace]:
        """Make what this consumer has fresh again, and tell what that is."""
        after = dict.fromkeys(range(self._keys.partitions), "0-0")
        mine: set[EntryPlace] = set()
        while after:
            streams = [self._keys.ready(partition) for partition in after]
            reply = self._wire.call(
                "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", _PAGE,
                "STREAMS", *streams, *after.values(),
            )  # fmt: skip
            pages = {name.decode(): [entry[0].decode() for entry in entries] for name, entries in reply or []}
            for partition, stream in zip(list(after), streams, strict=True):
                page = pages.get(stream, [])
                mine.update(EntryPlace(partition, at) for at in page)
                if len(page) == _PAGE:
                    after[partition] = page[-1]
                else:
                    del after[partition]
        return mine

    def adopt(self, is_predecessor: Callable[[Slot], bool]) -> list[Delivery]:
        """Take everything that earlier consumers of this one's place have, alive or not.

        Args:
            is_predecessor: whether this consumer follows those of a place; its own is one of these.
        """
        found: list[Delivery] = []
        for _ in range(_ROUNDS):
            missed = 0
            for consumer in self._others():
                slot = slot_of(consumer.name)
                if slot is not None and is_predecessor(slot):
                    for seen_at, page in self._pending(consumer):
                        claimed = self._claim_as_seen(consumer.partition, page, seen_at)
                        found += claimed
                        missed += len(page) - len(claimed)
            if not missed:
                break
        else:
            log.warning("%d entries of an earlier %s stay with it, for it keeps using them", missed, self._consumer)
        return found

    def take_over(self, count: int, *, may: Callable[[str], bool]) -> list[Delivery]:
        """Take up to `count` entries of consumers that have been silent for the lease.

        Args:
            may: asked about each with its name.
        """
        found: list[Delivery] = []
        for consumer in self._others():
            if consumer.idle < self._lease or not may(consumer.name):
                continue
            for _, page in self._pending(consumer, idle=self._lease):
                ids = [at for at, _ in page[: count - len(found)]]
                if ids:
                    reply = self._wire.call(*self._xclaim(consumer.partition, int(self._lease * 1000), *ids))
                    found += parse_deliveries(consumer.partition, reply)
                if len(found) >= count:
                    return found
        return found

    def owners(self, places: Sequence[EntryPlace]) -> list[str | None]:
        """Who has each of these entries; None for one that was acknowledged."""
        replies = self._wire.call_all(
            [("XPENDING", self._keys.ready(one.partition), self._group, one.at, one.at, 1) for one in places]
        )
        return [reply[0][1].decode() if reply else None for reply in replies]

    def read(self, places: Sequence[EntryPlace]) -> list[Delivery]:
        """These entries, as far as they have not been trimmed."""
        replies = self._wire.call_all([("XRANGE", self._keys.ready(one.partition), one.at, one.at) for one in places])
        return [
            delivery
            for place, reply in zip(places, replies, strict=True)
            for delivery in parse_deliveries(place.partition, reply)
        ]

    def leave(self) -> None:
        """Remove this consumer where it has nothing in hand; its thread reads no more."""
        streams = [self._keys.ready(partition) for partition in range(self._keys.partitions)]
        sign_off(self._wire, streams, self._group, self._consumer)

    def _others(self) -> list[_Consumer]:
        """The other consumers that have something in hand."""
        partitions = range(self._keys.partitions)
        replies = self._wire.call_all(
            [("XINFO", "CONSUMERS", self._keys.ready(one), self._group) for one in partitions]
        )
        found = []
        for partition, reply in zip(partitions, replies, strict=True):
            for flat in reply:
                fields = reply_fields(flat)
                one = _Consumer(partition, fields[b"name"].decode(), fields[b"pending"], fields[b"idle"] / 1000)
                if one.name != self._consumer and one.pending:
                    found.append(one)
        return found

    def _pending(self, consumer: _Consumer, *, idle: float = 0.0) -> Iterator[tuple[float, list[tuple[str, int]]]]:
        """Pages of what a consumer has: when each was asked for, and (id, milliseconds idle) of its entries."""
        stream, after = self._keys.ready(consumer.partition), "-"
        while True:
            asked = time.monotonic()
            reply = self._wire.call(
                "XPENDING", stream, self._group, "IDLE", int(idle * 1000), after, "+", _PAGE, consumer.name
            )
            if not reply:
                return
            yield asked, [(at.decode(), milliseconds) for at, _, milliseconds, _ in reply]
            after = f"({reply[-1][0].decode()}"

    def _claim_as_seen(self, partition: int, page: Iterable[tuple[str, int]], seen_at: float) -> list[Delivery]:
        """Claim entries that nobody has touched since they were seen.

        An entry that somebody took or kept since is idle for less than the time since `seen_at`; that is below what it
        was idle then, or else nobody may take it over yet, as long as the claim comes within the lease.
        """
        if time.monotonic() - seen_at > self._lease / 2:
            return []
        replies = self._wire.call_all([self._xclaim(partition, max(1, idle), at) for at, idle in page])
        return [delivery for reply in replies for delivery in parse_deliveries(partition, reply)]

    def _xclaim(self, partition: int, idle: int, *ids: str) -> Command:
        return ("XCLAIM", self._keys.ready(partition), self._group, self._consumer, idle, *ids)
