"""Export and import: a selection of a run as an archive of its own, and an archive's trajectories into a run.

See `docs/transfer.md`. How entries are read and packed is in `archive/transfer/`.
"""

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import get_args

from ulid import ULID

from trajstore.archive.pack import ReadEntry
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.archive.transfer.copies import PackCopies, Transferred, not_held
from trajstore.archive.transfer.source import Source, Whole, payload_bytes, routing_of
from trajstore.archive.writer import StagedEntry
from trajstore.blob import to_blob
from trajstore.entries import partition_of
from trajstore.errors import Conflict, Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import EventId
from trajstore.fold import Policy
from trajstore.ingest import require_id
from trajstore.log.feed import worker_name
from trajstore.log.reader import HotReader
from trajstore.log.stream import stream_last_id
from trajstore.reading import Archive, wanted_statuses
from trajstore.store import Store
from trajstore.summary import Summary, summarize
from trajstore.view import View

__all__ = ["Exported", "Imported", "export", "import_archive"]

log = logging.getLogger(__name__)

PACK_BYTES = 64 << 20
"""Payload bytes of one pack, as an archiver's."""

_POLICIES: tuple[Policy, ...] = get_args(Policy)

_NAMED = 10
"""Conflicts that an error message names; there may be a million."""


class Exported(Transferred):
    """What an export has done so far.

    Attributes:
        trajectories: written.
        checked: of them, found to fold as in their source.
    """

    trajectories: int = 0
    checked: int = 0


class Imported(Transferred):
    """What an import has done so far.

    Attributes:
        added: trajectories that the run did not know.
        continued: known ones that got new entries or notes.
        known: left as they are, for the run holds all of it.
        gone: left out, for the run has deleted or dropped them.
        conflicts: left out, for the run holds something else.
    """

    added: int = 0
    continued: int = 0
    known: int = 0
    gone: int = 0
    conflicts: int = 0


def export(
    source: Store | ArchiveReader,
    dest: str | os.PathLike[str],
    *,
    options: Mapping[str, str] | None = None,
    ids: Collection[str] = (),
    groups: Collection[str] = (),
    statuses: Collection[str] = (),
    check: bool = True,
    pack_bytes: int = PACK_BYTES,
    on_progress: Callable[[Exported], None] = lambda _: None,
    on_corrupt: Callable[[Corrupt], None] | None = None,
) -> Exported:
    """Write trajectories, as they stand now, to a new archive: every event, note and payload, open segments too.

    Deleted trajectories are left out. `archive.json` comes last, so an export that was interrupted is no archive.

    Args:
        source: a run, hot log and archive as one; or an archive alone (`trajstore.opening.read_archive`).
        dest: folder or URL, new or empty.
        options: of an object store.
        ids, groups, statuses: only those; empty for all. Each id and each group must be there.
        check: fold every trajectory of source and copy under every policy, and compare.
        pack_bytes: of one pack, which bounds memory with the longest trajectory.
        on_corrupt: hears of each record, pack and trajectory that cannot be read; all else is exported.

    Raises:
        Conflict: `dest` is not empty.
        NotFound: one of `ids` or `groups` is not there, or deleted; or nothing is selected. Then nothing was written.
        Corrupt: without `on_corrupt` something cannot be read; or a copy does not fold as its source does.
    """
    for name, given in (("ids", ids), ("groups", groups)):
        if isinstance(given, str):
            raise SchemaError(f"{name} are several, not the text {given!r:.80}; give a list")
    for id in ids:
        require_id(id)
    wanted = wanted_statuses(statuses or None) - {"deleted"}
    hot, archive, about = _parts_of(source)
    root = ArchiveRoot.at(dest, options)
    _require_empty(root)
    view, origin = View(hot, lambda: archive), Source(hot, archive)
    reading = Archive(view, about.partitions)
    copy = ArchiveReader(root, about)
    where = source.location if isinstance(source, Store) else source.root.location
    named = []
    for id in dict.fromkeys(ids):
        try:
            named.append(_summary_of(reading, id))
        except Corrupt as error:
            if on_corrupt is None:
                raise
            on_corrupt(error)
    early: list[Corrupt] = []  # what is damaged is told once, in the pass that copies
    heard = None if on_corrupt is None else early.append
    known = (one for partition in range(about.partitions) for one in view.summaries(partition, on_corrupt=heard))
    try:
        _require_selected(named if ids else known, groups=groups, statuses=wanted, where=where)
    except NotFound:
        if on_corrupt is not None:
            for damage in early:
                on_corrupt(damage)
        raise
    done = Exported()
    for partition in range(about.partitions):
        copies = PackCopies(copy, partition, writer=worker_name(), pack_bytes=pack_bytes, done=done)
        here = [one for one in named if partition_of(one.id, about.partitions) == partition]
        for summary in sorted(here if ids else view.summaries(partition, on_corrupt=on_corrupt), key=_by_group):
            if summary.status in wanted and (not groups or summary.group in groups):
                try:
                    whole = origin.read(summary.id)
                    staged = list(origin.stage(summary.id, whole.entries))
                except Corrupt as error:
                    if on_corrupt is None:
                        raise
                    on_corrupt(error)
                    continue
                if staged:  # else it was deleted a moment ago
                    _copy(copies, summary.id, whole, whole.entries, staged)
                    done.trajectories += 1
                    on_progress(done)
        copies.flush()
        if check:
            for summary in copy.summaries(partition):
                _compare(reading, Archive(View(None, lambda: copy), about.partitions), summary)
                done.checked += 1
                on_progress(done)
    if not done.trajectories:  # deleted or found damaged since they were selected
        raise NotFound(f"no trajectory of {where} could be exported; {root.location} holds nothing")
    root.claim(about)
    return done


