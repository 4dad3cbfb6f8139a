"""The threads in which this process compresses and decompresses chunks."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

__all__ = ["shared_threads"]


def shared_threads() -> ThreadPoolExecutor:
    """One executor for all."""
    return _threads(os.getpid())


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="trajstore-shard")
