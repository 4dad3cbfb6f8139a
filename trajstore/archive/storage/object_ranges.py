"""Which requests fetch parts of an object: neighbours together, long ones in parts. Pure.

obstore's own `get_ranges` is not used: where a range lies past the end of an object it panics (0.12).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from trajstore.archive.storage.protocol import Range

__all__ = ["PART_BYTES", "cut", "requests"]

PART_BYTES = 8 << 20
"""The most that one request carries: each has a deadline, and a whole shard may take longer."""

_GAP_BYTES = 256 << 10
"""Bytes between two ranges that cost less than another request."""


def requests(ranges: Sequence[Range]) -> list[Range]:
    """Ranges to ask for, ascending and apart from each other, that hold all those wanted."""
    found: list[tuple[int, int]] = []  # start, stop
    for start, length in sorted(ranges):
        stop = start + length
        if not length or (found and stop <= found[-1][1]):
            continue
        if found and start <= found[-1][1] + _GAP_BYTES:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return [(at, min(PART_BYTES, stop - at)) for start, stop in found for at in range(start, stop, PART_BYTES)]


def cut(ranges: Sequence[Range], asked: Sequence[Range], blocks: Sequence[bytes]) -> list[bytes]:
    """The ranges wanted, out of what came for those asked for; shorter where the object ended."""
    starts = [start for start, _ in asked]
    return [b"".join(_pieces(each, starts, asked, blocks)) for each in ranges]


def _pieces(wanted: Range, starts: Sequence[int], asked: Sequence[Range], blocks: Sequence[bytes]) -> Iterator[bytes]:
    at, stop = wanted[0], sum(wanted)
    number = bisect_right(starts, at) - 1
    while at < stop:
        block = blocks[number]
        piece = block[at - starts[number] : stop - starts[number]]
        yield piece
        if len(block) < asked[number][1]:
            return  # the object ends here
        at += len(piece)
        number += 1
