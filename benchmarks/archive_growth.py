"""What must not grow with a run: the cost of a read with the size of the archive, the memory of reader and archiver."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

import trajstore
from benchmarks.archive_reading import percentiles
from benchmarks.corpora import Corpus, Rollout
from benchmarks.measure import peak_memory
from benchmarks.packs import Packs
from benchmarks.tables import Cell, Goal, Scale, Table, Topic
from trajstore.archiver import Archiver

__all__ = ["measure_archiver", "measure_growth"]

SMALL = Corpus("real", lengths=(256,))

SPACING = 64
"""Trajectories between two that are read: their rows and tokens lie in other chunks, which are not decoded yet."""

READS_EACH = 8
"""Reads of a kind by one reader: a small archive has no more chunks than that."""

LIMITS = {1: 2.0, 2: 1.5, 4: 1.5, 6: 1.5}
"""By column of the table: how many times more the largest archive may take. Memory may fill bounded caches."""

P = ParamSpec("P")
T = TypeVar("T")


class Archiving(NamedTuple):
    """What an archiver's process did: payload bytes, seconds at work, packs, peak memory in bytes."""

    nbytes: int
    seconds: float
    packs: int
    memory: int


class Growth(NamedTuple):
    """Seconds: of opening an archive and a first read, of later reads of whole trajectories and of their routing."""

    first: list[float]
    whole: list[float]
    routing: list[float]


def measure_growth(scale: Scale, folder: Path) -> Topic:
    """Reads of small trajectories from an archive of one partition that holds more and more of them."""
    packs = Packs(folder / "archive", SMALL.spec)
    size = scale.pack_bytes // (SMALL.lengths[0] * (SMALL.spec.row_bytes + 8))
    rollouts = SMALL.rollouts()
    begins: list[int] = []
    rows: list[Sequence[Cell]] = []
    for many in scale.many:
        while (missing := many - len(packs.ids)) > 0:
            begins.append(len(packs.ids))
            packs.write([next(rollouts) for _ in range(min(missing, size))])
        found = _read_by_fresh_readers(packs, begins, scale.reads)
        whole, routing = percentiles(found.whole), percentiles(found.routing)
        ids = [packs.ids[i] for i in np.random.default_rng(4).integers(0, many, scale.reads)]
        memory = _in_child(_memory_of_reads, packs.folder, ids) / 1e6
        rows.append((f"{many:,}", percentiles(found.first).p50, *whole, *routing, memory))
    columns = ("trajectories", "first read", "whole p50", "whole p99", "routing p50", "routing p99", "memory MB")
    few, lots = rows[0], rows[-1]
    goals = [
        Goal(f"growth, {columns[i]}: {lots[0]} over {few[0]} trajectories", float(b) / float(a), "<=", limit)
        for i, limit in LIMITS.items()
        if (a := few[i]) and (b := lots[i])
    ]
    title = f"Reading one of many trajectories of {SMALL.lengths[0]} tokens, ms, from an archive of one partition"
    return Topic([Table(title, columns, rows)], goals)


def _read_by_fresh_readers(packs: Packs, begins: Sequence[int], reads: int) -> Growth:
    """Each opens the archive, then the arrays of every pack; what is timed after that decodes chunks of its own."""
    rng = np.random.default_rng(5)
    many = len(packs.ids)
    found = Growth([], [], [])
    while len(found.whole) < reads:
        spread = rng.permutation(max(1, many // SPACING)) * SPACING + rng.integers(min(SPACING, many))
        opener, *others = (packs.ids[i % many] for i in spread[: 2 * READS_EACH + 1])
        begun = time.perf_counter()
        archive = trajstore.open_archive(packs.folder)
        archive.load(opener)
        found.first.append(time.perf_counter() - begun)
        for begin in begins:
            archive.load(packs.ids[begin])
        found.whole.extend(_timed(archive.load, id) for id in others[::2] or [opener])
        found.routing.extend(_timed(archive.load_routing, id) for id in others[1::2] or [opener])
    return found


def measure_archiver(scale: Scale, folder: Path) -> Topic:
    """The archiver end to end, in a process of its own: from a server that fsyncs into packs, then trimmed."""
    corpus = Corpus("noise")
    rows: list[Sequence[Cell]] = []
    memory: list[int] = []
    for count in scale.archiver_packs:
        place = folder / f"{count} packs"
        with trajstore.open(place, partitions=1, ack="fsync", timeout=120) as store:
            for _, batch in zip(range(count), corpus.batches(scale.archiver_pack_bytes), strict=False):
                for rollout in batch:
                    _record(store, corpus, rollout)
            store.flush()
            done = _in_child(_archive, place, scale.archiver_pack_bytes)
        memory.append(done.memory)
        rows.append((done.packs, done.nbytes / 1e6, done.nbytes / 1e6 / done.seconds, done.memory / 1e6))
    grown = (memory[1] - memory[0]) / scale.archiver_pack_bytes
    few, lots = scale.archiver_packs
    goals = [Goal(f"archiver: memory grown from {few} to {lots} packs, in packs", grown, "<=", 1.0)]
    size = scale.archiver_pack_bytes / 1e6
    title = f"The archiver, from an embedded server into packs of {size:.0f} MB: {corpus.name}"
    return Topic([Table(title, ("packs", "MB", "MB/s", "peak memory MB"), rows)], goals)


def _timed(read: Callable[[str], object], id: str) -> float:
    begun = time.perf_counter()
    read(id)
    return time.perf_counter() - begun


def _memory_of_reads(folder: Path, ids: Sequence[str]) -> int:
    archive = trajstore.open_archive(folder)
    for id in ids:
        archive.load(id)
    return peak_memory()


def _record(store: trajstore.Store, corpus: Corpus, rollout: Rollout) -> None:
    trajectory = store.create(routing=corpus.spec)
    with trajectory.segment(context=rollout.tokens[: rollout.prompt]) as segment:
        segment.tokens(rollout.tokens[rollout.prompt :], rollout.logprobs[rollout.prompt :])
        segment.routing(rollout.routed, start=0)
        segment.close("stop")
    trajectory.close("completed")


def _archive(folder: Path, pack_bytes: int) -> Archiving:
    with trajstore.open(folder, ack="fsync", timeout=120) as store:
        done = Archiver(store, pack_bytes=pack_bytes).run(once=True)
    return Archiving(done.nbytes, done.seconds, done.packs, peak_memory())


def _in_child(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a process that has done nothing else returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(work, *args, **kwargs).result()
