"""Where a run is archived: given when it is opened, recorded beside it, found by stores that were opened before."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.entries import EntryStamp
from trajstore.errors import Conflict, SchemaError, Unavailable
from trajstore.events import EventId
from trajstore.log.keys import Keys
from trajstore.log.run import RunInfo, open_run, read_run
from trajstore.log.wire import Wire
from trajstore.routing import RoutingOrder

__all__ = ["RunArchive", "open_archived_run"]

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class RunArchive:
    """The archive of a run as a store sees it; answers a writer as `trajstore.log.resolve.ArchiveIndex`.

    Args:
        wire, run, info: of the run.
        home: folder of an embedded store, to which a recorded path is relative.
        options: of an object store.
        root: where the archive was said to be, None to go by the run's record.
    """

    def __init__(
        self,
        wire: Wire,
        run: str,
        info: RunInfo,
        *,
        home: Path | None,
        options: Mapping[str, str] | None,
        root: ArchiveRoot | None,
    ) -> None:
        self._wire = wire
        self._run = run
        self._about = _about(run, info)
        self._home = home
        self._options = options
        self._root = root
        self._reader: ArchiveReader | None = None
        self._silent: str | None = None
        self._silent_until = 0.0

    def reader(self) -> ArchiveReader | None:
        """The archive, None while the run has none; asked anew each time until it has, and until the archive answers.

        Raises:
            Conflict: the archive does not lie, as seen from here, where the run has it; or is another run's.
            Unavailable: it does not answer.
        """
        if self._reader is None:
            recorded = _recorded(self._wire, self._run, self._home, self._options)
            root = self._root or recorded
            if root is not None:
                known = root.info() is not None
                if not known and recorded is not None:
                    raise _not_here(self._run, recorded, root)
                self.meet(root, recorded, known=known)
        return self._reader

    def meet(self, root: ArchiveRoot, recorded: ArchiveRoot | None, *, known: bool) -> None:
        """The first contact: make this the run's archive, or find that it is; only here it can show to be another's.

        Args:
            recorded: where the run has it.
            known: there is an archive already.

        Raises:
            Conflict, Unavailable: as `reader`.
        """
        root.claim(self._about)
        if recorded is None or not recorded.is_at(root):  # a full server takes no SET
            _record(self._wire, self._run, root, self._home, self._options, moved=known)
        self._reader = ArchiveReader(root, self._about)

    def knows(self, id: str) -> bool:
        """Something of the trajectory is archived."""
        reader = self.reader()
        if reader is None:
            return False
        archived = reader.find(id)
        return archived.dropped or bool(archived.parts)

    def entry(self, id: str, at: EventId) -> EntryStamp | None:
        """What an archived entry was written as, None if it is not archived."""
        return self._answer(lambda reader: reader.entry(id, at), None)

    def note(self, id: str, at: EventId) -> EntryStamp | None:
        """Likewise for a note."""
        return self._answer(lambda reader: reader.note(id, at), None)

    def last_note(self, id: str) -> int:
        """Number of the newest archived note, 0 for none."""
        return self._answer(lambda reader: reader.last_note(id), 0)

    def last_entry(self, id: str) -> EventId | None:
        """Id of the newest archived entry."""
        return self._answer(lambda reader: reader.last_entry(id), None)

    def _answer(self, ask: Callable[[ArchiveReader], _Answer], without: _Answer) -> _Answer:
        """For a writer, whose other trajectories wait: what does not answer is let be for as long as that took.

        Raises:
            Unavailable: it does not answer, or did not a moment ago.
        """
        begun = time.monotonic()
        if self._silent is not None and begun < self._silent_until:
            raise Unavailable(self._silent)
        try:
            reader = self.reader()
            return without if reader is None else ask(reader)
        except Unavailable as error:
            now = time.monotonic()
            self._silent, self._silent_until = str(error), now + max(1.0, now - begun)
            raise


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

    A run that is known to have an archive opens while that does not answer, for a writer asks it only where it is in
    doubt what became of an entry. Whoever needs it meets it later, by `RunArchive.reader`.

    Args:
        archive, options, partitions, routing_order: as given to `trajstore.open`.
        home: folder of an embedded store, which has its archive in `archive/` unless told otherwise.

    Raises:
        NotFound, Conflict, SchemaError: see `trajstore.open`.
        Unavailable: the server does not answer, or the archive of a run that is not known to be archived there.
    """
    recorded = _recorded(wire, run, home, options)
    root = recorded if home is None or recorded is not None else ArchiveRoot.at(home / "archive")
    if archive is not None:
        root = ArchiveRoot.at(archive, options)
    if options and (root is None or root.is_local):
        raise SchemaError(
            f"archive_options are given, but run {run!r} has "
            + (f"its archive in the folder {root.location}" if root is not None else "no archive")
            + "; leave them out, or give the archive that they are for: archive='s3://bucket/name'"
        )
    found: ArchiveInfo | None = None
    silent: Unavailable | None = None
    try:
        found = None if root is None else root.info()
    except Unavailable as error:
        if root is None or recorded is None or not _may_be(recorded, root):
            raise
        silent = error
    known = read_run(wire, run)  # after the archive, which is claimed once the run has its record
    if known is None and silent is not None:
        raise silent
    if known is None and found is not None and root is not None:
        raise Conflict(
            f"the server knows no run {run!r}, but {root.location} archives incarnation {found.incarnation} of run "
            f"{found.run!r}: the hot log was lost, or this is another server. `trajstore rebuild` continues the run "
            f"from its archive, trajstore.open_archive({root.location!r}) reads it; or begin a run in a new folder"
        )
    if recorded is not None and found is None and root is not None and silent is None:
        raise _not_here(run, recorded, root)
    info = open_run(wire, run, partitions=partitions, routing_order=routing_order, create=create)
    run_archive = RunArchive(wire, run, info, home=home, options=options, root=root)
    if silent is not None:
        log.warning(
            "run %r is opened without its archive: %s. New trajectories are written all the same; whatever needs the "
            "archive asks it anew",
            run,
            silent,
        )
    elif root is not None:
        run_archive.meet(root, recorded, known=found is not None)
    return info, run_archive


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
    if "://" in text:
        return ArchiveRoot.at(text, options)
    return ArchiveRoot.at((home or Path()) / text)


def _may_be(recorded: ArchiveRoot, root: ArchiveRoot) -> bool:
    """They are one place as far as can be told without asking: an endpoint has several names."""
    return recorded.is_at(root) or recorded.location.partition("?")[0] == root.location.partition("?")[0]


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
