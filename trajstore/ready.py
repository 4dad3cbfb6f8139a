"""What is ready for a trainer: finished trajectories, assembled into groups, as entries of the `ready` streams.

An entry is small and names its members; each member's fold lies beside it as one blob under a key that may expire,
because it can always be folded again. Publishing is keyed by (trajectory, version): repeated hints publish once.

A group is complete when as many members have been closed as it is to have, aborted ones too: whether to train on those
is the trainer's choice. It is published again, whole and under a higher version, for each change after that: a member
that was resumed and closed again, or one beyond its size. A member that was deleted counts as come and is left out: its
group waits for it no longer. It is published again because of that only if the member was aborted, for then a trainer
may wait for it. A member that cannot be folded counts as come, too, and is named. A group that waits for longer than a
materializer's `group_seconds` is published without those that are late, and again when they come.

The reading side is in `ready_follower.py`.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from trajstore.errors import UNREADABLE, Corrupt, Unavailable
from trajstore.log.feed import parse_stream
from trajstore.log.keys import Keys
from trajstore.log.wire import Command, Wire, memory_use, reply_fields

__all__ = [
    "Delivery",
    "EntryPlace",
    "Offer",
    "ReadyGroup",
    "ReadyMember",
    "ReadyQueue",
    "assembly_name",
    "parse_deliveries",
]

T = TypeVar("T")

log = logging.getLogger(__name__)

_LAID_AT = 0.6
"""Share of `maxmemory` up to which folds are laid ready. Readers can fold again; writers, who stop at `FULL_AT`, can
only wait, and archiving makes no room where folds lie."""

_ATTEMPTS = 100
_PUBLISHED = b"\x00published"  # no id begins so
_SIZE = b"\x00size"
_DELETED = "deleted"


class ReadyMember(msgspec.Struct, frozen=True, kw_only=True):
    """One finished trajectory.

    Attributes:
        id: of the trajectory.
        version: how often it had been closed; a re-closed one comes again with a higher version.
        status: completed, truncated, failed or aborted; "unreadable" for one that cannot be folded.
        at: id of the last event folded; of an unreadable one, of the last that there is.
        tokens: T; 0 of an unreadable one.
        nbytes: size of its blob; 0 likewise.
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
        version: sum of the members' versions, of deleted ones the last offered (one more if that was aborted); rises
            when a member was closed again, another one came, or an aborted one was deleted.
        policy: of the fold.
        members: by id.
        size: how many members the group was to have when it was first published; None for a trajectory by itself, and
            in entries that were written before it was recorded.
        came: how many members had come, deleted ones too; fewer than `size` where others are late. None in older
            entries.
        before: version under which the group was published last, 0 for none; None in older entries.
    """

    group: str | None
    version: int
    policy: str
    members: tuple[ReadyMember, ...]
    size: int | None = None
    came: int | None = None
    before: int | None = None

    @property
    def late(self) -> int:
        """Members that had not come when it was published."""
        return max(0, self.size - self.came) if self.size is not None and self.came is not None else 0


class EntryPlace(NamedTuple):
    """Where an entry lies in the ready streams."""

    partition: int
    at: str

    def __str__(self) -> str:
        return f"{self.partition}/{self.at}"

    @classmethod
    def parse(cls, text: str) -> "EntryPlace":
        """From `str(place)`."""
        partition, _, at = text.partition("/")
        return cls(int(partition), at)


class Delivery(NamedTuple):
    """A ready entry that was handed to a consumer, to be acknowledged when it has been used."""

    partition: int
    at: str
    group: ReadyGroup

    @property
    def place(self) -> EntryPlace:
        """Where it lies."""
        return EntryPlace(self.partition, self.at)


class Offer(NamedTuple):
    """What became of an offered trajectory.

    Attributes:
        is_new: this version of it was not known before.
        published: the entry that it completed, None if its group still waits or was published before.
    """

    is_new: bool
    published: ReadyGroup | None


class _Assembly(NamedTuple):
    """What is known of a group while it is put together: members by id, deleted ones too."""

    members: dict[str, ReadyMember]
    size: int
    published: int

    @classmethod
    def of(cls, reply: Sequence[Any]) -> "_Assembly":
        """From HGETALL."""
        held = reply_fields(reply)
        published, size = int(held.pop(_PUBLISHED, b"0")), int(held.pop(_SIZE, b"0"))
        return cls({one.id: one for one in map(_decode_member, held.values())}, size, published)

    @property
    def there(self) -> tuple[ReadyMember, ...]:
        """Members that were not deleted, by id."""
        return tuple(self.members[id] for id in sorted(self.members) if self.members[id].status != _DELETED)

    @property
    def version(self) -> int:
        """Of the group as it is now."""
        return sum(one.version for one in self.members.values())

    def entry(self, group: str | None, policy: str, *, size: int | None) -> ReadyGroup:
        """The group as it is now."""
        return ReadyGroup(
            group=group,
            version=self.version,
            policy=policy,
            members=self.there,
            size=size,
            came=len(self.members),
            before=self.published,
        )


class ReadyQueue:
    """The materializer's side of the ready streams."""

    def __init__(self, wire: Wire, keys: Keys) -> None:
        self._wire = wire
        self._keys = keys

    def offered(self, id: str, *, group: str | None, group_size: int | None) -> int:
        """Version under which a trajectory was last offered, 0 if it never was."""
        data = self._wire.call("HGET", self._keys.assembly(assembly_name(id, group, group_size)), id)
        return 0 if data is None else _decode_member(data).version

    def published(self, group: str) -> int:
        """Version under which a group was published last; 0 if it never was, or so long ago that it is forgotten."""
        (version,) = self._wire.call("HMGET", self._keys.assembly(group), _PUBLISHED)
        return int(version or 0)

    def offer(
        self,
        member: ReadyMember,
        *,
        group: str | None,
        group_size: int | None,
        policy: str,
        keep: float,
        goes_on: Callable[[ReadyMember], bool] = lambda _: False,
        holds: Callable[[], bool] = lambda: True,
    ) -> Offer:
        """Put a trajectory in its group's place; publish the group if that completes it.

        Args:
            group_size: as this member knows it; where members differ, the largest counts that was known when the group
                was first published.
            keep: seconds for which the assembly of a complete group is remembered, against repeated hints.
            goes_on: asked about aborted members: True for one that was resumed since, and that will be offered again
                when it is closed. The group waits for it.
            holds: asked while nobody can offer: whether the log still has what the member was folded from. Where a
                crash has lost it, what is written in its place would be taken for offered.

        Raises:
            Unavailable: it does not hold, or the server does not answer; look at the trajectory again.
        """
        name = assembly_name(member.id, group, group_size)
        key = self._keys.assembly(name)
        for _ in range(_ATTEMPTS):
            with self._wire.watching(key) as watch:
                held = _Assembly.of(watch.call("HGETALL", key))
                if not holds():
                    raise Unavailable(
                        f"the server has restarted since {member.id} was read, and may have lost some of it"
                    )
                members, before = held.members, held.members.get(member.id)
                if member.status == _DELETED and before is not None:
                    # No version comes or goes with it, unless it was aborted: for such a one trainers may wait.
                    known = before.version + (before.status == "aborted")
                    member = msgspec.structs.replace(member, version=known)
                if before is not None and (before.version > member.version or before.status == _DELETED):
                    return Offer(False, None)
                members[member.id] = member
                size = held.size if held.published else max(held.size, group_size or 1)
                commands: list[Command] = [("HSET", key, member.id, _encode(member), _SIZE, size)]
                others = (one for one in members.values() if one.id != member.id and one.status == "aborted")
                ready: ReadyGroup | None = None
                whole = group is not None and group_size is not None
                if not held.there:
                    commands += self._nobody_left(name, keep)
                elif len(members) >= size and held.version > held.published and not any(map(goes_on, others)):
                    ready = held.entry(group, policy, size=size if whole else None)
                    commands += self._publication(name, ready, keep)
                elif held.version > held.published:
                    # A published one may be about to expire; it stays until what came since is published, too.
                    commands.append(("PERSIST", key))
                    commands.append(("HSETNX", self._keys.waiting(self._keys.partition(name)), name, b""))
                if self._wire.transaction(commands, watch=watch) is not None:
                    if held.size not in (0, group_size or 1):
                        log.warning("group %s: sizes %d and %s; %d counts", group, held.size, group_size, size)
                    return Offer(before is None or before.version < member.version, ready)
        raise Unavailable(f"group {group!r} was changed by others {_ATTEMPTS} times in a row")

    def withdraw(
        self,
        id: str,
        *,
        at: str,
        group: str | None,
        group_size: int | None,
        policy: str,
        keep: float,
        goes_on: Callable[[ReadyMember], bool],
        holds: Callable[[], bool] = lambda: True,
    ) -> ReadyGroup | None:
        """Take a deleted trajectory out of its group.

        Args:
            at: id of its tombstone.
            group, group_size, policy, keep, goes_on, holds: as for `offer`.

        Returns:
            The entry of its group, if that waited for this one only, or had been published with it as aborted; None
            else.
        """
        if group is None or group_size is None:  # nobody waits for it
            return None
        gone = ReadyMember(id=id, version=0, status=_DELETED, at=at, tokens=0, nbytes=0)
        return self.offer(
            gone, group=group, group_size=group_size, policy=policy, keep=keep, goes_on=goes_on, holds=holds
        ).published

    def publish_late(self, partition: int, *, after: float, policy: str, keep: float) -> list[ReadyGroup]:
        """Publish the groups that have waited for `after` seconds, without the members that are late.

        How long is measured by the server's clock, from the first call that found the group waiting.

        Args:
            policy, keep: as for `offer`.
        """
        key = self._keys.waiting(partition)
        waiting = reply_fields(self._wire.call("HGETALL", key))
        if not waiting:
            return []
        seconds, microseconds = self._wire.call("TIME")
        now = int(seconds) + int(microseconds) / 1e6
        found = [part for name, since in waiting.items() if not since for part in (name, f"{now:.6f}")]
        if found:
            self._wire.call("HSET", key, *found)
        late = [name for name, since in waiting.items() if now - float(since or now) >= after]
        published = (self._publish_late(name.decode(), policy=policy, keep=keep) for name in late)
        return [ready for ready in published if ready is not None]

    def _publish_late(self, name: str, *, policy: str, keep: float) -> ReadyGroup | None:
        key = self._keys.assembly(name)
        for _ in range(_ATTEMPTS):
            with self._wire.watching(key) as watch:
                held = _Assembly.of(watch.call("HGETALL", key))
                ready = held.entry(name, policy, size=held.size)
                due = bool(held.there) and held.version > held.published
                if due:
                    commands = self._publication(name, ready, keep)
                else:
                    commands = self._waits_no_more(name) if held.there else self._nobody_left(name, keep)
                if self._wire.transaction(commands, watch=watch) is not None:
                    return ready if due else None
        raise Unavailable(f"group {name!r} was changed by others {_ATTEMPTS} times in a row")

    def _publication(self, name: str, ready: ReadyGroup, keep: float) -> list[Command]:
        key = self._keys.assembly(name)
        return [
            ("XADD", self._keys.ready(self._keys.partition(name)), "*", "g", _encode(ready)),
            ("HSET", key, _PUBLISHED, ready.version),
            ("PEXPIRE", key, int(keep * 1000)),
            *self._waits_no_more(name),
        ]

    def _waits_no_more(self, name: str) -> list[Command]:
        return [("HDEL", self._keys.waiting(self._keys.partition(name)), name)]

    def _nobody_left(self, name: str, keep: float) -> list[Command]:
        """All that came were deleted; a member that comes yet brings the group back."""
        return [("PEXPIRE", self._keys.assembly(name), int(keep * 1000)), *self._waits_no_more(name)]

    def put_blob(self, id: str, version: int, blob: bytes, *, keep: float) -> bool:
        """Lay a fold beside its entry for `keep` seconds, if the server has room for it, else readers fold it; whether
        it had."""
        key = self._keys.ready_payload(id, version)
        info = self._wire.at(key).exchange([("INFO", "memory")])[0]
        if isinstance(info, bytes):
            used, limit = memory_use(info)
            if limit and used + len(blob) >= _LAID_AT * limit:
                return False
        self._wire.call("SET", key, blob, "PX", int(keep * 1000))
        return True


def assembly_name(id: str, group: str | None, group_size: int | None) -> str:
    """Where a trajectory is put together with others: its group, or by itself (behind a character no group has)."""
    return group if group is not None and group_size is not None else f"\x00{id}"


def parse_deliveries(partition: int, entries: object) -> list[Delivery]:
    """Entries of a partition's ready stream, as a reply holds them; those trimmed meanwhile are left out."""
    return [
        Delivery(partition, at, _decode_group(fields.get(b"g", b""), EntryPlace(partition, at)))
        for at, fields in parse_stream(entries)
    ]


_encode = msgspec.msgpack.Encoder().encode
_member = msgspec.msgpack.Decoder(ReadyMember)
_group = msgspec.msgpack.Decoder(ReadyGroup)


def _decode_member(data: bytes) -> ReadyMember:
    return _decoded(_member, data, "what is known of a group that is put together")


def _decode_group(data: bytes, place: EntryPlace) -> ReadyGroup:
    return _decoded(_group, data, f"ready entry {place}")


def _decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise Corrupt(f"{what} cannot be read: {error}; it is damaged, or not trajstore's") from error
