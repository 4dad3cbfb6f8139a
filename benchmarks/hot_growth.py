"""What the next trajectories cost, and what each process holds in memory, as the log grows."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import trajstore
from benchmarks.hot_scale import HotScale, opened, tidy
from benchmarks.hot_trajectories import write
from benchmarks.measure import forget_peak, peak_memory
from benchmarks.tables import Cell, Goal, Table, Topic
from trajstore.archiver import Archiver
from trajstore.materializer import Materializer

__all__ = ["measure_growth"]

PROBE = 50
"""Trajectories that are timed together, some times at each size."""


def measure_growth(scale: HotScale, folder: Path) -> Topic:
    """Trajectories are written until the log holds so many; then some more are timed. Then what follows the log."""
    rows: list[Sequence[Cell]] = []
    costs: list[float] = []
    memory: list[float] = []
    probes = max(3, 4 * scale.repeats)
    with opened(folder) as store:
        held = 0
        for size in scale.many:
            forget_peak()
            while held < size:
                held += len(write(store, min(1000, size - held)))
            tidy(store)
            costs.append(statistics.median(_cost(store) for _ in range(probes)))
            held += PROBE * probes
            memory.append(peak_memory() / 1e6)
            rows.append((f"{size}", 1e6 * costs[-1], memory[-1]))
    growing = Table("The next trajectories, by how many the log holds", ("held", "µs each", "writer's memory MB"), rows)
    goals = [
        Goal("growth: cost of the next trajectory, last over first", costs[-1] / costs[0], "<=", 1.2),
        # Not over the first: what is kept until it is on disk grows for the first seconds.
        Goal("growth: memory of the writer, last over the one before", memory[-1] / memory[-2], "<=", 1.2),
    ]
    works = {"materializer": _materialize, "archiver": _archive}
    followers: list[list[float]] = []
    for count in scale.waiting:
        place = folder / f"{count} to follow"
        place.mkdir()
        with opened(place) as store:
            for begin in range(0, count, 1000):
                write(store, min(1000, count - begin))
        followers.append([_in_child(work, place / "store") / 1e6 for work in works.values()])
    following = Table(
        "Peak memory, MB, by how many wait",
        ("waiting", *works),
        [(f"{count}", *peaks) for count, peaks in zip(scale.waiting, followers, strict=True)],
    )
    goals += [
        Goal(f"growth: memory of the {name}, many over few", many / few, "<=", 1.2)
        for name, few, many in zip(works, followers[0], followers[-1], strict=True)
    ]
    return Topic([growing, following], goals)


def _cost(store: trajstore.Store) -> float:
    begun = time.perf_counter()
    write(store, PROBE)
    return (time.perf_counter() - begun) / PROBE


def _materialize(folder: Path) -> int:
    with trajstore.open(folder, timeout=120) as store:
        Materializer(store).run(once=True)
    return peak_memory()


def _archive(folder: Path) -> int:
    with trajstore.open(folder, timeout=120) as store:
        Archiver(store).run(once=True)
    return peak_memory()


def _in_child(work: Callable[[Path], int], folder: Path) -> int:
    """What a process that has done nothing else returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(work, folder).result()
