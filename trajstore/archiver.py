"""The archiver: follows the feed, collects finished epochs of many trajectories, writes packs, trims the hot log.

For each partition it holds the lease; what makes two archivers safe is the numbered manifest record. The archive never
runs ahead of a server that may crash: an entry is published only after it was seen, the fsync horizon has passed, and
it is seen again, the same, on a server that has not restarted meanwhile. Everything from publish to trim uses only
commands that a full server lets pass.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import redis

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.select import finished_entries, ripe_prefix
from trajstore.archive.writer import PackWriter, StagedEntry
from trajstore.entries import Event, entry_digest
from trajstore.errors import Conflict, Corrupt, Fenced, SchemaError, StoreFull, TrajstoreError, Unavailable
from trajstore.events import FINAL_STATUSES, EventId, TrajectoryOpened, UnknownEvent
from trajstore.log.batch import payload_field
from trajstore.log.feed import ARCHIVER, FeedFollower, Hint
from trajstore.log.flusher import FSYNC_HORIZON
from trajstore.log.lease import Lease
from trajstore.log.reader import HotEntry
from trajstore.log.wire import Command, server_info, translate
from trajstore.materializer import worker_name
from trajstore.routing import RoutingSpec
from trajstore.store import Store
from trajstore.summary import Summary, advance

__all__ = ["Archived", "Archiver"]

log = logging.getLogger(__name__)

Key = tuple[bool, EventId]
"""(is a note, id) of an entry."""


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
    """

    packs: int = 0
    trajectories: int = 0
    entries: int = 0
    nbytes: int = 0
    stored: int = 0
    waiting: int = 0
    partitions: int = 0
    refused: int = 0


@dataclass(slots=True)
class _Ripening:
    """A trajectory between the first look and the second.

    Attributes:
        hints: to be acknowledged with it.
        later: hints that came after the first look; they make it ripen again.
        seen: digests of its entries and notes at the first look.
        nbytes: payload bytes of them.
        since: when that was, monotonic.
        server: run id of the server then.
    """

    hints: list[Hint]
    seen: dict[Key, str]
    nbytes: int
    since: float
    server: str
    later: list[Hint] = field(default_factory=list)


@dataclass(slots=True)
class _Part:
    """What is archived of one trajectory in one go."""

    id: str
    ripening: _Ripening
    staged: list[StagedEntry]
    spec: RoutingSpec | None
    summary: Summary | None
    entries: list[HotEntry]
    notes: list[HotEntry]

    @property
    def nbytes(self) -> int:
        return sum(len(data) for entry in self.staged for data in entry.payloads)


