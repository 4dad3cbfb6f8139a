"""What is ready for a trainer: finished trajectories, assembled into groups, as entries of the `ready` streams.

An entry is small and names its members; each member's fold lies beside it as one blob under a key that may expire,
because it can always be folded again. Publishing is keyed by (trajectory, version): repeated hints publish once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import redis

from trajstore.errors import Unavailable
from trajstore.log.feed import lowest_needed, parse_stream
from trajstore.log.keys import Keys
from trajstore.log.run import TRAINER_GROUP
from trajstore.log.wire import Command, Wire, translate

__all__ = ["Delivery", "ReadyGroup", "ReadyMember", "ReadyQueue"]

_ATTEMPTS = 100
_PUBLISHED = b"\x00published"  # no id begins so


class ReadyMember(msgspec.Struct, frozen=True, kw_only=True):
    """One finished trajectory.

    Attributes:
        id: of the trajectory.
        version: how often it had been closed; a re-closed one comes again with a higher version.
        status: completed, truncated, failed or aborted.
        at: id of the last event folded.
        tokens: T.
        nbytes: size of its blob.
    """

    id: str
    version: int
    status: str
    at: str
    tokens: int
    nbytes: int


class ReadyGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One entry: a complete group, or a single trajectory that has none.

    Attributes:
        group: name, None for a trajectory without one.
        version: sum of the members' versions; rises when a member was closed again.
        policy: of the fold.
        members: by id.
    """

    group: str | None
    version: int
    policy: str
    members: tuple[ReadyMember, ...]


class Delivery(NamedTuple):
    """A ready entry that was handed to a consumer, to be acknowledged when it has been used."""

    partition: int
    at: str
    group: ReadyGroup


