"""A trajectory's log in memory: events and payload bytes as a store would give them back, made without a store."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tests.builders import SPEC
from trajstore.entries import Event
from trajstore.events import (
    EventId,
    Header,
    LateRouting,
    PayloadInfo,
    Rewarded,
    Routing,
    RoutingAbsent,
    RoutingObserved,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
    TrajectoryOpened,
    UnknownEvent,
)
from trajstore.fold import plan
from trajstore.trajectory import Trajectory

__all__ = ["Log"]


class Log:
    """Events in order, notes in order, payloads by event id. `asked` says which payloads a fold fetched."""

    def __init__(self, routing=SPEC, **opened: Any) -> None:
        self.events: list[Event] = []
        self.notes: list[Event] = []
        self.payloads: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.token_ids: list[int] = []
        self.claim(TrajectoryOpened(routing=routing, **opened))

    def claim(self, header: Header | UnknownEvent, payload: bytes = b"") -> str:
        """The first event of the next epoch."""
        epoch = self.events[-1].at.epoch + 1 if self.events else 1
        return self._put(EventId(epoch, 0), header, payload)

    def add(self, header: Header | UnknownEvent, payload: bytes = b"") -> str:
        """The next event of this epoch."""
        last = self.events[-1].at
        return self._put(EventId(last.epoch, last.seq + 1), header, payload)

    def segment(self, base: int | None = None, context: Sequence[int] = (), *, weight_version="v1", **fields) -> str:
        """Open a segment."""
        start = len(self.token_ids) if base is None else base
        self.token_ids[start:] = context
        data = _int32(context)
        header = SegmentOpened(
            base=start,
            context=len(context),
            weight_version=weight_version,
            input_digest=hashlib.blake2b(_int32(self.token_ids), digest_size=16).hexdigest(),
            payload=_info(data) if len(context) else None,
            **fields,
        )
        return self.claim(header, data)

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> str:
        """Sample tokens."""
        start = len(self.token_ids)
        self.token_ids += token_ids
        data = _int32(token_ids) + (b"" if logprobs is None else np.array(logprobs, "<f4").tobytes())
        header = Tokens(start=start, count=len(token_ids), payload=_info(data), logprobs=logprobs is not None)
        return self.add(header, data)

    def routing(self, rows: np.ndarray, start: int, **fields: Any) -> str:
        """Record routing rows `[n, L, K]`."""
        data = rows.tobytes()
        return self.add(Routing(start=start, rows=len(rows), payload=_info(data), **fields), data)

    def absent(self, reason: str) -> str:
        """Say that there is no routing."""
        return self.add(RoutingAbsent(reason=reason))

    def finish(self, reason: str = "stop", **fields: Any) -> str:
        """Close the segment."""
        return self.add(SegmentClosed(finish_reason=reason, **fields))

    def reward(self, reward: float) -> str:
        """Score the trajectory."""
        return self.claim(Rewarded(reward=reward))

    def close(self, status: str) -> str:
        """Close the trajectory."""
        return self.claim(TrajectoryClosed(status=status))

    def late(self, segment: int, rows: np.ndarray, start: int, **fields: Any) -> str:
        """A late recording."""
        data = rows.tobytes()
        return self._note(
            LateRouting(segment=segment, start=start, rows=len(rows), payload=_info(data), **fields), data
        )

    def observe(self, rows: np.ndarray, start: int, source: str = "trainer", *, epoch: int | None = None) -> str:
        """Another party's routing, of the tokens as they are; `epoch=0`: the note does not say which these are."""
        data = rows.tobytes()
        seen = self.events[-1].at.epoch if epoch is None else epoch
        header = RoutingObserved(source=source, start=start, rows=len(rows), payload=_info(data), epoch=seen)
        return self._note(header, data)

    def drop(self, *ids: str) -> None:
        """Lose events."""
        self.events = [event for event in self.events if event.id not in ids]

    def plan(self, policy="last_segment_wins", until: str | None = None):
        """The decided fold."""
        return plan(self.events, policy, notes=self.notes, until=None if until is None else EventId.parse(until))

    def load(self, policy="last_segment_wins", until: str | None = None) -> Trajectory:
        """The fold."""
        self.asked = []
        return self.plan(policy, until).apply(self.fetch, id="t")

    def fetch(self, events: Sequence[Event]) -> Iterator[bytes]:
        """Payload bytes, noting who was asked for."""
        for event in events:
            self.asked.append(event.id)
            yield self.payloads[event.id]

    def _note(self, header: Header, payload: bytes) -> str:
        event = Event(at=EventId(len(self.notes) + 1, 0), header=header, nonce=1, time=0.0, note=True)
        self.notes.append(event)
        self.payloads[event.id] = payload
        return event.id

    def _put(self, at: EventId, header: Header | UnknownEvent, payload: bytes) -> str:
        event = Event(at=at, header=header, nonce=1, time=0.0)
        self.events.append(event)
        self.payloads[event.id] = payload
        return event.id


def _int32(values: Sequence[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


def _info(data: bytes) -> PayloadInfo:
    return PayloadInfo(nbytes=len(data), crc=zlib.crc32(data))
