"""The end of a consumer group of the ready streams.

A group that nobody reads any more costs memory for ever: whatever is published is kept for it, in case it comes back.
"""

from collections.abc import Sequence
from operator import itemgetter

import redis

from trajstore.errors import Conflict, NotFound
from trajstore.log.groups import groups_of, is_missing, trim_used
from trajstore.log.keys import Keys
from trajstore.log.wire import Wire, reply_fields, translate

__all__ = ["remove_consumer_group"]

_NAMED = 4


def remove_consumer_group(wire: Wire, keys: Keys, name: str, *, force: bool = False) -> None:
    """Forget how far a consumer group has read; entries that were kept for it alone go.

    Whoever reads under this name afterwards begins with what the ready streams still hold, also after a checkpoint of
    the group that is no more. It may be `trainer`, which every run has from the start, but not the last group: without
    any, nothing that is published would ever go.

    Folds that lie ready, and what the group has decided on (`trajstore_trainer.decisions`), expire by themselves.

    Args:
        force: also a group with consumers that have not signed off. Those that are alive go on with what they have
            read ahead, and then fail.

    Raises:
        NotFound: there is no such group.
        Conflict: it has consumers, or is the last.
        Unavailable: the server does not answer.
    """
    streams = [keys.ready(partition) for partition in range(keys.partitions)]
    groups = [{reply_fields(one)[b"name"] for one in some or ()} for some in groups_of(wire, streams)]
    raw = name.encode(errors="surrogateescape")
    others = set().union(*groups) - {raw}
    there = [stream for stream, some in zip(streams, groups, strict=True) if raw in some]
    if not there:
        known = ", ".join(sorted(other.decode(errors="replace") for other in others)) or "none"
        raise NotFound(f"run {keys.run!r} has no consumer group {name!r}; its groups: {known}")
    if not others:
        raise Conflict(
            f"{name!r} is the last consumer group of run {keys.run!r}: without any, what is published would stay for "
            "good. Where nobody trains, run no materializer"
        )
    if not force:
        _require_left(wire, there, raw)
    wire.call_all([("XGROUP", "DESTROY", stream, raw) for stream in there])
    trim_used(wire, there)


def _require_left(wire: Wire, streams: Sequence[str], group: bytes) -> None:
    """Nobody is signed on to a group."""
    found: dict[str, tuple[float, int]] = {}
    for reply in wire.exchange([("XINFO", "CONSUMERS", stream, group) for stream in streams]):
        if is_missing(reply):  # somebody else has just removed it
            continue
        if isinstance(reply, redis.RedisError):
            raise translate(reply, "XINFO CONSUMERS")
        for one in map(reply_fields, reply):
            who, silent, pending = one[b"name"].decode(errors="replace"), int(one[b"idle"]) / 1000, int(one[b"pending"])
            least, held = found.get(who, (silent, 0))
            found[who] = min(silent, least), held + pending
    if found:
        told = [
            f"{who} (last heard of {silent:.0f} s ago, {held} entries in hand)"
            for who, (silent, held) in sorted(found.items(), key=itemgetter(1))
        ]
        more = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
        raise Conflict(
            f"consumer group {group.decode(errors='replace')!r} has consumers: {', '.join(told[:_NAMED])}{more}. Stop "
            "them first; they sign off, unless they have something in hand, as those that died, and a job by "
            "checkpoint, which would be given everything again if it went on. Those that are given up go by force: "
            "--force, force=True"
        )
