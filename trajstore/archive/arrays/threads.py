"""The threads in which this process compresses and decompresses chunks."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

__all__ = ["run_all", "shared_threads"]


def run_all(jobs: Sequence[Callable[[], None]], threads: Executor | None = None) -> None:
    """Run jobs side by side: one in this thread, for handing it over and back takes about as long as a chunk.

    Args:
        threads: for the others; not the executor that runs this call. By default the process's.

    Raises:
        Exception: what the first job that failed raised.
    """
    if not jobs:
        return
    others = [(threads or shared_threads()).submit(job) for job in jobs[1:]]
    jobs[0]()
    for other in others:
        other.result()


def shared_threads() -> ThreadPoolExecutor:
    """One executor for all."""
    return _threads(os.getpid())


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="trajstore-shard")
