"""The facade over hot log, archive and fold: a run, written and read. How it is opened is in `opening.py`."""

import asyncio
import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
from ulid import ULID

from trajstore.archive.of_run import RunArchive
from trajstore.archive.reader import ArchiveReader
from trajstore.backlog import Backlog, measure_backlog
from trajstore.deletion import remove_deleted, write_tombstone
from trajstore.errors import Conflict, Corrupt, Fenced, NotFound, SchemaError, StoreFull, TrajstoreError, Unavailable
from trajstore.events import CLOSED_STATUSES, EventId, TrajectoryDeleted, TrajectoryOpened
from trajstore.history import deleted_error
from trajstore.ingest import check_count, check_finite, check_group, check_id, check_json, check_label
from trajstore.log.counts import WriterCounts
from trajstore.log.flusher import FSYNC_HORIZON, KEPT_BYTES, Flusher
from trajstore.log.keys import Keys
from trajstore.log.reader import HotReader
from trajstore.log.run import RunInfo, read_run, require_fsync
from trajstore.log.stream import stream_last_id
from trajstore.log.wire import Wire
from trajstore.reading import ALL_STATUSES, Archive, wanted_statuses
from trajstore.routing import RoutingSpec
from trajstore.server import Ack, EmbeddedServer
from trajstore.summary import Summary, encode_summary, summarize
from trajstore.view import View
from trajstore.writing import TrajectoryWriter

__all__ = ["Store"]