def import_archive(
    store: Store,
    origin: ArchiveReader,
    *,
    skip_conflicts: bool = False,
    pack_bytes: int = PACK_BYTES,
    on_progress: Callable[[Imported], None] = lambda _: None,
) -> Imported:
    """Add an archive's trajectories to a run's archive. What the run holds already is left; nothing is added twice.

    They are not offered to trainers: that happened where they came from, or `plan` and `load` give them. Whoever may
    be writing to one of them in this run wants to stop before.

    Args:
        store: of the run, which must have an archive.
        origin: see `trajstore.opening.read_archive`.
        skip_conflicts: import the others.
        pack_bytes: of one pack, which bounds memory with the longest trajectory.

    Raises:
        Conflict: the run has no archive; or it holds something else under the id of some trajectory, or is still
            writing to one that the archive continues. Then nothing was written.
        NotFound: the archive holds no trajectories, or deleted ones only.
        Corrupt: something cannot be read.
    """
    if store.archive is None:
        raise Conflict(f"{store.location} has no archive to import into; open it with archive=")
    store.flush()
    source, target = Source(None, origin), Source(store.hot, store.archive)
    offered = conflicts = 0
    named: list[str] = []
    for partition in range(origin.info.partitions):
        for id in _ids(origin, partition):
            offered += 1
            try:
                _new_entries(source, target, id)
            except Conflict as error:
                conflicts += 1
                named += [str(error)][: _NAMED - len(named)]
    if not offered:
        raise NotFound(f"{origin.root.location} holds no trajectory to import; is it the right archive?")
    if conflicts and not skip_conflicts:
        raise Conflict(
            f"{conflicts} trajectories of {origin.root.location} cannot be imported into {store.location}, and nothing "
            "was written; the others can be, with --skip-conflicts:\n" + "\n".join(named)
        )
    done = Imported()
    for partition in range(store.partitions):
        copies = PackCopies(store.archive, partition, writer=worker_name(), pack_bytes=pack_bytes, done=done)
        continued: dict[str, EventId | None] = {}
        for id in _ids_for(origin, partition, store.partitions):
            try:
                whole, new, known = _new_entries(source, target, id)
            except Conflict:
                done.conflicts += 1
                continue
            if known.gone:
                done.gone += 1
            elif not new:
                done.known += 1
            else:
                _copy(copies, id, whole, new, source.stage(id, new))
                if known.entries:
                    done.continued += 1
                    continued[id] = whole.last
                else:
                    done.added += 1
            on_progress(done)
        copies.flush()
        _raise_fences(store, continued)
    return done


def _parts_of(source: Store | ArchiveReader) -> tuple[HotReader | None, ArchiveReader | None, ArchiveInfo]:
    """What a source consists of, and whose archive its copy is: the same run, of an incarnation of its own."""
    if isinstance(source, Store):
        source.flush()
        hot, archive, run, partitions = source.hot, source.archive, source.run, source.partitions
    else:
        hot, archive, run, partitions = None, source, source.info.run, source.info.partitions
    return hot, archive, ArchiveInfo(format=ARCHIVE_FORMAT, run=run, incarnation=str(ULID()), partitions=partitions)


