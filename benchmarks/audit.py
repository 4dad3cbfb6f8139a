"""What an audit costs: cells compared per second beside numpy and torch, wall time by how much drifted, and its memory.

    python -m benchmarks.audit [--quick] [--only kernel|drifted|memory] [--json FILE] [--dir FOLDER]

The archive of `memory` takes about 7 GB for the 10 GB that are compared, and is deleted again. `--quick`
judges no time.
"""

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.corpora import EXPERTS, Corpus, Rollout
from benchmarks.measure import in_turns, peak_memory
from benchmarks.packs import Packs, stage, whole
from benchmarks.program import collect, run_as_program
from benchmarks.tables import Cell, Goal, Report, Table, Topic
from trajstore_audit import audit
from trajstore_audit.compare import compare

__all__ = ["FULL", "QUICK", "AuditScale", "run"]

CORPUS = Corpus("real", 6)
"""48 layers, top 8 of 128: 384 bytes a token."""

SHARES = (0.0, 0.01, 0.1, 0.5, 1.0)
"""Of cells, or rows, that drifted."""

LIMIT = 1 << 30
"""Bytes of memory that an audit may take."""

FREE = 1.2
"""Of what is to be written, so much must be free."""

Rows = npt.NDArray[np.uint8]


class AuditScale(NamedTuple):
    """How much is measured.

    Attributes:
        kernel_bytes: of one side of what is compared in memory.
        drifted_bytes: recorded once, where wall time by drift is measured.
        memory_bytes: of routing that is compared, both recordings.
        repeats: rounds of what is timed.
        judges_time: whether what is timed takes long enough for goals on it.
    """

    kernel_bytes: int
    drifted_bytes: int
    memory_bytes: int
    repeats: int
    judges_time: bool = True


FULL = AuditScale(kernel_bytes=32 << 20, drifted_bytes=256 << 20, memory_bytes=10_000_000_000, repeats=5)
QUICK = AuditScale(kernel_bytes=1 << 20, drifted_bytes=8 << 20, memory_bytes=24 << 20, repeats=1, judges_time=False)


def by_numpy(first: Rows, second: Rows) -> npt.NDArray[np.bool_]:
    """Cells whose expert sets differ, as one would write it."""
    differs: npt.NDArray[np.bool_] = (np.sort(first, axis=-1) != np.sort(second, axis=-1)).any(axis=-1)
    return differs


