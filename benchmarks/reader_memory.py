"""What a reading trainer holds: run in a process of its own, which prints its peak beyond what it began with, in bytes.

python -m benchmarks.reader_memory STORE GROUPS PREFETCH_BYTES
"""

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measure import peak_memory
from trajstore_trainer import TrajectoryDataset, packed_batch

__all__ = ["memory_of_reading"]

ROOT = Path(__file__).parents[1]


def memory_of_reading(store: Path, *, groups: int, prefetch_bytes: int) -> int:
    """Peak, in bytes, of a fresh process that reads so many groups one by one and collates each."""
    command = [sys.executable, "-m", "benchmarks.reader_memory", str(store), str(groups), str(prefetch_bytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


def main(store: str, groups: str, prefetch_bytes: str) -> None:
    """Read and collate; a consumer group of its own leaves everything to others."""
    torch.set_num_threads(1)
    name = f"memory-{groups}-{prefetch_bytes}"
    with TrajectoryDataset(
        store, group=name, prefetch_groups=1 << 10, prefetch_bytes=int(prefetch_bytes), timeout=60.0
    ) as dataset:
        before = peak_memory()
        batches = dataset.batches(1, packed_batch)
        for _ in range(int(groups)):
            next(batches)
            dataset.acknowledge()
    print(peak_memory() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
