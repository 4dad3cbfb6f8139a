"""Digests of files while they are being written: what a pack's record says of each."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from trajstore.archive.record import FileDigest

__all__ = ["Digests"]


class Digests:
    """Size and SHA-256 of every file whose parts pass by. In a thread of its own: a digest takes as long as a disk.

    To be left before the process goes on: a context manager.
    """

    def __init__(self) -> None:
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="trajstore-digest")
        self._running: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def watch(self, name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        """The parts of a file, which somebody writes meanwhile."""
        self._running[name] = hashlib.sha256()
        self._sizes[name] = 0
        for part in parts:
            self._sizes[name] += len(part)
            self._aside.submit(self._running[name].update, part)
            yield part

    def files(self) -> dict[str, FileDigest]:
        """By name, once all parts were taken."""
        self._aside.shutdown()
        return {name: FileDigest(self._sizes[name], self._running[name].hexdigest()) for name in sorted(self._running)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._aside.shutdown(cancel_futures=True)
