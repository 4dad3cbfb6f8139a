"""Two ways of doing the same, timed in turns; what counts is the median of each and their ratio."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Comparison", "compare"]


class Comparison(NamedTuple):
    """Median seconds of both ways, and how much of the baseline's speed ours reaches (1 = the same)."""

    ours: float
    baseline: float

    @property
    def ratio(self) -> float:
        """Baseline seconds / our seconds."""
        return self.baseline / self.ours


def compare(ours: Callable[[], object], baseline: Callable[[], object], *, repeats: int) -> Comparison:
    """Time both in turns, after one unmeasured round of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for way, into in zip((ours, baseline), seconds, strict=True):
            begun = time.perf_counter()
            way()
            if repeat:
                into.append(time.perf_counter() - begun)
    return Comparison(*map(statistics.median, seconds))
