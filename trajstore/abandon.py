"""What nobody goes on with: open segments are closed as aborted, their writer fenced; what was only created is found.

How long is measured by the server's clock and remembered beside the log, so it survives the archivers that measure it.
"""

import contextlib
import logging
from collections.abc import Iterable
from typing import NamedTuple

from trajstore.archive.trim import free
from trajstore.errors import NotFound, StoreFull, TrajstoreError
from trajstore.log.wire import FULL_AT, fullest
from trajstore.store import Store
from trajstore.summary import Summary, summarize

__all__ = ["Swept", "sweep"]

log = logging.getLogger(__name__)


class Swept(NamedTuple):
    """What a sweep came to.

    Attributes:
        closed: trajectories that were closed as aborted.
        created: by partition, ids of trajectories that were created, and nothing more came of them. Their one entry is
            finished, but no hint tells of it: a segment mostly follows, and takes it along.
    """

    closed: int
    created: dict[int, list[str]]


def sweep(store: Store, partitions: Iterable[int], *, after: float, created_after: float) -> Swept:
    """Look at the open segments of some partitions, and at what was only created.

    Args:
        after: seconds without a new event after which a segment counts as abandoned.
        created_after: seconds after which a trajectory that was only created is given out; 0 for all at once.
    """
    seconds, _ = store.wire.call("TIME")
    now = int(seconds)
    closed = 0
    created: dict[int, list[str]] = {}
    for partition in partitions:
        key = store.keys.quiet(partition)
        flat = store.wire.call("HGETALL", key)
        known = {id.decode(): text.decode() for id, text in zip(flat[::2], flat[1::2], strict=True)}
        summaries = store.hot.summaries(partition, on_unreadable=lambda *_: None)  # see `mending`
        quiet_now = {one.id: one for one in summaries if one.has_open_segment or _is_bare(one)}
        changed: list[Summary] = []
        bare: list[str] = []
        for summary in quiet_now.values():
            last, _, since = known.get(summary.id, "").partition(" ")
            if last != summary.last:
                changed.append(summary)
            if _is_bare(summary):
                if (now - int(since) if last == summary.last else 0) >= created_after:
                    bare.append(summary.id)
            elif last == summary.last and now - int(since) >= after:
                closed += _close(store, summary)
        lengths = store.wire.call_all([("XLEN", store.keys.entries(id)) for id in bare])
        created[partition] = [id for id, length in zip(bare, lengths, strict=True) if length]  # else it is archived
        if changed:
            read_at, _ = store.wire.call("TIME")  # what was read may be younger than `now`
            marks = [part for one in changed for part in (one.id, f"{one.last} {int(read_at)}")]
            try:
                store.wire.call("HSET", key, *marks)
            except StoreFull:  # draining the server comes first; the next sweep looks again
                return Swept(closed, created)
        gone = [id for id in known if id not in quiet_now]
        if gone:
            store.wire.call("HDEL", key, *gone)
    return Swept(closed, created)


def _is_bare(summary: Summary) -> bool:
    """Nothing but its first entry was written."""
    return summary.last == "1-0"


def _is_full(store: Store) -> bool:
    used, limit = fullest([one.exchange([("INFO", "memory")])[0] for one in store.wire.servers()])
    return bool(limit) and used >= FULL_AT * limit


def _close(store: Store, summary: Summary) -> bool:
    try:
        now = summarize(summary.id, store.events(summary.id))
        if now is None or now.last != summary.last or not now.has_open_segment:
            store.repair_summary(summary.id)  # it has moved since, or the loser of a race had left its own
            return False
        if _is_full(store):  # draining it comes first, and closing would wait for room for longer than a lease lasts
            return False
        handle = store.get(summary.id)
        if not handle._is_at(now.last):  # somebody has gone on with it since
            return False
        handle.close("aborted", takeover=True)
        store.flush(summary.id)
    except NotFound as error:
        if store.archive is not None and store.archive.is_dropped(summary.id):
            free(store.wire, store.keys, [summary.id])
        with contextlib.suppress(StoreFull):  # it is a hint
            store.repair_summary(summary.id)
        log.warning(
            "%s could not be closed as abandoned: %s",
            summary.id,
            error,
            extra={"event": "abandon-failed", "trajectory": summary.id},
        )
        return False
    except TrajstoreError as error:
        log.warning(
            "%s could not be closed as abandoned: %s",
            summary.id,
            error,
            extra={"event": "abandon-failed", "trajectory": summary.id},
        )
        return False
    log.warning(
        "%s stood open without progress at %s and is closed as aborted",
        summary.id,
        summary.last,
        extra={"event": "abandoned", "trajectory": summary.id},
    )
    return True
