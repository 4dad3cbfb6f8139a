"""A Redis server as a model: the commands that trajstore uses, exactly, and what it forgets when it goes down.

Every write is kept as in an append-only file, so a server that comes back has executed the file as far as it had
reached the disk. `tests/simulation/test_server_model.py` holds the model to real servers.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import redis

__all__ = ["MODELLED", "Group", "Id", "Server", "Stream", "Unit"]

Id: TypeAlias = tuple[int, int]
Arguments: TypeAlias = Sequence[bytes]

_TOP = (1 << 64) - 1


class Refusal(Exception):
    """An error reply."""


class Group:
    """A consumer group.

    Attributes:
        last: newest id given out.
        pending: by id, [consumer, time of delivery in ms, deliveries].
        consumers: by name, when it was last seen, ms.
    """

    def __init__(self, last: Id) -> None:
        self.last = last
        self.pending: dict[Id, list[Any]] = {}
        self.consumers: dict[bytes, int] = {}


class Stream:
    """Entries by id, ascending."""

    def __init__(self) -> None:
        self.ids: list[Id] = []
        self.data: dict[Id, list[bytes]] = {}
        self.last: Id = (0, 0)
        self.groups: dict[bytes, Group] = {}

    def span(self, first: Id, last: Id) -> list[Id]:
        return self.ids[bisect.bisect_left(self.ids, first) : bisect.bisect_right(self.ids, last)]


class Unit(NamedTuple):
    """What the append-only file holds or loses as a whole: a command, or a transaction."""

    ms: int
    commands: list[Arguments]


class Server:
    """One server.

    Args:
        now: milliseconds, by its own clock.

    Attributes:
        keys: what it holds.
        aof: every write, oldest first.
        changes: how many writes there have been.
        fsync: `appendfsync`, "always" or "everysec".
        limit: `maxmemory`, 0 for none.
        ms: when it last did something, by its clock.
        watchers: called with each write command before it is executed; of a key that expires, as if it were unlinked.
        observers: called with each write command that was executed, and its reply.
    """

    def __init__(self, now: Callable[[], int], *, fsync: str = "everysec") -> None:
        self._now = now
        self.fsync = fsync
        self.keys: dict[bytes, Any] = {}
        self.expires: dict[bytes, int] = {}
        self.versions: dict[bytes, int] = {}
        self.aof: list[Unit] = []
        self.changes = 0
        self.limit = 0
        self.starts = 1
        self.watchers: list[Callable[[Arguments], None]] = []
        self.observers: list[Callable[[Arguments, Any], None]] = []
        self.ms = 0
        self._replaying = False
        self._used_at = (-1, 0)

    def restart(self, units: int) -> list[Unit]:
        """Come back with so many units of the file; returns the lost ones."""
        kept, lost = self.aof[:units], self.aof[units:]
        self.keys, self.expires, self.aof = {}, {}, []
        self.starts += 1
        self._replaying = True
        for unit in kept:
            self.ms = unit.ms
            self._drop_expired()
            for command in unit.commands:
                self._run(command)
            self.aof.append(unit)
        self._replaying = False
        self.changes += 1
        return lost

    def execute(self, commands: Sequence[Arguments]) -> list[Any]:
        """Run commands as one unit: one command, or those of a transaction. An error reply is a value."""
        self.ms = self._now()
        self._drop_expired()
        replies: list[Any] = []
        logged: list[Arguments] = []
        for command in commands:
            try:
                name = command[0].upper()
                if name in _WRITES:
                    for watcher in self.watchers:
                        watcher(command)
                reply = self._run(command)
            except Refusal as refused:
                reply = refusal(str(refused))
            else:
                if name in _WRITES and not (name in (b"XREADGROUP", b"XADD", b"SET") and reply is None):
                    logged.append(command)
                    for observer in self.observers:
                        observer(command, reply)
            replies.append(reply)
        if logged:
            self.aof.append(Unit(self.ms, logged))
            self.changes += 1
        return replies

    @property
    def used(self) -> int:
        """`used_memory`."""
        if self._used_at[0] != self.changes:
            self._used_at = (self.changes, sum(map(_size, self.keys.values())))
        return self._used_at[1]

    @property
    def full(self) -> bool:
        return bool(self.limit) and self.used >= self.limit

    def refused_when_full(self, command: Arguments) -> bool:
        """A command that a full server does not take."""
        return command[0].upper() in _NEEDS_ROOM or command[:2] == [b"XGROUP", b"CREATE"]

    def stream(self, key: bytes) -> Stream | None:
        found = self.keys.get(key)
        return found if isinstance(found, Stream) else None

    # Inside

    def _run(self, command: Arguments) -> Any:
        known = _COMMANDS.get(command[0].upper())
        assert known is not None, f"the model of the server does not know {command[0].decode()} yet"
        return known(self, *command[1:])

    def _drop_expired(self) -> None:
        for key in [key for key, at in self.expires.items() if at <= self.ms]:
            if not self._replaying:
                for watcher in self.watchers:
                    watcher([b"UNLINK", key])
            self._unlink(key)

    def _touch(self, key: bytes) -> None:
        self.versions[key] = self.versions.get(key, 0) + 1

    def _of(self, key: bytes, kind: type, *, make: bool = False) -> Any:
        if key in self.expires and self.expires[key] <= self.ms:
            self._unlink(key)
        found = self.keys.get(key)
        if found is None and make:
            found = self.keys[key] = kind()
        if found is not None and not isinstance(found, kind):
            raise Refusal("WRONGTYPE Operation against a key holding the wrong kind of value")
        return found

    def _unlink(self, *keys: bytes) -> int:
        gone = 0
        for key in keys:
            self.expires.pop(key, None)
            if self.keys.pop(key, None) is not None:
                self._touch(key)
                gone += 1
        return gone

    # Strings and the server itself

    def _ping(self) -> Any:
        return b"PONG"

    def _time(self) -> Any:
        return [b"%d" % (self.ms // 1000), b"%d" % (self.ms % 1000 * 1000)]

    def _info(self, section: bytes = b"") -> Any:
        fields = {"run_id": f"{self.starts:040x}", "used_memory": self.used, "maxmemory": self.limit}
        return "".join(f"{name}:{value}\r\n" for name, value in fields.items()).encode()

    def _config(self, _: bytes, name: bytes) -> Any:
        values = {b"appendonly": b"yes", b"appendfsync": self.fsync.encode()}
        return [name, values[name]] if name in values else []

    def _get(self, key: bytes) -> Any:
        return self._of(key, bytes)

    def _set(self, key: bytes, value: bytes, *options: bytes) -> Any:
        if b"NX" in options and key in self.keys:
            return None
        self.keys[key] = value
        self.expires.pop(key, None)
        for unit, ms in ((b"EX", 1000), (b"PX", 1)):
            if unit in options:
                self.expires[key] = self.ms + ms * int(options[options.index(unit) + 1])
        self._touch(key)
        return b"OK"

    def _exists(self, *keys: bytes) -> Any:
        return sum(key in self.keys for key in keys)

    def _pexpire(self, key: bytes, ms: bytes, *_: bytes) -> Any:
        if key not in self.keys:
            return 0
        self.expires[key] = self.ms + int(ms)
        return 1

    def _expire(self, key: bytes, seconds: bytes) -> Any:
        return self._pexpire(key, b"%d" % (int(seconds) * 1000))

    def _pttl(self, key: bytes) -> Any:
        return -2 if key not in self.keys else self.expires[key] - self.ms if key in self.expires else -1

    def _persist(self, key: bytes) -> Any:
        return int(self.expires.pop(key, None) is not None)

    def _scan(self, cursor: bytes, *options: bytes) -> Any:
        wanted = options[options.index(b"MATCH") + 1].rstrip(b"*") if b"MATCH" in options else b""
        return [b"0", sorted(key for key in self.keys if key.startswith(wanted))]

    # Hashes

    def _hset(self, key: bytes, *pairs: bytes) -> Any:
        held = self._of(key, dict, make=True)
        before = len(held)
        held.update(zip(pairs[::2], pairs[1::2], strict=True))
        self._touch(key)
        return len(held) - before

    def _hsetnx(self, key: bytes, field: bytes, value: bytes) -> Any:
        held = self._of(key, dict, make=True)
        if field in held:
            return 0
        return self._hset(key, field, value)

    def _hget(self, key: bytes, field: bytes) -> Any:
        return (self._of(key, dict) or {}).get(field)

    def _hmget(self, key: bytes, *fields: bytes) -> Any:
        held = self._of(key, dict) or {}
        return [held.get(field) for field in fields]

    def _hgetall(self, key: bytes) -> Any:
        return [part for pair in (self._of(key, dict) or {}).items() for part in pair]

    def _hdel(self, key: bytes, *fields: bytes) -> Any:
        held = self._of(key, dict)
        if held is None:
            return 0
        gone = sum(held.pop(field, None) is not None for field in fields)
        if gone:
            self._touch(key)
        if not held:
            del self.keys[key]
            self.expires.pop(key, None)
        return gone

    def _hscan(self, key: bytes, cursor: bytes, *_: bytes) -> Any:
        return [b"0", self._hgetall(key)]

    # Streams

    def _xadd(self, key: bytes, *rest: bytes) -> Any:
        creates = rest[0].upper() != b"NOMKSTREAM"
        if rest[0].upper() == b"MAXLEN":
            assert self._xlen(key) < int(rest[2]), "what a server trims then is not modelled"
            rest = rest[3:]
        at, *fields = rest if creates else rest[1:]
        stream = self._of(key, Stream)
        if stream is None and not creates:
            return None
        last = stream.last if stream is not None else (0, 0)
        if at == b"*":
            new = (self.ms, 0) if self.ms > last[0] else (last[0], last[1] + 1)
        else:
            new = _id(at)
            if new == (0, 0):
                raise Refusal("ERR The ID specified in XADD must be greater than 0-0")
        if new <= last:
            raise Refusal("ERR The ID specified in XADD is equal or smaller than the target stream top item")
        stream = self._of(key, Stream, make=True)
        stream.ids.append(new)
        stream.data[new] = fields
        stream.last = new
        self._touch(key)
        return _text(new)

    def _xlen(self, key: bytes) -> Any:
        stream = self._of(key, Stream)
        return 0 if stream is None else len(stream.ids)

    def _xrange(self, key: bytes, first: bytes, last: bytes, *count: bytes) -> Any:
        stream = self._of(key, Stream)
        found = [] if stream is None else stream.span(_bound(first), _bound(last, end=True))
        return [_entry(stream, at) for at in found[: int(count[1]) if count else None]]

    def _xrevrange(self, key: bytes, last: bytes, first: bytes, *count: bytes) -> Any:
        stream = self._of(key, Stream)
        found = [] if stream is None else stream.span(_bound(first), _bound(last, end=True))[::-1]
        return [_entry(stream, at) for at in found[: int(count[1]) if count else None]]

    def _xtrim(self, key: bytes, how: bytes, least: bytes) -> Any:
        stream = self._of(key, Stream)
        if stream is None:
            return 0
        count = bisect.bisect_left(stream.ids, _id(least))
        for at in stream.ids[:count]:
            del stream.data[at]
        del stream.ids[:count]
        if count:
            self._touch(key)
        return count

    def _xsetid(self, key: bytes, at: bytes) -> Any:
        stream = self._stream(key)
        if stream.ids and _id(at) < stream.ids[-1]:
            raise Refusal("ERR The ID specified in XSETID is smaller than the target stream top item")
        stream.last = _id(at)
        self._touch(key)
        return b"OK"

    def _xread(self, *rest: bytes) -> Any:
        options, keys, starts = _streams(rest)
        count = int(options.get(b"COUNT", 0)) or None
        reply = []
        for key, start in zip(keys, starts, strict=True):
            stream = self._of(key, Stream)
            found = [] if stream is None else stream.span(_after(_id(start)), (_TOP, _TOP))[:count]
            if found:
                reply.append([key, [_entry(stream, at) for at in found]])
        return reply or None

    def _xinfo(self, what: bytes, key: bytes, group: bytes = b"") -> Any:
        stream = self._of(key, Stream)
        if stream is None:
            raise Refusal("ERR no such key")
        if what.upper() == b"STREAM":
            newest = _entry(stream, stream.ids[-1]) if stream.ids else None
            return [
                b"length", len(stream.ids), b"last-generated-id", _text(stream.last), b"groups", len(stream.groups),
                b"last-entry", newest,
            ]  # fmt: skip
        if what.upper() == b"GROUPS":
            return [
                [b"name", name, b"consumers", len(one.consumers), b"pending", len(one.pending),
                 b"last-delivered-id", _text(one.last)]
                for name, one in sorted(stream.groups.items())
            ]  # fmt: skip
        found = self._group(key, group)
        owners = [consumer for consumer, _, _ in found.pending.values()]
        return [
            [b"name", name, b"pending", owners.count(name), b"idle", max(0, self.ms - seen)]
            for name, seen in sorted(found.consumers.items())
        ]

    # Consumer groups

    def _xgroup(self, what: bytes, key: bytes, group: bytes, *rest: bytes) -> Any:
        if what.upper() == b"CREATE":
            stream = self._of(key, Stream, make=b"MKSTREAM" in rest)
            if stream is None:
                raise Refusal("ERR The XGROUP subcommand requires the key to exist.")
            if group in stream.groups:
                raise Refusal("BUSYGROUP Consumer Group name already exists")
            stream.groups[group] = Group(stream.last if rest[0] == b"$" else _id(rest[0]))
            return b"OK"
        found = self._group(key, group)
        gone = [at for at, (consumer, _, _) in found.pending.items() if consumer == rest[0]]
        for at in gone:
            del found.pending[at]
        found.consumers.pop(rest[0], None)
        return len(gone)

    def _xreadgroup(self, _: bytes, group: bytes, consumer: bytes, *rest: bytes) -> Any:
        options, keys, starts = _streams(rest)
        count = int(options.get(b"COUNT", 0)) or None
        reply = []
        for key in keys:
            self._group(key, group)
        for key, start in zip(keys, starts, strict=True):
            stream, found = self._stream(key), self._group(key, group)
            found.consumers[consumer] = self.ms
            if start == b">":
                fresh = stream.span(_after(found.last), (_TOP, _TOP))[:count]
                for at in fresh:
                    found.pending[at] = [consumer, self.ms, 1]
                    found.last = at
                if fresh:
                    reply.append([key, [_entry(stream, at) for at in fresh]])
            else:
                mine = [at for at in sorted(found.pending) if found.pending[at][0] == consumer and at > _id(start)]
                for at in mine[:count]:
                    found.pending[at][1:] = [self.ms, found.pending[at][2] + 1]
                reply.append([key, [_entry(stream, at) for at in mine[:count]]])
        return reply or None

    def _xack(self, key: bytes, group: bytes, *ids: bytes) -> Any:
        stream = self._of(key, Stream)
        if stream is None or group not in stream.groups:
            return 0
        return sum(stream.groups[group].pending.pop(_id(at), None) is not None for at in ids)

    def _xpending(self, key: bytes, group: bytes, *rest: bytes) -> Any:
        found = self._group(key, group)
        if not rest:
            if not found.pending:
                return [0, None, None, None]
            owners = [consumer for consumer, _, _ in found.pending.values()]
            counts = [[name, b"%d" % owners.count(name)] for name in sorted(set(owners))]
            return [len(found.pending), _text(min(found.pending)), _text(max(found.pending)), counts]
        idle = 0
        if rest[0].upper() == b"IDLE":
            idle, rest = int(rest[1]), rest[2:]
        first, last, count, *who = rest
        reply = []
        for at in sorted(found.pending):
            consumer, since, times = found.pending[at]
            quiet = max(0, self.ms - since)
            if _bound(first) <= at <= _bound(last, end=True) and quiet >= idle and who in ([], [consumer]):
                reply.append([_text(at), consumer, quiet, times])
        return reply[: int(count)]

    def _xautoclaim(self, key: bytes, group: bytes, consumer: bytes, least: bytes, start: bytes, *rest: bytes) -> Any:
        stream, found = self._stream(key), self._group(key, group)
        count = int(rest[rest.index(b"COUNT") + 1]) if b"COUNT" in rest else 100
        found.consumers[consumer] = self.ms
        claimed, gone = [], []
        ids = [at for at in sorted(found.pending) if at >= _id(start)]
        tried = 0
        for tried, at in enumerate(ids):
            if tried >= count * 10 or len(claimed) >= count:
                break
            one = found.pending[at]
            if at not in stream.data:
                del found.pending[at]
                gone.append(_text(at))
                continue
            if self.ms - one[1] < int(least):
                continue
            one[:] = [consumer, self.ms, one[2] + 1]
            claimed.append(_entry(stream, at))
        else:
            return [b"0-0", claimed, gone]
        return [_text(ids[tried]), claimed, gone]

    def _xclaim(self, key: bytes, group: bytes, consumer: bytes, least: bytes, *rest: bytes) -> Any:
        stream, found = self._stream(key), self._group(key, group)
        ids = [at for at in rest if b"-" in at]
        options = rest[len(ids) :]
        found.consumers[consumer] = self.ms
        since = self.ms - (int(options[options.index(b"IDLE") + 1]) if b"IDLE" in options else 0)
        claimed = []
        for at in map(_id, ids):
            one = found.pending.get(at)
            if one is None:
                continue
            if at not in stream.data:
                del found.pending[at]
                continue
            if self.ms - one[1] < int(least):
                continue
            just = b"JUSTID" in options
            one[:] = [consumer, since, one[2] + (not just)]
            claimed.append(_text(at) if just else _entry(stream, at))
        return claimed

    def _stream(self, key: bytes) -> Stream:
        found = self._of(key, Stream)
        if found is None:
            raise Refusal("NOGROUP No such key")
        return found  # type: ignore[no-any-return]

    def _group(self, key: bytes, name: bytes) -> Group:
        stream = self._of(key, Stream)
        if stream is None or name not in stream.groups:
            raise Refusal(f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'")
        return stream.groups[name]  # type: ignore[no-any-return]


def refusal(text: str) -> redis.ResponseError:
    """The exception that redis-py makes of an error reply."""
    if text.startswith("OOM "):
        return redis.OutOfMemoryError(text.removeprefix("OOM "))
    if text.startswith("EXECABORT "):
        return redis.exceptions.ExecAbortError(text.removeprefix("EXECABORT "))
    return redis.ResponseError(text.removeprefix("ERR "))


def _id(text: bytes) -> Id:
    epoch, _, seq = text.partition(b"-")
    return int(epoch), int(seq or 0)


def _text(at: Id) -> bytes:
    return b"%d-%d" % at


def _after(at: Id) -> Id:
    return (at[0], at[1] + 1)


def _bound(text: bytes, *, end: bool = False) -> Id:
    if text in (b"-", b"+"):
        return (0, 0) if text == b"-" else (_TOP, _TOP)
    if text.startswith(b"("):
        at = _id(text[1:])
        return (at[0], at[1] - 1) if end else _after(at)
    return _id(text)


def _entry(stream: Any, at: Id) -> list[Any]:
    return [_text(at), list(stream.data[at]) if at in stream.data else None]


def _streams(rest: Sequence[bytes]) -> tuple[dict[bytes, bytes], Sequence[bytes], Sequence[bytes]]:
    split = list(rest).index(b"STREAMS")
    options = dict(zip(rest[:split:2], rest[1:split:2], strict=False))
    names = rest[split + 1 :]
    return options, names[: len(names) // 2], names[len(names) // 2 :]


def _size(held: Any) -> int:
    if isinstance(held, bytes):
        return 64 + len(held)
    if isinstance(held, dict):
        return 64 + sum(32 + len(name) + len(value) for name, value in held.items())
    return 64 + sum(32 + sum(map(len, fields)) for fields in held.data.values())


_COMMANDS: dict[bytes, Callable[..., Any]] = {
    name.encode(): vars(Server)[f"_{name.lower()}"]
    for name in (
        "PING", "TIME", "INFO", "CONFIG", "GET", "SET", "EXISTS", "EXPIRE", "PEXPIRE", "PTTL", "PERSIST", "SCAN",
        "UNLINK", "HSET", "HSETNX", "HGET", "HMGET", "HGETALL", "HDEL", "HSCAN", "XADD", "XLEN", "XRANGE", "XREVRANGE",
        "XTRIM", "XSETID", "XREAD", "XINFO", "XGROUP", "XREADGROUP", "XACK", "XPENDING", "XAUTOCLAIM", "XCLAIM",
    )
}  # fmt: skip
MODELLED = tuple(sorted(name.decode() for name in _COMMANDS))
"""Names of the commands."""

_WRITES = frozenset(b"SET EXPIRE PEXPIRE PERSIST UNLINK HSET HSETNX HDEL XADD XTRIM XSETID".split())
_WRITES |= frozenset(b"XGROUP XREADGROUP XACK XAUTOCLAIM XCLAIM".split())
_NEEDS_ROOM = frozenset(b"SET HSET HSETNX XADD XSETID".split())
