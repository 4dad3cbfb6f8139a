"""Closing what writers left open: segments without progress for long are closed as aborted, and their writer fenced.

How long is measured by the server's clock and remembered beside the log, so it survives the archivers that measure it.
"""

import logging
from collections.abc import Iterable

from trajstore.errors import StoreFull, TrajstoreError
from trajstore.store import Store
from trajstore.summary import Summary

__all__ = ["close_abandoned"]

log = logging.getLogger(__name__)


def close_abandoned(store: Store, partitions: Iterable[int], *, after: float) -> int:
    """One sweep over the open segments of some partitions.

    Args:
        after: seconds without a new event after which a segment counts as abandoned.

    Returns:
        How many trajectories were closed as aborted.
    """
    seconds, _ = store.wire.call("TIME")
    now = int(seconds)
    closed = 0
    for partition in partitions:
        key = store.keys.quiet(partition)
        flat = store.wire.call("HGETALL", key)
        known = {id.decode(): text.decode() for id, text in zip(flat[::2], flat[1::2], strict=True)}
        open_now = {one.id: one for one in store.hot.summaries(partition) if one.has_open_segment}
        changed: list[str | int] = []
        for summary in open_now.values():
            last, _, since = known.get(summary.id, "").partition(" ")
            if last != summary.last:
                changed += [summary.id, f"{summary.last} {now}"]
            elif now - int(since) >= after:
                closed += _close(store, summary)
        if changed:
            try:
                store.wire.call("HSET", key, *changed)
            except StoreFull:  # draining the server comes first; the next sweep looks again
                return closed
        gone = [id for id in known if id not in open_now]
        if gone:
            store.wire.call("HDEL", key, *gone)
    return closed


def _close(store: Store, summary: Summary) -> bool:
    try:
        if store.events(summary.id)[-1].id != summary.last:  # it has moved since the summary was read
            return False
        store.get(summary.id).close("aborted", takeover=True)
        store.flush(summary.id)
    except TrajstoreError as error:
        log.warning("%s could not be closed as abandoned: %s", summary.id, error)
        return False
    log.warning("%s stood open without progress at %s and is closed as aborted", summary.id, summary.last)
    return True
