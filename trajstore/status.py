"""How a run stands, as its operator asks: feeds and who follows them, leases, what is ready, claims, the server, packs.

Everything is read from where it stands, by commands whose cost goes with the partitions and consumers, not with the
trajectories. The one dear look, at the backlog, is taken by `RunLook` only as often as it is cheap.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import redis

from trajstore.asking import Question
from trajstore.backlog import Backlog
from trajstore.errors import TrajstoreError, Unavailable
from trajstore.log.lease import LEASE_GROUP
from trajstore.log.wire import Command, info_fields, memory_use, reply_fields, tightest, translate
from trajstore.store import Store

__all__ = [
    "ArchiveStanding",
    "ConsumerStanding",
    "GroupStanding",
    "LeaseStanding",
    "Rates",
    "RunLook",
    "RunStatus",
    "ServerStanding",
    "by_slot",
    "measure_ready",
    "measure_status",
]

COUNTED = 1000
"""Where a server does not say how far a group is behind (Redis 6.2), entries are counted, up to so many per stream."""

_RELEASED = 86400.0
"""A lease that was given back stands there as one whose holder has been silent for a week."""

_BACKLOG_SHARE = 10
"""The backlog is measured again after so many times as long as measuring it took."""


class ConsumerStanding(msgspec.Struct, kw_only=True):
    """One consumer of a group, over all partitions.

    Attributes:
        name: of the consumer.
        held: entries that it was given and has not acknowledged.
        silent: seconds since it last asked the server for anything as this consumer.
    """

    name: str
    held: int = 0
    silent: float = float("inf")


class GroupStanding(msgspec.Struct, kw_only=True):
    """One consumer group over a kind of stream.

    Attributes:
        name: of the group.
        waiting: entries that no consumer was given.
        held: entries that were given out and not acknowledged.
        seconds: age of the oldest entry that is not acknowledged, given out or not; 0 for none.
        by_partition: of each partition, (waiting, held, seconds).
        consumers: by name.
    """

    name: str
    waiting: int = 0
    held: int = 0
    seconds: float = 0.0
    by_partition: dict[int, tuple[int, int, float]] = {}
    consumers: dict[str, ConsumerStanding] = {}


class LeaseStanding(msgspec.Struct, frozen=True, kw_only=True):
    """Who archives a partition.

    Attributes:
        holder: name of the archiver; "" if nobody has it.
        silent: seconds since it was renewed. An archiver renews every 5 s, and another takes over after 15.
        lost: the server has no such lease: it lost the partition's keys, and nothing there is archived until
            `trajstore rebuild`.
    """

    holder: str = ""
    silent: float = 0.0
    lost: bool = False


class ServerStanding(msgspec.Struct, frozen=True, kw_only=True):
    """The server, of a cluster the one with the least room, of its own INFO; 0 or "" for what it does not say.

    Attributes:
        name: redis or valkey, and the version.
        run_id: of this server since its start; another one's is another.
        uptime: seconds.
        clients: connected.
        used_memory, maxmemory: bytes; 0 for no limit.
        commands: run since its start.
        received, sent: bytes over the network since its start, everything that it serves together.
        persists: what it says of its append-only file: "ok", "off", or what is wrong.
    """

    name: str = ""
    run_id: str = ""
    uptime: int = 0
    clients: int = 0
    used_memory: int = 0
    maxmemory: int = 0
    commands: int = 0
    received: int = 0
    sent: int = 0
    persists: str = ""


class ArchiveStanding(msgspec.Struct, frozen=True, kw_only=True):
    """The archive.

    Attributes:
        location: of it; "" if the run has none.
        packs: that count, in all (a record by which retention dropped others counts as one).
        by_partition: packs of each.
        seconds: since the newest record of any partition was written, by the clock of who wrote it; None for none.
        problem: why it cannot be looked at; "" if it can.
    """

    location: str = ""
    packs: int = 0
    by_partition: tuple[int, ...] = ()
    seconds: float | None = None
    problem: str = ""


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment.

    Attributes:
        run, location: which.
        time: Unix seconds, by the server's clock.
        hints: entries that the feeds ever took; None where the server does not say.
        published: likewise of the ready streams.
        feed: the groups that follow the feeds.
        ready: the groups that take what is ready.
        leases: of each partition.
        server, archive: how they stand.
        backlog: what is not archived yet; None if it was not asked for.
        backlog_seconds: how old that look is.
        backlog_problem: why it could not be measured; "" if it could.
    """

    run: str
    location: str
    time: float
    hints: int | None
    published: int | None
    feed: tuple[GroupStanding, ...]
    ready: tuple[GroupStanding, ...]
    leases: tuple[LeaseStanding, ...]
    server: ServerStanding
    archive: ArchiveStanding
    backlog: Backlog | None = None
    backlog_seconds: float = 0.0
    backlog_problem: str = ""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Per second, between two looks; None where the server does not count it, or was started anew in between.

    Of a cluster's servers the figures are of the one with the least room: where that is another by now, those of the
    server are None.

    Attributes:
        hints: into the feeds: segments and trajectories closed, rewards, notes.
        published: into the ready streams.
        commands: of the server.
        received, sent: bytes of the server.
    """

    hints: float | None = None
    published: float | None = None
    commands: float | None = None
    received: float | None = None
    sent: float | None = None

    @classmethod
    def between(cls, before: RunStatus, now: RunStatus) -> "Rates":
        """Of two looks at one run, the later one second."""
        seconds = now.time - before.time
        if seconds <= 0 or now.server.uptime < before.server.uptime:
            return cls()
        counters = {name: (getattr(before, name), getattr(now, name)) for name in ("hints", "published")}
        counters |= {
            name: (getattr(before.server, name), getattr(now.server, name))
            for name in ("commands", "received", "sent")
            if now.server.name and now.server.run_id == before.server.run_id
        }
        return cls(**{name: _rate(*pair, seconds) for name, pair in counters.items()})


class RunLook:
    """Looks at a run again and again. Thread-safe: one look is under way at a time, and is everybody's who waits.

    Args:
        store: of the run; only read.
        backlog: measure the backlog, too. That costs the server a pass over the summaries of what is not archived; it
            is repeated only after ten times as long as it took.
    """

    def __init__(self, store: Store, *, backlog: bool = True) -> None:
        self.store = store
        self._wants_backlog = backlog
        self._standing = Question(lambda: measure_status(store), name="trajstore-status")
        self._measuring = Question(self._measure_backlog, name="trajstore-backlog")
        self._backlog: Backlog | None = None
        self._problem = ""
        self._measured = self._next = 0.0

    def look(self, *, seconds: float | None = None) -> RunStatus:
        """How the run stands now.

        Args:
            seconds: wait no longer for it; of a backlog that takes longer, what was measured before is told. None: as
                long as the store's timeout and the measuring take.

        Raises:
            Unavailable: the server does not answer, or not in time.
            Corrupt: a key is something else.
        """
        begun = time.monotonic()
        asked = self._standing.ask(seconds)
        if not asked.done():
            raise Unavailable(f"{self.store.location} did not answer a look at the run within {seconds:g} s")
        status = asked.result()
        if self._wants_backlog and time.monotonic() >= self._next:
            left = None if seconds is None else max(0.0, begun + seconds - time.monotonic())
            measuring = self._measuring.ask(left)
            if measuring.done():
                measuring.result()
        return msgspec.structs.replace(
            status,
            backlog=self._backlog,
            backlog_seconds=time.monotonic() - self._measured if self._backlog is not None else 0.0,
            backlog_problem=self._problem,
        )

    def _measure_backlog(self) -> None:
        begun = time.monotonic()
        try:
            self._backlog, self._problem = self.store.backlog(), ""
        except TrajstoreError as error:  # of the archive, or of one summary: the rest is worth seeing
            self._backlog, self._problem = None, str(error)
        self._measured = time.monotonic()
        self._next = self._measured + _BACKLOG_SHARE * (self._measured - begun)


def measure_status(store: Store) -> RunStatus:
    """Look at all of a run but its backlog.

    Raises:
        Unavailable: the server does not answer.
        Corrupt: a key is something else.
    """
    partitions = range(store.partitions)
    feeds = [store.keys.feed(partition) for partition in partitions]
    readies = [store.keys.ready(partition) for partition in partitions]
    leases = [store.keys.lease(partition) for partition in partitions]
    clock, *held = store.wire.exchange(
        [("TIME",), *(("XPENDING", lease, LEASE_GROUP, "-", "+", 1) for lease in leases)]
    )
    seconds, micros = _answer(clock, "TIME")
    now = int(seconds) + int(micros) / 1e6
    hints, feed = _follow(store, feeds, now)
    published, ready = _follow(store, readies, now)
    return RunStatus(
        run=store.run,
        location=store.location,
        time=now,
        hints=hints,
        published=published,
        feed=feed,
        ready=ready,
        leases=tuple(_lease(reply) for reply in held),
        server=_server(store),
        archive=_archive(store),
    )


def measure_ready(store: Store) -> tuple[GroupStanding, ...]:
    """The consumer groups of the ready streams, and nothing else.

    Raises:
        Unavailable: the server does not answer.
    """
    seconds, micros = store.wire.call("TIME")
    readies = [store.keys.ready(partition) for partition in range(store.partitions)]
    return _follow(store, readies, int(seconds) + int(micros) / 1e6)[1]


def _follow(store: Store, streams: Sequence[str], now: float) -> tuple[int | None, tuple[GroupStanding, ...]]:
    """Entries that the streams of one kind ever took, one stream to a partition, and their groups."""
    asked = [command for stream in streams for command in (("XINFO", "STREAM", stream), ("XINFO", "GROUPS", stream))]
    replies = iter(store.wire.exchange(asked))
    added: list[int | None] = []
    places: list[tuple[int, str, Mapping[bytes, Any]]] = []
    for partition, stream in enumerate(streams):
        about, groups = next(replies), next(replies)
        if isinstance(about, redis.ResponseError) and "no such key" in str(about).lower():
            continue  # lost; whoever rebuilds the run makes it again
        added.append(reply_fields(_answer(about, "XINFO STREAM")).get(b"entries-added"))
        places += [(partition, stream, reply_fields(group)) for group in _answer(groups, "XINFO GROUPS")]
    commands: list[Command] = []
    for _, stream, fields in places:
        after, name = fields[b"last-delivered-id"].decode(), fields[b"name"]
        count = 1 if isinstance(fields.get(b"lag"), int) else COUNTED
        commands += [
            ("XRANGE", stream, f"({after}", "+", "COUNT", count),
            ("XPENDING", stream, name),
            ("XINFO", "CONSUMERS", stream, name),
        ]
    found: dict[str, GroupStanding] = {}
    answers = iter(store.wire.call_all(commands))
    for partition, _, fields in places:
        name = fields[b"name"].decode(errors="replace")
        group = found.setdefault(name, GroupStanding(name=name))
        _add(group, partition, fields, (next(answers), next(answers), next(answers)), now)
    known = [one for one in added if one is not None]
    return (sum(known) if len(known) == len(added) else None), tuple(found[name] for name in sorted(found))


def _add(
    group: GroupStanding, partition: int, fields: Mapping[bytes, Any], replies: tuple[Any, Any, Any], now: float
) -> None:
    """Add what one stream tells of a group."""
    fresh, pending, consumers = replies
    lag = fields.get(b"lag")
    waiting = lag if isinstance(lag, int) else len(fresh)
    oldest = [_age(entry[0], now) for entry in fresh[:1]]
    oldest += [_age(pending[1], now)] if pending[1] is not None else []
    seconds = max(oldest, default=0.0)
    group.by_partition[partition] = (waiting, int(pending[0]), seconds)
    group.waiting += waiting
    group.held += int(pending[0])
    group.seconds = max(group.seconds, seconds)
    for flat in consumers:
        about = reply_fields(flat)
        name = about[b"name"].decode(errors="replace")
        one = group.consumers.setdefault(name, ConsumerStanding(name=name))
        one.held += int(about[b"pending"])
        one.silent = min(one.silent, int(about[b"idle"]) / 1000)


def _lease(reply: Any) -> LeaseStanding:
    if isinstance(reply, redis.ResponseError) and str(reply).startswith("NOGROUP"):
        return LeaseStanding(lost=True)
    held = _answer(reply, "XPENDING")
    if not held:
        return LeaseStanding()
    _, holder, idle, _ = held[0]
    silent = int(idle) / 1000
    if silent >= _RELEASED:
        return LeaseStanding()
    return LeaseStanding(holder=holder.decode(errors="replace"), silent=silent)


def _server(store: Store) -> ServerStanding:
    reply = tightest([one.exchange([("INFO",)])[0] for one in store.wire.servers()])
    if reply is None:  # not allowed to this user
        return ServerStanding()
    fields = info_fields(reply)
    used, limit = memory_use(reply)
    name = "valkey" if "valkey_version" in fields else "redis"
    version = fields.get("valkey_version", fields.get("redis_version", ""))
    return ServerStanding(
        name=f"{name} {version}".strip(),
        run_id=fields.get("run_id", ""),
        uptime=int(fields.get("uptime_in_seconds", "0")),
        clients=int(fields.get("connected_clients", "0")),
        used_memory=used,
        maxmemory=limit,
        commands=int(fields.get("total_commands_processed", "0")),
        received=int(fields.get("total_net_input_bytes", "0")),
        sent=int(fields.get("total_net_output_bytes", "0")),
        persists=_persists(fields),
    )


def _persists(fields: Mapping[str, str]) -> str:
    if fields.get("aof_enabled") != "1":
        return "off" if "aof_enabled" in fields else ""
    failed = [name for name in ("aof_last_write_status", "aof_last_bgrewrite_status") if fields.get(name, "ok") != "ok"]
    return ", ".join(f"{name} {fields[name]}" for name in failed) or "ok"


def _archive(store: Store) -> ArchiveStanding:
    location = ""
    try:
        archive = store.archive
        if archive is None:
            return ArchiveStanding()
        location = archive.root.location
        archive.root.require()  # a folder that is gone looks like one without packs
        packs, newest = [], 0.0
        for partition in range(store.partitions):
            manifest = archive.manifest(partition)
            number = manifest.refresh()
            packs.append(len(manifest.live_numbers()))
            if number:
                newest = max(newest, manifest.record(number).created)
    except (TrajstoreError, OSError) as error:  # the rest of the run can be looked at all the same
        return ArchiveStanding(location=location, problem=str(error))
    return ArchiveStanding(
        location=location,
        packs=sum(packs),
        by_partition=tuple(packs),
        seconds=max(0.0, time.time() - newest) if newest else None,
    )


def _age(at: bytes, now: float) -> float:
    """Seconds since the server gave an entry this id."""
    return max(0.0, now - int(at.partition(b"-")[0]) / 1000)


def _rate(before: Any, now: Any, seconds: float) -> float | None:
    return (now - before) / seconds if before is not None and now is not None and now >= before else None


def _answer(reply: Any, what: str) -> Any:
    if isinstance(reply, redis.RedisError):
        raise translate(reply, what)
    return reply


def by_slot(consumers: Iterable[ConsumerStanding]) -> dict[str, ConsumerStanding]:
    """Consumers by their place in the job, `rank-3.0`, without what is new at each start; of others, by their name."""
    found: dict[str, ConsumerStanding] = {}
    for one in consumers:
        label = one.name.partition(":")[0]
        known = found.setdefault(label, ConsumerStanding(name=label))
        known.held += one.held
        known.silent = min(known.silent, one.silent)
    return found
