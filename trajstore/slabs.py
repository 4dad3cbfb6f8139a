"""Memory for large payloads, cut from slabs that are large enough for the kernel's huge pages.

A payload of 1.5 MB that is copied into memory of its own costs 0.3 ms, nearly all of it for some 400 pages that the
kernel hands out one by one; cut from a slab, 0.1 ms (benchmarks/hotpath.py). NumPy asks for huge pages from 4 MiB on.
"""

import threading

import numpy as np
import numpy.typing as npt

__all__ = ["Slabs"]

_SLAB = 8 << 20
_SMALL = 1 << 16
_LARGE = 4 << 20
_ALIGNED = 64


class Slabs:
    """Arrays that are kept for a while and let go in about the order in which they came. Thread-safe.

    A slab goes when the last array cut from it does; so does what is not asked for again, with one slab at most.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = np.empty(0, np.uint8)
        self._used = 0

    def cut(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Uninitialized, uint8 `[nbytes]`. What is small, or large by itself, has memory of its own."""
        if not _SMALL <= nbytes < _LARGE:
            return np.empty(nbytes, np.uint8)
        with self._lock:
            if self._used + nbytes > len(self._slab):
                self._slab, self._used = np.empty(_SLAB, np.uint8), 0
            start = self._used
            self._used += -(-nbytes // _ALIGNED) * _ALIGNED
            return self._slab[start : start + nbytes]
