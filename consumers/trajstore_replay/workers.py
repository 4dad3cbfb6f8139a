"""Whether somebody works on a run: archiver and materializer follow the feeds, trainers take what is ready, memory."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import redis
from rich.filesize import decimal

from trajstore.archive.verify.findings import Finding
from trajstore.errors import Corrupt
from trajstore.log.feed import FEED_GROUPS, MATERIALIZER
from trajstore.log.wire import FULL_AT, fullest, reply_fields, translate
from trajstore.store import Store
from trajstore_replay.ages import told

__all__ = ["Followers", "check_workers", "followers"]

_TIGHT = 0.75
"""Share of `maxmemory` from which on somebody should look."""

_PAGE = 1000


class Followers(msgspec.Struct, kw_only=True):
    """One consumer group over the streams of all partitions.

    Attributes:
        name: of the group.
        consumers: members that it ever had and that did not sign off.
        waiting: entries that no consumer was given; counted up to 1000 in each partition.
        waited: seconds since the oldest of them was written.
        held: entries that a consumer was given a while ago, and has not acknowledged; counted likewise.
        idle: seconds since the longest held of them was given out or made fresh.
        holders: who has them.
    """

    name: str
    consumers: int = 0
    waiting: int = 0
    waited: float = 0.0
    held: int = 0
    idle: float = 0.0
    holders: set[str] = msgspec.field(default_factory=set)


def check_workers(run: Store, *, stale_seconds: float, where: str) -> Iterator[Finding]:
    """What is wrong with those who work on a run.

    Args:
        stale_seconds: after so long, what nobody has taken counts as left alone.
        where: the store, as a word of a command line.

    Raises:
        Unavailable: the server does not answer.
    """
    partitions = range(run.partitions)
    feeds = [run.keys.feed(partition) for partition in partitions]
    for group in followers(run, feeds, stale_seconds):
        if group.name in FEED_GROUPS and (run.archive is not None or group.name == MATERIALIZER):
            yield from _of_feed(group, stale_seconds, where)
    if run.archive is None:
        yield Finding(
            kind="no-archive",
            severity="information",
            what="the run has no archive: all of it stays in the server's memory",
            what_to_do=f"`trajstore archive {where} --archive FOLDER`",
        )
    ready = [run.keys.ready(partition) for partition in partitions]
    groups = followers(run, ready, stale_seconds)
    for group in groups:
        yield from _of_ready(group, stale_seconds, where, is_last=len(groups) == 1)
    yield from _memory(run, where)
    yield from _backlog(run, where)


def followers(run: Store, streams: list[str], stale_seconds: float) -> list[Followers]:
    """How far each consumer group of some streams is.

    Args:
        stale_seconds: entries that were given out longer ago count as held.
    """
    seconds, micros = run.wire.call("TIME")
    now = int(seconds) + int(micros) / 1e6
    found: dict[str, Followers] = {}
    for stream, reply in zip(streams, run.wire.exchange([("XINFO", "GROUPS", s) for s in streams]), strict=True):
        if isinstance(reply, redis.RedisError):
            if "no such key" in str(reply).lower():
                continue
            raise translate(reply, "XINFO GROUPS")
        for flat in reply:
            fields = reply_fields(flat)
            name = fields[b"name"].decode()
            group = found.setdefault(name, Followers(name=name))
            _look(run, stream, group, fields, now=now, stale_ms=int(stale_seconds * 1000))
    return list(found.values())


def _look(run: Store, stream: str, group: Followers, fields: Mapping[bytes, Any], *, now: float, stale_ms: int) -> None:
    """Add what one stream tells."""
    group.consumers += int(fields[b"consumers"])
    after = fields[b"last-delivered-id"].decode()
    waiting, held = run.wire.call_all(
        [
            ("XRANGE", stream, f"({after}", "+", "COUNT", _PAGE),
            ("XPENDING", stream, group.name, "IDLE", stale_ms, "-", "+", _PAGE),
        ]
    )
    if waiting:
        group.waiting += len(waiting)
        group.waited = max(group.waited, now - int(waiting[0][0].partition(b"-")[0]) / 1000)
    for _, consumer, idle, _ in held:
        group.held += 1
        group.idle = max(group.idle, int(idle) / 1000)
        group.holders.add(consumer.decode())


def _of_feed(group: Followers, stale: float, where: str) -> Iterator[Finding]:
    command = "materialize" if group.name == MATERIALIZER else "archive"
    yield from _behind(
        group,
        stale,
        entries="hints",
        kinds=("unfollowed", "unfinished"),
        start=f"run `trajstore {command} {where}`",
        take_over=f"if it is gone, any running `trajstore {command} {where}` takes them over; else its log says what "
        "keeps it",
    )


def _of_ready(group: Followers, stale: float, where: str, *, is_last: bool) -> Iterator[Finding]:
    start = f"start its trainer; `trajstore status {where}` shows who takes what"
    if is_last:
        start += ". Where nobody trains, run no materializer: what is published stays until it is taken"
    elif not group.consumers:
        start += (
            ". All that is published is kept for it: if nobody uses the group any more, "
            f"`trajstore consumers {where} --remove {shlex.quote(group.name)}` ends that"
        )
    yield from _behind(
        group,
        stale,
        entries="published entries",
        kinds=("untaken", "claimed"),
        start=start,
        take_over="a trainer without checkpoints that is alive takes them over once its lease is over; else begin the "
        "job again, with as many ranks or fewer",
    )


def _behind(
    group: Followers, stale: float, *, entries: str, kinds: tuple[str, str], start: str, take_over: str
) -> Iterator[Finding]:
    """What waits for a consumer group, and what one of its consumers sits on.

    Args:
        entries: what they are called.
        kinds: of the two findings.
        start, take_over: what to do about each.
    """
    if group.waiting and group.waited >= stale:
        yield Finding(
            kind=kinds[0],
            severity="warning",
            what=f"{group.waiting} {entries} wait for consumer group {group.name!r}, the oldest for "
            f"{told(group.waited)}; it has {group.consumers} consumers",
            what_to_do=start,
        )
    if group.held:
        yield Finding(
            kind=kinds[1],
            severity="warning",
            what=f"{_several(group.holders)} of consumer group {group.name!r} took {group.held} {entries}, and neither "
            f"acknowledged nor renewed them for up to {told(group.idle)}",
            what_to_do=take_over,
        )


def _backlog(run: Store, where: str) -> Iterator[Finding]:
    try:
        found = run.backlog()
    except Corrupt:  # told where the archive is looked at
        return
    if found.trajectories:
        yield Finding(
            kind="backlog",
            severity="information",
            what=f"{found.trajectories} trajectories are not archived yet, with {decimal(found.nbytes)} of payloads; "
            f"the oldest has waited for {told(found.seconds)} since it could be",
            what_to_do=f"`trajstore archive {where}` archives them; open segments wait for their writer",
        )


def _memory(run: Store, where: str) -> Iterator[Finding]:
    used, limit = fullest([one.exchange([("INFO", "memory")])[0] for one in run.wire.servers()])
    if limit and used >= _TIGHT * limit:
        full = used >= FULL_AT * limit
        yield Finding(
            kind="memory",
            severity="error" if full else "warning",
            what=f"the server uses {used / limit:.0%} of its memory"
            + ("; writers are refused" if full else f"; at {FULL_AT:.0%} writers are refused"),
            what_to_do=f"run `trajstore archive {where}`; `trajstore backlog {where}` tells what waits for it, and "
            f"`trajstore consumers {where}` what is kept for trainers",
        )


def _several(names: set[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} others"
