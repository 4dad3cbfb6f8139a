"""Reading rollouts back: random ones, whole or in part, from a warm page cache and a cold one; and a scan of all."""

import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from benchmarks.archive_writing import OURS
from benchmarks.corpora import Corpus
from benchmarks.measure import in_turns
from benchmarks.packs import Packs
from benchmarks.rivals import FRAMES, RIVALS, Rival
from benchmarks.tables import Cell, Goal, Scale, Table, Topic

__all__ = ["measure_reading", "percentiles"]

CORPORA = {Corpus("real"): tuple(RIVALS), Corpus("real", 6): (FRAMES,), Corpus("noise"): (FRAMES,)}
"""What is read, and beside whom."""

GOAL = 2.0
"""Times what the file of frames takes."""

Read: TypeAlias = Callable[[int], object]


class Spread(NamedTuple):
    """Milliseconds."""

    p50: float
    p99: float


def measure_reading(scale: Scale, folder: Path) -> Topic:
    """Random reads and a scan of the same rollouts by each way."""
    topic = Topic([], [])
    for corpus, rivals in CORPORA.items():
        ways: dict[str, Rival] = {}
        for name in (OURS, *rivals):
            place = folder / corpus.name / name
            place.mkdir(parents=True)
            ways[name] = Packs(place, corpus.spec) if name == OURS else RIVALS[name](place)
        raw = count = 0
        for _, batch in zip(range(scale.read_packs), corpus.batches(scale.pack_bytes), strict=False):
            raw += sum(rollout.nbytes for rollout in batch)
            count += len(batch)
            for way in ways.values():
                way.write(batch)
        files = [path for path in (folder / corpus.name).rglob("*") if path.is_file()]
        os.sync()  # what is dirty would stay in the cache
        of = f"of {count} trajectories: {corpus.name}"
        topic.tables.append(_scan_all(ways, scale.repeats, raw, of))
        for kind, readers in _kinds(corpus, ways).items():
            warm = _read_randomly(readers, count, scale.reads, cool=())
            cold = _read_randomly(readers, count, scale.reads, cool=files)
            rows = [(name, *warm[name], *cold[name]) for name in ways]
            columns = ("", "warm p50", "warm p99", "cold p50", "cold p99")
            topic.tables.append(Table(f"Random reads, {kind}, ms, {of}", columns, rows))
            for temperature, spreads in (("warm", warm), ("cold", cold)):
                ratio = spreads[OURS].p50 / spreads[FRAMES].p50
                topic.goals.append(
                    Goal(f"read, {corpus.name}, {kind}, {temperature}: p50 over {FRAMES}", ratio, "<=", GOAL)
                )
    return topic


def percentiles(seconds: list[float]) -> Spread:
    """Of all that was timed."""
    return Spread(*(1e3 * float(np.percentile(seconds, percent)) for percent in (50, 99)))


def _kinds(corpus: Corpus, ways: Mapping[str, Rival]) -> dict[str, dict[str, Read]]:
    """How each way reads a rollout: all of it, its routing, some layers of its routing."""
    kinds: dict[str, dict[str, Read]] = {
        "whole": {name: way.read for name, way in ways.items()},
        "routing": {name: way.routed for name, way in ways.items()},
    }
    layers = range(corpus.spec.num_layers // 4)
    if len(layers) > 8:
        kinds[f"{len(layers)} layers of routing"] = {
            name: partial(way.some_layers if isinstance(way, Packs) else partial(_cut_layers, way), layers=layers)
            for name, way in ways.items()
        }
    return kinds


def _cut_layers(way: Rival, number: int, layers: range) -> object:
    return np.ascontiguousarray(way.routed(number)[:, layers.start : layers.stop])


def _read_randomly(readers: Mapping[str, Read], count: int, reads: int, *, cool: Iterable[Path]) -> dict[str, Spread]:
    """Every way reads the same rollouts in turns; before each, the page cache forgets the files `cool`.

    But for those that are mapped (safetensors): they stay.
    """
    numbers = np.random.default_rng(3).integers(0, count, reads).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in numbers:
        for path in cool:
            _forget(path)
        ways = {name: partial(read, number) for name, read in readers.items()}
        for name, taken in in_turns(ways, repeats=1, warm_up=False).items():
            seconds[name] += taken
    return {name: percentiles(taken) for name, taken in seconds.items()}


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _scan_all(ways: Mapping[str, Rival], repeats: int, raw: int, of: str) -> Table:
    seconds = in_turns({name: partial(_scan, way) for name, way in ways.items()}, repeats=max(1, repeats // 2))
    rows: list[tuple[Cell, ...]] = [(name, raw / 1e6 / statistics.median(taken)) for name, taken in seconds.items()]
    return Table(f"Scan {of}", ("", "MB/s"), rows)


def _scan(way: Rival) -> None:
    for _ in way.scan():
        pass