def by_torch(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The same."""
    return (first.sort(dim=-1).values != second.sort(dim=-1).values).any(dim=-1)


def drift(rows: Rows, share: float, *, seed: int = 0) -> Rows:
    """One expert replaced in that share of cells, and a tenth as many in another order."""
    rng = np.random.default_rng(seed)
    cells = rows.reshape(-1, rows.shape[2]).copy()
    hit = np.flatnonzero(rng.random(len(cells)) < share)
    new, at = rng.integers(0, EXPERTS, len(hit)).astype(np.uint8), rng.integers(0, rows.shape[2], len(hit))
    fits = (cells[hit] != new[:, None]).all(axis=1)
    cells[hit[fits], at[fits]] = new[fits]
    turned = np.flatnonzero(rng.random(len(cells)) < share / 10)
    cells[turned] = cells[turned, ::-1]
    return cells.reshape(rows.shape)


def measure_kernel(scale: AuditScale, folder: Path) -> Topic:
    """Cells compared in memory by one core, as sets; bytes are those of both sides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first = np.concatenate([rollout.routed for rollout in CORPUS.take(scale.kernel_bytes)])
    table: list[Sequence[Cell]] = []
    goals = []
    for share in SHARES:
        second = drift(first, share)
        found = compare(first, second)
        assert np.count_nonzero(found.shared < 8) == np.count_nonzero(by_numpy(first, second))
        tensors = torch.from_numpy(first), torch.from_numpy(second)
        ways: dict[str, Callable[[], object]] = {
            "ours": partial(compare, first, second),
            "numpy": partial(by_numpy, first, second),
            "torch": partial(by_torch, *tensors),
        }
        seconds = {name: statistics.median(some) for name, some in in_turns(ways, repeats=scale.repeats).items()}
        rates = [2 * first.nbytes / one / 1e9 for one in seconds.values()]
        ratios = [seconds[name] / seconds["ours"] for name in ("numpy", "torch")]
        table.append((f"{share:.0%}", *rates, *ratios))
        if scale.judges_time:
            goals.append(Goal(f"kernel, {share:.0%} of cells drifted: speed over numpy", ratios[0], ">=", 4.0))
    torch.set_num_threads(threads)
    columns = ("drifted", "ours GB/s", "numpy GB/s", "torch GB/s", "x numpy", "x torch")
    return Topic([Table(f"Comparing {2 * first.nbytes / 1e6:.0f} MB as sets, one core", columns, table)], goals)


def measure_drifted(scale: AuditScale, folder: Path) -> Topic:
    """Audits of archives that differ in how many rows drifted: all rows of some trajectories, or runs of all.

    Time is judged where trajectories drifted as wholes: runs lie scattered, so that few rows are read from many places.
    """
    rollouts = CORPUS.take(scale.drifted_bytes)
    table: list[Sequence[Cell]] = []
    goals = []
    for name, chosen in (("whole trajectories", _some_trajectories), ("runs of 64 rows", _some_runs)):
        places = {share: folder / f"{name} {share}" for share in SHARES}
        found = {}
        for share, place in places.items():
            _archive(place, rollouts, partial(chosen, share=share, of=len(rollouts)))
            found[share] = audit(place, load_rows=0)
        ways = {str(share): partial(audit, place, load_rows=0) for share, place in places.items()}
        spent = in_turns(ways, repeats=scale.repeats, warm_up=False)
        rows, seconds = [], []
        for share, place in places.items():
            shutil.rmtree(place)
            of = found[share]
            assert of.segments is not None
            total = of.segments.total
            rows.append(total.tokens - total.referenced)
            seconds.append(statistics.median(spent[str(share)]))
            rate = of.totals.bytes_read / seconds[-1] / 1e9
            table.append((f"{name}, {share:.0%}", total.tokens, rows[-1], seconds[-1], rate))
        if chosen is _some_trajectories and scale.judges_time:
            fit = float(np.corrcoef(rows, seconds)[0, 1] ** 2)
            goals.append(Goal("drifted: wall time is linear in rows read, R2", fit, ">=", 0.98))
            goals.append(
                Goal("drifted: wall time without drift over that with all", seconds[0] / seconds[-1], "<=", 0.2)
            )
    columns = ("drifted", "rows", "rows read", "seconds", "GB/s read")
    return Topic([Table("Audits of archives, one process", columns, table)], goals)


def measure_memory(scale: AuditScale, folder: Path) -> Topic:
    """An archive in which every row drifted, so that all is read; audited by a process of its own."""
    needed = int(scale.memory_bytes * FREE)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; give --dir")
    place = folder / "archive"
    batch = CORPUS.take(min(scale.memory_bytes // 8, 64 << 20))
    each = sum(rollout.routed.nbytes for rollout in batch)  # half of the rows are compared, on both sides
    packs = Packs(place, CORPUS.spec)
    for _ in range(max(1, round(scale.memory_bytes / each))):
        _publish(packs, batch, _drifted)
    stored = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        spent, memory, nbytes, differing, cells = pool.submit(_audit, place).result()
    shutil.rmtree(place)
    row = (nbytes / 1e9, stored / 1e9, spent, nbytes / spent / 1e9, memory / 1e6, differing / cells)
    columns = ("GB compared", "GB on disk", "seconds", "GB/s", "peak memory MB", "share of cells")
    goals = [Goal("memory: bytes over 1 GiB", memory / LIMIT, "<=", 1.0)]
    return Topic([Table("An audit that reads all, one process", columns, [row])], goals)


def _audit(place: Path) -> tuple[float, int, int, int, int]:
    begun = time.perf_counter()
    found = audit(place)
    assert found.segments is not None
    total = found.segments.total
    spent = time.perf_counter() - begun
    return spent, peak_memory(), found.totals.bytes_read, total.differing, total.cells


def _some_trajectories(number: int, rollout: Rollout, *, share: float, of: int) -> Rows:
    drifts = (number + 0.5) / of < share
    return _touched(rollout.routed, np.arange(len(rollout.tokens))) if drifts else rollout.routed


def _some_runs(number: int, rollout: Rollout, *, share: float, of: int) -> Rows:
    runs = np.flatnonzero(np.random.default_rng(number).random(len(rollout.tokens) // 64) < share)
    return _touched(rollout.routed, (runs[:, None] * 64 + np.arange(64)).ravel())


def _touched(rows: Rows, at: npt.NDArray[np.int64]) -> Rows:
    """These rows with one layer of another row in each."""
    found = rows.copy()
    found[at, at % rows.shape[1]] = rows[(at + 999) % len(rows), at % rows.shape[1]]
    return found


def _archive(place: Path, rollouts: Sequence[Rollout], again: Callable[[int, Rollout], Rows]) -> None:
    packs = Packs(place, CORPUS.spec)
    for at, batch in _batches(rollouts):
        _publish(packs, batch, partial(_from, again, at))


def _from(again: Callable[[int, Rollout], Rows], at: int, number: int, rollout: Rollout) -> Rows:
    return again(at + number, rollout)


def _drifted(number: int, rollout: Rollout) -> Rows:
    return drift(rollout.routed, 0.1, seed=number % 4)


def _publish(packs: Packs, rollouts: Sequence[Rollout], again: Callable[[int, Rollout], Rows]) -> None:
    """One pack of trajectories that were aborted near their end, resumed, and recorded anew."""
    parts = [
        whole(stage(rollout, packs.spec, segments=2, again=again(number, rollout)))
        for number, rollout in enumerate(rollouts)
    ]
    packs.publish(parts)


def _batches(rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Sequence[Rollout]]]:
    for at in range(0, len(rollouts), 16):
        yield at, rollouts[at : at + 16]


TOPICS: dict[str, Callable[[AuditScale, Path], Topic]] = {
    "kernel": measure_kernel,
    "drifted": measure_drifted,
    "memory": measure_memory,
}


def run(
    scale: AuditScale, folder: Path, *, only: str | None = None, show: Callable[[Table], object] = lambda _: None
) -> Report:
    """Measure.

    Args:
        folder: where to write; what is written goes again.
        only: one topic.
        show: hears each table as soon as it is there.
    """

    def in_own(measure: Callable[[AuditScale, Path], Topic], name: str) -> Topic:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}-") as own:
            return measure(scale, Path(own))

    return collect({name: partial(in_own, measure, name) for name, measure in TOPICS.items()}, only=only, show=show)


def main() -> None:
    """Print a table per topic, then the goals."""
    run_as_program("What an audit of routing costs.", TOPICS, run, full=FULL, quick=QUICK)


if __name__ == "__main__":
    main()
