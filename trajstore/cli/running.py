"""Running a worker in the foreground: progress on stderr while it works, a stop that it notices, one last line."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from rich.live import Live
from rich.text import Text

from trajstore.cli.logs import is_json
from trajstore.cli.terminal import diagnostics, plain

__all__ = ["run_worker"]

log = logging.getLogger(__name__)

_LOOK = 0.25  # seconds between two looks at the account
_SAY = 5.0  # seconds between two log lines, where there is no terminal


def run_worker(
    title: str,
    work: Callable[[], Any],
    stopped: threading.Event,
    progress: Callable[[], str],
    *,
    account: Callable[[], dict[str, Any]] = dict,
    drain: float = float("inf"),
) -> bool:
    """Run `work` to its end, and raise what it raises.

    It runs in a thread of its own, for a signal's handler sets `stopped` in the main thread: had that been waiting for
    the event, it would hang.

    Args:
        title: what is done and where.
        stopped: asks `work` to end.
        progress: how far it is.
        account: likewise in numbers, for log lines that programs read.
        drain: seconds that it has to end once it was asked to; then the process ends, with exit code 1.

    Returns:
        True if it was asked to stop, False if it came to its end by itself.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        looks = _looks(future, stopped, drain)
        try:
            if diagnostics().is_terminal and not is_json():
                _show_line(looks, title, progress)
            else:
                _log_lines(looks, title, progress, account)
            future.result()
            return stopped.is_set()
        except _Overdue:
            log.error(
                "what was in hand was not finished within %g s of being asked to stop, and is left to another worker",
                drain,
                extra={"event": "drain-overdue"},
            )
            sys.stdout.flush()
            os._exit(1)  # the thread cannot be ended, and Python would wait for it
        finally:
            stopped.set()


class _Overdue(Exception):
    """It has not ended in time."""


def _looks(future: Future[Any], stopped: threading.Event, drain: float) -> Iterator[None]:
    """A turn for each look at the account, until the work is done."""
    deadline: float | None = None
    while not wait([future], _LOOK).done:
        if deadline is None and stopped.is_set():
            deadline = time.monotonic() + drain
            log.info("stopping; what is in hand is finished first", extra={"event": "stopping"})
        if deadline is not None and time.monotonic() >= deadline:
            raise _Overdue
        yield


def _show_line(looks: Iterator[None], title: str, progress: Callable[[], str]) -> None:
    with Live(console=diagnostics(), auto_refresh=False, transient=True, redirect_stdout=False) as live:
        for _ in looks:
            live.update(Text(plain(f"{title}: {progress()}"), no_wrap=True, overflow="ellipsis"), refresh=True)


def _log_lines(
    looks: Iterator[None], title: str, progress: Callable[[], str], account: Callable[[], dict[str, Any]]
) -> None:
    said = ""
    log.info("%s", title, extra={"event": "started"})
    next_line = time.monotonic() + _SAY
    for _ in looks:
        if time.monotonic() >= next_line:
            next_line += _SAY
            now = progress()
            if now != said:
                log.info("%s", now, extra={"event": "progress", "account": account()})
                said = now
