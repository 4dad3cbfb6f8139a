"""What a store's writer has done, in numbers: counted where it happens, read by whoever shows them."""

from bisect import bisect_left
from collections import Counter

import msgspec

__all__ = ["LATENCY_BOUNDS", "WriterCounts"]

LATENCY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: upper bounds of the classes in which latencies are counted; what is above the last has its own class."""


def _classes() -> list[int]:
    return [0] * (len(LATENCY_BOUNDS) + 1)


class WriterCounts(msgspec.Struct):
    """One store's writer, since it was opened, in this process.

    Attributes:
        events, entries: acknowledged.
        nbytes: of those entries and the payloads beside them, as they went out.
        latencies: entries by seconds from `append` of their oldest event to the acknowledgement, in the classes of
            `LATENCY_BOUNDS`.
        latency: the sum of those seconds.
        rounds: round trips that carried entries.
        connections: made to the server.
        again: entries that were acknowledged before, and were written again because a crash of the server lost them.
        resolved: writes whose fate was looked up, by what was found: landed, resend, renumber, nothing (still not
            known) or refused.
        failed: lanes given up, by the name of the error: Fenced, SequenceGap, StoreFull, Unavailable, ...
        blocked: calls that found the buffer full.
        blocked_seconds: for which they waited.
        buffered: bytes that wait to be acknowledged now.
        buffer_bytes: how many may.
        kept: acknowledged bytes that are kept against the loss of the server's tail, now.
        waiting: trajectories (their notes count as one more) with something unacknowledged, now.
    """

    events: int = 0
    entries: int = 0
    nbytes: int = 0
    latencies: list[int] = msgspec.field(default_factory=_classes)
    latency: float = 0.0
    rounds: int = 0
    connections: int = 0
    again: int = 0
    resolved: Counter[str] = msgspec.field(default_factory=Counter)
    failed: Counter[str] = msgspec.field(default_factory=Counter)
    blocked: int = 0
    blocked_seconds: float = 0.0
    buffered: int = 0
    buffer_bytes: int = 0
    kept: int = 0
    waiting: int = 0

    def landed(self, events: int, nbytes: int, seconds: float) -> None:
        """Count an entry that was acknowledged for the first time, so many seconds after its oldest event came."""
        self.events += events
        self.entries += 1
        self.nbytes += nbytes
        self.latency += seconds
        self.latencies[bisect_left(LATENCY_BOUNDS, seconds)] += 1
