"""The inside of a pack: one Zarr v3 group with the events of many trajectories.

    tokens        int32  [N]         ids of every tokens payload, one after the other
    logprobs      float32 [N]        beside them; NaN where none were recorded
    routed        uint8|uint16 [R, L, K]   rows of every recording
    events        uint8  [B]         JSON lines, one per entry: headers, and where their payloads lie (`extents`)
    trajectories  uint8  [C]         JSON lines: which bytes of `events` belong to which trajectory

Every array is one shard file. The layout is documented in `docs/format.md`; this module is its code.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from trajstore.entries import Event, header_from
from trajstore.errors import Corrupt
from trajstore.events import EventId, Header, LateRouting, Routing, RoutingObserved, SegmentOpened, Tokens, payload_of

__all__ = ["CHUNK_BYTES", "PackedEntry", "decode_entries", "encode_entries", "payload_array", "write_array"]

CHUNK_BYTES = 3 << 19
"""About 1.5 MB before compression: what one read of a part decodes."""


class PackedEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `events`.

    Attributes:
        id: of the entry; event *i* of it is `<epoch>-<seq + i>`.
        v: schema version of the headers.
        nonce: 16 hex digits.
        digest: BLAKE2b-128 (hex) of the entry as the hot log held it.
        time: Unix seconds, for show.
        events: the headers; payload bytes left out.
        extents: per event the pieces `[row, count]` of its payload in `tokens` and `logprobs`, or in `routed`.
        note: it belongs to the notes stream.
    """

    id: str
    v: int
    nonce: str
    digest: str
    time: float
    events: Sequence[Header]
    extents: Sequence[Sequence[tuple[int, int]]]
    note: bool = False


class _RawPackedEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    v: int
    nonce: str
    digest: str
    time: float
    events: list[msgspec.Raw]
    extents: list[list[tuple[int, int]]]
    note: bool = False


class ReadEntry(NamedTuple):
    """An archived entry, decoded."""

    at: EventId
    nonce: int
    digest: str
    note: bool
    events: list[Event]


def encode_entries(entries: Sequence[PackedEntry]) -> bytes:
    """Lines of the array `events`."""
    return b"".join(_encode(_without_inline(entry)) + b"\n" for entry in entries)


def decode_entries(lines: bytes, *, pack: str, id: str) -> list[ReadEntry]:
    """Entries of one trajectory from its part of `events`.

    Raises:
        Corrupt: the bytes are no such lines.
    """
    found = []
    for line in lines.splitlines():
        try:
            raw = _decode(line)
        except msgspec.MsgspecError as error:
            raise Corrupt(f"pack {pack} is damaged: an entry of trajectory {id} cannot be read: {error}") from error
        at, nonce = EventId.parse(raw.id), int(raw.nonce, 16)
        events = [
            Event(
                at=EventId(at.epoch, at.seq + i),
                header=header_from(bytes(body), raw.v, at=at, json=True),
                nonce=nonce,
                time=raw.time,
                note=raw.note,
                stored=pack,
                extents=tuple(extents),
            )
            for i, (body, extents) in enumerate(zip(raw.events, raw.extents, strict=True))
        ]
        found.append(ReadEntry(at, nonce, raw.digest, raw.note, events))
    return found


def payload_array(header: Header) -> str | None:
    """Which array holds a header's payload: "tokens" (with "logprobs"), "routed", or None."""
    if isinstance(header, SegmentOpened | Tokens):
        return "tokens"
    return "routed" if isinstance(header, Routing | RoutingObserved | LateRouting) else None


def write_array(group: zarr.Group, name: str, data: np.ndarray[Any, Any]) -> None:
    """Write an array whole, as one shard of independent chunks.

    Chunks compress with zstd level 3 and a checksum: without one, a flipped byte would be silent. Bitshuffle in front
    of it makes real uint8 routing larger, not smaller.
    """
    row_bytes = data.dtype.itemsize * int(np.prod(data.shape[1:], dtype=np.int64))
    rows = max(1, min(len(data), CHUNK_BYTES // row_bytes))
    shard = max(1, -(-len(data) // rows)) * rows
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(rows, *data.shape[1:]),
        shards=(shard, *data.shape[1:]),
        compressors=ZstdCodec(level=3, checksum=True),
        fill_value=0,
        config={"write_empty_chunks": True},  # an absent chunk would read as zeros: absence must mean damage
    )
    if len(data):
        array[...] = data


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
