"""Looking at a store's keys with a plain client, beside the code under test."""

from functools import partial
from typing import Any

import redis

import trajstore
from tests import waiting
from trajstore.entries import Entry, EntryStamp, decode_known
from trajstore.events import EventId

__all__ = ["NoArchive", "dense", "entries", "newest_id", "notes", "payload_fields", "until", "write_one"]


def entries(client: redis.Redis, store: trajstore.Store, id: str) -> list[tuple[str, Entry]]:
    """Entries of a trajectory's stream: id and content."""
    return _entries(client, store.keys.entries(id))


def notes(client: redis.Redis, store: trajstore.Store, id: str) -> list[tuple[str, Entry]]:
    """Entries of its notes stream."""
    return _entries(client, store.keys.notes(id))


def payload_fields(client: redis.Redis, store: trajstore.Store, id: str) -> set[str]:
    """Names of its payload fields."""
    names: Any = client.hkeys(store.keys.payloads(id))
    return {name.decode() for name in names}


def newest_id(client: redis.Redis, store: trajstore.Store, id: str) -> str:
    """The newest id that its stream ever took."""
    found: Any = client.xinfo_stream(store.keys.entries(id))
    return str(found["last-generated-id"].decode())


def dense(found: list[tuple[str, Entry]]) -> int:
    """Check that ids follow from the entries' counts, so that nothing is missing or doubled; returns the events."""
    expected: dict[str, int] = {}
    for at, entry in found:
        epoch, _, seq = at.partition("-")
        assert int(seq) == expected.get(epoch, 0)
        expected[epoch] = int(seq) + len(entry.events)
    return sum(expected.values())


def write_one(segment: trajstore.SegmentWriter) -> None:
    """Append a token and wait for it; a failure may show at either."""
    segment.tokens([1])
    segment._trajectory._flusher.flush(segment._trajectory.id)


until = partial(waiting.until, seconds=10.0)


def _entries(client: redis.Redis, key: str) -> list[tuple[str, Entry]]:
    found: Any = client.xrange(key)
    return [(at.decode(), decode_known(fields[b"e"])) for at, fields in found]


class NoArchive:
    """The `ArchiveIndex` of a run that has no archive."""

    def entry(self, id: str, at: EventId) -> EntryStamp | None:
        return None

    def note(self, id: str, at: EventId) -> EntryStamp | None:
        return None

    def last_note(self, id: str) -> int:
        return 0

    def last_entry(self, id: str) -> EventId | None:
        return None
