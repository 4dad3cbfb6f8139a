"""From the hot log to a pack: what of a trajectory may be archived now.

A trajectory is looked at twice, a fsync horizon apart. Only entries that were the same both times, and that belong to
finished epochs, are staged: so the archive never runs ahead of a server that may still lose its tail.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import ReadEntry
from trajstore.archive.pieces import Known
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.repeats import known_rows
from trajstore.archive.writer import StagedEntry
from trajstore.entries import Event, entry_digest
from trajstore.errors import Corrupt, SchemaError
from trajstore.events import (
    EventId,
    Rewarded,
    SegmentClosed,
    TrajectoryClosed,
    TrajectoryDeleted,
    TrajectoryOpened,
    UnknownEvent,
)
from trajstore.history import find_tombstone
from trajstore.log.feed import Hint
from trajstore.log.reader import HotEntry, HotReader
from trajstore.routing import RoutingSpec
from trajstore.summary import Summary, advance

__all__ = ["Look", "Part", "finished_entries", "first_look", "ripe_prefix", "second_look"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Look:
    """The first look at a trajectory.

    Attributes:
        hints: to be acknowledged once what they tell of is archived.
        later: hints about what came after this look.
        entries, notes: digest by id of everything that the hot log held.
        nbytes: payload bytes of what is not archived yet.
        ripe_at: when to look again, monotonic seconds.
        server: run id of the server then; "" where it cannot lose anything.
    """

    hints: list[Hint]
    entries: dict[EventId, str]
    notes: dict[EventId, str]
    nbytes: int
    ripe_at: float
    server: str
    later: list[Hint] = field(default_factory=list)

    def covers(self, hint: Hint) -> bool:
        """True if what the hint tells of was there at this look."""
        seen = self.notes if hint.is_note else self.entries
        return EventId.parse(hint.event) in seen


@dataclass(slots=True, eq=False)
class Part:
    """What is archived of one trajectory in one go.

    Attributes:
        id: of the trajectory.
        look: the first look at it.
        staged: entries to archive, then notes; may be empty.
        spec: its routing.
        summary: as of the last staged entry.
        known: rows that the archive holds and the staged recordings may repeat.
        entries, notes: everything that the hot log holds of it.
    """

    id: str
    look: Look
    staged: list[StagedEntry]
    spec: RoutingSpec | None
    summary: Summary | None
    known: Known | None
    entries: list[HotEntry]
    notes: list[HotEntry]

    @property
    def nbytes(self) -> int:
        """Payload bytes staged."""
        return sum(len(data) for entry in self.staged for data in entry.payloads)

    @property
    def shape(self) -> tuple[int, int, str] | None:
        """(L, K, dtype) of its rows; one pack holds one shape. None without routing."""
        spec = self.spec
        return None if spec is None else (spec.num_layers, spec.top_k, spec.dtype.str)


def first_look(
    hot: HotReader, manifest: Manifest, id: str, hints: Sequence[Hint], *, now: float, horizon: float, server: str
) -> Look:
    """Note down what the hot log holds; what holds nothing new need not ripen.

    Raises:
        SchemaError, Corrupt: what the hot log holds is not trajstore's, or damaged.
    """
    entries, notes = hot.read(id)
    archived = manifest.find(id)
    last, last_note = archived.last, archived.last_note
    new = [event for entry in entries if last is None or entry.at > last for event in entry.events()]
    new += [event for note in notes if note.at.epoch > last_note for event in note.events(note=True)]
    return Look(
        hints=list(hints),
        entries={entry.at: entry_digest(entry.data) for entry in entries},
        notes={note.at: entry_digest(note.data) for note in notes},
        nbytes=sum(event.payload.nbytes for event in new if event.payload is not None),
        ripe_at=now + horizon if new and not archived.dropped else now,
        server=server,
    )


def second_look(hot: HotReader, archive: ArchiveReader, manifest: Manifest, id: str, look: Look) -> Part | None:
    """Read a trajectory again and stage what is still the same and finished; nothing if retention has dropped it.

    None if only notes of it are ripe, and it itself has come since, created anew after a loss: look at it again.

    Raises:
        SchemaError: an event that this version does not know, so cannot write as it was.
        Corrupt: a payload is missing, or the archive holds another entry of the same id.
    """
    entries, notes = hot.read(id)
    archived = manifest.find(id)
    if archived.dropped:
        return Part(id, look, [], None, None, None, entries, notes)
    last, last_note = archived.last, archived.last_note
    ripe = set(ripe_prefix([(e.at, entry_digest(e.data)) for e in entries], look.entries, last))
    decoded = [(entry, entry.events()) for entry in entries if entry.at in ripe]
    decoded = decoded[: finished_entries([(entry.at, events) for entry, events in decoded])]
    tombstone = find_tombstone(entries[-1].events()) if entries else None
    if tombstone is not None:  # what came before it may be half removed, and is not wanted
        decoded = [(entry, events) for entry, events in decoded if entry.at == tombstone.at]
    ripe_notes = ripe_prefix(
        [(e.at, entry_digest(e.data)) for e in notes], look.notes, EventId(last_note, 0) if last_note else None
    )
    decoded_notes = [(note, note.events(note=True)) for note in notes if note.at in ripe_notes]
    summary = archived.summary
    is_deleted = tombstone is not None or (summary is not None and summary.status == "deleted")
    if is_deleted:
        decoded_notes = []
    if decoded_notes and not decoded and last is None and entries and entries[0].at == EventId(1, 0):
        return None
    for _, events in decoded:
        for event in events:
            if isinstance(event.header, UnknownEvent):
                raise SchemaError(f"event {event.id} is a {event.type} that this version does not know; upgrade it")
            summary = advance(summary, id, event.at, event.time, event.header)
    try:
        staged = [_stage(hot, id, entry, events, note=False) for entry, events in decoded]
        staged += [_stage(hot, id, entry, events, note=True) for entry, events in decoded_notes]
    except Corrupt:
        now, _ = hot.read(id)
        if tombstone is not None or not now or find_tombstone(now[-1].events()) is None:
            raise
        return second_look(hot, archive, manifest, id, look)  # it was deleted since it was read
    both = any(last is not None and entry.at <= last for entry in entries)
    both |= any(note.at.epoch <= last_note for note in notes)
    old = archive.read_parts(id, archived) if (staged and tombstone is None) or (both and not is_deleted) else []
    if not is_deleted:
        _require_copies(id, entries, notes, old)
    spec = _spec(decoded, old) if staged else None
    return Part(
        id=id,
        look=look,
        staged=staged,
        spec=spec,
        summary=summary,
        known=None if spec is None else _known(archive, id, old, staged, spec.row_bytes),
        entries=entries,
        notes=notes,
    )


def _require_copies(id: str, entries: Sequence[HotEntry], notes: Sequence[HotEntry], old: Sequence[ReadEntry]) -> None:
    """What the hot log still has of what is archived must be the same, or trimming would destroy it."""
    archived = {(entry.note, entry.at): entry.digest for entry in old}
    for note, some in ((False, entries), (True, notes)):
        for entry in some:
            if archived.get((note, entry.at), entry_digest(entry.data)) != entry_digest(entry.data):
                raise Corrupt(
                    f"{'note' if note else 'entry'} {entry.at} of {id} differs between hot log and archive: the server "
                    "came back with an older state, and was written on. It stays in the hot log; export it from "
                    "there, or delete the trajectory"
                )


def _known(
    archive: ArchiveReader, id: str, old: Sequence[ReadEntry], staged: Sequence[StagedEntry], row_bytes: int
) -> Known:
    """Rows that need not be written again; where an old pack is damaged, all are."""
    try:
        return known_rows(archive, id, old, staged, row_bytes)
    except Corrupt as error:
        log.error("%s is archived without reference to what is archived of it: %s", id, error)
        return Known(row_bytes)


def ripe_prefix(
    found: Sequence[tuple[EventId, str]], seen: Mapping[EventId, str], archived: EventId | None
) -> list[EventId]:
    """Entries not archived yet that were there, the same, when they were first looked at.

    Args:
        found: id and digest of the entries in the hot log now, by id.
        seen: the same at the first look, a fsync horizon ago.
        archived: newest archived entry.
    """
    ripe = []
    for at, digest in found:
        if archived is not None and at <= archived:
            continue
        if seen.get(at) != digest:
            break
        ripe.append(at)
    return ripe


def finished_entries(entries: Sequence[tuple[EventId, Sequence[Event]]]) -> int:
    """How many of these entries, from the first, belong to finished epochs.

    An epoch is finished when it has its closing event, or when a newer epoch exists.
    """
    if not entries:
        return 0
    newest = entries[-1][0].epoch
    closing = (TrajectoryOpened, SegmentClosed, Rewarded, TrajectoryClosed, TrajectoryDeleted)
    if any(isinstance(event.header, closing) for at, events in entries if at.epoch == newest for event in events):
        return len(entries)
    return sum(at.epoch < newest for at, _ in entries)


def _stage(hot: HotReader, id: str, entry: HotEntry, events: Sequence[Event], *, note: bool) -> StagedEntry:
    payloads = []
    for event, data in zip(events, hot.payloads(id, events), strict=True):
        if data is None:
            raise Corrupt(f"the payload of event {event.id} is gone from the hot log")
        payloads.append(data)
    return StagedEntry.from_hot(entry.at, entry.data, payloads, note=note)


def _spec(decoded: Sequence[tuple[HotEntry, Sequence[Event]]], old: Sequence[ReadEntry]) -> RoutingSpec | None:
    opened = next((entry.events[0].header for entry in old if entry.at == (1, 0) and not entry.note), None)
    first = opened or (decoded[0][1][0].header if decoded else None)
    if not isinstance(first, TrajectoryOpened | TrajectoryDeleted):
        raise Corrupt("its first events are neither in the hot log nor in the archive")
    return first.routing if isinstance(first, TrajectoryOpened) else None
