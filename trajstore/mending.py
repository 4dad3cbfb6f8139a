"""Summaries that would be wrong for good: archivers compare them with what is archived, and write them anew.

The loser of a race was cut off before it could take its own back, or a request that its sender had long given up laid
an older one over the newest. The archive has a summary with everything that it holds, so this reads no log but what is
younger than that. It is done a page at a time, for whoever archives has more urgent things to do.

On the way it finds what is archived and yet not trimmed: a server that crashed just then came back with it, and its
hints were acknowledged.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from trajstore.archive.archived import Archived
from trajstore.archive.manifest import Manifest
from trajstore.errors import Corrupt, SchemaError
from trajstore.events import EventId
from trajstore.log.stream import stream_last_id, stream_length
from trajstore.store import Store
from trajstore.summary import Summary, summarize

__all__ = ["Mending", "Step"]

log = logging.getLogger(__name__)

_PAGE = 100

_REMEMBERED = 1 << 17
"""Summaries that are known to be right, at most: of these the archive is not asked again."""


class Step(NamedTuple):
    """What a step of a comparison came to.

    Attributes:
        more: there are more pages.
        untrimmed: ids of trajectories of which the hot log still has what is archived.
    """

    more: bool
    untrimmed: list[str]


class Mending:
    """Compares the summaries of partitions that an archiver holds, each partition's as often as is given.

    Args:
        store: of the run; has an archive.
        every: seconds from the end of one comparison to the next.
    """

    def __init__(self, store: Store, *, every: float) -> None:
        self._store = store
        self._every = every
        self._next: dict[int, float] = {}  # when each partition is to be compared again
        self._cursors: dict[int, bytes] = {}  # of those that are being compared
        self._right: set[int] = set()  # hashes of summaries, with how their streams stood

    def step(self, partition: int, manifest: Manifest, *, stay: Callable[[], bool]) -> Step:
        """Compare the next page of a partition, if it is time.

        Summaries that nobody can read are written anew, too. One that says that a segment stands open above what is
        archived is left to `trajstore.abandon`.

        Args:
            stay: asked before each trajectory; False to stop.
        """
        if time.monotonic() < self._next.get(partition, 0.0):
            return Step(False, [])
        untrimmed: list[str] = []
        try:
            manifest.refresh()
            cursor, page = self._store.hot.summaries_from(partition, self._cursors.get(partition), count=_PAGE)
            untrimmed += self._compare(manifest, page, stay)
        except (OSError, Corrupt, SchemaError) as error:  # it is hints: what else there is to do goes on
            cursor = b"0"
            log.warning(
                "summaries of partition %d are not compared with the archive for now: %s",
                partition,
                error,
                extra={"event": "summaries-unseen", "partition": partition},
            )
        if cursor != b"0":
            self._cursors[partition] = cursor
            return Step(True, untrimmed)
        self._cursors.pop(partition, None)
        self._next[partition] = time.monotonic() + self._every
        return Step(False, untrimmed)

    def _compare(
        self, manifest: Manifest, page: list[tuple[str, Summary | SchemaError]], stay: Callable[[], bool]
    ) -> Iterator[str]:
        """Mend a page; gives the ids of what is archived and not trimmed."""
        commands = [("XINFO", "STREAM", self._store.keys.entries(id)) for id, _ in page]
        for (id, found), info in zip(page, self._store.wire.exchange(commands), strict=True):
            if not stay():
                return
            try:
                if not isinstance(found, Summary):
                    self._repair(id, None)
                elif self._compare_one(manifest, found, stream_last_id(info), stream_length(info)):
                    yield id
            except (Corrupt, SchemaError) as error:  # of one trajectory
                log.warning(
                    "the summary of %s may be out of date: %s",
                    id,
                    error,
                    extra={"event": "summary-stale", "trajectory": id},
                )

    def _compare_one(self, manifest: Manifest, found: Summary, last: EventId | None, length: int) -> bool:
        """True if the hot log has entries, and all of them are archived."""
        stands = hash((found, last, length > 0))
        if stands in self._right:
            return False
        archived = manifest.find(found.id)
        wrong = self._is_wrong(found, archived, last)
        # A repair leaves it as it was where an older version archived it, whose summaries say less.
        right = self._repair(found.id, found) == found if wrong else wrong is False
        if length and last is not None and archived.last is not None and last <= archived.last:
            return True
        if right:
            self._remember(stands)
        return False

    def _is_wrong(self, found: Summary, archived: Archived, last: EventId | None) -> bool | None:
        """Whether archive and log say otherwise; None while that cannot be told without reading all of the log."""
        if archived.last is None:
            return None
        if last is None:  # it was let go, and its summary with it
            return True
        if last <= archived.last:
            return found != archived.summary
        if found.has_open_segment:  # a writer is at work
            return None
        entries, _ = self._store.hot.read(found.id)
        events = [event for entry in entries if entry.at > archived.last for event in entry.events()]
        return found != summarize(found.id, events, after=archived.summary)

    def _repair(self, id: str, found: Summary | None) -> Summary | None:
        right = self._store.repair_summary(id)
        if right != found:
            log.info(
                "the summary of %s was wrong: %s, and is now %s",
                id,
                "nothing that can be read" if found is None else f"{found.status} at {found.last}",
                "gone" if right is None else f"{right.status} at {right.last}",
                extra={"event": "summary-mended", "trajectory": id},
            )
        return right

    def _remember(self, one: int) -> None:
        if len(self._right) >= _REMEMBERED:
            self._right.clear()
        self._right.add(one)