class ReadyQueue:
    """The ready streams of one run."""

    def __init__(self, wire: Wire, keys: Keys) -> None:
        self._wire = wire
        self._keys = keys

    # The materializer's side

    def offered(self, id: str, *, group: str | None, group_size: int | None) -> int:
        """Version under which a trajectory was last offered, 0 if it never was."""
        data = self._wire.call("HGET", self._keys.assembly(_assembly_name(id, group, group_size)), id)
        return 0 if data is None else _decode_member(data).version

    def offer(
        self, member: ReadyMember, *, group: str | None, group_size: int | None, policy: str, keep: float
    ) -> ReadyGroup | None:
        """Put a trajectory in its group's place; publish the group if that completes it.

        Args:
            keep: seconds for which the assembly of a complete group is remembered, against repeated hints.

        Returns:
            What was published, None if the group still waits for others or this was published before.
        """
        name = _assembly_name(member.id, group, group_size)
        key = self._keys.assembly(name)
        for _ in range(_ATTEMPTS):
            with self._wire.watching(key) as watch:
                flat = watch.call("HGETALL", key)
                held = dict(zip(flat[::2], flat[1::2], strict=True))
                published = int(held.pop(_PUBLISHED, b"0"))
                members = {found.id: found for found in map(_decode_member, held.values())}
                if member.id not in members or members[member.id].version < member.version:
                    members[member.id] = member
                version = sum(one.version for one in members.values())
                commands: list[Command] = [("HSET", key, member.id, _encode(members[member.id]))]
                ready: ReadyGroup | None = None
                if len(members) >= (group_size or 1) and version > published:
                    ready = ReadyGroup(
                        group=group,
                        version=version,
                        policy=policy,
                        members=tuple(members[one] for one in sorted(members)),
                    )
                    stream = self._keys.ready(self._keys.partition(name))
                    commands.append(("XADD", stream, "*", "g", _encode(ready)))
                    commands.append(("HSET", key, _PUBLISHED, version))
                    commands.append(("PEXPIRE", key, int(keep * 1000)))
                if self._wire.transaction(commands, watch=watch) is not None:
                    return ready
        raise Unavailable(f"group {group!r} was changed by others {_ATTEMPTS} times in a row")

    def put_blob(self, id: str, version: int, blob: bytes, *, keep: float) -> None:
        """Lay a fold beside its entry for `keep` seconds."""
        self._wire.call("SET", self._keys.ready_payload(id, version), blob, "PX", int(keep * 1000))

    # The trainer's side

    def join(self, group: str) -> None:
        """Make a consumer group of another name than the default; it reads from the beginning of what is there."""
        for partition in range(self._keys.partitions):
            reply = self._wire.exchange([("XGROUP", "CREATE", self._keys.ready(partition), group, "0", "MKSTREAM")])[0]
            if isinstance(reply, redis.RedisError) and "BUSYGROUP" not in str(reply):
                raise translate(reply, "XGROUP CREATE")

    def poll(
        self, consumer: str, *, group: str = TRAINER_GROUP, count: int = 1, block: float = 0.0, pending: bool = False
    ) -> list[Delivery]:
        """Entries that no consumer of the group has had (or, `pending`, that this one had and never acknowledged)."""
        streams = {self._keys.ready(partition): partition for partition in range(self._keys.partitions)}
        wait: tuple[str | int, ...] = ("BLOCK", max(1, int(block * 1000))) if block > 0 and not pending else ()
        reply = self._wire.call(
            "XREADGROUP", "GROUP", group, consumer, "COUNT", count, *wait,
            "STREAMS", *streams, *("0" if pending else ">" for _ in streams),
        )  # fmt: skip
        return [delivery for name, entries in reply or [] for delivery in _deliveries(streams[name.decode()], entries)]

    def take_over(self, consumer: str, *, group: str = TRAINER_GROUP, idle: float) -> list[Delivery]:
        """Entries that another consumer has had for `idle` seconds without acknowledging."""
        found: list[Delivery] = []
        for partition in range(self._keys.partitions):
            reply = self._wire.call(
                "XAUTOCLAIM", self._keys.ready(partition), group, consumer, int(idle * 1000), "0-0", "COUNT", 100
            )
            found += _deliveries(partition, reply[1])
        return found

    def blobs(self, members: Sequence[ReadyMember]) -> Iterator[bytes | None]:
        """The folds of members, in one round trip; None for one that is gone and must be folded again."""
        commands: list[Command] = [("GET", self._keys.ready_payload(one.id, one.version)) for one in members]
        for reply in self._wire.exchange(commands):
            if isinstance(reply, redis.RedisError):
                raise translate(reply, "GET")
            yield reply

    def acknowledge(self, deliveries: Iterable[Delivery], *, group: str = TRAINER_GROUP) -> None:
        """These entries were used. Their blobs go; what every group has used is trimmed."""
        deliveries = list(deliveries)
        commands: list[Command] = []
        for delivery in deliveries:
            commands.append(("XACK", self._keys.ready(delivery.partition), group, delivery.at))
            commands += [("UNLINK", self._keys.ready_payload(one.id, one.version)) for one in delivery.group.members]
        for reply in self._wire.exchange(commands):
            if isinstance(reply, redis.RedisError):
                raise translate(reply, "XACK")
        for partition in sorted({delivery.partition for delivery in deliveries}):
            self._trim(partition)

    def backlog(self) -> int:
        """Entries that some group still needs."""
        return sum(
            int(self._wire.call("XLEN", self._keys.ready(partition))) for partition in range(self._keys.partitions)
        )

    def _trim(self, partition: int) -> None:
        stream = self._keys.ready(partition)
        groups = self._wire.call("XINFO", "GROUPS", stream)
        names = [dict(zip(flat[::2], flat[1::2], strict=True))[b"name"] for flat in groups]
        pending = [self._wire.call("XPENDING", stream, name) for name in names]
        needed = lowest_needed(groups, pending)
        if needed is not None:
            self._wire.call("XTRIM", stream, "MINID", str(needed))


def _assembly_name(id: str, group: str | None, group_size: int | None) -> str:
    """Where a trajectory is put together with others: its group, or by itself (behind a character no group has)."""
    return group if group is not None and group_size is not None else f"\x00{id}"


def _deliveries(partition: int, entries: object) -> list[Delivery]:
    return [Delivery(partition, at, _decode_group(fields[b"g"])) for at, fields in parse_stream(entries)]


_encode = msgspec.msgpack.Encoder().encode
_decode_member = msgspec.msgpack.Decoder(ReadyMember).decode
_decode_group = msgspec.msgpack.Decoder(ReadyGroup).decode
