"""The facade: one object over hot log, archive and fold. What each part does is in its own module."""

import asyncio
import atexit
import contextlib
import math
import os
import time
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from ulid import ULID

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot, write_new
from trajstore.entries import Event
from trajstore.errors import Conflict, NotFound, SchemaError, TrajstoreError, Unavailable
from trajstore.events import CLOSED_STATUSES, EventId, TrajectoryOpened
from trajstore.fold import Plan, Policy
from trajstore.history import Recording, read_history
from trajstore.ingest import check_count, check_group, check_id, check_json
from trajstore.log.flusher import FSYNC_HORIZON, Flusher
from trajstore.log.keys import Keys
from trajstore.log.reader import HotReader
from trajstore.log.resolve import ArchiveIndex, NoArchive
from trajstore.log.run import MAX_PARTITIONS, RunInfo, open_run, read_run, require_fsync
from trajstore.log.stream import stream_last_id
from trajstore.log.wire import Wire, describe_url, split_run
from trajstore.overlaps import Overlap, find_overlaps
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore.server import Ack, EmbeddedServer, find_server
from trajstore.summary import Summary, encode_summary, summarize
from trajstore.trajectory import Trajectory
from trajstore.view import View
from trajstore.writing import TrajectoryWriter

__all__ = ["Archive", "Location", "Store", "open", "open_archive"]

Location: TypeAlias = str | os.PathLike[str]

_STATUSES = ("open", *CLOSED_STATUSES)
_STORE_FORMAT = 1


class _StoreFile(msgspec.Struct, frozen=True):
    """`store.json` of an embedded store."""

    format: int
    run: str


class Archive:
    """Reading trajectories: what a store and a bare archive have in common."""

    def __init__(self, view: View, partitions: int) -> None:
        self._view = view
        self._partitions = partitions

    def load(self, id: str, *, policy: Policy = "last_segment_wins", until: str | EventId | None = None) -> Trajectory:
        """A trajectory, folded; open ones too.

        Args:
            policy: "last_segment_wins" or "as_sampled", see `trajstore.fold.plan`.
            until: id of an event, e.g. "3-7": the state when it had just happened.

        Raises:
            NotFound: no such trajectory or event.
            SequenceGap: the log has a hole; the error's `last_good` loads.
            Corrupt: stored bytes are damaged or gone.
            SchemaError: written by a newer trajstore.
        """
        self._settle(id)
        return self._view.load(id, policy, None if until is None else EventId.parse(until))

    def plan(self, id: str, *, policy: Policy = "last_segment_wins", until: str | EventId | None = None) -> Plan:
        """The decided fold of a trajectory: its history, and with `Plan.why` the provenance of each row."""
        self._settle(id)
        return self._view.plan(id, policy, None if until is None else EventId.parse(until))

    def events(self, id: str) -> list[Event]:
        """Every event of a trajectory, in order. Notes are apart, see `notes`."""
        self._settle(id)
        return self._view.read(id).events

    def notes(self, id: str) -> list[Event]:
        """Observations and late recordings of a trajectory, in order of arrival."""
        self._settle(id)
        return self._view.read(id).notes

    def overlaps(self, id: str) -> list[Overlap]:
        """Pairs of recordings of the same rows; `recorded_rows` gives the rows of each."""
        self._settle(id)
        log = self._view.read(id)
        return find_overlaps(read_history(log.events, notes=log.notes))

    def recorded_rows(self, id: str, recording: Recording) -> RoutingArray:
        """Rows of one recording, `[stop - start, L, K]`, whether or not they win a fold."""
        self._settle(id)
        return self._view.rows(id, recording)

    def list(self, *, status: str | Collection[str] | None = None, group: str | None = None) -> list[Summary]:
        """Summaries of trajectories, oldest id first.

        Args:
            status: only these: open, completed, truncated, failed, aborted.
            group: only members of this group.
        """
        wanted = _wanted(status)
        self._settle(None)
        found = [
            summary
            for partition in range(self._partitions)
            for summary in self._view.summaries(partition)
            if summary.status in wanted and (group is None or summary.group == group)
        ]
        return sorted(found, key=lambda summary: summary.id)

    def _settle(self, id: str | None) -> None:
        """Nothing is ever on its way into a bare archive."""


