"""Several ways of doing the same, timed in turns; what counts is the median of each and their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Comparison", "Spent", "compare", "forget_peak", "in_turns", "peak_memory", "spent_in_turns"]


class Comparison(NamedTuple):
    """Median seconds of both ways, and how much of the baseline's speed ours reaches (1 = the same)."""

    ours: float
    baseline: float

    @property
    def ratio(self) -> float:
        """Baseline seconds / our seconds."""
        return self.baseline / self.ours


class Spent(NamedTuple):
    """Seconds: by the clock, of processor time of the calling thread, and of that of all threads of this process."""

    wall: float
    caller: float
    process: float


def compare(ours: Callable[[], object], baseline: Callable[[], object], *, repeats: int) -> Comparison:
    """Time both in turns, after one unmeasured round of each."""
    seconds = in_turns({"ours": ours, "baseline": baseline}, repeats=repeats)
    return Comparison(statistics.median(seconds["ours"]), statistics.median(seconds["baseline"]))


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    before: Callable[[], object] = lambda: None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each way, by name: a round of all after the other, so that a slow spell of the machine hits all.

    Each round begins with another way: what one leaves behind (pages to be written to disk, memory to be freed) hits
    all that come after it as often.

    Args:
        ways: what to time.
        repeats: rounds that are measured.
        before: runs before each, untimed: makes room, or empties a cache.
        warm_up: begin with one round that is not measured.
    """
    spent = spent_in_turns(ways, repeats=repeats, before=before, warm_up=warm_up)
    return {name: [one.wall for one in found] for name, found in spent.items()}


def spent_in_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    before: Callable[[], object] = lambda: None,
    warm_up: bool = True,
) -> dict[str, list[Spent]]:
    """As `in_turns`, with the processor time."""
    clocks = (time.perf_counter, time.thread_time, time.process_time)
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(-warm_up, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            before()
            begun = [clock() for clock in clocks]
            ways[name]()
            ended = [clock() for clock in clocks]
            if repeat >= 0:
                spent[name].append(Spent(*(b - a for a, b in zip(begun, ended, strict=True))))
    return spent


def forget_peak() -> None:
    """Let `peak_memory` begin anew. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of physical memory that this process ever held at once. Linux only.

    Not `ru_maxrss`: a child begins with its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status tells no VmHWM; measure memory on Linux")
