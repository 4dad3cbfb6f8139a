"""The live path beside bare clients of the same server: payloads, events, calls, whole trajectories, growth.

Everything is measured in one run, in turns; what is printed are medians. The server is the embedded one, reached by its
socket, with its append-only file on. MB are 10^6 bytes.

    python -m benchmarks.hotpath [--quick] [--dir FOLDER] [--only TOPIC] [--json FILE]
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.hot_events import measure_calls, measure_events, measure_payloads
from benchmarks.hot_growth import measure_growth
from benchmarks.hot_scale import FULL, QUICK, HotScale
from benchmarks.hot_trajectories import measure_trajectories
from benchmarks.program import collect, run_as_program
from benchmarks.tables import Report, Table, Topic

__all__ = ["TOPICS", "run"]

TOPICS: dict[str, Callable[[HotScale, Path], Topic]] = {
    "payloads": measure_payloads,
    "events": measure_events,
    "calls": measure_calls,
    "trajectories": measure_trajectories,
    "growth": measure_growth,
}


def run(
    scale: HotScale, folder: Path, *, only: str | None = None, show: Callable[[Table], object] = lambda _: None
) -> Report:
    """Measure; what is written in `folder` goes again with it.

    Args:
        only: one topic.
        show: hears each table as soon as it is there.
    """

    def in_own(measure: Callable[[HotScale, Path], Topic], name: str) -> Topic:
        with tempfile.TemporaryDirectory(prefix=name, dir=folder) as own:
            return measure(scale, Path(own))

    return collect({name: partial(in_own, measure, name) for name, measure in TOPICS.items()}, only=only, show=show)


def main() -> None:
    """Print a table per topic, then the goals."""
    run_as_program("The live path beside bare clients of the same server.", TOPICS, run, full=FULL, quick=QUICK)


if __name__ == "__main__":
    main()
