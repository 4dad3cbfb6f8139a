"""The archiver: follows the feed, collects finished epochs of many trajectories, writes packs, trims the hot log.

For each partition it holds the lease; what makes two archivers safe is the numbered manifest record. What may go is
decided in `archive/ripening.py`. Everything from publish to trim uses only commands that a full server lets pass.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec

from trajstore.abandon import sweep
from trajstore.archive.fair_share import FairShare
from trajstore.archive.manifest import Manifest
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.ripening import Look, Part, first_look, second_look
from trajstore.archive.trim import trim
from trajstore.archive.upkeep.idle import IdleCompaction
from trajstore.archive.writer import PackWriter
from trajstore.errors import Conflict, Corrupt, Fenced, SchemaError, TrajstoreError, Unavailable
from trajstore.log.feed import ARCHIVER, FeedFollower, Hint, worker_name
from trajstore.log.flusher import FSYNC_HORIZON
from trajstore.log.lease import Lease
from trajstore.log.wire import server_info
from trajstore.mending import Mending
from trajstore.pulse import Pulse
from trajstore.store import Store

__all__ = ["Archived", "Archiver"]

log = logging.getLogger(__name__)

_STAGING_SECONDS = 3600.0
"""What lies in staging for longer is a killed archiver's."""

_LOOKED_AT = 4096
"""Trajectories of one partition between their two looks; the feed holds the others."""

_PATIENCE = 16.0
"""Leases for which a holder may be silent, at most, before whoever lost the partition to it takes it again."""

_GIVEN = 2.0
"""Leases for which a partition that was given up is left to others."""

_ASIDE = 16.0
"""Leases for which an archiver that cannot archive lets others do it, at most: at first one, then twice as many each
time."""


class Archived(msgspec.Struct):
    """What an archiver has done so far.

    Attributes:
        packs: published.
        trajectories: parts of trajectories in them.
        entries: in them.
        nbytes: payload bytes that went in.
        stored: bytes of the packs' files.
        waiting: trajectories seen, not archived yet.
        partitions: held now.
        refused: trajectories that cannot be archived; each is logged, and stays in the hot log.
        abandoned: trajectories whose writer was gone, closed as aborted.
        compactions: packs written anew, in the place of others.
        seconds: spent on reading, writing and trimming.
    """

    packs: int = 0
    trajectories: int = 0
    entries: int = 0
    nbytes: int = 0
    stored: int = 0
    waiting: int = 0
    partitions: int = 0
    refused: int = 0
    abandoned: int = 0
    compactions: int = 0
    seconds: float = 0.0


