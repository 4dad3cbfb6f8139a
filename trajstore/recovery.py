"""A run whose manifest, lookup tables, server or summaries were lost, made whole again from what is left."""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.rebuild.rebuild import Rebuilt, rebuild_archive
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.errors import UNREADABLE, Conflict, Corrupt, NotFound, SchemaError, TrajstoreError
from trajstore.events import TrajectoryOpened
from trajstore.ingest import check_id
from trajstore.log.cluster import connect
from trajstore.log.keys import Keys
from trajstore.log.run import RunInfo, begin_run, read_run, set_up
from trajstore.log.wire import Wire, describe_url, split_run
from trajstore.opening import Location
from trajstore.opening import open as open_run
from trajstore.routing import RoutingOrder
from trajstore.server import EmbeddedServer

__all__ = ["Recovered", "recover"]


class Recovered(msgspec.Struct, kw_only=True):
    """What was done.

    Attributes:
        archive: made anew of its archive; None where the run has none.
        begun: the server did not know the run, which goes on there now.
        unfinished: trajectories of the run just begun that are open or aborted in the archive: what they had beyond it
            was in the lost hot log.
        summaries: written anew, of trajectories in the hot log.
    """

    archive: Rebuilt | None = None
    begun: bool = False
    unfinished: int = 0
    summaries: int = 0


def recover(
    location: Location,
    *,
    archive: Location | None = None,
    archive_options: Mapping[str, str] | None = None,
    routing_order: RoutingOrder | None = None,
    digests: bool = False,
    without: Collection[str] = (),
    timeout: float = 30.0,
    on_partition: Callable[[int, int], None] = lambda done, total: None,
) -> Recovered:
    """Make a run whole: its archive, then its server if that has lost everything, then the hot log's summaries.

    What was in a lost hot log only is lost. No archiver may be at work on the run meanwhile.

    Args:
        location: as for `trajstore.open`: an embedded store's folder, or a Redis URL that names the run.
        archive, archive_options: where the run is archived; default where the run has it, or `archive/` in the folder.
        routing_order: of a run that is begun again; default what its archived trajectories have.
        digests, without, on_partition: see `trajstore.archive.rebuild.rebuild_archive`.
        timeout: seconds that any call may wait for the server.

    Raises:
        NotFound: no such run, and no archive to continue it from.
        Conflict: the archive is another run's; or the server holds data of a run whose record it does not know.
        Corrupt: a pack that is needed cannot be read.
        SchemaError: as `trajstore.open`.
    """
    done = Recovered()
    with _server_of(location, timeout) as (wire, run, home):
        known = read_run(wire, run)
        root = _archive_of(wire, run, home, archive, archive_options)
        if root is not None:
            done.archive = rebuild_archive(root, digests=digests, without=without, on_partition=on_partition)
            if done.archive.unreadable:
                raise Corrupt(
                    f"{root.location} has packs that no record names and that cannot be read: "
                    f"{'; '.join(done.archive.unreadable)}. Restore them from a copy, or give them up: --without PACK"
                )
        if known is None:
            if root is None:
                raise NotFound(f"there is no run {run!r} on this server, and no archive to continue it from: --archive")
            reader = ArchiveReader(root, root.require())
            _begin_again(wire, run, reader, home, routing_order or _order_of(reader))
            done.begun = True
            done.unfinished = sum(_unfinished(reader))
        else:
            set_up(wire, Keys(run, known.partitions))  # one server of a cluster may have lost its partitions
            if root is not None:
                root.claim(_about(run, known))
    with open_run(location, archive=archive, archive_options=archive_options, create=False, timeout=timeout) as store:
        done.summaries = store.rebuild_summaries()
    return done


class _Server(NamedTuple):
    """Connections to a run's server, the run's name, and the folder of an embedded store."""

    wire: Wire
    run: str
    home: Path | None


@contextlib.contextmanager
def _server_of(location: Location, timeout: float) -> Iterator[_Server]:
    text = os.fspath(location)
    server: EmbeddedServer | None = None
    if "://" in text:
        url, run = split_run(text)
        if run is None:
            raise SchemaError(f"{describe_url(text)} names no run; add it: {describe_url(text)}?run=NAME")
        found = _Server(connect(url, timeout=timeout), check_id(run), None)
    else:
        home = Path(text).absolute()
        run = _embedded_run(home)
        server = EmbeddedServer(home, ack="memory", timeout=timeout)
        found = _Server(server.wire(), run, home)
    try:
        found.wire.wait_while_loading()
        yield found
    finally:
        found.wire.close()
        if server is not None:
            with contextlib.suppress(TrajstoreError):  # an error on its way tells more
                server.leave()