class Store(Archive):
    """A run: written and read. Made by `trajstore.open`; a context manager, also an async one.

    Attributes:
        run: its name.
        incarnation: ULID of this run's beginning.
        partitions: P.
        archive: where it is archived, None if nowhere.
        location: what was opened, fit for messages.
    """

    def __init__(
        self,
        *,
        location: str,
        wire: Wire,
        run: str,
        info: RunInfo,
        archive: ArchiveReader | None,
        server: EmbeddedServer | None,
        ack: Ack,
        timeout: float,
        buffer_bytes: int,
    ) -> None:
        self.location = location
        self.run = run
        self.incarnation = info.incarnation
        self.partitions = info.partitions
        self.archive = archive
        self.timeout = timeout
        self.ack = ack
        self.keys = Keys(run, info.partitions)
        self.wire = wire
        self.hot = HotReader(wire, self.keys)
        super().__init__(View(self.hot, archive), info.partitions)
        self._server = server
        self._closed = False
        self._forked = False
        index: ArchiveIndex = archive if archive is not None else NoArchive()
        self._flusher = Flusher(
            wire,
            self.keys,
            timeout=timeout,
            buffer_bytes=buffer_bytes,
            kept_bytes=buffer_bytes,
            horizon=0.0 if ack == "fsync" else FSYNC_HORIZON,
            archive=index,
            on_connect=self._check_connection,
            on_refused=self.repair_summary,
        )
        _stores.add(self)
        atexit.register(self.close)

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
            routing: layers and experts; None: no routing will be recorded.
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
        opened = TrajectoryOpened(
            group=check_group(group),
            group_size=size,
            routing=routing,
            metadata=check_json(metadata, name="metadata"),
        )
        if id is not None:
            check_id(id)
            known = self.archive is not None and self.archive.last_entry(id) is not None
            if self._flusher.knows(id) or self.hot.exists(id) or known:
                raise Conflict(f"there is a trajectory {id!r} already, and ids are never reused; store.get({id!r})")
        return TrajectoryWriter.create(id or str(ULID()), opened, self._flusher, self._load_tokens)

    def get(self, id: str) -> TrajectoryWriter:
        """A handle on an existing trajectory as it stands now, to resume, score, close or annotate it.

        Raises:
            NotFound: no such trajectory.
        """
        self._settle(id)
        return TrajectoryWriter.resume(self._view.read(id), self._flusher, self._load_tokens)

    def wait(
        self, id: str, *, status: str | Collection[str] = CLOSED_STATUSES, timeout: float | None = None
    ) -> Summary:
        """Block until a trajectory has one of these statuses (default: any but open).

        Args:
            timeout: seconds, default the store's.

        Raises:
            Unavailable: it did not come to that before the deadline (also a `TimeoutError`).
        """
        wanted = _wanted(status)
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            self._settle(id)
            newest, seen = "0-0", f"{id} is not there yet"
            try:
                log = self._view.read(id)
            except NotFound:
                log = None
            if log is not None:
                newest = str(log.last_entry)
                summary = summarize(id, log.events)
                if summary is not None and summary.status in wanted:
                    return summary
                seen = f"{id} is {summary.status if summary else 'empty'}"
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unavailable(f"{seen}, not {' or '.join(sorted(wanted))}, at the deadline")
            pause = max(1, int(min(left, 1.0, self.timeout / 2) * 1000))
            self.wire.call("XREAD", "COUNT", 1, "BLOCK", pause, "STREAMS", self.keys.entries(id), newest)

    def flush(self, id: str | None = None) -> None:
        """Wait until everything written so far, of one trajectory or of all, is acknowledged.

        Raises:
            TrajstoreError: what could not be written; several in an `ExceptionGroup`. With `id` the error is sticky,
                without it each failure is raised once.
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

    def repair_summary(self, id: str) -> None:
        """Write a trajectory's summary anew from its log: the loser of a race may have left its own.

        What became final and was archived and removed has its summary in the archive only.
        """
        with contextlib.suppress(NotFound):
            summary = summarize(id, self._view.read(id).events)
            name = self.keys.summaries(self.keys.partition(id))
            stream = self.keys.entries(id)
            with self.wire.watching(stream) as watch:
                last = stream_last_id(watch.session.exchange([("XINFO", "STREAM", stream)])[0])
                if last is None:
                    self.wire.transaction([("HDEL", name, id)], watch=watch)
                elif summary is not None and EventId.parse(summary.last) >= last:
                    self.wire.transaction([("HSET", name, id, encode_summary(summary))], watch=watch)

    def rebuild_summaries(self) -> int:
        """Write all hot trajectories' summaries anew, from the log; returns how many. For a lost summary hash."""
        self._settle(None)
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

    def _load_tokens(self, id: str, until: EventId) -> npt.NDArray[np.int32]:
        return self._view.load(id, "last_segment_wins", until).token_ids

    def _settle(self, id: str | None) -> None:
        """Read what this process has written: wait for what is on its way, and leave its errors to `flush`."""
        self._require_open()
        self._flusher.drain(id)

    def _check_connection(self) -> None:
        if self.ack == "fsync":
            require_fsync(self.wire)

    def _require_open(self) -> None:
        if self._forked:
            raise Conflict("this store was opened before a fork; open it again in the child process")
        if self._closed:
            raise Conflict("this store is closed; open it again")

    def _after_fork(self) -> None:
        self._forked = True


