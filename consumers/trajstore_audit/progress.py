"""How far an audit is: a bar in a terminal, a log line now and then elsewhere; always on stderr."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from trajstore.cli.terminal import diagnostics
from trajstore_audit.numbers import size
from trajstore_audit.running import Progress

__all__ = ["showing_progress"]

log = logging.getLogger("trajstore.audit")

_SAY = 5.0  # seconds between two log lines, where there is no terminal


@contextmanager
def showing_progress() -> Iterator[Callable[[Progress], None]]:
    """Gives what `audit` takes as `progress`."""
    with Bar(
        TextColumn("auditing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=diagnostics(),
        transient=True,
        disable=not diagnostics().is_terminal,
        redirect_stdout=False,
    ) as bar:
        task = bar.add_task("trajectories", total=None)
        next_line = time.monotonic() + _SAY

        def show(progress: Progress) -> None:
            nonlocal next_line
            done = f"{size(progress.bytes_read)} read"
            bar.update(
                task,
                completed=progress.trajectories,
                total=progress.total,
                description=f"trajectories, {done}",
            )
            if bar.disable and time.monotonic() >= next_line:
                log.info("%d of %d trajectories, %s", progress.trajectories, progress.total, done)
                next_line = time.monotonic() + _SAY

        yield show
