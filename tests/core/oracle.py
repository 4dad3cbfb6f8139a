"""The fold as DESIGN.md says it ("The fold", points 1 to 4), token by token and row by row: slow, obvious, apart from
the library's own."""

from typing import Any, NamedTuple

import numpy as np

from tests.core.logs import Log
from trajstore.events import (
    EventId,
    LateRouting,
    Rewarded,
    Routing,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
)

__all__ = ["Expected", "expected_fold"]


class Token(NamedTuple):
    id: int
    logprob: float
    sampled: bool
    segment: int
    weight_version: str


class Expected(NamedTuple):
    tokens: list[Token]
    rows: list[Any]  # per position the winning row [L, K], None where missing
    sources: list[int]
    winners: list[str]  # id of the event that gave the row, "" where missing
    status: str
    finish_reason: str
    reward: float | None
    version: int


class Seg:
    def __init__(self, epoch: int, header: SegmentOpened) -> None:
        self.epoch, self.base, self.version = epoch, header.base, header.weight_version
        self.closed = ""
        self.recordings: list[tuple[int, Any, str, str]] = []  # start, rows, origin, event id


def expected_fold(log: Log, policy: str, until: str | None = None) -> Expected:
    tokens: list[Token] = []
    segments: list[Seg] = []
    status, reward, version = "open", None, 0
    last_epoch = 0
    for event in log.events:
        if until is not None and event.at > EventId.parse(until):
            break
        last_epoch = event.at.epoch
        header, data = event.header, log.payloads[event.id]
        if isinstance(header, SegmentOpened):
            tokens = tokens[: header.base]  # a shorter base rewinds
            segments.append(Seg(event.at.epoch, header))
            for id in np.frombuffer(data, "<i4"):
                tokens.append(Token(int(id), float("nan"), False, len(segments) - 1, ""))
            status = "open"
        elif isinstance(header, Tokens):
            ids = np.frombuffer(data[: 4 * header.count], "<i4")
            probs = np.frombuffer(data[4 * header.count :], "<f4") if header.logprobs else [float("nan")] * len(ids)
            for id, prob in zip(ids, probs, strict=True):
                tokens.append(Token(int(id), float(prob), True, len(segments) - 1, segments[-1].version))
        elif isinstance(header, Routing):
            segments[-1].recordings.append((header.start, _rows(log, data), header.origin, event.id))
        elif isinstance(header, SegmentClosed):
            segments[-1].closed = header.finish_reason
        elif isinstance(header, Rewarded):
            reward = header.reward
        elif isinstance(header, TrajectoryClosed):
            status, version = header.status, version + 1
    for segment in segments:
        if not segment.closed and segment.epoch < last_epoch:
            segment.closed = "lost"
    for note in log.notes:
        header = note.header
        # folds as if that segment had recorded it, once the segment is over
        if isinstance(header, LateRouting) and header.segment < len(segments) and segments[header.segment].closed:
            found = (header.start, _rows(log, log.payloads[note.id]), header.origin, note.id)
            segments[header.segment].recordings.append(found)

    def counting(index: int, p: int) -> list[tuple[Any, str, str]]:
        """Recordings of row p by one segment, oldest first, if its row p counts: (row, origin, event)."""
        if any(p >= later.base for later in segments[index + 1 :]):
            return []
        return [
            (rows[p - start], origin, event)
            for start, rows, origin, event in segments[index].recordings
            if start <= p < start + len(rows)
        ]

    rows: list[Any] = []
    sources: list[int] = []
    winners: list[str] = []
    for p in range(len(tokens)):
        row, source, winner = None, -1, ""
        if policy == "last_segment_wins":
            for index in reversed(range(len(segments))):
                if found := counting(index, p):
                    (row, _, winner), source = found[-1], index
                    break
        elif p + 1 < len(tokens):
            owner = tokens[p + 1].segment
            found = counting(owner, p)
            if found and found[-1][1] != "recomputed":
                (row, _, winner), source = found[-1], owner
        rows.append(row)
        sources.append(source)
        winners.append(winner)
    finish = segments[-1].closed if segments else ""
    return Expected(tokens, rows, sources, winners, status, finish, reward, version)


def _rows(log: Log, data: bytes) -> Any:
    spec = log.events[0].header.routing
    return np.frombuffer(data, spec.dtype).reshape(-1, spec.num_layers, spec.top_k)