def open(  # `trajstore.open`, as one says `gzip.open`
    location: Location,
    *,
    archive: Location | None = None,
    ack: Ack = "memory",
    partitions: int | None = None,
    create: bool = True,
    timeout: float = 30.0,
    buffer_bytes: int = 256 << 20,
) -> Store:
    """Open a run.

    Args:
        location: a folder (new, empty, or an embedded store) for a private server and an archive on disk; or a Redis
            URL that names the run: `redis://host:6379/0?run=exp1`, also `rediss://` and `unix://`.
        archive: folder of the run's archive; default what the run was opened with before, or `archive/` in the folder.
        ack: when a write counts as acknowledged. "memory": the server has it (a crash of the server may lose about 2
            seconds, a crash of any other process nothing). "fsync": it is on the server's disk.
        partitions: P of a new run, default 16; fixed from then on.
        create: False refuses to begin a new run.
        timeout: seconds that any call may wait for the server.
        buffer_bytes: what may wait to be written; beyond it, writing blocks.

    Raises:
        Conflict: the folder holds something else, or its server runs on another host; hot log and archive are of
            different incarnations, or the archive is not where the run has it; the server does not fsync although asked
            to.
        NotFound: no run there, and `create` is False.
        Unavailable: the folder cannot be used, no server can be had, or it does not answer.
        SchemaError: the location or an option cannot be right; a store of a newer format.
    """
    if ack not in ("memory", "fsync"):
        raise SchemaError(f"ack must be 'memory' or 'fsync', not {ack!r}")
    if not 0 < timeout < math.inf:
        raise SchemaError(f"timeout must be positive and finite, not {timeout}")
    if partitions is not None and not 1 <= check_count(partitions, name="partitions") <= MAX_PARTITIONS:
        raise SchemaError(f"partitions must lie in [1, {MAX_PARTITIONS}], not {partitions}")
    text = os.fspath(location)
    if not text:
        raise SchemaError("the location is empty; give a folder or a Redis URL")
    server: EmbeddedServer | None = None
    folder: Path | None = None
    if "://" in text:
        url, run = split_run(text)
        if run is None:
            raise SchemaError(f"{describe_url(text)} names no run; add it: {describe_url(text)}?run=NAME")
        wire, shown = Wire.to_url(url, timeout=timeout), f"{describe_url(text)}?run={run}"
    else:
        folder = Path(text).absolute()  # a later chdir must not matter
        run = _embedded_run(folder, create=create)
        server = EmbeddedServer(folder, ack=ack, timeout=timeout)
        wire, shown = server.wire(), text
    try:
        if ack == "fsync":
            require_fsync(wire)
        info, reader = _open_run(wire, check_id(run), archive, home=folder, partitions=partitions, create=create)
        return Store(
            location=shown,
            wire=wire,
            run=run,
            info=info,
            archive=reader,
            server=server,
            ack=ack,
            timeout=timeout,
            buffer_bytes=buffer_bytes,
        )
    except BaseException:
        wire.close()
        if server is not None:
            with contextlib.suppress(TrajstoreError):  # the first error tells more
                server.leave()
        raise


def open_archive(location: Location) -> Archive:
    """Read an archive without Redis: `load`, `events`, `list`, `overlaps`.

    Raises:
        NotFound: there is no archive (a folder of an embedded store will do, its archive is found).
    """
    root = ArchiveRoot(ArchiveRoot.at(location).path.absolute())
    if root.info() is None and (inner := ArchiveRoot(root.path / "archive")).info() is not None:
        root = inner
    info = root.require()
    return Archive(View(None, ArchiveReader(root, info)), info.partitions)


