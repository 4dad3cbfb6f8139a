"""Where a run is archived: given when it is opened, recorded beside it, found by stores that were opened before."""

import os
from collections.abc import Mapping
from pathlib import Path

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.entries import EntryStamp
from trajstore.errors import Conflict
from trajstore.events import EventId
from trajstore.log.keys import Keys
from trajstore.log.run import RunInfo, open_run, read_run
from trajstore.log.wire import Wire
from trajstore.routing import RoutingOrder

__all__ = ["RunArchive", "open_archived_run"]


class RunArchive:
    """The archive of a run as a store sees it; answers a writer as `trajstore.log.resolve.ArchiveIndex`.

    Args:
        wire, run, info: of the run.
        home: folder of an embedded store, to which a recorded path is relative.
        options: of an object store.
        reader: of the archive, None if the run has none yet.
    """

    def __init__(
        self,
        wire: Wire,
        run: str,
        info: RunInfo,
        *,
        home: Path | None,
        options: Mapping[str, str] | None,
        reader: ArchiveReader | None,
    ) -> None:
        self._wire = wire
        self._run = run
        self._about = _about(run, info)
        self._home = home
        self._options = options
        self._reader = reader

    def reader(self) -> ArchiveReader | None:
        """The archive, None while the run has none; asked anew each time until it has.

        Raises:
            Conflict: the archive does not lie, as seen from here, where the run has it; or is another run's.
        """
        if self._reader is None:
            root = _recorded(self._wire, self._run, self._home, self._options)
            if root is not None:
                if root.info() is None:
                    raise _not_here(self._run, root, root)
                root.claim(self._about)
                self._reader = ArchiveReader(root, self._about)
        return self._reader

    def knows(self, id: str) -> bool:
        """Something of the trajectory is archived."""
        reader = self.reader()
        if reader is None:
            return False
        archived = reader.find(id)
        return archived.dropped or bool(archived.parts)

    def entry(self, id: str, at: EventId) -> EntryStamp | None:
        """What an archived entry was written as, None if it is not archived."""
        reader = self.reader()
        return None if reader is None else reader.entry(id, at)

    def note(self, id: str, at: EventId) -> EntryStamp | None:
        """Likewise for a note."""
        reader = self.reader()
        return None if reader is None else reader.note(id, at)

    def last_note(self, id: str) -> int:
        """Number of the newest archived note, 0 for none."""
        reader = self.reader()
        return 0 if reader is None else reader.last_note(id)


def open_archived_run(
    wire: Wire,
    run: str,
    archive: str | os.PathLike[str] | None,
    *,
    options: Mapping[str, str] | None,
    home: Path | None,
    partitions: int | None,
    routing_order: RoutingOrder | None,
    create: bool,
) -> tuple[RunInfo, RunArchive]:
    """The run's record and its archive, both of one incarnation.

    Args:
        archive, options, partitions, routing_order: as given to `trajstore.open`.
        home: folder of an embedded store, which has its archive in `archive/` unless told otherwise.

    Raises:
        NotFound, Conflict: see `trajstore.open`.
    """
    recorded = _recorded(wire, run, home, options)
    root = recorded if home is None or recorded is not None else ArchiveRoot.at(home / "archive")
    if archive is not None:
        root = ArchiveRoot.at(archive, options)
    found = None if root is None else root.info()
    known = read_run(wire, run)  # after the archive, which is claimed once the run has its record
    if known is None and found is not None and root is not None:
        raise Conflict(
            f"the server knows no run {run!r}, but {root.location} archives incarnation {found.incarnation} of run "
            f"{found.run!r}: the hot log was lost, or this is another server. `trajstore rebuild` continues the run "
            f"from its archive, trajstore.open_archive({root.location!r}) reads it; or begin a run in a new folder"
        )
    if recorded is not None and found is None and root is not None:
        raise _not_here(run, recorded, root)
    info = open_run(wire, run, partitions=partitions, routing_order=routing_order, create=create)
    if root is None:
        return info, RunArchive(wire, run, info, home=home, options=options, reader=None)
    root.claim(_about(run, info))
    if recorded is None or not recorded.is_at(root):  # a full server takes no SET
        _record(wire, run, root, home, options, moved=found is not None)
    reader = ArchiveReader(root, _about(run, info))
    return info, RunArchive(wire, run, info, home=home, options=options, reader=reader)


def _about(run: str, info: RunInfo) -> ArchiveInfo:
    return ArchiveInfo(format=ARCHIVE_FORMAT, run=run, incarnation=info.incarnation, partitions=info.partitions)


def _not_here(run: str, recorded: ArchiveRoot, root: ArchiveRoot) -> Conflict:
    return Conflict(
        f"run {run!r} is archived in {recorded.location}, but {root.location} holds no archive. Give archive= where "
        "the archive lies as seen from here (on another host it wants to be mounted); a second one would split the run"
    )


def _recorded(wire: Wire, run: str, home: Path | None, options: Mapping[str, str] | None) -> ArchiveRoot | None:
    """Where the run was archived when it was opened before; a relative path is below an embedded store's folder."""
    recorded = wire.call("GET", Keys.archive_location(run))
    if recorded is None:
        return None
    text = os.fsdecode(recorded)
    return ArchiveRoot.at(text if "://" in text else (home or Path()) / text, options)


def _record(
    wire: Wire, run: str, root: ArchiveRoot, home: Path | None, options: Mapping[str, str] | None, *, moved: bool
) -> None:
    """Let later opens find the archive, also after the embedded store's folder was moved with its archive."""
    location = os.path.realpath(root.location) if root.is_local else root.location
    if home is not None and root.is_local and Path(location).is_relative_to(home.resolve()):
        location = str(Path(location).relative_to(home.resolve()))
    wire.call("SET", Keys.archive_location(run), os.fsencode(location), *([] if moved else ["NX"]))
    recorded = _recorded(wire, run, home, options)
    if not moved and recorded is not None and not recorded.is_at(root):
        raise Conflict(f"somebody else has just begun to archive run {run!r} in {recorded.location}; open it with that")
