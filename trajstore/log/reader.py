"""Reading the hot log: entries, notes, payloads and summaries of one run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trajstore.entries import Entry, Event, decode_entry, decode_known
from trajstore.events import EventId
from trajstore.log.batch import payload_field
from trajstore.log.keys import Keys
from trajstore.log.stream import parse_entries
from trajstore.log.wire import Wire
from trajstore.summary import Summary, decode_summary

__all__ = ["HotEntry", "HotReader"]

_PAGE = 1000
_FETCH_BYTES = 16 << 20


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

    def payloads(self, id: str, events: Sequence[Event]) -> Iterator[bytes | None]:
        """Payload bytes of hot events, in order; None for one that is gone. Reads a bounded number of bytes ahead."""
        page: list[Event] = []
        nbytes = 0
        for event in events:
            page.append(event)
            nbytes += event.payload.nbytes if event.payload else 0
            if nbytes >= _FETCH_BYTES:
                yield from self._fetch(id, page)
                page, nbytes = [], 0
        yield from self._fetch(id, page)

    def _fetch(self, id: str, events: Sequence[Event]) -> Iterator[bytes | None]:
        fields = [
            payload_field(event.at, event.nonce, note=event.note)
            for event in events
            if event.payload is not None and event.payload.inline is None
        ]
        found = iter(self._wire.call("HMGET", self._keys.payloads(id), *fields) if fields else [])
        for event in events:
            inline = event.payload.inline if event.payload is not None else b""
            yield inline if inline is not None else next(found)

    def summary(self, id: str) -> Summary | None:
        """The summary of one trajectory, None if there is none."""
        reply = self._wire.call("HGET", self._keys.summaries(self._keys.partition(id)), id)
        return None if reply is None else decode_summary(reply)

    def summaries(self, partition: int) -> Iterator[Summary]:
        """All summaries of a partition, in no order; one may come twice."""
        cursor = b"0"
        while True:
            cursor, flat = self._wire.call("HSCAN", self._keys.summaries(partition), cursor, "COUNT", _PAGE)
            yield from (decode_summary(data) for data in flat[1::2])
            if cursor == b"0":
                return

    def ids(self, partition: int) -> Iterator[str]:
        """Ids of all trajectories with a stream in a partition, by scanning all keys of each server."""
        prefix = self._keys.entries_prefix(partition)
        for server in self._wire.servers():
            cursor = None
            while cursor != b"0":
                cursor, found = server.call("SCAN", cursor or 0, "MATCH", prefix + "*", "COUNT", _PAGE)
                yield from (key.decode(errors="replace")[len(prefix) :] for key in found)
