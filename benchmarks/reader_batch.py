"""Getting a batch out of what is ready, beside other ways to get the same samples; and what putting them takes."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

import trajstore
from benchmarks.corpora import Corpus, Rollout
from benchmarks.measure import in_turns
from benchmarks.reader_rivals import LAYOUTS, Pickles, SavedBatch, TransferQueue, transfer_queue
from benchmarks.ready_samples import GROUP_SIZE, Reader, publish, record
from benchmarks.tables import Cell, Goal, Table, Topic
from trajstore.trajectory import Trajectory
from trajstore_trainer import TrajectoryBatch, TrajectoryDataset, packed_batch, padded_batch

__all__ = ["COLLATE", "Size", "measure_batch"]

COLLATE: dict[str, Callable[[Sequence[Trajectory]], TrajectoryBatch]] = {
    "padded": padded_batch,
    "packed": packed_batch,
}


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        groups: of 4 trajectories, in a batch.
        lengths: of trajectories, by batch: short ones, long ones.
        repeats: rounds.
        closes, close_tokens: trajectories whose way to the trainer is timed, and how long they are.
        memory_groups: fewer, and more.
        prefetch_bytes: that a reader may hold.
    """

    groups: int
    lengths: tuple[tuple[int, ...], ...]
    repeats: int
    closes: int
    close_tokens: int
    memory_groups: tuple[int, int]
    prefetch_bytes: int


def measure_batch(size: Size, folder: Path) -> Topic:
    """Getting a batch, and putting its samples; of short trajectories, and of long ones."""
    topic = Topic([], [])
    for number, lengths in enumerate(size.lengths):
        own = folder / str(number)
        own.mkdir()
        found = _measure(size, lengths, own)
        topic.tables.extend(found.tables)
        topic.goals.extend(found.goals)
    return topic


def _measure(size: Size, lengths: Sequence[int], folder: Path) -> Topic:
    corpus = Corpus("real", 6, lengths=tuple(lengths))
    rollouts = list(itertools.islice(corpus.rollouts(), size.groups * GROUP_SIZE))
    with trajstore.open(folder / "store", partitions=4) as store, ExitStack() as rivals:
        publish(store, corpus, rollouts * 2)  # two batches: while one is trained on, the next is read ahead
        ready = Reader(store, size.groups)
        ready.fresh()
        trajectories = ready.read()
        batches = {layout: collate(trajectories) for layout, collate in COLLATE.items()}
        gets: dict[str, Callable[[], object]] = {}
        puts: dict[str, Callable[[], object]] = {"store, until acknowledged": _recording(store, corpus, rollouts)}
        gets["store, samples"] = ready.read
        for layout, collate in COLLATE.items():
            saved = SavedBatch(folder / f"{layout}-batch.pt", batches[layout])
            gets[f"torch.load, {layout}"] = saved.get
            gets[f"store, {layout}"] = lambda collate=collate: collate(ready.read())  # type: ignore[misc]
        pickles = Pickles(store, trajectories)
        rivals.callback(pickles.close)
        puts["pickles in a Redis list"] = pickles.put
        gets["pickles in a Redis list, padded"] = pickles.get
        absent = ""
        try:
            queue = rivals.enter_context(transfer_queue(folder, padded_batch(trajectories), trajectories))
        except RuntimeError as error:
            absent = str(error)
        else:
            for layout in LAYOUTS:
                puts[f"TransferQueue, {layout}"] = _putting(queue, layout)
                gets[f"TransferQueue, {layout}"] = _getting(queue, layout)
        put = _median_ms(in_turns(puts, repeats=max(1, size.repeats // 3)))
        got = _median_ms(in_turns(_held(gets), repeats=size.repeats, before=ready.fresh))
        ahead = {f"store, {layout}, read ahead": _wait_after_step(store, size, layout) for layout in COLLATE}
        got |= _median_ms(ahead)
    megabytes = {layout: sum(t.nbytes for t in batch.tensors().values()) / 1e6 for layout, batch in batches.items()}
    name = f"{len(rollouts)} trajectories of {min(lengths)} to {max(lengths)} tokens"
    rows: list[Sequence[Cell]] = list(got.items())
    if absent:
        rows.append((absent, None))
    sizes = ", ".join(f"{layout} {nbytes:.0f} MB" for layout, nbytes in megabytes.items())
    tables = [
        Table(f"Getting a batch of {name} ({sizes})", ("", "ms"), rows),
        Table(f"Putting {name}", ("", "ms"), list(put.items())),
    ]
    return Topic(tables, [*_get_goals(got, name)])


def _get_goals(got: dict[str, float], name: str) -> Iterator[Goal]:
    """Of a batch, read ahead or not; and of TransferQueue, which gives a batch or samples, to what ours gives."""
    for layout in COLLATE:
        for ours in (f"store, {layout}", f"store, {layout}, read ahead"):
            yield Goal(f"{ours}, {name}: ms over torch.load", got[ours] / got[f"torch.load, {layout}"], "<=", 1.5)
    for layout, ways in (("padded", ("padded", "padded, read ahead")), ("jagged", ("samples", "packed, read ahead"))):
        its = got.get(f"TransferQueue, {layout}")
        for ours in ways if its is not None else ():
            assert its is not None
            yield Goal(f"store, {ours}, {name}: TransferQueue's ms over ours", its / got[f"store, {ours}"], ">=", 3.0)


def _wait_after_step(store: trajstore.Store, size: Size, layout: str) -> list[float]:
    """Seconds that a trainer waits for a batch, after a step in which the dataset could read ahead."""
    square = torch.rand(1024, 1024)
    seconds = []
    for number in range(size.repeats):
        with TrajectoryDataset(store, group=f"ahead-{layout}-{number}", prefetch_groups=size.groups) as dataset:
            batches = dataset.batches(size.groups, COLLATE[layout], pin_memory=False)
            held = next(batches)
            for _ in range(4):
                square @ square
            begun = time.perf_counter()
            held = next(batches)
            seconds.append(time.perf_counter() - begun)
            assert len(held) == size.groups * GROUP_SIZE
    return seconds


def _held(ways: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The same, each holding what it got last until it has got the next."""
    last: dict[str, object] = {}

    def holding(name: str, way: Callable[[], object]) -> Callable[[], object]:
        def get() -> None:
            last[name] = way()

        return get

    return {name: holding(name, way) for name, way in ways.items()}


def _putting(queue: TransferQueue, layout: str) -> Callable[[], object]:
    def put() -> None:
        queue.tell("clear", layout)
        queue.tell("put", layout)

    queue.tell("put", layout)
    queue.tell("get", layout)
    if queue.tell("check", layout) != "same":
        raise RuntimeError(f"TransferQueue, {layout}: what was got is not what was put")
    return put


def _getting(queue: TransferQueue, layout: str) -> Callable[[], object]:
    return lambda: queue.tell("get", layout)


def _recording(store: trajstore.Store, corpus: Corpus, rollouts: Sequence[Rollout]) -> Callable[[], object]:
    """Records all rollouts until they are acknowledged; what it recorded goes at its next turn."""
    before: list[str] = []

    def record_all() -> None:
        for id in before:
            store.wire.call("UNLINK", store.keys.entries(id), store.keys.payloads(id))
        before[:] = [record(store, corpus, one).id for one in rollouts]
        store.flush()

    return record_all


def _median_ms(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) * 1e3 for name, taken in seconds.items()}
