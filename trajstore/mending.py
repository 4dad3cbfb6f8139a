"""Summaries that would be wrong for good: archivers compare them with what is archived, and write them anew.

The loser of a race was cut off before it could take its own back, or a request that its sender had long given up laid
an older one over the newest. The archive has a summary with everything that it holds, so this reads no log but what is
younger than that.
"""

import contextlib
import logging
from collections.abc import Iterator
from itertools import islice

from trajstore.archive.archived import Archived
from trajstore.archive.manifest import Manifest
from trajstore.errors import Corrupt, SchemaError, StoreFull
from trajstore.events import EventId
from trajstore.log.stream import stream_last_id
from trajstore.store import Store
from trajstore.summary import Summary, summarize

__all__ = ["mend_summaries"]

log = logging.getLogger(__name__)

_PAGE = 500


def mend_summaries(store: Store, manifest: Manifest, partition: int) -> int:
    """Write the wrong summaries of one partition anew, of trajectories that the archive knows; returns how many.

    So are those that nobody can read. One that says that a segment stands open, above what is archived, is left to
    `abandon.sweep`.

    Raises:
        Unavailable: the server did not answer.
        Corrupt, SchemaError: the manifest cannot be read.
    """
    manifest.refresh()
    mended = 0
    unreadable: list[str] = []
    summaries = store.hot.summaries(partition, on_unreadable=lambda of, _: unreadable.append(of))
    with contextlib.suppress(StoreFull):  # draining the server comes first
        while page := list(islice(summaries, _PAGE)):
            for summary in _wrong(store, manifest, page):
                _mend(store, summary.id)
                mended += store.hot.summary(summary.id) != summary
        for id in unreadable:
            _mend(store, id)
            mended += 1
    return mended


def _mend(store: Store, id: str) -> None:
    try:
        store.repair_summary(id)
    except (Corrupt, SchemaError) as error:
        log.warning("%s: %s", id, error, extra={"event": "summary-stale", "trajectory": id})


def _wrong(store: Store, manifest: Manifest, page: list[Summary]) -> Iterator[Summary]:
    """Those that are not what archive and log say."""
    known: list[tuple[Summary, Archived]] = []
    for summary in page:
        try:
            archived = manifest.find(summary.id)
        except Corrupt:
            continue
        if archived.last is not None and archived.summary is not None:
            known.append((summary, archived))
    infos = store.wire.exchange([("XINFO", "STREAM", store.keys.entries(summary.id)) for summary, _ in known])
    for (summary, archived), info in zip(known, infos, strict=True):
        last = stream_last_id(info)
        if last is None or not _tells(summary, _right(store, archived, summary, last)):
            yield summary


def _right(store: Store, archived: Archived, summary: Summary, last: EventId) -> Summary | None:
    """The summary of all that there is up to the newest entry; what was found, where it is as good."""
    assert archived.last is not None
    if last == archived.last:
        return archived.summary
    if last < archived.last or summary.has_open_segment:  # the server lost something; or a writer is at work
        return summary
    try:
        entries, _ = store.hot.read(summary.id)
        events = [event for entry in entries if entry.at > archived.last for event in entry.events()]
    except (Corrupt, SchemaError):
        return summary
    return summarize(summary.id, events, after=archived.summary)


def _tells(summary: Summary, right: Summary | None) -> bool:
    """Whether it says the same, but for the times."""
    return right is not None and all(
        getattr(summary, name) == getattr(right, name)
        for name in Summary.__struct_fields__
        if name not in ("created", "updated")
    )
