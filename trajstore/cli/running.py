"""Running a worker in the foreground: progress on stderr while it works, a stop that it notices, one last line."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from rich.live import Live
from rich.text import Text

from trajstore.cli.terminal import diagnostics, plain

__all__ = ["run_worker"]

log = logging.getLogger(__name__)

_LOOK = 0.25  # seconds between two looks at the account
_SAY = 5.0  # seconds between two log lines, where there is no terminal


def run_worker(title: str, work: Callable[[], Any], stopped: threading.Event, progress: Callable[[], str]) -> bool:
    """Run `work` to its end, and raise what it raises.

    It runs in a thread of its own, for a signal's handler sets `stopped` in the main thread: had that been waiting for
    the event, it would hang.

    Args:
        title: what is done and where.
        stopped: asks `work` to end.
        progress: how far it is.

    Returns:
        True if it was asked to stop, False if it came to its end by itself.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            if diagnostics().is_terminal:
                _show_line(future, title, progress)
            else:
                _log_lines(future, title, progress)
            future.result()
            return stopped.is_set()
        finally:
            stopped.set()


def _show_line(future: Future[Any], title: str, progress: Callable[[], str]) -> None:
    with Live(console=diagnostics(), auto_refresh=False, transient=True, redirect_stdout=False) as live:
        while not wait([future], _LOOK).done:
            live.update(Text(plain(f"{title}: {progress()}"), no_wrap=True, overflow="ellipsis"), refresh=True)


def _log_lines(future: Future[Any], title: str, progress: Callable[[], str]) -> None:
    said = ""
    log.info("%s", title)
    next_line = time.monotonic() + _SAY
    while not wait([future], _LOOK).done:
        if time.monotonic() >= next_line:
            next_line += _SAY
            now = progress()
            if now != said:
                log.info("%s", now)
                said = now
