"""Raw replies about streams → ids and entry bytes."""

from typing import Any

import msgspec
import redis

from trajstore.errors import Corrupt
from trajstore.events import EventId
from trajstore.log.batch import ENTRY_FIELD
from trajstore.log.wire import translate

__all__ = ["nonce_of", "parse_entries", "stream_last_id"]


class _Nonce(msgspec.Struct):
    nonce: int


_decode_nonce = msgspec.msgpack.Decoder(_Nonce).decode


def nonce_of(entry: bytes) -> int:
    """The nonce of an entry, whatever its events."""
    return _decode_nonce(entry).nonce


def stream_last_id(reply: Any) -> EventId | None:
    """Newest id that a stream ever took, from XINFO STREAM; None if it does not exist."""
    if isinstance(reply, redis.ResponseError):
        if "no such key" in str(reply):
            return None
        raise translate(reply, "XINFO STREAM")
    fields = dict(zip(reply[::2], reply[1::2], strict=True))
    return EventId.parse(fields[b"last-generated-id"])


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
