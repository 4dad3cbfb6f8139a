"""A batch: the events of one flush of one trajectory, frozen byte for byte, and the commands that write it.

Entry, payloads, summary and feed hint go in one `MULTI` of one slot. The entry's explicit id is the fence: Redis
refuses an id that is not above the newest. A payload's field carries the writer's nonce, so that a loser's payload
cannot occupy the winner's place.
"""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from trajstore.entries import Buffer, Entry, encode_entry
from trajstore.events import (
    SCHEMA_VERSION,
    EventId,
    Header,
    LateRouting,
    Rewarded,
    RoutingObserved,
    SegmentClosed,
    TrajectoryClosed,
    TrajectoryDeleted,
    payload_of,
)
from trajstore.log.keys import Keys
from trajstore.log.wire import Command
from trajstore.summary import Summary, advance_by, encode_summary

__all__ = ["BATCH_BYTES", "BESIDE_BYTES", "Batch", "Item", "Turn", "freeze", "payload_field"]

BATCH_BYTES = 1 << 20
"""A batch takes no further event beyond this, but for what is small beside a large one. A server executes one large
payload per MULTI as fast as a bare SET, but MULTIs of several at half the speed or less: they fall out of its caches
(benchmarks/append.py)."""

BESIDE_BYTES = 1 << 16
"""What is small: all of a batch but its largest event."""

LIFECYCLE = (SegmentClosed, Rewarded, TrajectoryClosed, TrajectoryDeleted, RoutingObserved, LateRouting)
"""Events that the feed's followers may have to act upon."""

ENTRY_FIELD = b"e"
"""The one field of a stream entry."""


class Turn(msgspec.Struct, gc=False):
    """A writer's turn on a trajectory: an epoch and the nonce drawn at its claim.

    Attributes:
        epoch: its number; for notes, the number of the note.
        creates: this claim may create the stream (`1-0`, a first note, or re-opening what was archived and removed).
        nonce: 64 random bits.
        seq: of the next event.
    """

    epoch: int
    creates: bool = False
    nonce: int = msgspec.field(default_factory=lambda: secrets.randbits(64))
    seq: int = 0


class Item(NamedTuple):
    """An event on its way: header, payload bytes unless they ride in the header, and when it came (monotonic clock)."""

    turn: Turn
    header: Header
    payload: Buffer | None
    since: float = 0.0

    @property
    def nbytes(self) -> int:
        """Buffer space that it takes: its payload, inline or not, and a flat count for the header."""
        info = payload_of(self.header)
        return 256 if info is None else 256 + info.nbytes


class Batch(msgspec.Struct, eq=False, gc=False):
    """Out of the garbage collector's sight, as are its turn and headers: tens of thousands of batches are kept until
    they are on disk, and going through them stopped the engine's thread for 0.2 s at a time (benchmarks/hotpath.py).

    Attributes:
        id: of the trajectory.
        note: goes to the notes stream.
        at: id of the entry; its events are `at`, `at + 1`, ...
        turn: whose turn it belongs to.
        entry: the entry's bytes, compared when a write is resolved.
        fields: payload hash fields and their bytes.
        items: the events; none once it was acknowledged, unless they are notes, which may have to be numbered anew.
        summary: after these events; None for notes.
        hint: kind of the newest lifecycle event, "" for none.
        creates: may create the stream.
        nbytes: on the wire, nearly.
        before, before_nonce: id and nonce of the entry acknowledged before it, once sent; None for the first, the nonce
            also where it is not known.
        sent: it went out at least once, so it may be in the log.
        acked: it was acknowledged once, so nobody waits for it any more.
    """

    id: str
    note: bool
    at: EventId
    turn: Turn
    entry: bytes
    fields: tuple[tuple[str, Buffer], ...]
    items: Sequence[Item]
    summary: Summary | None
    hint: str
    creates: bool
    nbytes: int
    before: EventId | None = None
    before_nonce: int | None = None
    sent: bool = False
    acked: bool = False

    def commands(self, keys: Keys) -> list[Command]:
        """The batch as one transaction; XADD comes first in it."""
        stream = keys.notes(self.id) if self.note else keys.entries(self.id)
        guard = () if self.creates else ("NOMKSTREAM",)
        commands: list[Command] = [("MULTI",), ("XADD", stream, *guard, str(self.at), ENTRY_FIELD, self.entry)]
        if self.fields:
            pairs = [part for name, data in self.fields for part in (name, data)]
            commands.append(("HSET", keys.payloads(self.id), *pairs))
        partition = keys.partition(self.id)
        if self.summary is not None:
            commands.append(("HSET", keys.summaries(partition), self.id, encode_summary(self.summary)))
        # A final trajectory's keys may be about to expire; what is new in them must not. Only these come after the end.
        if self.note:
            commands += [("PERSIST", keys.notes(self.id)), ("PERSIST", keys.payloads(self.id))]
        elif self.hint == TrajectoryDeleted.__name__:
            commands.append(("PERSIST", keys.entries(self.id)))
        if self.hint:
            commands.append(("XADD", keys.feed(partition), "*", "t", self.id, "k", self.hint, "e", str(self.at)))
        commands.append(("EXEC",))
        return commands


def payload_field(at: EventId, nonce: int, *, note: bool) -> str:
    """Hash field of an event's payload: `<epoch>-<seq>:<nonce>`, notes with an `n` before it."""
    return f"{'n' if note else ''}{at}:{nonce:016x}"


def freeze(id: str, items: Sequence[Item], *, note: bool, summary: Summary | None, now: float) -> Batch:
    """Make a batch of events of one turn, which advances; the summary follows unless they are notes."""
    turn = items[0].turn
    at = EventId(turn.epoch, turn.seq)
    turn.seq += len(items)
    headers = [item.header for item in items]
    entry = encode_entry(Entry(SCHEMA_VERSION, turn.nonce, now, headers))
    fields = tuple(
        (payload_field(EventId(at.epoch, at.seq + i), turn.nonce, note=note), item.payload)
        for i, item in enumerate(items)
        if item.payload is not None
    )
    hint = next((type(header).__name__ for header in reversed(headers) if isinstance(header, LIFECYCLE)), "")
    return Batch(
        id=id,
        note=note,
        at=at,
        turn=turn,
        entry=entry,
        fields=fields,
        items=items,
        summary=None if note else advance_by(summary, id, at, now, headers),
        hint=hint,
        creates=turn.creates and at.seq == 0,
        nbytes=len(entry) + sum(len(data) for _, data in fields),
    )
