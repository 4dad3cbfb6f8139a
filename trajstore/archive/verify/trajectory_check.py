"""What `verify` asks of one trajectory: entries once, references that lead somewhere, no gap, right payloads."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from trajstore.archive.pack import PackedTrajectory, ReadEntry
from trajstore.archive.record import Record
from trajstore.archive.verify.findings import Finding
from trajstore.archive.verify.payload_check import Payloads, ReadRows
from trajstore.errors import NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import EventId, TrajectoryDeleted, TrajectoryOpened, UnknownEvent
from trajstore.fold import Plan, plan
from trajstore.summary import Summary, advance

__all__ = ["Parts", "check_trajectory"]

Parts: TypeAlias = Sequence[tuple[Record, PackedTrajectory]]
"""(record, line) of each pack that holds something of the trajectory."""

_SHOWN = 6


def check_trajectory(id: str, parts: Parts, entries: Sequence[ReadEntry], read: ReadRows) -> Iterator[Finding]:
    """Check everything that is archived of a trajectory. Holds one recording at a time.

    Args:
        entries: of all parts, their events with extents, as `resolve` gives them.
        read: gives rows of the packs' arrays.
    """
    yield from _twice(id, entries)
    unique = {(entry.note, entry.at): entry for entry in entries}
    ordered = [unique[key] for key in sorted(unique)]
    events = [event for entry in ordered for event in entry.events if not entry.note]
    notes = [event for entry in ordered for event in entry.events if entry.note]
    if any(isinstance(event.header, TrajectoryDeleted) for event in events):
        return  # what came before it is wanted by nobody, and may be gone
    yield from _chains(id, ordered)
    yield from _summaries(id, parts, ordered)
    decided: Plan | None = None
    try:
        decided = plan(events, "last_segment_wins", notes=notes)
    except SequenceGap as gap:
        yield Finding(
            kind="gap",
            severity="warning",
            trajectory=id,
            event=gap.last_good,
            what=f"{gap}",
            what_to_do="a server that lost its tail leaves such a gap; if none did, look for lost records or packs",
        )
    except (SchemaError, RoutingError, NotFound) as error:
        unknown = any(isinstance(event.header, UnknownEvent) for event in events + notes)
        yield Finding(
            kind="events",
            severity="warning" if unknown else "error",
            trajectory=id,
            what=str(error),
            what_to_do="upgrade trajstore" if unknown else "the writer was at fault; until= loads an earlier state",
        )
    opened = events[0].header if events else None
    check = Payloads(id, read, opened.routing if isinstance(opened, TrajectoryOpened) else None)
    own = yield from check.tokens(events)
    yield from check.rows(decided.history if decided is not None else None, events + notes, own)
    if decided is not None:
        yield from _coverage(id, decided)


def _twice(id: str, entries: Sequence[ReadEntry]) -> Iterator[Finding]:
    """Entries that stand in two packs."""
    seen: dict[tuple[bool, EventId], ReadEntry] = {}
    for entry in entries:
        other = seen.setdefault((entry.note, entry.at), entry)
        if other is entry:
            continue
        same = (other.nonce, other.digest) == (entry.nonce, entry.digest)
        yield Finding(
            kind="twice",
            severity="warning" if same else "error",
            pack=_pack(entry),
            trajectory=id,
            event=_name(entry),
            what=f"the entry lies in pack {_pack(other)} as well" + ("" if same else ", with another digest"),
            what_to_do="" if same else "two archivers wrote different logs; compare both packs with the hot log",
        )


def _chains(id: str, entries: Sequence[ReadEntry]) -> Iterator[Finding]:
    """References must come to rows that are written; after compactions perhaps over several others."""
    for entry in entries:
        for event, some in zip(entry.events, entry.pieces, strict=True):
            refers = next((piece for piece in some if len(piece) == 3), None)
            if refers is not None and any(not extent.pack for extent in event.extents):
                yield Finding(
                    kind="reference",
                    severity="error",
                    pack=event.stored,
                    trajectory=id,
                    event=event.id,
                    what=f"event {event.id} repeats rows of event {refers[0]} or another that are not written",
                    what_to_do="restore the pack that held them from a copy",
                )


def _summaries(id: str, parts: Parts, entries: Sequence[ReadEntry]) -> Iterator[Finding]:
    """Each pack's summary must be what the log says as of its last entry."""
    told = {line.last: (record.pack, line.summary) for record, line in parts if line.summary and record.format > 1}
    summary: Summary | None = None
    for entry in entries:
        if entry.note:
            continue
        for event in entry.events:
            if isinstance(event.header, UnknownEvent):
                return
            summary = advance(summary, id, event.at, event.time, event.header)
        pack, found = told.get(str(entry.at), ("", None))
        if found is not None and found != summary:
            yield Finding(
                kind="summary",
                severity="warning",
                pack=pack,
                trajectory=id,
                event=str(entry.at),
                what=f"the pack's summary of the trajectory as of {entry.at} is not what its events say",
                what_to_do="listings of the archive show it wrong; what load gives is right",
            )


def _coverage(id: str, decided: Plan) -> Iterator[Finding]:
    """Which rows no recording gives, and why not as far as it was recorded."""
    history = decided.history
    if history.opened.routing is None or not history.length:
        return
    missing = np.ones(history.length, np.bool_)
    missing[-1] = False  # its row is decided by the next token only
    for placement in decided.placements:
        missing[placement.start : placement.stop] = False
    count = int(missing.sum())
    if not count:
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]])))
    runs = [f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in zip(edges[::2], edges[1::2], strict=True)]
    more = f" and {len(runs) - _SHOWN} more runs" if len(runs) > _SHOWN else ""
    reasons = dict.fromkeys(reason for segment in history.segments for reason in segment.absent)
    yield Finding(
        kind="coverage",
        severity="information",
        trajectory=id,
        what=f"{count} of {history.length} rows have no routing: {', '.join(runs[:_SHOWN])}{more}; recorded reasons: "
        f"{'; '.join(reasons) or 'none'}",
    )


def _pack(entry: ReadEntry) -> str:
    return entry.events[0].stored if entry.events else ""


def _name(entry: ReadEntry) -> str:
    return f"note {entry.at}" if entry.note else str(entry.at)
