"""The threads in which this process compresses and decompresses chunks."""

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

__all__ = ["run_all", "shared_threads"]

_AT_ONCE = min(8, os.cpu_count() or 1)


def run_all(jobs: Sequence[Callable[[], None]], threads: Executor | None = None) -> None:
    """Run jobs side by side: this thread and the others each take the next one, in order, until none is left.

    So nobody waits for a thread that is busy elsewhere and has not begun.

    Args:
        threads: the others. By default the process's.

    Raises:
        Exception: what a job that failed raised.
    """
    left = deque(jobs)

    def work() -> None:
        while True:
            try:
                job = left.popleft()
            except IndexError:
                return
            job()

    others = [(threads or shared_threads()).submit(work) for _ in range(min(len(jobs), _AT_ONCE) - 1)]
    work()
    for other in others:
        if not other.cancel():
            other.result()


def shared_threads() -> ThreadPoolExecutor:
    """One executor for all."""
    return _threads(os.getpid())


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="trajstore-shard")