class Archiver:
    """One archiving process. Any number may work on a run, and share its partitions evenly.

    Args:
        store: of the run; must have an archive.
        pack_bytes: payload bytes at which a pack is written without waiting for more.
        pack_seconds: how long ripe entries wait for more.
        lease_seconds: how long another may be silent before this one takes its partitions; the same for all of a run.
        abandon_seconds: an open segment without progress for so long is closed as aborted, its writer fenced; a
            trajectory that was only created is archived as it is after so long, with `once` at once.
        grace_seconds: how long the emptied keys of a final trajectory stay.
        compact: merge small packs and remove deleted data while there is nothing to archive; not with `once`.
        on_step: hears the steps of each publish: staged, synced, moved, recorded, trimmed.

    Attributes:
        done: what it has done so far.
        name: of this archiver, as lease holder and consumer.
        run_name: of the run.
        pulse: its sign of life.

    Raises:
        Conflict: the store has no archive.
    """

    def __init__(
        self,
        store: Store,
        *,
        pack_bytes: int = 64 << 20,
        pack_seconds: float = 5.0,
        lease_seconds: float = 15.0,
        abandon_seconds: float = 86400.0,
        grace_seconds: float = 3600.0,
        compact: bool = True,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        if store.archive is None:
            raise Conflict(f"{store.location} has no archive; give one: --archive FOLDER, or open(..., archive=FOLDER)")
        self.done = Archived()
        self.name = worker_name()
        self.run_name = store.run
        self.pulse = Pulse()
        self._store = store
        self._archive: ArchiveReader = store.archive
        self._pack_bytes = pack_bytes
        self._pack_seconds = pack_seconds
        self._abandon_seconds = abandon_seconds
        self._looks_around_every = min(abandon_seconds / 4, 3600.0)
        self._grace_seconds = grace_seconds
        self._heard = on_step
        self._lease_seconds = lease_seconds
        self._lease = Lease(store.wire, store.keys, self.name, seconds=lease_seconds)
        self._feed = FeedFollower(store.wire, store.keys, ARCHIVER, self.name)
        self._horizon = FSYNC_HORIZON
        self._waiting: dict[int, dict[str, Look]] = {}
        self._patience: dict[int, float] = {}  # with the holders of partitions that were lost, see `_drop`
        self._share = FairShare(store.partitions, name=self.name, seconds=lease_seconds)
        self._given: dict[int, float] = {}  # partitions, and until when they are left to others
        self._others: set[str] = set()  # archivers that were there at the last look
        self._aside_until = 0.0
        self._next_aside = 1.0  # leases
        self._has_failed = False  # and has archived nothing since
        self._left: dict[tuple[int, str], list[Hint]] = {}  # of refused trajectories, unacknowledged on purpose
        self._idle = IdleCompaction(
            self._archive,
            writer=self.name,
            pack_bytes=pack_bytes,
            renew=self._renew,
            every=lease_seconds / 3,
            on_step=self._on_step,
        )
        self._mending = Mending(store, every=self._looks_around_every)
        self._compacts = compact
        self._next_lease = self._next_renewal = self._next_sweep = self._next_compaction = 0.0
        self._cleared = False

    def run(
        self,
        *,
        once: bool = False,
        stop: threading.Event | None = None,
        on_progress: Callable[[Archived], None] = lambda _: None,
    ) -> Archived:
        """Work until stopped, or with `once` until what is there is archived.

        Partitions whose lease another holds are waited for, with `once` no longer than the lease lasts: then their
        holder is alive and at work.

        Raises:
            Unavailable: with `once`, when server or archive do not answer or a pack cannot be written (a full disk);
                else it keeps trying.
        """
        self._cleared = False
        try:
            self._work(stop or threading.Event(), once=once, on_progress=on_progress)
        finally:
            try:
                self._leave()
            except Unavailable as error:  # the lease runs out by itself
                log.warning("left without giving the lease back: %s", error, extra={"event": "left-uncleanly"})
        return self.done

    def _work(self, stopped: threading.Event, *, once: bool, on_progress: Callable[[Archived], None]) -> None:
        patience = time.monotonic() + 1.5 * self._lease_seconds
        while not stopped.is_set():
            self.pulse.beat()
            try:
                busy = self._turn(once=once, stopped=stopped)
                if not self._has_failed or self._has_nothing_to_do():
                    self.pulse.trouble, self._has_failed = None, False
            except OSError as error:  # Unavailable and StoreFull are such, and so is a full disk
                if once:
                    raise
                self.pulse.trouble = error
                log.warning(
                    "archiving pauses, and what is not archived yet stays in the hot log: %s",
                    error,
                    extra={"event": "paused"},
                )
                self._step_aside()
                stopped.wait(1.0)
                continue
            self.done.waiting = sum(len(waiting) for waiting in self._waiting.values())
            self.done.partitions = len(self._waiting)
            on_progress(self.done)
            held_all = len(self._waiting) == self._store.partitions
            if once and not busy and not self.done.waiting and (held_all or time.monotonic() > patience):
                break

    def _turn(self, *, once: bool, stopped: threading.Event) -> bool:
        """One round; True if there were hints."""
        if not self._cleared:
            self._archive.root.storage.clear_staging(older_than=_STAGING_SECONDS)
            self._cleared = True
        now = time.monotonic()
        hints: list[Hint] = []
        if now >= self._next_lease:
            self._next_lease = now + self._lease_seconds / 3
            self._others = set() if once else self._lease.others()
            if not self._others:
                self._aside_until = 0.0
                self._given.clear()
            if now >= self._aside_until:
                hints += self._hold_leases()
            self._give_way()
            self._feed.trim(self._waiting)
        roomy = [partition for partition, waiting in self._waiting.items() if len(waiting) < _LOOKED_AT]
        hints += self._feed.poll(roomy, count=256, block=0.2)
        if not roomy:
            stopped.wait(0.2)
        self._notice(hints)
        idle = not hints
        for partition in list(self._waiting):
            if not self._holds(partition):
                continue
            ripe = self._ripe(partition, at_once=once)
            idle &= not ripe
            if ripe and not stopped.is_set():
                begun = time.perf_counter()
                try:
                    self._archive_ripe(partition, ripe)
                except (SchemaError, Corrupt) as error:  # of its manifest; the other partitions go on
                    self._refuse_partition(partition, ripe, error)
                self.done.seconds += time.perf_counter() - begun
        if now >= self._next_sweep:
            self._next_sweep = now + self._looks_around_every
            self._sweep(created_after=0.0 if once else self._abandon_seconds)
        if not stopped.is_set():
            self._mend(at_once=once)
        if self._compacts and idle and not once and now >= self._next_compaction and not stopped.is_set():
            step = self._idle.step(list(self._waiting))
            self.done.compactions += step.compactions
            self._next_compaction = now if step.more else now + self._lease_seconds / 3
            if step.lost is not None:
                self._drop(step.lost)
        return bool(hints)

    # Leases

    def _hold_leases(self) -> list[Hint]:
        """Renew the leases, try for the others; returns what earlier holders left unacknowledged."""
        hints: list[Hint] = []
        always = all(server_info(one).fsyncs_always for one in self._store.wire.servers())
        self._horizon = 0.0 if always else FSYNC_HORIZON  # it can be reconfigured
        self._next_renewal = time.monotonic() + self._lease_seconds / 3
        for partition in range(self._store.partitions):
            self._stay()
            held = partition in self._waiting
            if not held and time.monotonic() < self._given.get(partition, 0.0):
                continue
            if self._lease.acquire(partition, patience=self._patience.get(partition, 1.0)):
                if not held:
                    self._waiting[partition] = {}
                    self._share.begin_anew()
                    self._left = {place: hints for place, hints in self._left.items() if place[0] != partition}
                    self._next_sweep = 0.0
                elif not self._waiting[partition]:  # nothing of it is to be archived
                    self._patience.pop(partition, None)
                # Of its own, too: a request that it has given up may have taken hints for it later.
                hints += self._feed.take_over(partition, idle=self._lease_seconds if held else 0.0)
            elif held:
                self._drop(partition)
        return hints

    def _give_way(self) -> None:
        """Give up what is more than a fair share; whoever has less finds it free at its next try."""
        now = time.monotonic()
        self._share.look(self._others, now)
        for partition in self._share.surplus(self._waiting):
            self._lease.release(partition)
            self._given[partition] = now + _GIVEN * self._lease_seconds
            del self._waiting[partition]
            log.info(
                "partition %d is left to other archivers: %d are there",
                partition,
                len(self._share.others),
                extra={"event": "lease-given", "partition": partition},
            )

    def _step_aside(self) -> None:
        """After a failure, forget what was looked at, and let others archive, if there are any: perhaps it is only this
        machine's disk that is full."""
        self._has_failed = True
        if self._others:
            self._aside_until = time.monotonic() + self._next_aside * self._lease_seconds
            self._next_aside = min(2 * self._next_aside, _ASIDE)
        with contextlib.suppress(TrajstoreError):  # then they run out
            for partition in self._waiting:
                self._lease.release(partition)
        self._waiting.clear()  # taking the partitions anew brings back every hint that was read
        self.done.partitions = self.done.waiting = 0
        self._next_lease = 0.0

    def _has_nothing_to_do(self) -> bool:
        """It has partitions, and nothing of them is to be archived."""
        return bool(self._waiting) and not any(self._waiting.values())

    def _stay(self) -> None:
        """What long work calls in between: renews the leases when it is time, and drops what went to others.

        Whoever is silent for as long as a lease lasts loses the partition with all that it has looked at, to one who
        begins anew.
        """
        self.pulse.beat()
        if time.monotonic() < self._next_renewal:
            return
        self._next_renewal = time.monotonic() + self._lease_seconds / 3
        for partition in list(self._waiting):
            if not self._lease.renew(partition):
                self._drop(partition)

    def _holds(self, partition: int) -> bool:
        """Whether the partition is still this archiver's, whose leases are renewed if it is time."""
        self._stay()
        return partition in self._waiting

    def _renew(self, partition: int) -> bool:
        """What a long compaction asks for in between."""
        self.pulse.beat()
        return self._lease.renew(partition)

    def _on_step(self, step: str) -> None:
        self.pulse.beat()
        self._heard(step)

    def _drop(self, partition: int) -> None:
        """Leave a partition to whoever has taken it, and be twice as patient with its holders until something of it
        is archived.

        Else two archivers that are both silent for longer than a lease, on a busy machine or over a slow archive, would
        take turns at looking at it, and archive nothing.
        """
        if self._waiting.pop(partition, None) is None:  # it was dropped before
            return
        self._patience[partition] = min(2 * self._patience.get(partition, 1.0), _PATIENCE)
        log.warning(
            "the lease of partition %d went to another archiver",
            partition,
            extra={"event": "lease-lost", "partition": partition},
        )

    def _leave(self) -> None:
        for partition in self._waiting:
            self._lease.release(partition)
        self._feed.trim(self._waiting)
        self._feed.leave(self._waiting)
        self._waiting.clear()

    # From hint to ripe

    def _notice(self, hints: Iterable[Hint]) -> None:
        """First look at the trajectories that hints tell of, one look for all hints of a trajectory."""
        fresh: dict[tuple[int, str], list[Hint]] = {}
        for hint in hints:
            waiting = self._waiting.get(hint.partition)
            place = (hint.partition, hint.id)
            if waiting is None or hint in self._left.get(place, ()):
                continue
            known = waiting.get(hint.id)
            if known is None:
                if place not in fresh:  # what is new of a refused trajectory may have mended it
                    fresh[place] = self._left.pop(place, [])
                fresh[place].append(hint)
            elif hint not in known.hints and hint not in known.later:
                (known.hints if known.covers(hint) else known.later).append(hint)
        self._look(fresh)

    def _sweep(self, *, created_after: float) -> None:
        """Deal with what nobody goes on with, of which no hint tells."""
        for partition in list(self._waiting):
            self._stay()
            waiting = self._waiting.get(partition)
            if waiting is None:
                continue
            try:
                swept = sweep(self._store, [partition], after=self._abandon_seconds, created_after=created_after)
            except (SchemaError, Corrupt) as error:  # what lies there is nobody's
                log.warning("%s", error, extra={"event": "abandon-failed", "partition": partition})
                continue
            self.done.abandoned += swept.closed
            fresh = [id for id in swept.created.get(partition, ()) if id not in waiting]
            room = max(0, _LOOKED_AT - len(waiting))
            self._look({(partition, id): [] for id in fresh[:room]})
            if len(fresh) > room:
                self._next_sweep = 0.0

    def _mend(self, *, at_once: bool) -> None:
        """Compare summaries with the archive: the next page of each partition, or all of them."""
        for partition in list(self._waiting):
            more = True
            while more and self._holds(partition):
                manifest = self._archive.manifest(partition)
                step = self._mending.step(partition, manifest, stay=partial(self._holds, partition))
                waiting = self._waiting.get(partition, {})
                places = [(partition, id) for id in step.untrimmed if id not in waiting]
                self._look({place: [] for place in places if place not in self._left})
                more = step.more and at_once

    def _look(self, fresh: Mapping[tuple[int, str], Sequence[Hint]]) -> None:
        """First look at trajectories of which these hints tell."""
        if not fresh:
            return
        servers: dict[int, str] = {}
        for (partition, id), about in fresh.items():
            self._stay()
            waiting = self._waiting.get(partition)
            if waiting is None:  # its hints come to whoever has it now
                continue
            if partition not in servers:
                servers[partition] = self._server(partition)
            try:
                waiting[id] = first_look(
                    self._store.hot,
                    self._archive.manifest(partition),
                    id,
                    about,
                    now=time.monotonic(),
                    horizon=self._horizon,
                    server=servers[partition],
                )
            except (SchemaError, Corrupt) as error:
                self._refuse(partition, id, error, about)

    def _ripe(self, partition: int, *, at_once: bool) -> list[str]:
        """Trajectories to archive now: past the horizon, and enough of them or long enough."""
        now = time.monotonic()
        waiting = self._waiting[partition]
        ripe = [id for id, look in waiting.items() if now >= look.ripe_at]
        if not ripe or at_once:
            return ripe
        oldest = min(waiting[id].ripe_at for id in ripe)
        enough = sum(waiting[id].nbytes for id in ripe) >= self._pack_bytes
        return ripe if enough or now - oldest >= self._pack_seconds else []

    # From ripe to trimmed

    def _archive_ripe(self, partition: int, ripe: Sequence[str]) -> None:
        manifest = self._archive.manifest(partition)
        newest = manifest.refresh()  # what is decided below stands on the records up to here, see Manifest.append
        server = self._server(partition)
        parts: list[Part] = []
        for id in ripe:
            if not self._holds(partition):
                return
            look = self._waiting[partition].pop(id)
            if look.server != server:  # it restarted: what it came back with must ripen anew
                self._notice([*look.hints, *look.later])
                continue
            try:
                part = second_look(self._store.hot, self._archive, manifest, id, look)
            except (SchemaError, Corrupt) as error:
                self._refuse(partition, id, error, [*look.hints, *look.later])
                continue
            if part is None:
                self._notice([*look.hints, *look.later])
                continue
            if part.staged and sum(other.nbytes for other in parts) + part.nbytes > self._pack_bytes:
                published = self._publish(partition, manifest, newest, parts)
                if published is None:
                    return
                newest, parts = published, []
            parts.append(part)
        self._publish(partition, manifest, newest, parts)

    def _publish(self, partition: int, manifest: Manifest, newest: int, parts: Sequence[Part]) -> int | None:
        """Write packs, one for each routing shape, then trim and acknowledge.

        Returns:
            Number of the newest record; None if the partition was lost.
        """
        if not self._lease.renew(partition):
            self._drop(partition)
            return None
        for together in _by_shape(part for part in parts if part.staged):
            spec = next((part.spec for part in together if part.spec is not None), None)
            writer = PackWriter(self._archive.root, self._archive.info, partition, spec)
            for part in together:
                writer.add(part.id, part.staged, summary=part.summary, known=part.known)
            try:
                record = writer.publish(manifest, newest + 1, writer=self.name, on_step=self._on_step)
            except Fenced as error:
                log.warning("%s", error, extra={"event": "fenced", "partition": partition})
                self._drop(partition)
                return None
            newest = record.number
            self.done.packs += 1
            self.done.stored += sum(file.size for file in record.files.values())
            self.done.trajectories += len(together)
            self.done.entries += sum(len(part.staged) for part in together)
            self.done.nbytes += sum(part.nbytes for part in together)
        again = trim(self._store.wire, self._store.keys, manifest, parts, grace=self._grace_seconds)
        self._on_step("trimmed")
        self._feed.acknowledge(hint for part in parts if part.id not in again for hint in part.look.hints)
        self._patience.pop(partition, None)
        self._has_failed, self._next_aside = False, 1.0
        self._notice(hint for part in parts for hint in part.look.later)
        return newest

    def _refuse_partition(self, partition: int, ripe: Sequence[str], error: Exception) -> None:
        """As `_refuse`, of all that was ripe. With the next look at the leases every hint of it comes back."""
        self.done.refused += len(ripe)
        log.error(
            "%d trajectories of partition %d stay in the hot log: %s",
            len(ripe),
            partition,
            error,
            extra={"event": "refused", "partition": partition},
        )
        del self._waiting[partition]

    def _refuse(self, partition: int, id: str, error: Exception, hints: Sequence[Hint]) -> None:
        """Its hints stay unacknowledged: the next holder of the partition, a newer version say, tries again."""
        self._left[partition, id] = [*self._left.get((partition, id), ()), *hints]
        self.done.refused += 1
        log.error(
            "%s cannot be archived and stays in the hot log: %s",
            id,
            error,
            extra={"event": "refused", "trajectory": id},
        )

    def _server(self, partition: int) -> str:
        """Run id of the server, "" where it cannot lose anything: another one means that it restarted, or another has
        the partition now."""
        return server_info(self._store.wire.at(self._store.keys.feed(partition))).run_id if self._horizon else ""


def _by_shape(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts that one pack can hold together; tokens without routing go along with any."""
    shapes: dict[tuple[int, int, str] | None, list[Part]] = {}
    for part in parts:
        shapes.setdefault(part.shape, []).append(part)
    plain = shapes.pop(None, [])
    if plain and not shapes:
        return [plain]
    together = list(shapes.values())
    if plain:
        together[0] += plain
    return together
