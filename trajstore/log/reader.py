"""Reading the hot log: entries, notes, payloads and summaries of one run."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trajstore.crc import crc32
from trajstore.entries import Buffer, Entry, Event, check_payload, decode_entry, decode_known
from trajstore.errors import Corrupt, SchemaError
from trajstore.events import EventId
from trajstore.limits import EVENT_BYTES
from trajstore.log.batch import payload_field
from trajstore.log.bulk import Value, whole_value
from trajstore.log.keys import Keys
from trajstore.log.stream import parse_entries
from trajstore.log.wire import Argument, Wire
from trajstore.summary import Summary, decode_summary

__all__ = ["HotEntry", "HotReader"]

_PAGE = 1000
_FETCH_BYTES = 16 << 20

_LARGE = 1 << 16
"""Bytes of a payload that is read as it arrives."""

_PIECE = 1 << 18
"""Bytes that are summed at once, at most: they are still in the cache then."""


class HotEntry(NamedTuple):
    """An entry as Redis holds it."""

    at: EventId
    data: bytes

    def events(self, *, note: bool = False) -> list[Event]:
        """Its events, decoded."""
        return decode_entry(self.at, self.data, note=note)

    def decoded(self) -> Entry:
        """The entry itself; every event must be known."""
        return decode_known(self.data)


class HotReader:
    """Reads what has not been trimmed yet."""

    def __init__(self, wire: Wire, keys: Keys) -> None:
        self._wire = wire
        self._keys = keys

    def read(self, id: str) -> tuple[list[HotEntry], list[HotEntry]]:
        """Entries and notes of a trajectory, oldest first; both empty if it is not in the hot log."""
        first = [("XRANGE", key, "-", "+", "COUNT", _PAGE) for key in (self._keys.entries(id), self._keys.notes(id))]
        entries, notes = (
            self._rest(command[1], parse_entries(reply))
            for command, reply in zip(first, self._wire.exchange(first), strict=True)
        )
        return entries, notes

    def _rest(self, key: str, page: list[tuple[EventId, bytes]]) -> list[HotEntry]:
        entries = [HotEntry(*entry) for entry in page]
        while len(page) == _PAGE:
            page = parse_entries(self._wire.call("XRANGE", key, f"({entries[-1].at}", "+", "COUNT", _PAGE))
            entries += [HotEntry(*entry) for entry in page]
        return entries

    def exists(self, id: str) -> bool:
        """True while the trajectory's stream exists, trimmed or not."""
        return bool(self._wire.call("EXISTS", self._keys.entries(id)))

    def payloads(self, id: str, events: Sequence[Event]) -> Iterator[Buffer | None]:
        """Payload bytes of hot events, in order; None for one that is gone. Reads a bounded number of bytes ahead.

        Raises:
            Corrupt: bytes that are not what the header says.
        """
        page: list[Event] = []
        nbytes = 0
        for event in events:
            page.append(event)
            nbytes += event.payload.nbytes if event.payload else 0
            if nbytes >= _FETCH_BYTES:
                yield from self._fetch(id, page)
                page, nbytes = [], 0
        yield from self._fetch(id, page)

    def payloads_into(self, id: str, events: Sequence[Event], into: Sequence[memoryview]) -> list[bool]:
        """Receive the payloads of hot events, checked, where they are wanted; False for one that is gone.

        Args:
            into: for each as many bytes as its header says that it has.

        Raises:
            Corrupt: bytes that are not what the header says.
        """
        key = self._keys.payloads(id)
        rooms: dict[Argument, memoryview] = {_field(event): room for event, room in zip(events, into, strict=True)}
        beside = [_field(event) for event in events if event.payload and event.payload.inline is None]
        commands = [("HMGET", key, field) for field in beside]
        received = self._wire.fetch_each(commands, lambda value: _summed(value, rooms[value.command[2]]))
        found = dict(zip(beside, received, strict=True))
        there = []
        for event, room in zip(events, into, strict=True):
            info = event.payload
            assert info is not None
            one = found[_field(event)] if info.inline is None else _summed(whole_value(info.inline), room)
            if one is not None:
                check_payload(one[0], info, crc=one[1], what=_whose(id, event))
            there.append(one is not None)
        return there

    def _fetch(self, id: str, events: Sequence[Event]) -> Iterator[Buffer | None]:
        """Small ones in one reply; large ones as they arrive, each part summed while the next is on its way."""
        key = self._keys.payloads(id)
        beside = {_field(event): event.payload for event in events if event.payload and event.payload.inline is None}
        small = [field for field, info in beside.items() if info.nbytes < _LARGE]
        large = [field for field, info in beside.items() if info.nbytes >= _LARGE]
        found: dict[str, tuple[Buffer, int] | None] = {}
        if small:
            for field, data in zip(small, self._wire.call("HMGET", key, *small), strict=True):
                found[field] = None if data is None else (data, crc32(data))
        if large:
            commands = [("HMGET", key, field) for field in large]
            found.update(zip(large, self._wire.fetch_each(commands, _summed), strict=True))
        for event in events:
            if event.payload is None:
                yield b""
                continue
            inline = event.payload.inline
            one = (inline, crc32(inline)) if inline is not None else found[_field(event)]
            if one is not None:
                check_payload(one[0], event.payload, crc=one[1], what=_whose(id, event))
            yield None if one is None else one[0]

    def summary(self, id: str) -> Summary | None:
        """The summary of one trajectory, None if there is none."""
        reply = self._wire.call("HGET", self._keys.summaries(self._keys.partition(id)), id)
        return None if reply is None else decode_summary(reply)

    def summaries(
        self, partition: int, *, on_unreadable: Callable[[str, SchemaError], object] | None = None
    ) -> Iterator[Summary]:
        """All summaries of a partition, in no order; one may come twice.

        Args:
            on_unreadable: hears of one that cannot be read, by its trajectory's id, instead of an error.

        Raises:
            SchemaError: one cannot be read.
        """
        cursor: bytes | None = None
        while cursor != b"0":
            cursor, page = self.summaries_from(partition, cursor, count=_PAGE)
            for id, summary in page:
                if isinstance(summary, Summary):
                    yield summary
                elif on_unreadable is not None:
                    on_unreadable(id, summary)
                else:
                    raise summary

    def summaries_from(
        self, partition: int, cursor: bytes | None, *, count: int
    ) -> tuple[bytes, list[tuple[str, Summary | SchemaError]]]:
        """About so many summaries by id, or why one cannot be read, and where to go on; b"0" at the end.

        Args:
            cursor: where the last ones ended, None for the first.
        """
        at, flat = self._wire.call("HSCAN", self._keys.summaries(partition), cursor or b"0", "COUNT", count)
        page: list[tuple[str, Summary | SchemaError]] = []
        for id, data in zip(flat[::2], flat[1::2], strict=True):
            try:
                found: Summary | SchemaError = decode_summary(data)
            except SchemaError as error:
                found = error
            page.append((id.decode(errors="replace"), found))
        return at, page

    def ids(self, partition: int) -> Iterator[str]:
        """Ids of all trajectories with a stream in a partition, by scanning all keys of each server."""
        prefix = self._keys.entries_prefix(partition)
        for server in self._wire.servers():
            cursor = None
            while cursor != b"0":
                cursor, found = server.call("SCAN", cursor or 0, "MATCH", prefix + "*", "COUNT", _PAGE)
                yield from (key.decode(errors="replace")[len(prefix) :] for key in found)


def _field(event: Event) -> str:
    return payload_field(event.at, event.nonce, note=event.note)


def _whose(id: str, event: Event) -> str:
    return f"{id}: the payload of event {event.id} in the hot log"


def _summed(value: Value, into: memoryview | None = None) -> tuple[memoryview, int]:
    """A value and its CRC-32, in memory of its own or where it is wanted."""
    if value.nbytes > EVENT_BYTES:
        raise Corrupt(f"a payload in the hot log has {value.nbytes} bytes, the limit is {EVENT_BYTES}")
    if into is None or len(into) != value.nbytes:
        into = np.empty(value.nbytes, np.uint8).data  # not zeroed first, as a bytearray is
    crc = at = 0
    while at < value.nbytes:
        piece = into[at : at + _PIECE]
        count = value.readinto1(piece)
        crc = crc32(piece[:count], crc)
        at += count
    return into, crc