class Store(Archive):
    """A run: written and read. Made by `trajstore.open`; a context manager, also an async one.

    Attributes:
        run: its name.
        incarnation: ULID of this run's beginning.
        partitions: P.
        routing_order: of the specs that are recorded, "engine" or "sorted".
        location: what was opened, fit for messages.
    """

    def __init__(
        self,
        *,
        location: str,
        wire: Wire,
        run: str,
        info: RunInfo,
        archive: RunArchive,
        server: EmbeddedServer | None,
        ack: Ack,
        timeout: float,
        buffer_bytes: int,
    ) -> None:
        self.location = location
        self.run = run
        self.incarnation = info.incarnation
        self.partitions = info.partitions
        self.routing_order = info.routing_order
        self._archive = archive
        self.timeout = timeout
        self.ack = ack
        self.keys = Keys(run, info.partitions)
        self.wire = wire
        self.hot = HotReader(wire, self.keys)
        super().__init__(View(self.hot, archive.reader), info.partitions, location=location)
        self._server = server
        self._closed = False
        self._forked = False
        self._flusher = Flusher(
            wire,
            self.keys,
            timeout=timeout,
            buffer_bytes=buffer_bytes,
            kept_bytes=min(buffer_bytes, KEPT_BYTES),
            horizon=0.0 if ack == "fsync" else FSYNC_HORIZON,
            archive=archive,
            on_connect=self._check_connection,
            on_refused=self.repair_summary,
        )
        _stores.add(self)
        atexit.register(self.close)

    @property
    def archive(self) -> ArchiveReader | None:
        """Where the run is archived, None if nowhere; found as soon as somebody gives it an archive.

        Raises:
            Conflict: the archive does not lie, as seen from here, where the run has it; or is another run's.
            Unavailable: it does not answer.
        """
        return self._archive.reader()

    def create(
        self,
        *,
        id: str | None = None,
        group: str | None = None,
        group_size: int | None = None,
        routing: RoutingSpec | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrajectoryWriter:
        """Begin a trajectory.

        Args:
            id: 1 to 200 letters, digits or ._:@+=~-; default a fresh ULID. Ids are never reused.
            group: the prompt that it belongs to (GRPO).
            group_size: how many members make the group complete; None: each is published by itself.
            routing: layers and experts; None: no routing will be recorded. In a run whose `routing_order` is "sorted"
                the recorded spec is sorted, whatever this one says; elsewhere as this one says.
            metadata: plain JSON data, at most 64 KiB.

        Raises:
            Conflict: the id exists, in the hot log or the archive.
            SchemaError: bad id, group or metadata.
        """
        self._require_open()
        size = None if group_size is None else check_count(group_size, name="group_size")
        if size is not None and (group is None or size < 1):
            raise SchemaError(f"group_size {size} needs to be positive and to have a group")
        if routing is not None and not isinstance(routing, RoutingSpec):
            raise SchemaError(f"routing must be a RoutingSpec, not {type(routing).__name__}")
        if routing is not None and self.routing_order == "sorted":
            routing = msgspec.structs.replace(routing, order="sorted")
        opened = TrajectoryOpened(
            group=check_group(group),
            group_size=size,
            routing=routing,
            metadata=check_json(metadata, name="metadata"),
        )
        if id is not None:
            check_id(id)
            if self._flusher.knows(id) or self.hot.exists(id) or self._archive.knows(id):
                raise Conflict(f"there is a trajectory {id!r} already, and ids are never reused; store.get({id!r})")
        return TrajectoryWriter.create(id or self._fresh_id(), opened, self._flusher, self._load_tokens)

    def get(self, id: str) -> TrajectoryWriter:
        """A handle on an existing trajectory as it stands now, to resume, score, close or annotate it.

        Raises:
            NotFound: no such trajectory, or it was deleted.
            Unavailable: the server or the archive did not answer; only both together tell how it stands.
        """
        self._settle(id)
        return TrajectoryWriter.resume(self._view.read(id), self._flusher, self._load_tokens)

    def delete(self, id: str | None = None, *, group: str | None = None, reason: str = "") -> int:
        """Delete a trajectory, or every member of a group that is known now. Waits until that is acknowledged.

        From then on it cannot be read or gone on with, here or from its archive, and its id stays taken. A writer that
        has it open is not asked, but `Fenced`. The hot log's payloads go at once; what packs hold of it goes with a
        compaction. To delete again is no error, and removes what a crash has left.

        Args:
            reason: kept in the tombstone, as is the group's name; at most 1000 characters.

        Returns:
            How many trajectories this call deleted; those that were deleted before do not count.

        Raises:
            NotFound: no trajectory of this id. A group without members is none: it gives 0.
            SchemaError: neither an id nor a group, or both; a bad reason.
            StoreFull: the server has no room for a tombstone; nothing was changed. An archiver makes room.
            Unavailable: the server did not answer before the deadline; delete again to know what became of it.
        """
        self._require_open()
        if (id is None) == (group is None):
            raise SchemaError("delete takes the id of a trajectory or group=, one of them")
        why = check_label(reason, name="reason")
        if id is not None:
            return int(self._delete(id, why))
        deleted = 0
        for member in self.list(status=ALL_STATUSES, group=check_group(group)):
            with contextlib.suppress(NotFound):  # a summary is a hint, it may outlive its trajectory
                deleted += self._delete(member.id, why)
        return deleted

    def wait(
        self, id: str, *, status: str | Collection[str] = CLOSED_STATUSES, timeout: float | None = None
    ) -> Summary:
        """Block until a trajectory has one of these statuses (default: any but open).

        Args:
            timeout: seconds, default the store's.

        Raises:
            NotFound: it was deleted, and that is not what was waited for.
            Unavailable: it did not come to that before the deadline (also a `TimeoutError`).
        """
        wanted = wanted_statuses(status)
        patience = self.timeout if timeout is None else check_finite(timeout, name="timeout")
        deadline = time.monotonic() + patience
        while True:
            self._settle(id)
            newest, seen = "0-0", f"{id} is not there yet"
            try:
                log = self._view.read_deleted_too(id)
            except NotFound:
                log = None
            if log is not None:
                newest = str(log.last_entry)
                summary = summarize(id, log.events)
                if summary is not None and summary.status in wanted:
                    return summary
                if log.tombstone is not None:
                    raise deleted_error(id, log.tombstone)
                seen = f"{id} is {summary.status if summary else 'empty'}"
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unavailable(f"{seen}, not {' or '.join(sorted(wanted))}, at the deadline")
            pause = max(1, int(min(left, 1.0, self.timeout / 2) * 1000))
            self.wire.call("XREAD", "COUNT", 1, "BLOCK", pause, "STREAMS", self.keys.entries(id), newest)

    def flush(self, id: str | None = None) -> None:
        """Wait until everything written so far, of one trajectory or of all, is acknowledged.

        Raises:
            TrajstoreError: what could not be written; several in an `ExceptionGroup`. With `id` the error is sticky.
                Without it each failure is raised once, and not at all where a call of the trajectory's handle has
                raised it.
        """
        self._require_open()
        self._flusher.flush(id)

    async def aflush(self, id: str | None = None) -> None:
        """As `flush`, without blocking the event loop."""
        self._require_open()
        await asyncio.wrap_future(self._flusher.watch(id).future)
        self._flusher.report(id)

    def close(self) -> None:
        """Flush, stop writing, and leave the embedded server; the last process out stops it.

        Raises:
            TrajstoreError: what could not be written, as `flush`.
        """
        if self._closed or self._forked:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            self._flusher.flush()
        finally:
            self._flusher.stop()
            self.wire.close()
            if self._server is not None:
                self._server.leave()

    def repair_summary(self, id: str) -> Summary | None:
        """Write a trajectory's summary anew from its log, and return it: the loser of a race may have left its own.

        What became final and was archived and removed has its summary in the archive only; what retention has dropped,
        nowhere.
        """
        try:
            summary = summarize(id, self._view.read_deleted_too(id).events)
        except NotFound:
            summary = None
        name = self.keys.summaries(self.keys.partition(id))
        stream = self.keys.entries(id)
        with self.wire.watching(stream) as watch:
            last = stream_last_id(watch.session.exchange([("XINFO", "STREAM", stream)])[0])
            if last is None:
                self.wire.transaction([("HDEL", name, id)], watch=watch)
            elif summary is not None and EventId.parse(summary.last) >= last:
                self.wire.transaction([("HSET", name, id, encode_summary(summary))], watch=watch)
        return summary

    def backlog(self) -> Backlog:
        """What the hot log holds that is not archived yet, and how full the server is. Only looks; does not flush.

        Raises:
            Unavailable: the server or the archive did not answer.
            Corrupt: something cannot be read.
        """
        self._require_open()
        return measure_backlog(self.wire, self.keys, self.hot, self.archive)

    def writer_counts(self) -> WriterCounts:
        """What this store has written, and what waits to be. Asks nobody and never waits; also after a close."""
        return self._flusher.counts()

    def rebuild_summaries(self) -> int:
        """Write all hot trajectories' summaries anew, from the log; returns how many. For a lost summary hash."""
        self._settle_all()
        count = 0
        for partition in range(self.partitions):
            for found in self.hot.ids(partition):
                self.repair_summary(found)
                count += 1
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (TrajstoreError, ExceptionGroup) as unwritten:
            if error is None:
                raise
            error.add_note(f"and closing the store failed: {unwritten}")  # the exception on its way out tells more

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def __repr__(self) -> str:
        return f"<Store {self.location} run {self.run!r}>"

    def _fresh_id(self) -> str:
        """A ULID: the time in milliseconds, and 80 random bits."""
        chance = self._flusher.chance
        random = (chance.word() << 16 | chance.word() >> 48).to_bytes(10, "big")
        return str(ULID.from_bytes(int(time.time() * 1000).to_bytes(6, "big") + random))

    def _delete(self, id: str, reason: str) -> bool:
        """Write a tombstone if there is none, and remove what the hot log holds beside it."""
        deadline = time.monotonic() + self.timeout
        while True:
            self._settle(id)
            # Some of what the stream took may be lost. Asked before it is read: nobody's tombstone may lie in between.
            taken = stream_last_id(self.wire.exchange([("XINFO", "STREAM", self.keys.entries(id))])[0])
            try:
                log = self._view.read_deleted_too(id)
            except (Corrupt, SchemaError):  # what cannot be read can be deleted all the same
                last, in_hot, summary = self._view.newest(id)
            else:
                if log.tombstone is not None:
                    remove_deleted(self.wire, self.keys, id, log.tombstone.at, archived=log.tombstone.stored != "hot")
                    with contextlib.suppress(StoreFull):  # it is a hint
                        self.repair_summary(id)
                    return False
                last, in_hot, summary = log.last_entry, log.in_hot, summarize(id, log.events)
            try:
                tombstone = write_tombstone(
                    self._flusher,
                    id,
                    TrajectoryDeleted(
                        reason=reason,
                        group=summary.group if summary else None,
                        group_size=summary.group_size if summary else None,
                    ),
                    after=max(last, taken or last),
                    in_hot=in_hot,
                    summary=summary,
                )
            except Fenced:  # somebody else's turn came first
                if time.monotonic() > deadline:
                    raise
                continue
            remove_deleted(self.wire, self.keys, id, tombstone)
            return True

    def _load_tokens(self, id: str, until: EventId) -> npt.NDArray[np.int32]:
        return self._view.token_ids(id, until)

    def _settle(self, id: str) -> None:
        """Read what this process has written: wait for what is on its way, and leave its errors to `flush`."""
        self._require_open()
        super()._settle(id)
        self._flusher.drain(id)

    def _settle_all(self) -> None:
        """Likewise of all trajectories."""
        self._require_open()
        self._flusher.drain(None)

    def _check_connection(self) -> None:
        """Before anything is written over a fresh connection: is this still the server that the run lies on?"""
        info = read_run(self.wire, self.run)
        if info is None or info.incarnation != self.incarnation:
            found = "does not know it" if info is None else f"has incarnation {info.incarnation}"
            raise Conflict(
                f"run {self.run!r} (incarnation {self.incarnation}) was opened on this server, which now {found}: it "
                "lost its data, or another one answers. Nothing is written; open the run again"
            )
        if self.ack == "fsync":
            require_fsync(self.wire)

    def _require_open(self) -> None:
        if self._forked:
            raise Conflict("this store was opened before a fork; open it again in the child process")
        if self._closed:
            raise Conflict("this store is closed; open it again")

    def _after_fork(self) -> None:
        self._forked = True


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _mark_forked() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_mark_forked)
