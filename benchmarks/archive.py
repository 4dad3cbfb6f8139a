"""The persistent log beside other ways to keep rollouts: writing, size, reading, growth, memory; and its goals.

Everything is measured in one run, in turns; what is printed are medians, and p99 of reads. MB are 10^6 bytes, those of
speeds before compression. All ways store the same columns, routing, tokens and logprobs, as durably as a pack is
(`benchmarks/rivals.py`); what they store is in `benchmarks/corpora.py`. Real routing is of a small model: 8 layers. Six
windows of it side by side have the shape of a large one.

    python -m benchmarks.archive [--quick] [--dir FOLDER] [--only TOPIC] [--json FILE]
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.archive_growth import measure_archiver, measure_growth
from benchmarks.archive_reading import measure_reading
from benchmarks.archive_writing import measure_resumed, measure_writing
from benchmarks.program import collect, run_as_program
from benchmarks.tables import Report, Scale, Table, Topic

__all__ = ["FULL", "QUICK", "run"]

FULL = Scale(
    pack_bytes=64 << 20,
    repeats=5,
    read_packs=4,
    reads=300,
    many=(1_000, 10_000, 100_000),
    archiver_pack_bytes=16 << 20,
    archiver_packs=(4, 32),
)
QUICK = Scale(
    pack_bytes=4 << 20,
    repeats=1,
    read_packs=3,
    reads=40,
    many=(200, 2_000),
    archiver_pack_bytes=4 << 20,
    archiver_packs=(2, 8),
)

TOPICS: dict[str, Callable[[Scale, Path], Topic]] = {
    "writing": measure_writing,
    "resumed": measure_resumed,
    "reading": measure_reading,
    "growth": measure_growth,
    "archiver": measure_archiver,
}


def run(
    scale: Scale, folder: Path, *, only: str | None = None, show: Callable[[Table], object] = lambda _: None
) -> Report:
    """Measure.

    Args:
        folder: where to write; what is written goes again.
        only: one topic.
        show: hears each table as soon as it is there.
    """

    def in_own(measure: Callable[[Scale, Path], Topic], name: str) -> Topic:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}-") as own:
            return measure(scale, Path(own))

    return collect({name: partial(in_own, measure, name) for name, measure in TOPICS.items()}, only=only, show=show)


def main() -> None:
    """Print a table per topic, then the goals."""
    run_as_program("The persistent log beside other ways to keep rollouts.", TOPICS, run, full=FULL, quick=QUICK)


if __name__ == "__main__":
    main()
