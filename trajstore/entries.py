"""How events travel: the entry that one flush writes, its encodings, and an event as it is read back.

An entry is msgpack in the hot log and JSON, payload bytes left out, in a pack.
"""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args

import msgspec

from trajstore.crc import crc32
from trajstore.errors import UNREADABLE, Corrupt, SchemaError
from trajstore.events import SCHEMA_VERSION, EventId, Header, PayloadInfo, UnknownEvent, payload_of
from trajstore.limits import EVENTS, HEADER_BYTES
from trajstore.upcast import upcast

__all__ = [
    "Buffer",
    "Entry",
    "EntryStamp",
    "Event",
    "Extent",
    "check_payload",
    "decode_entry",
    "decode_known",
    "encode_entry",
    "entry_digest",
    "header_from",
    "partition_of",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Payload bytes."""


class EntryStamp(NamedTuple):
    """Who wrote an entry, and what: by this, hot log and archive compare."""

    nonce: int
    digest: str


class Entry(msgspec.Struct, frozen=True):
    """What one flush of one trajectory wrote, taken or refused whole. Event *i* is `<epoch>-<seq + i>`.

    Attributes:
        v: schema version of the headers.
        nonce: 64 random bits, drawn when the epoch was claimed: who wrote this.
        time: wall clock of the writer, Unix seconds; for show, never for order.
        events: the headers, at least one.
    """

    v: int
    nonce: int
    time: float
    events: Sequence[Header]


class _RawEntry(msgspec.Struct, frozen=True):
    v: int
    nonce: int
    time: float
    events: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=EVENTS)]


class Extent(NamedTuple):
    """Rows `[row, row + rows)` of a pack's arrays."""

    pack: str
    row: int
    rows: int


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event as read back.

    Attributes:
        at: its id; notes count on a sequence of their own.
        header: what happened.
        nonce, time: of its entry.
        note: True for the notes stream.
        stored: "hot", or the name of the pack that holds it.
        extents: where its payload lies in packs; empty for hot events.
    """

    at: EventId
    header: Header | UnknownEvent
    nonce: int
    time: float
    note: bool = False
    stored: str = "hot"
    extents: tuple[Extent, ...] = ()

    @property
    def id(self) -> str:
        """`"3-7"`, as `until=` takes it; notes read `"note 2-0"`."""
        return f"note {self.at}" if self.note else str(self.at)

    @property
    def type(self) -> str:
        """Name of the event type, e.g. `"SegmentOpened"`."""
        return self.header.type if isinstance(self.header, UnknownEvent) else type(self.header).__name__

    @property
    def payload(self) -> PayloadInfo | None:
        """Where the bytes are, None for events without any."""
        return None if isinstance(self.header, UnknownEvent) else payload_of(self.header)


_encode = msgspec.msgpack.Encoder().encode
_decode_raw = msgspec.msgpack.Decoder(_RawEntry).decode


def encode_entry(entry: Entry) -> bytes:
    """Msgpack bytes of an entry, as they go to Redis and are compared when a write is resolved."""
    return _encode(entry)


def decode_entry(at: EventId, data: bytes, *, note: bool = False) -> list[Event]:
    """Events of a hot entry. Older headers are upcast; unknown types and schema versions become `UnknownEvent`.

    Raises:
        SchemaError: the bytes are no entry at all.
    """
    try:
        raw = _decode_raw(data)
    except UNREADABLE as error:
        raise SchemaError(f"the entry at {at} cannot be read: {error}; is it trajstore's?") from error
    return [
        Event(
            at=EventId(at.epoch, at.seq + i),
            header=header_from(bytes(body), raw.v, at=at),
            nonce=raw.nonce,
            time=raw.time,
            note=note,
        )
        for i, body in enumerate(raw.events)
    ]


def decode_known(data: bytes) -> Entry:
    """A hot entry all of whose events are known, to be written elsewhere: its headers, and `v`, are today's.

    Raises:
        SchemaError: an event of a type, or an entry of a schema version, that is not known here.
    """
    try:
        raw = _decode_raw(data)
        if not _knows(raw.v):
            raise SchemaError(f"an entry has schema version {raw.v}, this trajstore knows 1 to {SCHEMA_VERSION}")
        return Entry(SCHEMA_VERSION, raw.nonce, raw.time, [_decode(bytes(body), raw.v) for body in raw.events])
    except UNREADABLE as error:
        raise SchemaError(f"an entry holds something that this trajstore does not know: {error}; upgrade it") from error


def header_from(body: bytes, version: int, *, at: EventId, json: bool = False) -> Header | UnknownEvent:
    """One header from its msgpack (or JSON) bytes, upcast; `UnknownEvent` for types and versions not known here.

    Raises:
        SchemaError: a known event with a bad field.
    """
    problem: Exception | None = None
    if len(body) > HEADER_BYTES:
        raise SchemaError(f"the header of the event at {at} takes {len(body)} bytes, the limit is {HEADER_BYTES}")
    if _knows(version):
        try:
            return _decode(body, version, json=json)
        except UNREADABLE as error:
            problem = error
    try:
        fields = _DECODERS[json].fields(body)
    except UNREADABLE as error:
        raise SchemaError(f"the event at {at} cannot be read: {error}") from error
    if not isinstance(fields, dict) or (problem is not None and str(fields.get("type")) in _HEADER_TYPES):
        raise SchemaError(f"the event at {at} has a bad field: {problem or 'it is no map'}")
    return UnknownEvent(type=str(fields.pop("type", "?")), version=version, fields=fields)


def _knows(version: int) -> bool:
    return 1 <= version <= SCHEMA_VERSION


def _decode(body: bytes, version: int, *, json: bool = False) -> Header:
    if version == SCHEMA_VERSION:
        return _DECODERS[json].header(body)
    fields = _DECODERS[json].fields(body)
    found: Header = msgspec.convert(upcast(fields, version) if isinstance(fields, dict) else fields, Header)
    return found


class _Decoders(NamedTuple):
    header: Callable[[bytes], Header]
    fields: Callable[[bytes], Any]


_DECODERS = {
    False: _Decoders(msgspec.msgpack.Decoder(Header).decode, msgspec.msgpack.decode),
    True: _Decoders(msgspec.json.Decoder(Header).decode, msgspec.json.decode),
}
_HEADER_TYPES = frozenset(t.__name__ for t in get_args(Header))


def entry_digest(entry: bytes) -> str:
    """BLAKE2b-128 (hex) of an entry's msgpack bytes."""
    return hashlib.blake2b(entry, digest_size=16).hexdigest()


def check_payload(data: Buffer, info: PayloadInfo, *, what: str, crc: int | None = None) -> None:
    """Compare payload bytes with their header.

    Args:
        crc: of the bytes, where it is known already.

    Raises:
        Corrupt: other length or CRC; `what` says whose.
    """
    if len(data) != info.nbytes or (crc32(data) if crc is None else crc) != info.crc:
        raise Corrupt(f"{what} does not match its header: {len(data)} bytes of {info.nbytes}, or another CRC-32")


def partition_of(name: str, partitions: int) -> int:
    """Partition of a trajectory id (or of a group, for group assembly): CRC-32 modulo their number."""
    return zlib.crc32(name.encode()) % partitions
