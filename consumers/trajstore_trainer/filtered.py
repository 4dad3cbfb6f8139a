"""What was passed over, kept where everybody finds it: a short record per ready entry, beside the ready streams.

The trajectories themselves stay in the store; `store.load(id)` gives them back. The newest records of each partition
are kept, and each is logged as well.
"""

import logging
from collections.abc import Sequence

import msgspec

from trajstore.errors import UNREADABLE, Corrupt, StoreFull
from trajstore.log.feed import parse_stream
from trajstore.log.keys import Keys
from trajstore.log.wire import Wire
from trajstore.ready import EntryPlace

__all__ = ["Filtered", "FilteredLog"]

log = logging.getLogger(__name__)

_KEPT = 10_000


class Filtered(msgspec.Struct, frozen=True, kw_only=True):
    """A ready entry of which something is not trained on.

    Attributes:
        entry: where it lay, partition and id.
        group: name, None for a trajectory without one.
        version: of the group.
        why: the reason if all of it was passed over, else "".
        reasons: id of each member that is not trained on, and why.
    """

    entry: str
    group: str | None
    version: int
    why: str
    reasons: dict[str, str]


class FilteredLog:
    """The records of one consumer group."""

    def __init__(self, wire: Wire, keys: Keys, *, consumers: str) -> None:
        self._wire = wire
        self._keys = keys
        self._consumers = consumers

    def write(self, records: Sequence[Filtered]) -> None:
        """Keep records. A full server takes none; they are in the log then, and nothing is held up.

        Raises:
            Unavailable: the server does not answer.
        """
        commands = [
            (
                "XADD", self._keys.filtered(EntryPlace.parse(one.entry).partition), "MAXLEN", "~", _KEPT, "*",
                "c", self._consumers, "f", _encode(one),
            )
            for one in records
        ]  # fmt: skip
        try:
            self._wire.call_all(commands)
        except StoreFull as error:
            log.warning("%d records of filtered groups could not be kept: %s", len(records), error)

    def read(self) -> list[Filtered]:
        """Every record that is kept, oldest first within a partition; each entry once."""
        partitions = range(self._keys.partitions)
        replies = self._wire.call_all([("XRANGE", self._keys.filtered(one), "-", "+") for one in partitions])
        mine = self._consumers.encode()
        found = [
            _decode(fields.get(b"f", b""))
            for reply in replies
            for _, fields in parse_stream(reply)
            if fields.get(b"c") == mine
        ]
        return list({one.entry: one for one in found}.values())


def _decode(data: bytes) -> Filtered:
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise Corrupt(f"a record of what was filtered cannot be read: {error}; is it trajstore's?") from error


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Filtered)
