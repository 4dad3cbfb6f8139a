"""The lines of a pack: one for each entry, one for each trajectory; and the names of its arrays.

    tokens        int32  [N]         ids of every tokens payload, one after the other
    logprobs      float32 [N]        beside them; NaN where none were recorded
    routed        uint8|uint16 [R, L, K]   rows of every recording, equal ones once
    events        uint8  [B]         JSON lines, one per entry: headers, and where their payloads lie (`extents`)
    trajectories  uint8  [C]         JSON lines: which bytes of `events` belong to which trajectory

The layout is documented in `docs/format.md`. How an array becomes a file is in `arrays/`.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from trajstore.entries import Event, header_from
from trajstore.errors import UNREADABLE, Corrupt
from trajstore.events import EventId, Header, LateRouting, Routing, RoutingObserved, SegmentOpened, Tokens, payload_of
from trajstore.limits import EVENTS, Count, Digest, Id
from trajstore.summary import Summary

__all__ = [
    "ARRAYS",
    "PackedEntry",
    "PackedTrajectory",
    "Piece",
    "ReadEntry",
    "decode_entries",
    "decode_trajectory",
    "encode_entries",
    "encode_trajectory",
    "payload_array",
]

ARRAYS = ("tokens", "logprobs", "routed", "events", "trajectories")

Piece: TypeAlias = tuple[int, int] | tuple[str, int, int]
"""A piece of a payload. `(row, count)`: these rows of the pack's arrays. `(event, first, count)`: rows
`[first, first + count)` of the payload of another event of the trajectory, in whichever pack that lies."""


class PackedTrajectory(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `trajectories`: what a pack holds of one trajectory.

    Attributes:
        id: of the trajectory.
        first, last: ids of its first and last entry in this pack; "" where it holds notes only.
        last_note: number of its newest note in this pack, 0 for none.
        offset, length: its bytes in the pack's array `events`.
        summary: of the trajectory as of `last`.
    """

    id: Id
    first: str = ""
    last: str = ""
    last_note: Count = 0
    offset: Count = 0
    length: Count = 0
    summary: Summary | None = None


class PackedEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `events`.

    Attributes:
        id: of the entry; event *i* of it is `<epoch>-<seq + i>`.
        v: schema version of the headers.
        nonce: 16 hex digits.
        digest: BLAKE2b-128 (hex) of the entry as the hot log held it.
        time: Unix seconds, for show.
        events: the headers; payload bytes left out.
        extents: per event the pieces of its payload, see `Piece`.
        note: it belongs to the notes stream.
    """

    id: str
    v: int
    nonce: str
    digest: str
    time: float
    events: Sequence[Header]
    extents: Sequence[Sequence[Piece]]
    note: bool = False


class _RawPackedEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    v: int
    nonce: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,16}\Z")]
    digest: Digest
    time: float
    events: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=EVENTS)]
    extents: list[list[tuple[int | str, ...]]]
    note: bool = False


class ReadEntry(NamedTuple):
    """An archived entry, decoded; `pieces` per event as they stand in the pack."""

    at: EventId
    nonce: int
    digest: str
    note: bool
    time: float
    events: list[Event]
    pieces: list[tuple[Piece, ...]]


def encode_trajectory(packed: PackedTrajectory) -> bytes:
    """A line of the array `trajectories`."""
    return _encode(packed) + b"\n"


def decode_trajectory(line: bytes, *, pack: str) -> PackedTrajectory:
    """A line of the array `trajectories`.

    Raises:
        Corrupt: it is none.
    """
    try:
        return _decode_trajectory(line)
    except UNREADABLE as error:
        raise Corrupt(f"pack {pack} is damaged: a line of its trajectories cannot be read: {error}") from error


def encode_entries(entries: Sequence[PackedEntry]) -> bytes:
    """Lines of the array `events`."""
    return b"".join(_encode(_without_inline(entry)) + b"\n" for entry in entries)


def decode_entries(lines: bytes, *, pack: str, id: str) -> list[ReadEntry]:
    """Entries of one trajectory from its part of `events`. Their events know the pack, but not yet their extents.

    Raises:
        Corrupt: the bytes are no such lines.
    """
    found = []
    for line in lines.splitlines():
        try:
            raw = _decode(line)
        except UNREADABLE as error:
            raise Corrupt(f"pack {pack} is damaged: an entry of trajectory {id} cannot be read: {error}") from error
        if len(raw.events) != len(raw.extents):
            raise Corrupt(f"pack {pack} is damaged: entry {raw.id} of trajectory {id} has not one extent per event")
        at, nonce = EventId.parse(raw.id), int(raw.nonce, 16)
        events = [
            Event(
                at=EventId(at.epoch, at.seq + i),
                header=header_from(bytes(body), raw.v, at=at, json=True),
                nonce=nonce,
                time=raw.time,
                note=raw.note,
                stored=pack,
            )
            for i, body in enumerate(raw.events)
        ]
        pieces = [tuple(_piece(piece, pack, id) for piece in some) for some in raw.extents]
        found.append(ReadEntry(at, nonce, raw.digest, raw.note, raw.time, events, pieces))
    return found


def payload_array(header: Header) -> str | None:
    """Which array holds a header's payload: "tokens" (with "logprobs"), "routed", or None."""
    if isinstance(header, SegmentOpened | Tokens):
        return "tokens"
    return "routed" if isinstance(header, Routing | RoutingObserved | LateRouting) else None


def _piece(piece: tuple[int | str, ...], pack: str, id: str) -> Piece:
    match piece:
        case (int(row), int(count)) if row >= 0 and count >= 0:
            return row, count
        case (str(event), int(first), int(count)) if first >= 0 and count >= 0:
            return event, first, count
    raise Corrupt(f"pack {pack} is damaged: {list(piece)} of trajectory {id} is no piece of a payload")


def _without_inline(entry: PackedEntry) -> PackedEntry:
    headers = []
    for header in entry.events:
        payload = payload_of(header)
        if payload is not None and payload.inline is not None:
            payload = msgspec.structs.replace(payload, inline=None)
            header = msgspec.structs.replace(header, payload=payload)
        headers.append(header)
    return msgspec.structs.replace(entry, events=headers)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_RawPackedEntry).decode
_decode_trajectory = msgspec.json.Decoder(PackedTrajectory).decode
