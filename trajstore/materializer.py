"""The materializer: follows the feed, folds trajectories as they close, assembles groups, publishes to `ready`.

Any number may run; they share the feed by consumer group, and take over what a dead one left. Every effect is keyed by
(trajectory, version), so a hint that comes twice publishes once.

In a cluster a group, or a trajectory that has none, may be published on another server than its member's hint lies on.
A crash or a failover of that one could take the publication along and leave the hint acknowledged; so a hint waits
until its effect cannot be lost any more.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from trajstore.blob import to_blob
from trajstore.deletion import remove_deleted
from trajstore.entries import Event
from trajstore.errors import (
    Corrupt,
    NotFound,
    RoutingError,
    SchemaError,
    SequenceGap,
    TrajstoreError,
    Unavailable,
)
from trajstore.events import CLOSED_STATUSES, SegmentOpened, TrajectoryClosed, TrajectoryDeleted, TrajectoryOpened
from trajstore.fold import Policy
from trajstore.log.feed import MATERIALIZER, FeedFollower, Hint, worker_name
from trajstore.log.flusher import FSYNC_HORIZON
from trajstore.log.wire import info_fields
from trajstore.pulse import Pulse
from trajstore.ready import ReadyMember, ReadyQueue, assembly_name
from trajstore.store import Store

__all__ = ["Materialized", "Materializer"]

log = logging.getLogger(__name__)

_READ_AHEAD = 4
"""Hints per partition that one materializer takes at once: what it has in hand, no other works on."""


class Materialized(msgspec.Struct):
    """What a materializer has done so far.

    Attributes:
        trajectories: folded and offered.
        groups: entries published.
        tokens: of the trajectories.
        nbytes: of their blobs.
        unlaid: of them, those for which the server had no room, or that were too large: readers fold them again.
        refused: trajectories that cannot be folded; each is logged, and stays in the log untouched. The group of one
            that is closed does not wait for it.
        seconds: spent on reading, folding and publishing.
    """

    trajectories: int = 0
    groups: int = 0
    tokens: int = 0
    nbytes: int = 0
    unlaid: int = 0
    refused: int = 0
    seconds: float = 0.0


class _Away(NamedTuple):
    """Where else than on its trajectory's server an offer had its effect.

    Attributes:
        key: of the group's assembly.
        server: run id of that server, from before.
    """

    key: str
    server: str


class _Unsettled(NamedTuple):
    """Hints that were acted on.

    Attributes:
        due: monotonic seconds at which the effect is on the other server's disk, and with its replicas.
    """

    due: float
    id: str
    away: _Away
    hints: list[Hint]


class Materializer:
    """One materializing process.

    Args:
        store: of the run.
        policy: of the folds that it publishes.
        blob_seconds: how long a fold lies ready; a later reader folds again.
        blob_bytes: larger folds are not laid ready, readers fold them themselves. Redis takes up to 512 MB.
        assembly_seconds: how long a published group is remembered against repeated hints.
        group_seconds: a group that has waited so long is published without the members that are late; None: never.
            Counted, by the server's clock, from when a materializer that is given this first finds the group waiting.
        claim_seconds: after this long, hints of a silent materializer are taken over.
        on_step: hears the steps of each publish: folded, laid, offered, acknowledged.
        on_offered: hears the id of each trajectory that was folded and offered.

    Attributes:
        done: what it has done so far.
        run_name: of the run.
        pulse: its sign of life.
    """

    def __init__(
        self,
        store: Store,
        *,
        policy: Policy = "last_segment_wins",
        blob_seconds: float = 3600.0,
        blob_bytes: int = 256 << 20,
        assembly_seconds: float = 7 * 86400.0,
        group_seconds: float | None = None,
        claim_seconds: float = 60.0,
        on_step: Callable[[str], None] = lambda _: None,
        on_offered: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.done = Materialized()
        self.run_name = store.run
        self.pulse = Pulse()
        self._store = store
        self._policy = policy
        self._blob_seconds = blob_seconds
        self._blob_bytes = blob_bytes
        self._assembly_seconds = assembly_seconds
        self._group_seconds = group_seconds
        self._claim_seconds = claim_seconds
        self._heard = on_step
        self._on_offered = on_offered
        self._ready = ReadyQueue(store.wire, store.keys)
        self._feed = FeedFollower(store.wire, store.keys, MATERIALIZER, worker_name())
        self._partitions = list(range(store.partitions))
        self._waiting: dict[str, list[Hint]] = {}
        self._servers: dict[int, str] = {}
        self._away: _Away | None = None
        self._unsettled: deque[_Unsettled] = deque()
        self._next_claim = 0.0
        self._next_late = 0.0

    def run(
        self,
        *,
        once: bool = False,
        stop: threading.Event | None = None,
        on_progress: Callable[[Materialized], None] = lambda _: None,
    ) -> Materialized:
        """Work until stopped, or with `once` until nothing is left to do.

        What is in hand at a stop stays unacknowledged; another materializer takes it over. `once` takes over from
        others without waiting for `claim_seconds`.

        Raises:
            OSError: with `once`, when the server does not answer (`Unavailable`) or is full (`StoreFull`); without, it
                keeps trying.
        """
        stopped = stop or threading.Event()
        while not stopped.is_set():
            self.pulse.beat()
            try:
                self._settle()
                self._notice(once=once)
                idle = not self._waiting
                self._work(stopped)
                if idle or not once:  # `once` has what is there come first
                    self._publish_late(once=once)
            except OSError as error:  # Unavailable and StoreFull are such, and so is an archive's disk
                if once:
                    raise
                self.pulse.trouble = error
                log.warning("materializing pauses: %s", error, extra={"event": "paused"})
                stopped.wait(1.0)
                continue
            self.pulse.trouble = None
            on_progress(self.done)
            if once and idle:
                if not self._unsettled:
                    break
                stopped.wait(0.05)
        try:
            self._feed.trim(self._partitions)
            self._feed.leave(self._partitions)
        except Unavailable as error:  # others take over what it had after `claim_seconds`
            log.warning("left without signing off: %s", error, extra={"event": "left-uncleanly"})
        return self.done

    def _notice(self, *, once: bool) -> None:
        """Collect hints, by trajectory: several about one are one."""
        if time.monotonic() >= self._next_claim:
            for partition in self._partitions:
                self._collect(self._feed.take_over(partition, idle=0.0 if once else self._claim_seconds))
            self._feed.trim(self._partitions)
            self._next_claim = time.monotonic() + self._claim_seconds / 4
        if not self._waiting:
            block = 0.0 if once else min(0.5, self._claim_seconds / 4)
            self._collect(self._feed.poll(self._partitions, count=_READ_AHEAD, block=block))

    def _publish_late(self, *, once: bool) -> None:
        """Publish what has waited for too long, a few times within that time."""
        if self._group_seconds is None or (time.monotonic() < self._next_late and not once):
            return
        for partition in self._partitions:
            published = self._ready.publish_late(
                partition, after=self._group_seconds, policy=self._policy, keep=self._assembly_seconds
            )
            for ready in published:
                log.warning(
                    "group %s is published %s",
                    ready.group,
                    f"without {ready.late} members that are late"
                    if ready.late
                    else "with a member as it was aborted: that was resumed, and has not been closed again in time",
                    extra={"event": "published-late", "partition": partition, "group": ready.group},
                )
            self.done.groups += len(published)
        self._next_late = time.monotonic() + min(30.0, max(0.1, self._group_seconds / 4))

    def _on_step(self, step: str) -> None:
        self.pulse.beat()
        self._heard(step)

    def _collect(self, hints: Sequence[Hint]) -> None:
        notes = [hint for hint in hints if hint.is_note]  # they close nothing
        self._feed.acknowledge(notes)
        unsettled = {hint for one in self._unsettled for hint in one.hints}  # taken over from itself
        for hint in hints:
            if not hint.is_note and hint not in unsettled:
                self._waiting.setdefault(hint.id, []).append(hint)

    def _work(self, stopped: threading.Event) -> None:
        """Act on hints, then acknowledge them. A trajectory that failed for now goes behind the others."""
        self._servers.clear()
        while self._waiting and not stopped.is_set():
            id = next(iter(self._waiting))
            about = self._waiting.pop(id)
            begun = time.perf_counter()
            try:
                self._away = None
                self._materialize(id)
                if self._away is None:
                    self._feed.acknowledge(about)
                else:
                    self._unsettled.append(_Unsettled(time.monotonic() + FSYNC_HORIZON, id, self._away, about))
            except OSError:
                self._waiting[id] = about
                raise
            finally:
                self.done.seconds += time.perf_counter() - begun
            self._on_step("acknowledged")
            self._settle()

    def _settle(self) -> None:
        """Acknowledge what lasts by now; what its server may have lost is done again."""
        while self._unsettled and self._unsettled[0].due <= time.monotonic():
            _, id, away, hints = self._unsettled[0]
            if self._server(away.key) == away.server:
                self._feed.acknowledge(hints)
            else:
                self._waiting.setdefault(id, []).extend(hints)
            self._unsettled.popleft()

    def _server(self, key: str) -> str:
        """Run id of the server that has a key: another one means that it restarted, or another has it now."""
        # Beside a key: where a cluster's server does not answer, it is learned who has the key by now.
        _, info = self._store.wire.exchange([("EXISTS", key), ("INFO", "server")])
        return info_fields(info).get("run_id", "") if isinstance(info, bytes) else ""

    def _look_at_server(self, partition: int, key: str) -> None:
        """Note who has a partition, from before anything is read there or put there."""
        if partition not in self._servers:
            self._servers[partition] = self._server(key)

    def _look_at_group(self, id: str, group: str | None, size: int | None) -> None:
        """Note what server the effect of an offer is on, if that is another than the trajectory's."""
        name = assembly_name(id, group, size)
        partition, key = self._store.keys.partition(name), self._store.keys.assembly(name)
        if self._store.wire.at(key) is not self._store.wire.at(self._store.keys.entries(id)):
            self._look_at_server(partition, key)
            self._away = _Away(key, self._servers[partition])

    def _materialize(self, id: str) -> None:
        self._look_at_server(self._store.keys.partition(id), self._store.keys.entries(id))
        try:
            self._publish(id)
        except NotFound:
            pass  # a spurious hint, or a trajectory whose data is gone
        except (SequenceGap, SchemaError, RoutingError, Corrupt) as error:
            log.error("%s cannot be folded: %s", id, error, extra={"event": "refused", "trajectory": id})
            self._offer_unreadable(id)
            self.done.refused += 1

    def _offer_unreadable(self, id: str) -> None:
        """The group of one that cannot be folded waits for it no longer, if its events can be read at all."""
        try:
            events = self._store.events(id)
        except (NotFound, SchemaError, Corrupt):
            return
        member, opened = _unreadable(id, events), events[0].header
        if member is None or not isinstance(opened, TrajectoryOpened):
            return
        group, size = opened.group, opened.group_size
        if group is None or size is None:
            return
        self._look_at_group(id, group, size)
        if self._ready.offered(id, group=group, group_size=size) >= member.version:
            return
        self._offer(member, group=group, group_size=size)

    def _publish(self, id: str) -> None:
        try:
            history = self._store.plan(id, policy=self._policy).history
        except NotFound:
            self._withdraw(id)
            return
        if history.status not in CLOSED_STATUSES:
            return
        group, size = history.opened.group, history.opened.group_size
        self._look_at_group(id, group, size)
        if self._ready.offered(id, group=group, group_size=size) >= history.closes:
            return
        trajectory = self._store.load(id, policy=self._policy, until=history.last)
        blob = to_blob(trajectory)
        self._on_step("folded")
        is_laid = len(blob) <= self._blob_bytes
        is_laid = is_laid and self._ready.put_blob(id, history.closes, blob, keep=self._blob_seconds)
        self._on_step("laid")
        if self._store.tombstone(id) is not None:  # since it was read: whoever deleted it may have missed the blob
            self._withdraw(id)
            return
        member = ReadyMember(
            id=id,
            version=history.closes,
            status=trajectory.status,
            at=trajectory.at,
            tokens=len(trajectory),
            nbytes=len(blob),
        )
        is_new = self._offer(member, group=group, group_size=size)
        self._on_step("offered")
        if is_new:
            self.done.trajectories += 1
            self.done.tokens += len(trajectory)
            self.done.nbytes += len(blob)
            self.done.unlaid += not is_laid
            self._on_offered(id)

    def _offer(self, member: ReadyMember, *, group: str | None, group_size: int | None) -> bool:
        """Offer a member; whether it was not known before."""
        offer = self._ready.offer(
            member,
            group=group,
            group_size=group_size,
            policy=self._policy,
            keep=self._assembly_seconds,
            goes_on=self._goes_on,
            holds=lambda: self._holds(member.id),
        )
        self.done.groups += offer.published is not None
        return offer.is_new

    def _withdraw(self, id: str) -> None:
        """If it was deleted: what it still has in the hot log goes, and its group waits for it no longer."""
        tombstone = self._store.tombstone(id)
        if tombstone is None or not isinstance(tombstone.header, TrajectoryDeleted):
            return
        self._look_at_group(id, tombstone.header.group, tombstone.header.group_size)
        remove_deleted(self._store.wire, self._store.keys, id, tombstone.at, archived=tombstone.stored != "hot")
        published = self._ready.withdraw(
            id,
            at=tombstone.id,
            group=tombstone.header.group,
            group_size=tombstone.header.group_size,
            policy=self._policy,
            keep=self._assembly_seconds,
            goes_on=self._goes_on,
            holds=lambda: self._holds(id),
        )
        self.done.groups += published is not None

    def _holds(self, id: str) -> bool:
        """Nothing that was read of a trajectory can have been lost since."""
        return self._server(self._store.keys.entries(id)) == self._servers[self._store.keys.partition(id)]

    def _goes_on(self, member: ReadyMember) -> bool:
        """True if a member that was aborted has been resumed since: its group waits until it is closed again."""
        try:
            history = self._store.plan(member.id, policy=self._policy).history
        except OSError:
            raise
        except TrajstoreError:
            return False  # nothing more will come of it; what was offered stays
        return history.status not in CLOSED_STATUSES or history.closes > member.version


def _unreadable(id: str, events: Sequence[Event]) -> ReadyMember | None:
    """How a trajectory that cannot be folded is offered; None for one that is open."""
    turns = [event.header for event in events if isinstance(event.header, SegmentOpened | TrajectoryClosed)]
    if not turns or not isinstance(turns[-1], TrajectoryClosed):
        return None
    closes = sum(isinstance(header, TrajectoryClosed) for header in turns)
    return ReadyMember(id=id, version=closes, status="unreadable", at=events[-1].id, tokens=0, nbytes=0)
