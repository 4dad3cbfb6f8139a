"""A benchmark of several topics as a program: its options, its tables as they come, and its goals at the end."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks.tables import Report, Table, Topic

__all__ = ["Run", "collect", "run_as_program"]

_Scale = TypeVar("_Scale", contravariant=True)


class Run(Protocol[_Scale]):
    """How a benchmark measures at a scale, in a folder whose content goes again."""

    def __call__(self, scale: _Scale, folder: Path, /, *, only: str | None, show: Callable[[Table], object]) -> Report:
        """One topic or all; `show` hears each table as soon as it is there."""


def collect(
    topics: Mapping[str, Callable[[], Topic]],
    *,
    only: str | None = None,
    show: Callable[[Table], object] = lambda _: None,
) -> Report:
    """Measure topics one after the other.

    Args:
        only: one of them.
        show: hears each table as soon as it is there.
    """
    report = Report([], [])
    for name, measure in topics.items():
        if only in (None, name):
            topic = measure()
            for table in topic.tables:
                show(table)
            report.tables.extend(topic.tables)
            report.goals.extend(topic.goals)
    return report


def run_as_program(description: str, topics: Iterable[str], run: Run[_Scale], *, full: _Scale, quick: _Scale) -> None:
    """Print a table per topic, then the goals."""
    names = list(topics)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run of some seconds; its figures mean little")
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="where to write, default the temporary folder")
    parser.add_argument("--only", choices=names, metavar="TOPIC", help=f"one of {', '.join(names)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        report = run(
            quick if options.quick else full,
            Path(folder),
            only=options.only,
            show=lambda table: print(table.as_text(), end="\n\n", flush=True),
        )
    print(report.goals_as_text())
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
