"""Where a run is archived: given when it is opened, recorded beside it, found by stores that were opened before."""

import os
from pathlib import Path

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.entries import EntryStamp
from trajstore.errors import Conflict
from trajstore.events import EventId
from trajstore.log.keys import Keys
from trajstore.log.run import RunInfo, open_run, read_run
from trajstore.log.wire import Wire

__all__ = ["RunArchive", "open_archived_run"]


class RunArchive:
    """The archive of a run as a store sees it; answers a writer as `trajstore.log.resolve.ArchiveIndex`.

    Args:
        wire, run, info: of the run.
        home: folder of an embedded store, to which a recorded path is relative.
        reader: of the archive, None if the run has none yet.
    """

    def __init__(self, wire: Wire, run: str, info: RunInfo, *, home: Path | None, reader: ArchiveReader | None) -> None:
        self._wire = wire
        self._run = run
        self._about = _about(run, info)
        self._home = home
        self._reader = reader

    def reader(self) -> ArchiveReader | None:
        """The archive, None while the run has none; asked anew each time until it has.

        Raises:
            Conflict: the archive does not lie, as seen from here, where the run has it; or is another run's.
        """
        if self._reader is None:
            root = _recorded(self._wire, self._run, self._home)
            if root is not None:
                if root.info() is None:
                    raise _not_here(self._run, root, root)
                root.claim(self._about)
                self._reader = ArchiveReader(root, self._about)
        return self._reader

    def knows(self, id: str) -> bool:
        """Something of the trajectory is archived."""
        reader = self.reader()
        return reader is not None and reader.last_entry(id) is not None

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
    home: Path | None,
    partitions: int | None,
    create: bool,
) -> tuple[RunInfo, RunArchive]:
    """The run's record and its archive, both of one incarnation.

    Args:
        archive: as given to `trajstore.open`.
        home: folder of an embedded store, which has its archive in `archive/` unless told otherwise.

    Raises:
        NotFound, Conflict: see `trajstore.open`.
    """
    known = read_run(wire, run)
    recorded = _recorded(wire, run, home)
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
        raise _not_here(run, recorded, root)
    info = open_run(wire, run, partitions=partitions, create=create)
    if root is None:
        return info, RunArchive(wire, run, info, home=home, reader=None)
    root.claim(_about(run, info))
    if recorded is None or recorded.path.resolve() != root.path.resolve():  # a full server takes no SET
        _record(wire, run, root, home, moved=found is not None)
    return info, RunArchive(wire, run, info, home=home, reader=ArchiveReader(root, _about(run, info)))


def _about(run: str, info: RunInfo) -> ArchiveInfo:
    return ArchiveInfo(format=ARCHIVE_FORMAT, run=run, incarnation=info.incarnation, partitions=info.partitions)


def _not_here(run: str, recorded: ArchiveRoot, root: ArchiveRoot) -> Conflict:
    return Conflict(
        f"run {run!r} is archived in {recorded.path}, but {root.path} holds no archive. Give archive= where the "
        "archive lies as seen from here (on another host it wants to be mounted); a second one would split the run"
    )


def _recorded(wire: Wire, run: str, home: Path | None) -> ArchiveRoot | None:
    """Where the run was archived when it was opened before; a relative path is below an embedded store's folder."""
    recorded = wire.call("GET", Keys.archive_location(run))
    return None if recorded is None else ArchiveRoot((home or Path()) / os.fsdecode(recorded))


def _record(wire: Wire, run: str, root: ArchiveRoot, home: Path | None, *, moved: bool) -> None:
    """Let later opens find the archive, also after the embedded store's folder was moved with its archive."""
    path = root.path.resolve()
    if home is not None and path.is_relative_to(home.resolve()):
        path = path.relative_to(home.resolve())
    wire.call("SET", Keys.archive_location(run), os.fsencode(path), *([] if moved else ["NX"]))
    recorded = _recorded(wire, run, home)
    if not moved and recorded is not None and recorded.path.resolve() != root.path.resolve():
        raise Conflict(f"somebody else has just begun to archive run {run!r} in {recorded.path}; open it with that")
