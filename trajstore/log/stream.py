"""Raw replies about streams → ids and entry bytes."""

from typing import Any

import msgspec
import redis

from trajstore.entries import decode_entry
from trajstore.errors import UNREADABLE, Corrupt
from trajstore.events import EventId, TrajectoryDeleted
from trajstore.log.batch import ENTRY_FIELD
from trajstore.log.wire import reply_fields, translate

__all__ = [
    "ends_in_tombstone",
    "nonce_of",
    "parse_entries",
    "stream_last_event",
    "stream_last_id",
    "stream_last_nonce",
    "stream_length",
]


class _Outline(msgspec.Struct):
    nonce: int
    events: list[msgspec.Raw]


_decode_outline = msgspec.msgpack.Decoder(_Outline).decode


def nonce_of(entry: bytes) -> int:
    """The nonce of an entry, whatever its events.

    Raises:
        Corrupt: the bytes are no entry.
    """
    return _outline(entry).nonce


def stream_last_id(reply: Any) -> EventId | None:
    """Newest id that a stream ever took, from XINFO STREAM; None if it does not exist."""
    if isinstance(reply, redis.ResponseError):
        if "no such key" in str(reply):
            return None
        raise translate(reply, "XINFO STREAM")
    return EventId.parse(reply_fields(reply)[b"last-generated-id"])


def stream_length(reply: Any) -> int:
    """How many entries a stream holds, from XINFO STREAM; 0 if it does not exist."""
    return 0 if isinstance(reply, redis.ResponseError) else int(reply_fields(reply)[b"length"])


def stream_last_event(reply: Any) -> EventId | None:
    """Id of the last event of the newest entry that a stream still holds, from XINFO STREAM; None if it holds none."""
    newest = None if isinstance(reply, redis.ResponseError) else reply_fields(reply).get(b"last-entry")
    if not newest:
        return None
    at, entry = parse_entries([newest])[0]
    return EventId(at.epoch, at.seq + len(_outline(entry).events) - 1)


def stream_last_nonce(reply: Any) -> int | None:
    """Nonce of the newest entry that a stream still holds, from XINFO STREAM; None if it holds none."""
    newest = None if isinstance(reply, redis.ResponseError) else reply_fields(reply).get(b"last-entry")
    return nonce_of(parse_entries([newest])[0][1]) if newest else None


def ends_in_tombstone(reply: Any) -> bool:
    """The newest entry that a stream still holds, from XINFO STREAM, says that the trajectory was deleted."""
    newest = None if isinstance(reply, redis.ResponseError) else reply_fields(reply).get(b"last-entry")
    if not newest:
        return False
    return any(isinstance(event.header, TrajectoryDeleted) for event in decode_entry(*parse_entries([newest])[0]))


def _outline(entry: bytes) -> _Outline:
    try:
        return _decode_outline(entry)
    except UNREADABLE as error:
        raise Corrupt(f"a stream entry was not written by trajstore: {error}") from error


def parse_entries(reply: Any) -> list[tuple[EventId, bytes]]:
    """Ids and entry bytes of an XRANGE reply.

    Raises:
        Corrupt: a stream entry that trajstore did not write.
    """
    if isinstance(reply, redis.RedisError):
        raise translate(reply, "XRANGE")
    entries = []
    for entry_id, fields in reply:
        if len(fields) != 2 or fields[0] != ENTRY_FIELD:
            raise Corrupt(
                f"the stream entry {entry_id.decode()} was not written by trajstore: its fields are {fields[::2]}"
            )
        entries.append((EventId.parse(entry_id), fields[1]))
    return entries