class Archiver:
    """One archiving process.

    Args:
        store: of the run; must have an archive.
        pack_bytes: payload bytes at which a pack is written without waiting for more.
        pack_seconds: how long ripe entries wait for more.
        lease_seconds: how long this archiver may be silent before another takes its partitions.
        abandon_seconds: an open segment without progress for so long is closed as aborted, its writer fenced.
        grace_seconds: how long the emptied keys of a final trajectory stay.
        on_step: hears the steps of each publish: staged, synced, moved, recorded, trimmed.
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
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        if store.archive is None:
            raise Conflict(f"{store.location} has no archive; give one: --archive FOLDER, or open(..., archive=FOLDER)")
        self.done = Archived()
        self.name = worker_name()
        self._store = store
        self._archive: ArchiveReader = store.archive
        self._pack_bytes = pack_bytes
        self._pack_seconds = pack_seconds
        self._abandon_seconds = abandon_seconds
        self._grace_seconds = grace_seconds
        self._on_step = on_step
        self._lease_seconds = lease_seconds
        self._lease = Lease(store.wire, store.keys, self.name, seconds=lease_seconds)
        self._feed = FeedFollower(store.wire, store.keys, ARCHIVER, self.name)
        self._horizon = 0.0 if server_info(store.wire).fsyncs_always else FSYNC_HORIZON
        self._waiting: dict[int, dict[str, _Ripening]] = {}
        self._quiet: dict[str, tuple[str, float]] = {}
        self._next_lease = self._next_sweep = 0.0

    def run(
        self,
        *,
        once: bool = False,
        stop: threading.Event | None = None,
        on_progress: Callable[[Archived], None] = lambda _: None,
    ) -> Archived:
        """Work until stopped, or with `once` until what is there is archived.

        Raises:
            Unavailable: with `once`, when the server does not answer; else it keeps trying.
        """
        stopped = stop or threading.Event()
        while not stopped.is_set():
            try:
                busy = self._turn(once=once, stopped=stopped)
            except (Unavailable, StoreFull) as error:
                if once:
                    raise
                log.warning("archiving pauses: %s", error)
                stopped.wait(1.0)
                continue
            self.done.waiting = sum(len(waiting) for waiting in self._waiting.values())
            self.done.partitions = len(self._waiting)
            on_progress(self.done)
            if once and not busy and not self.done.waiting:
                break
        self._leave()
        return self.done

    def _turn(self, *, once: bool, stopped: threading.Event) -> bool:
        """One round; True if there were hints."""
        now = time.monotonic()
        hints: list[Hint] = []
        if now >= self._next_lease:
            self._next_lease = now + self._lease_seconds / 3
            hints += self._hold_leases()
            self._feed.trim(self._waiting)
        hints += self._feed.poll(list(self._waiting), count=256, block=0.2)
        if not self._waiting:
            stopped.wait(0.2)
        for hint in hints:
            self._notice(hint)
        for partition in list(self._waiting):
            ripe = self._ripe(partition, at_once=once)
            if ripe and not stopped.is_set():
                self._archive_ripe(partition, ripe)
        if now >= self._next_sweep:
            self._next_sweep = now + min(self._abandon_seconds / 4, 3600.0)
            self._sweep_abandoned(now)
        return bool(hints)

    # Leases

    def _hold_leases(self) -> list[Hint]:
        """Renew the leases, try for the others; returns what earlier holders left unacknowledged."""
        hints: list[Hint] = []
        for partition in range(self._store.partitions):
            held = partition in self._waiting
            if self._lease.acquire(partition):
                if not held:
                    self._waiting[partition] = {}
                    hints += self._feed.take_over(partition, idle=0.0)
            elif held:
                self._drop(partition)
        return hints

    def _drop(self, partition: int) -> None:
        log.warning("the lease of partition %d went to another archiver", partition)
        del self._waiting[partition]

    def _leave(self) -> None:
        for partition in self._waiting:
            self._lease.release(partition)
        self._feed.trim(self._waiting)
        self._feed.leave(self._waiting)
        self._waiting.clear()

    # From hint to ripe

    def _notice(self, hint: Hint) -> None:
        """First look at a trajectory, unless it is ripening already."""
        waiting = self._waiting.get(hint.partition)
        if waiting is None:
            return
        known = waiting.get(hint.id)
        if known is not None:
            known.later.append(hint)
            return
        entries, notes = self._store.hot.read(hint.id)
        waiting[hint.id] = _Ripening(
            hints=[hint],
            seen={key: entry_digest(entry.data) for key, entry in _keyed(entries, notes)},
            nbytes=sum(len(entry.data) for _, entry in _keyed(entries, notes)),
            since=time.monotonic(),
            server=server_info(self._store.wire).run_id if self._horizon else "",
        )

    def _ripe(self, partition: int, *, at_once: bool) -> list[str]:
        """Trajectories to archive now: past the horizon, and enough of them or long enough."""
        now = time.monotonic()
        waiting = self._waiting[partition]
        ripe = [id for id, one in waiting.items() if now - one.since >= self._horizon]
        if not ripe or at_once:
            return ripe
        oldest = min(waiting[id].since for id in ripe)
        enough = sum(waiting[id].nbytes for id in ripe) >= self._pack_bytes
        return ripe if enough or now - oldest >= self._horizon + self._pack_seconds else []

    # From ripe to trimmed

    def _archive_ripe(self, partition: int, ripe: Sequence[str]) -> None:
        manifest = self._archive.manifest(partition)
        manifest.refresh()
        server = server_info(self._store.wire).run_id if self._horizon else ""
        parts: list[_Part] = []
        for id in ripe:
            ripening = self._waiting[partition].pop(id)
            if ripening.server != server:  # it restarted: what it came back with must ripen anew
                self._again([*ripening.hints, *ripening.later])
                continue
            try:
                part = self._second_look(id, ripening)
            except (SchemaError, Corrupt) as error:
                self.done.refused += 1
                log.error("%s cannot be archived and stays in the hot log: %s", id, error)
                continue
            if part.staged and sum(other.nbytes for other in parts) + part.nbytes > self._pack_bytes:
                if not self._publish(partition, parts):
                    return
                parts = []
            parts.append(part)
        if self._publish(partition, parts):
            self._again(hint for part in parts for hint in part.ripening.later)

    def _again(self, hints: Iterable[Hint]) -> None:
        for hint in list(hints):
            self._notice(hint)

    def _second_look(self, id: str, ripening: _Ripening) -> _Part:
        """Read a trajectory again; what is still the same and finished may go.

        Raises:
            SchemaError: an event that this version does not know, so cannot write as it was.
            Corrupt: a payload is missing.
        """
        entries, notes = self._store.hot.read(id)
        manifest = self._archive.manifest(self._store.keys.partition(id))
        archived, last_note = manifest.last_entry(id), manifest.last_note(id)
        seen = {at: digest for (note, at), digest in ripening.seen.items() if not note}
        seen_notes = {at: digest for (note, at), digest in ripening.seen.items() if note}
        ripe = set(ripe_prefix([(e.at, entry_digest(e.data)) for e in entries], seen, archived))
        decoded = [(entry, entry.events()) for entry in entries if entry.at in ripe]
        decoded = decoded[: finished_entries([(entry.at, events) for entry, events in decoded])]
        ripe_notes = ripe_prefix(
            [(e.at, entry_digest(e.data)) for e in notes], seen_notes, EventId(last_note, 0) if last_note else None
        )
        decoded_notes = [(entry, entry.events(note=True)) for entry in notes if entry.at in ripe_notes]
        summary = manifest.summary(id)
        for _, events in decoded:
            for event in events:
                if isinstance(event.header, UnknownEvent):
                    raise SchemaError(f"event {event.id} is a {event.type} that this version does not know")
                summary = advance(summary, id, event.at, event.time, event.header)
        staged = [self._stage(id, entry, events, note=False) for entry, events in decoded]
        staged += [self._stage(id, entry, events, note=True) for entry, events in decoded_notes]
        return _Part(
            id=id,
            ripening=ripening,
            staged=staged,
            spec=self._spec(id, decoded) if staged else None,
            summary=summary,
            entries=entries,
            notes=notes,
        )

    def _stage(self, id: str, entry: HotEntry, events: Sequence[Event], *, note: bool) -> StagedEntry:
        payloads = []
        for event, data in zip(events, self._store.hot.payloads(id, events), strict=True):
            if data is None:
                raise Corrupt(f"the payload of event {event.id} is gone from the hot log")
            payloads.append(data)
        return StagedEntry(entry.at, note, entry.data, entry.decoded(), payloads)

    def _spec(self, id: str, decoded: Sequence[tuple[HotEntry, Sequence[Event]]]) -> RoutingSpec | None:
        first = decoded[0][1][0].header if decoded else None
        if not isinstance(first, TrajectoryOpened):
            first = self._archive.read(id)[0][0].events[0].header
        return first.routing if isinstance(first, TrajectoryOpened) else None

    def _publish(self, partition: int, parts: Sequence[_Part]) -> bool:
        """Write packs, one for each routing shape, then acknowledge and trim; False if the partition was lost."""
        if not self._lease.renew(partition):
            self._drop(partition)
            return False
        shapes: dict[tuple[int, int, str] | None, list[_Part]] = {}
        for part in parts:
            if part.staged:
                spec = part.spec
                shape = None if spec is None else (spec.num_layers, spec.top_k, spec.dtype.str)
                shapes.setdefault(shape, []).append(part)
        if None in shapes and len(shapes) > 1:  # tokens without routing go along with any
            plain = shapes.pop(None)
            next(iter(shapes.values())).extend(plain)
        for together in shapes.values():
            spec = next((part.spec for part in together if part.spec is not None), None)
            writer = PackWriter(self._archive.root, self._archive.info, partition, spec)
            for part in together:
                writer.add(part.id, part.staged, summary=part.summary)
            try:
                record = writer.publish(self._archive.manifest(partition), writer=self.name, on_step=self._on_step)
            except Fenced as error:
                log.warning("%s", error)
                self._drop(partition)
                return False
            self._archive.manifest(partition).refresh()
            self.done.packs += 1
            self.done.stored += sum(file.size for file in record.files.values())
            self.done.trajectories += len(together)
            self.done.entries += sum(len(part.staged) for part in together)
            self.done.nbytes += sum(part.nbytes for part in together)
        self._trim(partition, parts)
        self._on_step("trimmed")
        return True

    def _trim(self, partition: int, parts: Sequence[_Part]) -> None:
        """Acknowledge hints and drop what the archive holds from the hot log, one transaction a trajectory."""
        commands: list[Command] = []
        for part in parts:
            commands += [("MULTI",), *self._trim_commands(partition, part), ("EXEC",)]
        for reply in self._store.wire.exchange(commands):
            if isinstance(reply, redis.RedisError):
                raise translate(reply, "trimming")

    def _trim_commands(self, partition: int, part: _Part) -> list[Command]:
        keys, id = self._store.keys, part.id
        manifest = self._archive.manifest(partition)
        last, last_note = manifest.last_entry(id), manifest.last_note(id)
        commands: list[Command] = []
        acknowledged = self._feed.acknowledgement(partition, part.ripening.hints)
        if acknowledged is not None:
            commands.append(acknowledged)
        fields: list[str] = []
        if last is not None:
            commands.append(("XTRIM", keys.entries(id), "MINID", f"{last.epoch}-{last.seq + 1}"))
            fields += [name for entry in part.entries if entry.at <= last for name in _fields(entry, note=False)]
        if last_note:
            commands.append(("XTRIM", keys.notes(id), "MINID", f"{last_note + 1}-0"))
            fields += [
                name for entry in part.notes if entry.at.epoch <= last_note for name in _fields(entry, note=True)
            ]
        if fields:
            commands.append(("HDEL", keys.payloads(id), *fields))
        summary = manifest.summary(id)
        left = any(last is None or entry.at > last for entry in part.entries)
        left |= any(entry.at.epoch > last_note for entry in part.notes)
        if summary is not None and summary.status in FINAL_STATUSES and not left:
            grace = int(self._grace_seconds * 1000)
            commands += [("PEXPIRE", key, grace) for key in (keys.entries(id), keys.payloads(id), keys.notes(id))]
            commands.append(("HDEL", keys.summaries(partition), id))
        return commands

    # Writers that are gone

    def _sweep_abandoned(self, now: float) -> None:
        """Close open segments that have not moved for too long by this process's clock, which nobody can set back."""
        quiet: dict[str, tuple[str, float]] = {}
        for partition in self._waiting:
            for summary in self._store.hot.summaries(partition):
                if summary.has_open_segment:
                    last, since = self._quiet.get(summary.id, ("", now))
                    since = since if last == summary.last else now
                    quiet[summary.id] = (summary.last, since)
                    if now - since >= self._abandon_seconds:
                        self._abandon(summary)
        self._quiet = quiet

    def _abandon(self, summary: Summary) -> None:
        try:
            if self._store.events(summary.id)[-1].id == summary.last:
                self._store.get(summary.id).close("aborted", takeover=True)
                self._store.flush(summary.id)
                log.warning("%s was open without progress since %s and is closed as aborted", summary.id, summary.last)
        except TrajstoreError as error:
            log.warning("%s could not be closed as abandoned: %s", summary.id, error)


def _keyed(entries: Iterable[HotEntry], notes: Iterable[HotEntry]) -> list[tuple[Key, HotEntry]]:
    return [((False, entry.at), entry) for entry in entries] + [((True, entry.at), entry) for entry in notes]


def _fields(entry: HotEntry, *, note: bool) -> list[str]:
    return [
        payload_field(event.at, event.nonce, note=note)
        for event in entry.events(note=note)
        if event.payload is not None and event.payload.inline is None
    ]
