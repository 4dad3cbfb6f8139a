"""Following the feed: the partition's stream of hints that something closed, was scored or was noted.

Hints are repeated, spurious and out of order by right. A follower reads the trajectory again, acts on what it finds,
keys its effect by (trajectory, event id), and acknowledges last.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ulid import ULID

from trajstore.events import EventId
from trajstore.log.groups import sign_off, trim_used
from trajstore.log.keys import Keys
from trajstore.log.stream import stream_last_id
from trajstore.log.wire import Wire, reply_fields

__all__ = [
    "ARCHIVER",
    "FEED_GROUPS",
    "MATERIALIZER",
    "FeedFollower",
    "FeedTail",
    "Hint",
    "parse_stream",
    "worker_name",
]

ARCHIVER = "archiver"
MATERIALIZER = "materializer"
FEED_GROUPS = (ARCHIVER, MATERIALIZER)
"""Consumer groups of every feed, made at the run's first open: a full server refuses XGROUP CREATE."""


class Hint(NamedTuple):
    """One feed entry: something happened to trajectory `id`."""

    partition: int
    at: str
    id: str
    kind: str
    event: str

    @property
    def is_note(self) -> bool:
        """True if `event` counts in the notes stream."""
        return self.kind in ("RoutingObserved", "LateRouting")


class FeedFollower:
    """One consumer of one group over some partitions' feeds."""

    def __init__(self, wire: Wire, keys: Keys, group: str, consumer: str) -> None:
        self._wire = wire
        self._keys = keys
        self._group = group
        self._consumer = consumer

    def poll(self, partitions: Sequence[int], *, count: int, block: float = 0.0) -> list[Hint]:
        """New hints, at most `count` per partition; waits up to `block` seconds for the first."""
        if not partitions:
            return []
        feeds = {self._keys.feed(partition): partition for partition in partitions}
        wait: tuple[str | int, ...] = ("BLOCK", max(1, int(block * 1000))) if block > 0 else ()
        reply = self._wire.call(
            "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count, *wait,
            "STREAMS", *feeds, *(">" for _ in feeds),
        )  # fmt: skip
        return [_hint(feeds[name.decode()], entry) for name, entries in reply or [] for entry in parse_stream(entries)]

    def take_over(self, partition: int, *, idle: float, count: int = 1000) -> list[Hint]:
        """Hints that another consumer (or this one, earlier) read `idle` seconds ago and never acknowledged."""
        hints: list[Hint] = []
        cursor: Any = b"0-0"
        while True:
            reply = self._wire.call(
                "XAUTOCLAIM", self._keys.feed(partition), self._group, self._consumer, int(idle * 1000), cursor,
                "COUNT", count,
            )  # fmt: skip
            cursor = reply[0]
            hints += [_hint(partition, entry) for entry in parse_stream(reply[1])]
            if cursor in (b"0-0", "0-0"):
                return hints

    def acknowledge(self, hints: Iterable[Hint]) -> None:
        """These hints need no more work by this group."""
        by_partition: dict[int, list[Hint]] = {}
        for hint in hints:
            by_partition.setdefault(hint.partition, []).append(hint)
        commands = [
            ("XACK", self._keys.feed(partition), self._group, *(hint.at for hint in some))
            for partition, some in by_partition.items()
        ]
        self._wire.call_all(commands)

    def trim(self, partitions: Iterable[int]) -> None:
        """Drop hints that no group needs any more: those below every group's oldest unacknowledged one."""
        trim_used(self._wire, [self._keys.feed(partition) for partition in partitions])

    def leave(self, partitions: Iterable[int]) -> None:
        """Remove this consumer where nothing is pending for it, so that names do not pile up."""
        sign_off(self._wire, [self._keys.feed(partition) for partition in partitions], self._group, self._consumer)


class FeedTail:
    """All feeds of a run as they grow, for somebody who only looks: it takes nothing from the groups that work.

    Args:
        from_start: begin with what the feeds still hold; else with what comes from now on.
    """

    def __init__(self, wire: Wire, keys: Keys, *, from_start: bool = False) -> None:
        self._wire = wire
        self._partitions = {keys.feed(partition): partition for partition in range(keys.partitions)}
        self._seen = dict.fromkeys(self._partitions, "0-0")
        if not from_start:  # "$" would mean another place at each call, and lose what came between two of them
            replies = wire.exchange([("XINFO", "STREAM", feed) for feed in self._partitions])
            for feed, reply in zip(self._partitions, replies, strict=True):
                self._seen[feed] = str(stream_last_id(reply) or "0-0")

    def poll(self, *, count: int, block: float) -> list[Hint]:
        """The next hints, oldest first, at most `count` per partition; waits up to `block` seconds for the first."""
        reply = self._wire.call(
            "XREAD", "COUNT", count, "BLOCK", max(1, int(block * 1000)), "STREAMS", *self._seen, *self._seen.values()
        )
        hints: list[Hint] = []
        for name, entries in reply or []:
            feed = name.decode()
            self._seen[feed] = entries[-1][0].decode()
            hints += [_hint(self._partitions[feed], entry) for entry in parse_stream(entries)]
        return sorted(hints, key=lambda hint: EventId.parse(hint.at))


def parse_stream(entries: Any) -> list[tuple[str, dict[bytes, bytes]]]:
    """Entries of a stream reply as (id, fields); those trimmed meanwhile are left out."""
    parsed = []
    for entry in entries:
        if entry is not None and entry[1] is not None:
            parsed.append((entry[0].decode(), reply_fields(entry[1])))
    return parsed


def _hint(partition: int, entry: tuple[str, dict[bytes, bytes]]) -> Hint:
    at, fields = entry
    return Hint(partition, at, *(fields.get(name, b"").decode(errors="replace") for name in (b"t", b"k", b"e")))


def worker_name() -> str:
    """A consumer name that no other process has had: host, pid and a ULID."""
    return f"{socket.gethostname()}-{os.getpid()}-{ULID()}"
