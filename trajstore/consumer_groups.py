"""The end of a consumer group of the ready streams.

A group that nobody reads any more costs memory for ever: whatever is published is kept for it, in case it comes back.
"""

from collections.abc import Sequence
from operator import itemgetter

import redis

from trajstore.errors import Conflict, NotFound
from trajstore.log.feed import trim_used
from trajstore.log.keys import Keys
from trajstore.log.wire import Wire, reply_fields, translate

__all__ = ["remove_consumer_group"]

_NAMED = 4


def remove_consumer_group(wire: Wire, keys: Keys, name: str, *, force: bool = False) -> None:
    """Forget how far a consumer group has read, and drop what was kept for it alone.

    Whoever reads under this name afterwards begins with what the ready streams still hold. It may also be `trainer`,
    the group that every run has from the start.

    Args:
        force: also a group with consumers that have not signed off. One that is alive fails at its next call.

    Raises:
        NotFound: there is no such group.
        Conflict: it has consumers.
        Unavailable: the server does not answer.
    """
    there, others = _streams_of(wire, keys, name)
    if not there:
        known = ", ".join(others) or "none"
        raise NotFound(f"run {keys.run!r} has no consumer group {name!r}; its groups: {known}")
    if not force:
        _require_left(wire, there, name)
    wire.call_all([("XGROUP", "DESTROY", stream, name) for stream in there])
    trim_used(wire, there)


def _streams_of(wire: Wire, keys: Keys, name: str) -> tuple[list[str], list[str]]:
    """The ready streams that have a group, and the names of all others."""
    streams = [keys.ready(partition) for partition in range(keys.partitions)]
    there, others = [], set[str]()
    for stream, reply in zip(streams, wire.exchange([("XINFO", "GROUPS", one) for one in streams]), strict=True):
        if isinstance(reply, redis.RedisError):
            if "no such key" in str(reply).lower():
                continue  # the server has lost the partition
            raise translate(reply, "XINFO GROUPS")
        names = {reply_fields(group)[b"name"].decode(errors="replace") for group in reply}
        there += [stream] if name in names else []
        others |= names - {name}
    return there, sorted(others)


def _require_left(wire: Wire, streams: Sequence[str], name: str) -> None:
    """Nobody is signed on to a group."""
    found: dict[str, float] = {}
    for reply in wire.call_all([("XINFO", "CONSUMERS", stream, name) for stream in streams]):
        for consumer in map(reply_fields, reply):
            who, silent = consumer[b"name"].decode(errors="replace"), int(consumer[b"idle"]) / 1000
            found[who] = min(silent, found.get(who, silent))
    if found:
        told = [f"{who}, last heard {silent:.0f} s ago" for who, silent in sorted(found.items(), key=itemgetter(1))]
        more = f"; and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
        raise Conflict(
            f"consumer group {name!r} has consumers: {'; '.join(told[:_NAMED])}{more}. Stop them first; those that "
            "died without signing off go with --force (force=True)"
        )
