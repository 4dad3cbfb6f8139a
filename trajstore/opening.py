"""Opening a run or an archive: what a location means, and the folder of an embedded store."""

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from trajstore.archive.of_run import open_archived_run
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ArchiveRoot, check_options
from trajstore.archive.storage.durable import write_new
from trajstore.errors import UNREADABLE, Conflict, NotFound, SchemaError, TrajstoreError, Unavailable
from trajstore.ingest import check_choice, check_count, check_id
from trajstore.limits import MAX_PARTITIONS
from trajstore.log.cluster import connect
from trajstore.log.run import require_fsync
from trajstore.log.wire import describe_url, split_run
from trajstore.reading import Archive
from trajstore.routing import ORDERS, RoutingOrder
from trajstore.server import Ack, EmbeddedServer, find_server
from trajstore.store import Store
from trajstore.view import View

__all__ = ["Location", "open", "open_archive"]

Location: TypeAlias = str | os.PathLike[str]

_STORE_FORMAT = 1


class _StoreFile(msgspec.Struct, frozen=True):
    """`store.json` of an embedded store."""

    format: int
    run: str


def open(  # `trajstore.open`, as one says `gzip.open`
    location: Location,
    *,
    archive: Location | None = None,
    archive_options: Mapping[str, str] | None = None,
    ack: Ack = "memory",
    partitions: int | None = None,
    routing_order: RoutingOrder | None = None,
    create: bool = True,
    timeout: float = 30.0,
    buffer_bytes: int = 256 << 20,
) -> Store:
    """Open a run.

    A run that has been opened before opens even while its archive, an object store say, does not answer: a warning is
    logged, new trajectories are written, and what needs the archive raises `Unavailable` until it is back.

    Args:
        location: a folder (new, empty, or an embedded store) for a private server and an archive on disk; or a Redis
            URL that names the run: `redis://host:6379/0?run=exp1`, also `rediss://` and `unix://`; of a cluster, of one
            server or several (`redis://host:6379,host2:6379?run=exp1`).
        archive: folder or URL (`s3://bucket/exp1`) of the run's archive; default what the run was opened with before,
            or `archive/` in the folder.
        archive_options: of an object store: endpoint, region, access_key_id, secret_access_key, session_token, timeout,
            ...; for what is not given, the environment (`AWS_ACCESS_KEY_ID`, ...). An archive on disk has none.
        ack: when a write counts as acknowledged. "memory": the server has it (a crash of the server may lose about 2
            seconds, a crash of any other process nothing). "fsync": it is on the server's disk.
        partitions: P of a new run, default 16; fixed from then on.
        routing_order: of a new run: "engine" (default) keeps expert ids as they come, "sorted" stores them ascending
            per token and layer, which halves the archive and loses the engine's order; fixed from then on.
        create: False refuses to begin a new run.
        timeout: seconds that any call may wait for the server.
        buffer_bytes: what may wait to be written; beyond it, writing blocks.

    Raises:
        Conflict: the folder holds something else, or its server runs on another host; hot log and archive are of
            different incarnations, or the archive is not where the run has it; the server does not fsync although asked
            to.
        NotFound: no run there, and `create` is False.
        Unavailable: the folder cannot be used, no server can be had, or it does not answer; it is waited for, while it
            loads its log, until the timeout. Or the archive of a run that is not known to be archived there.
        SchemaError: the location or an option cannot be right; a store of a newer format.
    """
    if ack not in ("memory", "fsync"):
        raise SchemaError(f"ack must be 'memory' or 'fsync', not {ack!r}")
    if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise SchemaError(f"timeout must be positive and finite, in seconds, not {timeout!r}")
    if partitions is not None and not 1 <= check_count(partitions, name="partitions") <= MAX_PARTITIONS:
        raise SchemaError(f"partitions must lie in [1, {MAX_PARTITIONS}], not {partitions}")
    if routing_order is not None:
        check_choice(routing_order, ORDERS, name="routing order")
    check_count(buffer_bytes, name="buffer_bytes")
    check_options(archive_options)
    if archive is not None:
        ArchiveRoot.at(archive, archive_options)  # refused before anything is begun
    text = _text(location)
    if not text:
        raise SchemaError("the location is empty; give a folder or a Redis URL")
    if archive_options and archive is None and "://" not in text and not Path(text, "store.json").exists():
        raise SchemaError(f"archive_options need archive=: the new store in {text} would have its archive in a folder")
    server: EmbeddedServer | None = None
    folder: Path | None = None
    if "://" in text:
        url, run = split_run(text)
        if run is None:
            raise SchemaError(f"{describe_url(text)} names no run; add it: {describe_url(text)}?run=NAME")
        check_id(run)
        wire, shown = connect(url, timeout=timeout), f"{describe_url(text)}?run={run}"
    else:
        if scheme := re.match(r"(rediss?|unix|s3|gs|az):/", text):
            raise SchemaError(f"a URL begins {scheme[0]}/ with two slashes; this one was made a path, or mistyped")
        folder = Path(text).absolute()  # a later chdir must not matter
        run = _embedded_run(folder, create=create)
        server = EmbeddedServer(folder, ack=ack, timeout=timeout)
        wire, shown = server.wire(), text
    try:
        wire.wait_while_loading()
        if ack == "fsync":
            require_fsync(wire)
        info, run_archive = open_archived_run(
            wire,
            run,
            archive,
            options=archive_options,
            home=folder,
            partitions=partitions,
            routing_order=routing_order,
            create=create,
        )
        return Store(
            location=shown,
            wire=wire,
            run=run,
            info=info,
            archive=run_archive,
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


def open_archive(location: Location, *, options: Mapping[str, str] | None = None) -> Archive:
    """Read an archive without Redis: `load`, `events`, `list`, `overlaps`.

    Args:
        location: its folder or URL; the folder of an embedded store will do, its archive is found.
        options: of an object store, as `archive_options` of `open`.

    Raises:
        NotFound: there is no archive.
        SchemaError: location or options cannot be right.
        Unavailable: it does not answer.
    """
    reader = read_archive(location, options)
    return Archive(View(None, lambda: reader), reader.info.partitions, location=reader.root.location)


def read_archive(location: Location, options: Mapping[str, str] | None = None) -> ArchiveReader:
    """The archive at a folder or URL, or inside an embedded store's folder.

    Raises:
        NotFound: there is none.
    """
    text = _text(location)
    root = ArchiveRoot.at(text, options)
    if root.is_local and root.info() is None:
        inner = ArchiveRoot.at(Path(root.location) / "archive")
        root = root if inner.info() is None else inner
    return ArchiveReader(root, root.require())


def _text(location: Location) -> str:
    if not isinstance(location, str | os.PathLike):
        raise SchemaError(f"a location is a folder or a URL, not {location!r:.80}")
    return os.fspath(location)


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
    except UNREADABLE as error:
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
