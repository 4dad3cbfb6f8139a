"""Stored once: which rows of a recording need not be written, for equal ones lie in the archive already. Pure.

A prefix that is filled anew after a resume gives the same rows again, but for what drifted. Rows that equal the newest
recorded ones at their positions become references to the event that brought those; rows that equal a group member's
point to the same place in the pack. What differs is written.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trajstore.archive.pack import Piece
from trajstore.entries import Buffer

__all__ = ["Known", "SharedRows", "joined", "row_view"]

_WORTH_BYTES = 48
"""A run of equal rows shorter than this costs more as a piece in `events` than as rows."""

_ABSENT = -1

Rows: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
"""Rows `[n, words]`: uint64 words where they fit into a row, for they compare fastest, else bytes."""


def row_view(data: Buffer, row_bytes: int) -> Rows:
    """Payload bytes as rows, without a copy."""
    return np.frombuffer(data, _word(row_bytes)).reshape(-1, row_bytes // _word(row_bytes).itemsize)


def _word(row_bytes: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype("<u8") if row_bytes % 8 == 0 else np.dtype("u1")


def _empty(count: int, row_bytes: int) -> Rows:
    word = _word(row_bytes)
    return np.empty((count, row_bytes // word.itemsize), word)


class Known:
    """The newest recorded row at each position of one trajectory, and the event that holds it."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._events: list[str] = []
        self._numbers: dict[str, int] = {}
        self._low = 0  # position of the first row of the arrays
        self._rows = _empty(0, row_bytes)
        self._event = np.empty(0, np.int32)  # index into _events, _ABSENT where no row is known
        self._offset = np.empty(0, np.int64)  # of the row in that event's payload
        self._only: tuple[str, int, Rows] | None = None  # not copied until there is a second one to compare with

    def learn(self, event: str, start: int, rows: Rows, *, first: int = 0) -> None:
        """Rows `[start, start + n)` are those from `first` on of an event's payload."""
        self._take_only()
        at = self.reserve(start, start + len(rows))
        self._rows[at] = rows
        self._event[at] = self._number(event)
        self._offset[at] = np.arange(first, first + len(rows))

    def place(self, event: str, start: int, rows: Rows) -> Iterator[tuple[int, int, Piece | None]]:
        """Split a recording into runs `[a, b)` of its own rows: a reference each, or None where it must be stored.

        Afterwards its stored rows are known, too.
        """
        if self._only is None and not len(self._event):
            self._only = event, start, rows
            if len(rows):
                yield 0, len(rows), None
            return
        self._take_only()
        at = self.reserve(start, start + len(rows))
        events, offsets = self._event[at], self._offset[at]
        equal = (events != _ABSENT) & (self._rows[at] == rows).all(axis=1)
        joins = (events[1:] == events[:-1]) & (offsets[1:] == offsets[:-1] + 1)
        runs = list(_worthwhile(equal, joins, self._row_bytes))
        found = [(a, b, None if not same else (self._events[events[a]], int(offsets[a]), b - a)) for a, b, same in runs]
        for a, b, reference in found:
            if reference is None:
                self.learn(event, start + a, rows[a:b], first=a)
        yield from found

    def _take_only(self) -> None:
        if self._only is not None:
            (event, start, rows), self._only = self._only, None
            self.learn(event, start, rows)

    def _number(self, event: str) -> int:
        if event not in self._numbers:
            self._numbers[event] = len(self._events)
            self._events.append(event)
        return self._numbers[event]

    def reserve(self, start: int, stop: int) -> slice:
        """Make room for rows `[start, stop)`, at once what else would grow bit by bit; their place in the arrays."""
        if not len(self._event):
            self._low = start
        before, after = max(0, self._low - start), max(0, stop - self._low - len(self._event))
        if before or after:
            self._rows = np.concatenate([_empty(before, self._row_bytes), self._rows, _empty(after, self._row_bytes)])
            self._event = np.pad(self._event, (before, after), constant_values=_ABSENT)
            self._offset = np.pad(self._offset, (before, after))
            self._low -= before
        return slice(start - self._low, stop - self._low)


class SharedRows:
    """The prompt rows that the first member of a group brought into a pack, and where they lie in it."""

    def __init__(self, row_bytes: int, length: int) -> None:
        self._row_bytes = row_bytes
        self._rows = _empty(length, row_bytes)
        self._place = np.full(length, _ABSENT, np.int64)

    def learn(self, start: int, rows: Rows, row: int) -> None:
        """Positions `[start, start + n)` lie from `row` on in the pack; those beyond the prompt are left out."""
        n = max(0, min(len(rows), len(self._place) - start))
        fresh = self._place[start : start + n] == _ABSENT
        self._rows[start : start + n][fresh] = rows[:n][fresh]
        self._place[start : start + n][fresh] = np.arange(row, row + n)[fresh]

    def place(self, start: int, rows: Rows) -> Iterator[tuple[int, int, Piece | None]]:
        """Split rows from position `start` into runs `[a, b)`: where each lies already, or None."""
        n = max(0, min(len(rows), len(self._place) - start))
        places = self._place[start : start + n]
        equal = (places != _ABSENT) & (self._rows[start : start + n] == rows[:n]).all(axis=1)
        joins = places[1:] == places[:-1] + 1
        if len(rows) > n:
            equal = np.concatenate([equal, np.zeros(len(rows) - n, np.bool_)])
            joins = np.concatenate([joins, np.ones(len(rows) - max(n, 1), np.bool_)])
        for a, b, same in _worthwhile(equal, joins, self._row_bytes):
            yield a, b, (int(places[a]), b - a) if same else None


def _worthwhile(
    equal: npt.NDArray[np.bool_], joins: npt.NDArray[np.bool_], row_bytes: int
) -> Iterator[tuple[int, int, bool]]:
    """Runs `[a, b)` of rows that are all equal and lie together, or all to be written; short equal ones are written.

    Args:
        equal: `[n]`: the row is there already.
        joins: `[n - 1]`: the known rows beside each other lie beside each other.
    """
    n = len(equal)
    if not n:
        return
    breaks = (equal[1:] != equal[:-1]) | (equal[1:] & ~joins)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), n]
    begun: int | None = None  # of rows to be written
    for a, b in pairwise(edges):
        if equal[a] and (b - a) * row_bytes >= _WORTH_BYTES:
            if begun is not None:
                yield begun, a, False
                begun = None
            yield a, b, True
        elif begun is None:
            begun = a
    if begun is not None:
        yield begun, n, False


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with those joined that follow each other."""
    found: list[Any] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and len(last) == len(piece) == 2 and last[0] + last[1] == piece[0]:
            found[-1] = (last[0], last[1] + piece[1])
        else:
            found.append(piece)
    return found
