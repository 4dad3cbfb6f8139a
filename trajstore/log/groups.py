"""Consumer groups of streams: what each still needs, what none needs any more, and a consumer's end."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis

from trajstore.events import EventId
from trajstore.log.wire import Wire, reply_fields, translate

__all__ = ["GroupNeed", "groups_of", "is_missing", "needs_of", "oldest_needed", "sign_off", "trim_used"]


class GroupNeed(NamedTuple):
    """What one consumer group of a stream still needs.

    Attributes:
        name: of the group.
        consumers: that have not signed off.
        oldest: id from which on it needs the stream.
    """

    name: bytes
    consumers: int
    oldest: EventId


def groups_of(wire: Wire, streams: Sequence[str]) -> list[list[Any] | None]:
    """The reply to XINFO GROUPS of each stream; None for one that is not there.

    Raises:
        Unavailable: the server does not answer.
    """
    found: list[list[Any] | None] = []
    for reply in wire.exchange([("XINFO", "GROUPS", stream) for stream in streams]):
        if isinstance(reply, redis.RedisError) and not is_missing(reply):
            raise translate(reply, "XINFO GROUPS")
        found.append(None if isinstance(reply, redis.RedisError) else list(reply))
    return found


def is_missing(reply: object) -> bool:
    """The server said that there is no such stream, or no such group in it."""
    text = str(reply)
    return isinstance(reply, redis.ResponseError) and ("no such key" in text.lower() or text.startswith("NOGROUP"))


def needs_of(wire: Wire, streams: Sequence[str]) -> list[list[GroupNeed]]:
    """What the groups of each stream need. One that is removed meanwhile needs nothing, nor does a stream that is not
    there.

    Raises:
        Unavailable: the server does not answer.
    """
    groups = [list(map(reply_fields, some or ())) for some in groups_of(wire, streams)]
    asked = [("XPENDING", stream, one[b"name"]) for stream, some in zip(streams, groups, strict=True) for one in some]
    summaries = iter(wire.exchange(asked))
    return [[need for one in some if (need := _need_of(one, next(summaries))) is not None] for some in groups]


def _need_of(group: Mapping[bytes, Any], summary: Any) -> GroupNeed | None:
    if is_missing(summary):
        return None
    if isinstance(summary, redis.RedisError):
        raise translate(summary, "XPENDING")
    oldest = oldest_needed(group[b"last-delivered-id"], summary[1])
    return GroupNeed(group[b"name"], int(group[b"consumers"]), oldest)


def trim_used(wire: Wire, streams: Sequence[str]) -> None:
    """Drop entries that no consumer group of their stream needs any more; of a stream without groups nothing."""
    wire.call_all(
        [
            ("XTRIM", stream, "MINID", str(min(need.oldest for need in needs)))
            for stream, needs in zip(streams, needs_of(wire, streams), strict=True)
            if needs
        ]
    )


def oldest_needed(delivered: bytes, pending: bytes | None) -> EventId:
    """Oldest id that a group still needs.

    Args:
        delivered: the newest that was given to a consumer.
        pending: the oldest that was given and is not acknowledged, None if all are.
    """
    last = EventId.parse(delivered)
    fresh = EventId(last.epoch, last.seq + 1)
    return fresh if pending is None else min(fresh, EventId.parse(pending))


def sign_off(wire: Wire, streams: Sequence[str], group: str, consumer: str) -> None:
    """Remove a consumer from its group of each stream where nothing is pending for it. It must not read meanwhile."""
    pending = wire.call_all([("XPENDING", stream, group, "-", "+", 1, consumer) for stream in streams])
    wire.call_all(
        [
            ("XGROUP", "DELCONSUMER", stream, group, consumer)
            for stream, entries in zip(streams, pending, strict=True)
            if not entries
        ]
    )
