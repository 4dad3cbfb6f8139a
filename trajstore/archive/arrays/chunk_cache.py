"""Decompressed chunks of which a read took a part, kept for the next one: a scan would else decode each many times."""

import os
import threading
from collections import OrderedDict
from typing import Any, TypeAlias

import numpy as np

__all__ = ["ChunkCache"]

Chunk: TypeAlias = np.ndarray[Any, Any]

Key: TypeAlias = tuple[str, str, int]
"""(storage, array, number of the chunk)."""


class ChunkCache:
    """The chunks used last, up to so many bytes. Thread-safe, and empty in a forked child."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begin()

    def get(self, key: Key) -> Chunk | None:
        """A chunk, read-only."""
        self._after_fork()
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: Key, chunk: Chunk) -> None:
        """Keep a chunk that nobody writes to any more."""
        self._after_fork()
        with self._lock:
            old = self._chunks.pop(key, None)
            self._nbytes += chunk.nbytes - (0 if old is None else old.nbytes)
            self._chunks[key] = chunk
            while self._nbytes > self._limit:
                self._nbytes -= self._chunks.popitem(last=False)[1].nbytes

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._chunks: OrderedDict[Key, Chunk] = OrderedDict()
        self._nbytes = 0
        self._process = os.getpid()

    def _after_fork(self) -> None:
        """A thread of the parent may have held the lock; in the child nobody would ever release it."""
        if self._process != os.getpid():
            self._begin()