def _open_run(
    wire: Wire, run: str, archive: Location | None, *, home: Path | None, partitions: int | None, create: bool
) -> tuple[RunInfo, ArchiveReader | None]:
    """The run's record and its archive, both of one incarnation. `home` is the folder of an embedded store."""
    known = read_run(wire, run)
    recorded = _recorded_archive(wire, run, home)
    root = recorded if home is None or recorded is not None else ArchiveRoot(home / "archive")
    if archive is not None:
        root = ArchiveRoot(ArchiveRoot.at(archive).path.absolute())
    found = None if root is None else root.info()
    if known is None and found is not None and root is not None:
        raise Conflict(
            f"the server knows no run {run!r}, but {root.path} archives incarnation {found.incarnation} of run "
            f"{found.run!r}: the hot log was lost, or this is another server. "
            f"trajstore.open_archive({str(root.path)!r}) reads the archive; begin a new run with a new folder"
        )
    if recorded is not None and found is None and root is not None:
        raise Conflict(
            f"run {run!r} is archived in {recorded.path}, but {root.path} holds no archive. Give archive= where the "
            "archive lies as seen from here (on another host it wants to be mounted); a second one would split the run"
        )
    info = open_run(wire, run, partitions=partitions, create=create)
    if root is None:
        return info, None
    about = ArchiveInfo(format=ARCHIVE_FORMAT, run=run, incarnation=info.incarnation, partitions=info.partitions)
    root.claim(about)
    if recorded is None or recorded.path.resolve() != root.path.resolve():  # a full server takes no SET
        _record_archive(wire, run, root, home, moved=found is not None)
    return info, ArchiveReader(root, about)


def _recorded_archive(wire: Wire, run: str, home: Path | None) -> ArchiveRoot | None:
    """Where the run was archived when it was opened before; a relative path is below an embedded store's folder."""
    recorded = wire.call("GET", Keys.archive_location(run))
    return None if recorded is None else ArchiveRoot((home or Path()) / os.fsdecode(recorded))


def _record_archive(wire: Wire, run: str, root: ArchiveRoot, home: Path | None, *, moved: bool) -> None:
    """Let later opens find the archive, also after the embedded store's folder was moved with its archive."""
    path = root.path.resolve()
    if home is not None and path.is_relative_to(home.resolve()):
        path = path.relative_to(home.resolve())
    wire.call("SET", Keys.archive_location(run), os.fsencode(path), *([] if moved else ["NX"]))
    recorded = _recorded_archive(wire, run, home)
    if not moved and recorded is not None and recorded.path.resolve() != root.path.resolve():
        raise Conflict(f"somebody else has just begun to archive run {run!r} in {recorded.path}; open it with that")


def _embedded_run(folder: Path, *, create: bool) -> str:
    """Name of the run that an embedded store's folder holds; makes the folder one if it is new or empty."""
    marker = folder / "store.json"
    try:
        if not marker.exists():
            if not create:
                raise NotFound(f"there is no trajstore in {folder} (no store.json)")
            _make_store(folder, marker)
        data = marker.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, TrajstoreError):
            raise
        raise Unavailable(f"{folder} cannot be used as a store: {error}") from error
    try:
        found = msgspec.json.decode(data, type=_StoreFile)
    except msgspec.MsgspecError as error:
        raise SchemaError(f"{marker} cannot be read: {error}") from error
    if found.format > _STORE_FORMAT:
        raise SchemaError(
            f"{folder} is a store of format {found.format}; this trajstore reads up to {_STORE_FORMAT}, upgrade it"
        )
    return found.run


def _make_store(folder: Path, marker: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise Conflict(f"{folder} is a file; an embedded store wants a folder of its own")
    leftover = f".{marker.name}."  # of somebody's attempt that crashed
    others = [path.name for path in (folder.iterdir() if folder.exists() else ()) if not path.name.startswith(leftover)]
    if others and not marker.exists():  # by now somebody else may have made it
        raise Conflict(
            f"{folder} is not empty and no trajstore (it holds {', '.join(sorted(others)[:3])}); give a new or an "
            "empty folder"
        )
    find_server()  # nothing is begun where it could not go on
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # somebody opens it at the same time
        write_new(marker, msgspec.json.format(msgspec.json.encode(_StoreFile(_STORE_FORMAT, "main"))))


def _wanted(status: str | Collection[str] | None) -> frozenset[str]:
    wanted = frozenset(_STATUSES if status is None else [status] if isinstance(status, str) else status)
    if not wanted <= frozenset(_STATUSES):
        unknown = ", ".join(sorted(wanted - frozenset(_STATUSES)))
        raise SchemaError(f"there is no status {unknown}; statuses are {', '.join(_STATUSES)}")
    return wanted


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _mark_forked() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_mark_forked)
