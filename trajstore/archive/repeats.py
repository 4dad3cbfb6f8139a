"""Which rows that the archive holds a trajectory's new recordings may repeat: found by their positions, then read."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trajstore.archive.pack import ReadEntry
from trajstore.archive.pieces import Known, row_view
from trajstore.archive.reader import ArchiveReader, Extents
from trajstore.archive.writer import StagedEntry
from trajstore.entries import Event
from trajstore.events import LateRouting, Routing, RoutingObserved

__all__ = ["known_rows"]

_MOST_PACKS = 4
"""A recording whose repeated rows lie in more packs than this is written whole: else reading it would touch ever more,
the longer its history."""


def known_rows(
    archive: ArchiveReader, id: str, old: Sequence[ReadEntry], staged: Sequence[StagedEntry], row_bytes: int
) -> Known:
    """The newest archived row at each position that the staged recordings cover.

    Args:
        old: what is archived of the trajectory.
        staged: what is about to be.

    Raises:
        Corrupt: a pack cannot be read.
    """
    known = Known(row_bytes)
    recordings = [header for entry in staged for header in entry.events if isinstance(header, _RECORDINGS)]
    stop = max((header.start + header.rows for header in recordings), default=0)
    wanted = np.zeros(stop, np.bool_)
    for header in recordings:
        wanted[header.start : header.start + header.rows] = True
    holder = np.full(stop, -1, np.int64)  # index into `events`
    offset = np.zeros(stop, np.int64)
    events: list[Event] = []
    numbers: dict[str, int] = {}
    for event, first, at, count in _held(old):
        n = min(count, stop - at)
        if n > 0:
            if event.id not in numbers:
                numbers[event.id] = len(events)
                events.append(event)
            holder[at : at + n] = numbers[event.id]
            offset[at : at + n] = np.arange(first, first + n)
    holder[~wanted] = -1
    runs = list(_runs(holder, offset))
    if not runs:
        return known
    known.reserve(runs[0][0], runs[-1][1])
    extents = [Extents(event.extents) for event in events]
    places = {extent.pack for at, end in runs for extent in extents[holder[at]].cut(int(offset[at]), end - at)}
    if len(places) > _MOST_PACKS:
        return known
    for number, event in enumerate(events):
        own = [(at, end) for at, end in runs if holder[at] == number]
        data = next(archive.payloads(id, [event])) if own else None
        if data is None:  # of no use here, or moved by a compaction
            continue
        for at, end in own:
            first = int(offset[at])
            known.learn(event.id, at, row_view(data, row_bytes)[first : first + end - at], first=first)
    return known


_RECORDINGS = Routing | LateRouting | RoutingObserved


def _held(old: Sequence[ReadEntry]) -> Iterator[tuple[Event, int, int, int]]:
    """Archived rows, oldest first: the event that stores them, which of its rows, their first position, how many."""
    by_id = {event.id: event for entry in old for event in entry.events}
    for entry in sorted(old, key=lambda entry: (entry.note, entry.at)):
        for event, pieces in zip(entry.events, entry.pieces, strict=True):
            if not isinstance(event.header, _RECORDINGS):
                continue
            done = 0
            for piece in pieces:
                if len(piece) == 2:
                    yield event, done, event.header.start + done, piece[1]
                elif piece[0] in by_id:
                    yield by_id[piece[0]], piece[1], event.header.start + done, piece[2]
                done += piece[-1]


def _runs(holder: npt.NDArray[np.int64], offset: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Positions `[at, end)` whose rows lie beside each other in one event."""
    if not len(holder):
        return
    breaks = (holder[1:] != holder[:-1]) | (offset[1:] != offset[:-1] + 1)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(holder)]
    for at, end in pairwise(edges):
        if holder[at] >= 0:
            yield at, end
