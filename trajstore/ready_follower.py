"""The trainer's side of the ready streams: one consumer of one consumer group over all of a run's.

Delivery is at least once. An entry is taken from where one lies, so that others get the rest; what every group has used
is trimmed. Blobs go earlier: they are kept for groups that have consumers, others fold again when they come.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis

from trajstore.blob import read_blob
from trajstore.entries import decode_entry
from trajstore.errors import Corrupt, SchemaError
from trajstore.events import EventId
from trajstore.history import find_tombstone
from trajstore.log.bulk import Value
from trajstore.log.groups import groups_of, needs_of, sign_off
from trajstore.log.keys import Keys
from trajstore.log.stream import parse_entries
from trajstore.log.wire import Command, Wire, reply_fields, translate
from trajstore.ready import Delivery, ReadyMember, parse_deliveries
from trajstore.trajectory import Trajectory

__all__ = ["ReadyFollower"]


class ReadyFollower:
    """One consumer.

    Args:
        group: consumer group; made if there is none, and then it reads from the beginning of what is there.
        consumer: its name.
    """

    def __init__(self, wire: Wire, keys: Keys, group: str, consumer: str) -> None:
        self._wire = wire
        self._keys = keys
        self._group = group
        self._consumer = consumer
        self._seen = dict.fromkeys(range(keys.partitions), "0-0")
        self._join()

    def poll(self, *, count: int, block: float = 0.0) -> list[Delivery]:
        """Entries that no consumer of the group has had, at most `count`; waits up to `block` seconds for the first."""
        # One XREADGROUP over all streams takes up to COUNT from each, and what it takes is kept from other consumers.
        # So look first, which takes nothing, and then take from where something is.
        wait: tuple[str | int, ...] = ("BLOCK", max(1, int(block * 1000))) if block > 0 else ()
        found: list[Delivery] = []
        while len(found) < count:
            streams = {self._keys.ready(partition): partition for partition in self._seen}
            reply = self._wire.call("XREAD", "COUNT", 1, *wait, "STREAMS", *streams, *self._seen.values())
            if not reply:
                self._go_back()
                break
            wait = ()
            for name, _ in reply:
                if len(found) < count:
                    stream = name.decode()
                    found += self._take(stream, streams[stream], count - len(found))
        return found

    def _take(self, stream: str, partition: int, count: int) -> list[Delivery]:
        taken = self._wire.call(
            "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count, "STREAMS", stream, ">"
        )
        entries = taken[0][1] if taken else []
        seen = entries[-1][0].decode() if entries else self._last_delivered(stream)
        del self._seen[partition]  # to the end: its turn comes again after the others'
        self._seen[partition] = seen
        return parse_deliveries(partition, entries)

    def unacknowledged(self, partition: int, *, after: str, count: int) -> tuple[list[Delivery], str | None]:
        """Entries that this consumer had and did not acknowledge, and where to go on; None at the end.

        Args:
            after: "0-0", or what the call before returned.
        """
        reply = self._wire.call(*self._unacknowledged(self._keys.ready(partition), after, count))
        entries = reply[0][1] if reply else []
        return parse_deliveries(partition, entries), entries[-1][0].decode() if entries else None

    def take_over(self, *, idle: float, count: int, skip: Callable[[Delivery], bool]) -> list[Delivery]:
        """Entries that a consumer has had for `idle` seconds without acknowledging, at most `count`.

        Args:
            skip: True for those that this consumer itself has in hand; they count as fresh again.
        """
        found: list[Delivery] = []
        for partition in range(self._keys.partitions):
            cursor: Any = b"0-0"
            while len(found) < count:
                reply = self._wire.call(
                    "XAUTOCLAIM", self._keys.ready(partition), self._group, self._consumer, int(idle * 1000), cursor,
                    "COUNT", count - len(found),
                )  # fmt: skip
                cursor = reply[0]
                found += [delivery for delivery in parse_deliveries(partition, reply[1]) if not skip(delivery)]
                if cursor in (b"0-0", "0-0"):
                    break
        return found

    def folds(self, members: Sequence[ReadyMember]) -> list[Trajectory | Corrupt | None]:
        """The folds of members, decoded while they arrive.

        None is one that is gone, and `Corrupt` one that is damaged: both must be folded again.
        """
        return self._wire.fetch([self._keys.ready_payload(one.id, one.version) for one in members], _read_fold)

    def deleted(self, members: Iterable[ReadyMember]) -> set[str]:
        """Ids of those whose tombstone lies in the hot log: for them a blob may lie there still, and must not be used.

        Once a tombstone is archived and trimmed, the blobs are gone.
        """
        ids = sorted({one.id for one in members})
        replies = self._wire.exchange([("XREVRANGE", self._keys.entries(id), "+", "-", "COUNT", 1) for id in ids])
        return {id for id, reply in zip(ids, replies, strict=True) if _is_tombstone(reply)}

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """These entries were used. What every group has used is trimmed; blobs go when those with consumers have."""
        by_partition: dict[int, list[Delivery]] = {}
        for delivery in deliveries:
            by_partition.setdefault(delivery.partition, []).append(delivery)
        self._wire.call_all(
            [
                ("XACK", self._keys.ready(partition), self._group, *(one.at for one in some))
                for partition, some in by_partition.items()
            ]
        )
        for partition, some in by_partition.items():
            stream = self._keys.ready(partition)
            (needs,) = needs_of(self._wire, [stream])
            needed = min((need.oldest for need in needs), default=None)
            commands: list[Command] = [] if needed is None else [("XTRIM", stream, "MINID", str(needed))]
            others = [need.oldest for need in needs if need.consumers and need.name != self._group.encode()]
            for delivery in some:
                if not others or EventId.parse(delivery.at) < min(others):
                    keys = [self._keys.ready_payload(one.id, one.version) for one in delivery.group.members]
                    commands += [("UNLINK", key) for key in keys]
            self._wire.call_all(commands)

    def leave(self) -> None:
        """Remove this consumer where nothing is pending for it, so that names do not pile up."""
        streams = [self._keys.ready(partition) for partition in range(self._keys.partitions)]
        sign_off(self._wire, streams, self._group, self._consumer)

    def _join(self) -> None:
        """Make the consumer group if there is none, which reads from the beginning of what is there, and sign on.

        Raises:
            Unavailable: the server does not answer, or has lost a partition.
        """
        streams = [self._keys.ready(partition) for partition in range(self._keys.partitions)]
        # A full server refuses XGROUP CREATE also where there is such a group, so look first.
        missing = [
            stream
            for stream, groups in zip(streams, groups_of(self._wire, streams), strict=True)
            if groups is None or not self._has_mine(groups)
        ]
        for reply in self._wire.exchange([("XGROUP", "CREATE", one, self._group, "0") for one in missing]):
            if isinstance(reply, redis.RedisError) and "BUSYGROUP" not in str(reply):
                raise translate(reply, "XGROUP CREATE")
        if self._consumer:  # others see that the group is read, from every stream, before anything is taken from it
            self._wire.call_all([self._unacknowledged(stream, "0-0", 1) for stream in streams])

    def _unacknowledged(self, stream: str, after: str, count: int) -> Command:
        return "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count, "STREAMS", stream, after

    def _go_back(self) -> None:
        """A server that lost its tail may have forgotten what it gave out, and gives it out again: look there, too."""
        replies = self._wire.call_all([("XINFO", "GROUPS", self._keys.ready(partition)) for partition in self._seen])
        for partition, groups in zip(list(self._seen), replies, strict=True):
            last = self._last_of(groups)
            if EventId.parse(last) < EventId.parse(self._seen[partition]):
                self._seen[partition] = last

    def _last_delivered(self, stream: str) -> str:
        return self._last_of(self._groups(stream))

    def _has_mine(self, groups: Sequence[Any]) -> bool:
        return any(reply_fields(one)[b"name"] == self._group.encode() for one in groups)

    def _last_of(self, groups: Sequence[Any]) -> str:
        """Newest entry that any consumer of the group has had, from XINFO GROUPS."""
        mine = [one for one in groups if reply_fields(one)[b"name"] == self._group.encode()]
        return str(reply_fields(mine[0])[b"last-delivered-id"].decode()) if mine else "0-0"

    def _groups(self, stream: str) -> list[Any]:
        return list(self._wire.call("XINFO", "GROUPS", stream))


def _read_fold(value: Value) -> Trajectory | Corrupt:
    try:
        return read_blob(value, value.nbytes)
    except Corrupt as error:
        return error


def _is_tombstone(reply: object) -> bool:
    """What XREVRANGE gave is a tombstone. What is not trajstore's is none; whoever reads the trajectory says so."""
    try:
        return any(find_tombstone(decode_entry(at, data)) is not None for at, data in parse_entries(reply))
    except (Corrupt, SchemaError):
        return False