def _require_empty(root: ArchiveRoot) -> None:
    found = next(iter(root.storage.list("")), None)
    if found is not None:
        raise Conflict(
            f"{root.location} is not empty (it holds {found.path}); export into a new or an empty folder. What an "
            "interrupted export left has no archive.json, and can be removed"
        )


def _require_selected(
    summaries: Iterable[Summary], *, groups: Collection[str], statuses: Collection[str], where: str
) -> None:
    """Make sure that there is something to export, and some of each group. Reads no further than that takes.

    Raises:
        NotFound: there is not.
    """
    missing, found = set(groups), False
    for summary in summaries:
        if summary.status != "deleted":
            missing.discard(summary.group or "")
            found |= summary.status in statuses and (not groups or summary.group in groups)
        if found and not missing:
            return
    if missing:
        names = ", ".join(sorted(missing))
        raise NotFound(f"{where} holds no trajectory of group {names}; nothing was written")
    raise NotFound(f"{where} holds no trajectory to export, or none that the selection means; nothing was written")


def _summary_of(reading: Archive, id: str) -> Summary:
    summary = summarize(id, reading.events(id))
    if summary is None:
        raise NotFound(f"trajectory {id!r} holds nothing that this version knows")
    return summary


def _by_group(summary: Summary) -> tuple[str, str]:
    """Members of a group come together, for a pack holds their equal prompt rows once."""
    return summary.group or "", summary.id


def _copy(
    copies: PackCopies, id: str, whole: Whole, entries: Sequence[ReadEntry], staged: Iterable[StagedEntry]
) -> None:
    copies.add(id, staged, spec=routing_of(id, whole.entries), nbytes=payload_bytes(entries))


def _compare(source: Archive, copy: Archive, summary: Summary) -> None:
    """Fold a trajectory of both, as of the copy's last event, under every policy.

    Raises:
        Corrupt: they differ.
    """
    if len(source.notes(summary.id)) > len(copy.notes(summary.id)):
        log.warning("%s got a note while it was exported, so its copy cannot be compared", summary.id)
        return
    for policy in _POLICIES:
        if _folded(source, summary, policy) != _folded(copy, summary, policy):
            raise Corrupt(
                f"the copy of trajectory {summary.id} does not fold as its source under {policy}; export again"
            )


def _folded(archive: Archive, summary: Summary, policy: Policy) -> bytes | str:
    """The fold as bytes; of what cannot be folded, why."""
    try:
        return to_blob(archive.load(summary.id, policy=policy, until=summary.last))
    except (SequenceGap, RoutingError, SchemaError) as error:
        return f"{type(error).__name__}: {error}"


def _ids(origin: ArchiveReader, partition: int) -> Iterator[str]:
    """Trajectories of one of its partitions that are not deleted, members of a group together."""
    for summary in sorted(origin.summaries(partition), key=_by_group):
        if summary.status != "deleted":
            yield summary.id


def _ids_for(origin: ArchiveReader, partition: int, partitions: int) -> Iterator[str]:
    """Trajectories that lie in one of `partitions`. CRC-32 modulo both numbers agrees modulo what divides both."""
    common = math.gcd(origin.info.partitions, partitions)
    for other in range(partition % common, origin.info.partitions, common):
        yield from (id for id in _ids(origin, other) if partition_of(id, partitions) == partition)


def _new_entries(source: Source, target: Source, id: str) -> tuple[Whole, list[ReadEntry], Whole]:
    """All that the source holds of a trajectory; of that, what the target does not; and what the target holds.

    Raises:
        Conflict: the target has gone on differently, or is still at it.
    """
    whole, known = source.read(id), target.read(id)
    new = [] if known.gone else not_held(id, whole.entries, known.entries)
    if new and known.in_hot:
        raise Conflict(
            f"{id}: it lies in the hot log here, and has gone on there; archive it first (`trajstore archive --once`)"
        )
    return whole, new, known


def _raise_fences(store: Store, continued: Mapping[str, EventId | None]) -> None:
    """Where the emptied stream of an aborted trajectory is left, let it refuse what is below the imported entries."""
    for id, last in continued.items():
        stream = store.keys.entries(id)
        with store.wire.watching(stream) as watch:
            newest = stream_last_id(watch.session.exchange([("XINFO", "STREAM", stream)])[0])
            if newest is not None and last is not None and newest < last:
                store.wire.transaction([("XSETID", stream, str(last))], watch=watch)
