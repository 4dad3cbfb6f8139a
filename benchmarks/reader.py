"""From finished trajectories to a trainer's batch, beside a ready-made one, TransferQueue, and pickles in a Redis list.

Everything is measured in one run, in turns; what is printed are medians. Trajectories with real routing of the shape of
a large model, 48 layers x 8, lie ready in an embedded store; a batch is 8 groups of them, in padded or packed tensors.
Whoever gets one holds it until it has the next, as a loop over batches does. MB are 10^6 bytes.

- "batch": what is ready in the store, as samples and as tensors of a batch; the same tensors by `torch.load` from the
  page cache; the same samples out of TransferQueue's memory (`kv_batch_get`; padded is a batch, jagged a tensor per
  sample) and out of a Redis list. "Read ahead" is what a trainer waits for `TrajectoryDataset` after a step.
- "latency": from `close()` of a trajectory to the batch with it; the materializer is a process of its own.
- "memory": what a process holds that reads few groups, and many.

    python -m benchmarks.reader [--quick] [--dir FOLDER] [--only TOPIC] [--json FILE]
"""

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import trajstore
from benchmarks.archive_reading import percentiles
from benchmarks.corpora import Corpus
from benchmarks.program import collect, run_as_program
from benchmarks.reader_batch import Size, measure_batch
from benchmarks.reader_memory import memory_of_reading
from benchmarks.ready_samples import GROUP_SIZE, publish, record
from benchmarks.tables import Cell, Goal, Report, Table, Topic
from trajstore.ready import ReadyQueue
from trajstore_trainer import TrajectoryReader, padded_batch

__all__ = ["FULL", "QUICK", "TOPICS", "run"]

FULL = Size(
    groups=8,
    lengths=((1024, 1536, 2048), (2048, 3072, 4096, 6144)),
    repeats=15,
    closes=200,
    close_tokens=2048,
    memory_groups=(16, 64),
    prefetch_bytes=16 << 20,
)
QUICK = Size(
    groups=2,
    lengths=((64, 96),),
    repeats=2,
    closes=5,
    close_tokens=64,
    memory_groups=(2, 4),
    prefetch_bytes=1 << 16,
)


def measure_latency(size: Size, folder: Path) -> Topic:
    """From the end of a trajectory to the batch, one at a time: alone, the last of its group, a whole group at once."""
    rows: list[Sequence[Cell]] = []
    goals = []
    with trajstore.open(folder / "store", partitions=4) as store, _materializer(folder / "store"):
        reader = TrajectoryReader(store)
        for name, group_size, at_once in (
            ("alone", 1, 1),
            (f"last of {GROUP_SIZE}", GROUP_SIZE, 1),
            (f"{GROUP_SIZE} at once", GROUP_SIZE, GROUP_SIZE),
        ):
            spread = percentiles(_close_to_batch(store, reader, size, group_size=group_size, at_once=at_once))
            rows.append((f"{size.close_tokens} tokens, {name}", *spread))
            goals.append(Goal(f"latency, {name}: p50 ms from close to batch", spread.p50, "<=", 10.0))
    return Topic([Table("From close() to the batch, ms", ("trajectory", "p50", "p99"), rows)], goals)


def _close_to_batch(
    store: trajstore.Store, reader: TrajectoryReader, size: Size, *, group_size: int, at_once: int
) -> list[float]:
    """Seconds from the close of the last `at_once` members of a group, when the materializer has done the others."""
    corpus = Corpus("real", 6, lengths=(size.close_tokens,))
    offers = ReadyQueue(store.wire, store.keys)
    seconds = []
    rollouts = corpus.rollouts()
    for number in range(-3, size.closes):
        group = f"{group_size}-{at_once}-{number}"
        writers = [
            record(store, corpus, one, group=group, group_size=group_size)
            for one in itertools.islice(rollouts, group_size)
        ]
        for writer in writers[:-at_once]:
            writer.close("completed")
        store.flush()
        for writer in writers[:-at_once]:
            deadline = time.monotonic() + 60
            while not offers.offered(writer.id, group=group, group_size=group_size):
                if time.monotonic() > deadline:
                    raise TimeoutError("the materializer did not come to a closed trajectory within a minute")
        begun = time.perf_counter()
        for writer in writers[-at_once:]:
            writer.close("completed")
        taken = reader.take(timeout=60.0)
        batch = padded_batch(taken[0].trajectories)
        if number >= 0:  # those before warm up
            seconds.append(time.perf_counter() - begun)
        assert len(batch) == group_size
        reader.acknowledge(taken)
        for writer in writers:
            store.wire.call("UNLINK", store.keys.entries(writer.id), store.keys.payloads(writer.id))
    return seconds


def measure_memory(size: Size, folder: Path) -> Topic:
    """A process that reads one group after the other, with a bounded prefetch."""
    corpus = Corpus("real", 6, lengths=size.lengths[-1])
    few, many = size.memory_groups
    with trajstore.open(folder / "store", partitions=4) as store:
        rollouts = list(itertools.islice(corpus.rollouts(), many * GROUP_SIZE))
        publish(store, corpus, rollouts)
        peaks = {
            groups: memory_of_reading(folder / "store", groups=groups, prefetch_bytes=size.prefetch_bytes)
            for groups in size.memory_groups
        }
    rows = [
        (f"{groups} groups", sum(one.nbytes for one in rollouts[: groups * GROUP_SIZE]) / 1e6, peak / 1e6)
        for groups, peak in peaks.items()
    ]
    title = f"Memory of reading group by group, {size.prefetch_bytes / 1e6:.0f} MB of prefetch"
    table = Table(title, ("", "read MB", "peak MB"), rows)
    return Topic([table], [Goal("memory: peak of many groups over that of few", peaks[many] / peaks[few], "<=", 1.25)])


TOPICS: dict[str, Callable[[Size, Path], Topic]] = {
    "batch": measure_batch,
    "latency": measure_latency,
    "memory": measure_memory,
}


def run(
    size: Size, folder: Path, *, only: str | None = None, show: Callable[[Table], object] = lambda _: None
) -> Report:
    """Measure.

    Args:
        folder: where to write; what is written goes again.
        only: one topic.
        show: hears each table as soon as it is there.
    """

    def in_own(measure: Callable[[Size, Path], Topic], name: str) -> Topic:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}-") as own:
            return measure(size, Path(own))

    torch.set_num_threads(1)
    return collect({name: partial(in_own, measure, name) for name, measure in TOPICS.items()}, only=only, show=show)


@contextmanager
def _materializer(store: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "trajstore", "materialize", str(store)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Print a table per topic, then the goals."""
    run_as_program("From finished trajectories to a trainer's batch.", TOPICS, run, full=FULL, quick=QUICK)


if __name__ == "__main__":
    main()