def _embedded_run(home: Path) -> str:
    marker = home / "store.json"
    try:
        return str(msgspec.json.decode(marker.read_bytes())["run"])
    except FileNotFoundError as error:
        raise NotFound(f"there is no trajstore in {home} (no store.json)") from error
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise SchemaError(f"{marker} cannot be read: {error}") from error


def _archive_of(
    wire: Wire, run: str, home: Path | None, archive: Location | None, options: Mapping[str, str] | None
) -> ArchiveRoot | None:
    """Where the run is archived: as given, as it is recorded, or in an embedded store's folder."""
    if archive is not None:
        return ArchiveRoot.at(archive, options)
    recorded = wire.call("GET", Keys.archive_location(run))
    if recorded is not None:
        text = os.fsdecode(recorded)
        return ArchiveRoot.at(text if "://" in text else (home or Path()) / text, options)
    return None if home is None or not (home / "archive").exists() else ArchiveRoot.at(home / "archive", options)


def _begin_again(wire: Wire, run: str, reader: ArchiveReader, home: Path | None, order: RoutingOrder) -> None:
    info, root = reader.info, reader.root
    if info.run != run:
        raise Conflict(f"{root.location} archives run {info.run!r}, not {run!r}; give its name: ?run={info.run}")
    held = _data_of(wire, run)
    if held is not None:
        raise Conflict(
            f"the server has no record of run {run!r}, but data of it ({held}): it is not an empty server, and what it "
            "holds may be another incarnation's. Move these keys away, or use another server"
        )
    location = root.location
    if home is not None and root.is_local and Path(location).is_relative_to(home.resolve()):
        location = str(Path(location).relative_to(home.resolve()))
    # First: a run that is known without its archive would seem to have lost everything.
    wire.call("SET", Keys.archive_location(run), os.fsencode(location))
    begun = begin_run(wire, run, incarnation=info.incarnation, partitions=info.partitions, routing_order=order)
    root.claim(_about(run, begun))


def _about(run: str, info: RunInfo) -> ArchiveInfo:
    return ArchiveInfo(format=ARCHIVE_FORMAT, run=run, incarnation=info.incarnation, partitions=info.partitions)


def _data_of(wire: Wire, run: str) -> str | None:
    """The key of some trajectory's entries, payloads or notes, None if the server holds none of the run."""
    ours = re.compile(rf"trajstore:\{{{re.escape(run)}:[0-9]{{2,4}}\}}:")  # and not the run "{run}:00"
    for server in wire.servers():
        cursor = None
        while cursor != b"0":
            cursor, found = server.call("SCAN", cursor or 0, "MATCH", f"trajstore:{{{run}:*}}:[epn]:*", "COUNT", 1000)
            names = map(os.fsdecode, found)
            if held := next((name for name in names if ours.match(name)), None):
                return held
    return None


def _order_of(reader: ArchiveReader) -> RoutingOrder:
    """In a run that sorts, every spec is sorted; looked at are those of the newest pack of each partition."""
    orders: set[str] = set()
    for partition in range(reader.info.partitions):
        manifest = reader.manifest(partition)
        newest = manifest.refresh()
        packs = (manifest.record(number) for number in range(newest, 0, -1) if manifest.is_live(number))
        record = next((record for record in packs if record.counts.entries), None)
        for line in manifest.lines(record) if record is not None else ():
            if line.first == "1-0":
                entries = reader.read(line.id)[0]
                opened = entries[0].events[0].header if entries else None
                if isinstance(opened, TrajectoryOpened) and opened.routing is not None:
                    orders.add(opened.routing.order)
    return "sorted" if orders == {"sorted"} else "engine"


def _unfinished(reader: ArchiveReader) -> Iterator[bool]:
    for partition in range(reader.info.partitions):
        for summary in reader.summaries(partition):
            yield summary.status in ("open", "aborted")
