"""The materializer: follows the feed, folds trajectories as they close, assembles groups, publishes to `ready`.

Any number may run; they share the feed by consumer group, and take over what a dead one left. Every effect is keyed by
(trajectory, version), so a hint that comes twice publishes once.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import msgspec
from ulid import ULID

from trajstore.blob import to_blob
from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import CLOSED_STATUSES
from trajstore.fold import Policy
from trajstore.log.feed import MATERIALIZER, FeedFollower, Hint
from trajstore.ready import ReadyMember, ReadyQueue
from trajstore.store import Store

__all__ = ["Materialized", "Materializer", "worker_name"]

log = logging.getLogger(__name__)


class Materialized(msgspec.Struct):
    """What a materializer has done so far.

    Attributes:
        trajectories: folded and offered.
        groups: entries published.
        tokens: of the trajectories.
        nbytes: of their blobs.
        refused: trajectories that cannot be folded; each is logged, and stays in the log untouched.
    """

    trajectories: int = 0
    groups: int = 0
    tokens: int = 0
    nbytes: int = 0
    refused: int = 0


class Materializer:
    """One materializing process.

    Args:
        store: of the run.
        policy: of the folds that it publishes.
        blob_seconds: how long a fold lies ready; a later reader folds again.
        assembly_seconds: how long a published group is remembered against repeated hints.
        claim_seconds: after this long, hints of a silent materializer are taken over.
    """

    def __init__(
        self,
        store: Store,
        *,
        policy: Policy = "last_segment_wins",
        blob_seconds: float = 3600.0,
        assembly_seconds: float = 7 * 86400.0,
        claim_seconds: float = 60.0,
    ) -> None:
        self.done = Materialized()
        self._store = store
        self._policy = policy
        self._blob_seconds = blob_seconds
        self._assembly_seconds = assembly_seconds
        self._claim_seconds = claim_seconds
        self._ready = ReadyQueue(store.wire, store.keys)
        self._feed = FeedFollower(store.wire, store.keys, MATERIALIZER, worker_name())
        self._partitions = list(range(store.partitions))

    def run(
        self,
        *,
        once: bool = False,
        stop: threading.Event | None = None,
        on_progress: Callable[[Materialized], None] = lambda _: None,
    ) -> Materialized:
        """Work until stopped, or with `once` until nothing is left to do."""
        stopped = stop or threading.Event()
        next_claim = time.monotonic()
        while not stopped.is_set():
            hints = self._feed.poll(self._partitions, count=32, block=0.0 if once else 0.5)
            if time.monotonic() >= next_claim:
                next_claim = time.monotonic() + self._claim_seconds / 4
                for partition in self._partitions:
                    hints += self._feed.take_over(partition, idle=0.0 if once else self._claim_seconds)
                self._feed.trim(self._partitions)
            self.handle(hints, stopped)
            on_progress(self.done)
            if once and not hints:
                break
        self._feed.trim(self._partitions)
        self._feed.leave(self._partitions)
        return self.done

    def handle(self, hints: list[Hint], stopped: threading.Event) -> None:
        """Act on hints, then acknowledge them; several about one trajectory are one."""
        by_id: dict[str, list[Hint]] = {}
        for hint in hints:
            by_id.setdefault(hint.id, []).append(hint)
        for id, about in by_id.items():
            if stopped.is_set():
                return
            try:
                self._materialize(id)
            except NotFound:
                pass  # a spurious hint, or a trajectory whose data is gone
            except (SequenceGap, SchemaError, RoutingError, Corrupt) as error:
                self.done.refused += 1
                log.error("%s cannot be folded and is not published: %s", id, error)
            self._feed.acknowledge(about)

    def _materialize(self, id: str) -> None:
        plan = self._store.plan(id, policy=self._policy)
        history = plan.history
        if history.status not in CLOSED_STATUSES:
            return
        group, size = history.opened.group, history.opened.group_size
        if self._ready.offered(id, group=group, group_size=size) >= history.closes:
            return
        trajectory = self._store.load(id, policy=self._policy, until=history.last)
        blob = to_blob(trajectory)
        self._ready.put_blob(id, history.closes, blob, keep=self._blob_seconds)
        member = ReadyMember(
            id=id,
            version=history.closes,
            status=trajectory.status,
            at=trajectory.at,
            tokens=len(trajectory),
            nbytes=len(blob),
        )
        published = self._ready.offer(
            member, group=group, group_size=size, policy=self._policy, keep=self._assembly_seconds
        )
        self.done.trajectories += 1
        self.done.tokens += len(trajectory)
        self.done.nbytes += len(blob)
        self.done.groups += published is not None


def worker_name() -> str:
    """A consumer name that no other process has had: host, pid and a ULID."""
    return f"{socket.gethostname()}-{os.getpid()}-{ULID()}"
