"""Compaction: packs of a partition written anew as one, without what was deleted or dropped. Which: `candidates.py`.

The new pack's record says which ones it replaces. Like every record it is refused if another was written meanwhile, so
nothing is lost in a race, and the work is done again. The old files stay for readers at work until `garbage.py` finds
them.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from trajstore.archive.archived import Archived
from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import PackedTrajectory, ReadEntry
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import RECORD_FORMAT, Record
from trajstore.archive.repeats import known_rows
from trajstore.archive.transfer.source import Source
from trajstore.archive.writer import PackWriter, PublishStep
from trajstore.errors import Conflict, Corrupt, Fenced, NotFound
from trajstore.events import EventId, TrajectoryDeleted, TrajectoryOpened
from trajstore.routing import RoutingSpec
from trajstore.summary import Summary

__all__ = ["compact"]


def compact(
    reader: ArchiveReader,
    partition: int,
    records: Sequence[Record],
    *,
    writer: str,
    on_step: Callable[[PublishStep], None] = lambda _: None,
    on_trajectory: Callable[[], None] = lambda: None,
) -> Record:
    """Write the packs of these live records anew as one. Entries and notes of a trajectory come to lie together.

    Of a deleted trajectory only the tombstone is kept, of a dropped one nothing. Holds one pack's content in memory.

    Args:
        records: of one partition; all recordings in their packs have one L, K and dtype.
        writer: who does it, for the record.
        on_step: hears the steps of the publish: staged, synced, moved, recorded.
        on_trajectory: called before each trajectory, to keep a lease say; what it raises ends the compaction.

    Returns:
        The new record; without a pack where nothing was left.

    Raises:
        Fenced: a record was written meanwhile; nothing is changed, try again.
        Conflict: the packs' recordings have different shapes.
        SchemaError: an event that this version does not know, so cannot write as it was.
        Corrupt: a pack cannot be read, or not all is found that its list names and its record counts; nothing is
            changed.
    """
    manifest = reader.manifest(partition)
    number = manifest.refresh() + 1
    _require_live(manifest, partition, records)
    packs = frozenset(record.pack for record in records)
    found: Counter[tuple[str, bool]] = Counter()
    thinned: set[int] = set()
    try:
        listed = _listed(manifest, records)
        spec = _first_spec(reader, manifest, records, listed)
        pack = PackWriter(reader.root, reader.info, partition, spec)
        added = False
        for id, here in listed.items():
            on_trajectory()
            archived = manifest.find(id, listed=here.numbers)
            entries = _read(reader, archived, id)
            found.update((_pack_of(entry), entry.note) for entry in entries)
            if archived.dropped or _is_deleted(archived):
                thinned.update(here.numbers)
            added |= _add(pack, reader, id, entries, here.summary, packs=packs, spec=spec)
        _require_counted(records, found, thinned)
    except Corrupt as error:
        manifest.refresh()
        _require_live(manifest, partition, records, error)
        raise
    except NotFound as error:  # its tombstone came meanwhile
        raise Fenced(f"{error}; look again at what wants compaction") from error
    replaces = sorted(record.number for record in records)
    if added:
        return pack.publish(manifest, number, writer=writer, on_step=on_step, replaces=replaces)
    record = Record(
        format=RECORD_FORMAT,
        number=number,
        partition=partition,
        created=time.time(),
        writer=writer,
        replaces=replaces,
    )
    manifest.append(record, [])
    on_step("recorded")
    return record


def _require_live(manifest: Manifest, partition: int, records: Sequence[Record], cause: Corrupt | None = None) -> None:
    ended = [record.number for record in records if not manifest.is_live(record.number)]
    if ended:
        raise Fenced(
            f"the packs of records {ended} of partition {partition} have been replaced or dropped meanwhile; look "
            "again at what wants compaction"
        ) from cause


class _Listed(NamedTuple):
    """What these packs' lists say of a trajectory.

    Attributes:
        numbers: of the records whose packs list it.
        newest: the line with its newest entry in them, or one of those where they hold notes only.
    """

    numbers: list[int]
    newest: PackedTrajectory

    @property
    def summary(self) -> Summary | None:
        """As of its newest entry in them; None where they hold notes only."""
        return self.newest.summary


def _listed(manifest: Manifest, records: Sequence[Record]) -> dict[str, _Listed]:
    """By id, all trajectories that these packs list."""
    found: dict[str, _Listed] = {}
    for record in records:
        for line in manifest.lines(record):
            numbers, newest = found.get(line.id, ((), line))
            if not newest.last or (line.last and EventId.parse(line.last) > EventId.parse(newest.last)):
                newest = line
            found[line.id] = _Listed([*numbers, record.number], newest)
    return found


def _require_counted(
    records: Sequence[Record], found: Mapping[tuple[str, bool], int], thinned: Collection[int]
) -> None:
    """Nothing of the packs is left behind: their files go once they are replaced.

    Args:
        found: entries by pack and whether they are notes.
        thinned: numbers of records of whose packs something is not written anew.

    Raises:
        Corrupt: a record counts others.
    """
    for record in records:
        if record.format == 1:
            continue  # it counts nothing
        here = [found[record.pack, False], found[record.pack, True]]
        said = [record.counts.entries, record.counts.notes]
        fewer = record.number in thinned and here[0] <= said[0] and here[1] <= said[1]
        if here != said and not fewer:
            raise Corrupt(
                f"in pack {record.pack} {here[0]} entries and {here[1]} notes were found, and its record counts "
                f"{said[0]} and {said[1]}: it stays as it is. `trajstore verify` says what is damaged"
            )


def _first_spec(
    reader: ArchiveReader, manifest: Manifest, records: Sequence[Record], listed: Mapping[str, _Listed]
) -> RoutingSpec | None:
    """The spec of any trajectory in these packs that has routing: L, K and dtype are the same for all."""
    if not any("routed/zarr.json" in record.files for record in records):
        return None
    specs = (_spec(_read(reader, manifest.find(id, listed=here.numbers), id)) for id, here in listed.items())
    return next((spec for spec in specs if spec is not None), None)


def _add(
    pack: PackWriter,
    reader: ArchiveReader,
    id: str,
    entries: Sequence[ReadEntry],
    summary: Summary | None,
    *,
    packs: frozenset[str],
    spec: RoutingSpec | None,
) -> bool:
    """Take what the new pack holds of a trajectory; False for nothing.

    Args:
        entries: all that is kept of it, in whichever packs.
        summary: as of its newest entry in the packs that are written anew.
    """
    moved = {(entry.note, entry.at): entry for entry in entries if _pack_of(entry) in packs}
    if not moved:
        return False
    own = _spec(entries)
    if own is not None and spec is not None and _shape(own) != _shape(spec):
        raise Conflict(
            f"trajectory {id} has rows of shape {_shape(own)}, others in these packs of shape {_shape(spec)}; one pack "
            "holds one shape, compact them apart"
        )
    staged = list(Source(None, reader).stage(id, [moved[key] for key in sorted(moved)]))
    old = _independent([entry for entry in entries if _pack_of(entry) not in packs], moved.values())
    known = known_rows(reader, id, old, staged, spec.row_bytes) if spec is not None and old else None
    pack.add(id, staged, summary=summary, known=known)
    return True


def _read(reader: ArchiveReader, archived: Archived, id: str) -> list[ReadEntry]:
    """What is kept of a trajectory, from all packs that it lies in."""
    entries = reader.read_parts(id, archived.kept)
    if not _is_deleted(archived):
        return entries
    return [entry for entry in entries if isinstance(entry.events[-1].header, TrajectoryDeleted)]


def _is_deleted(archived: Archived) -> bool:
    return archived.summary is not None and archived.summary.status == "deleted"


def _independent(stays: Sequence[ReadEntry], moved: Iterable[ReadEntry]) -> list[ReadEntry]:
    """Entries that stay where they are and repeat no row of those that are written anew, not even by way of others.

    Only to their rows may the new pack refer: else two events could come to lead to each other.
    """
    leads: dict[str, set[int | str]] = {
        event.id: {piece[0] for piece in pieces if len(piece) == 3}
        for entry in stays
        for event, pieces in zip(entry.events, entry.pieces, strict=True)
    }
    bound = {event.id for entry in moved for event in entry.events}
    more = bound
    while more:
        more = {id for id, targets in leads.items() if id not in bound and targets & bound}
        bound |= more
    return [entry for entry in stays if not any(event.id in bound for event in entry.events)]


def _spec(entries: Iterable[ReadEntry]) -> RoutingSpec | None:
    opened = next((entry.events[0].header for entry in entries if entry.at == (1, 0) and not entry.note), None)
    return opened.routing if isinstance(opened, TrajectoryOpened) else None


def _shape(spec: RoutingSpec) -> tuple[int, int, str]:
    return spec.num_layers, spec.top_k, spec.dtype.str


def _pack_of(entry: ReadEntry) -> str:
    return entry.events[0].stored
