"""Memory for large payloads, cut from slabs that are large enough for the kernel's huge pages.

A payload of 1.5 MB that is copied into memory of its own costs 0.3 ms, nearly all of it for some 400 pages that the
kernel hands out one by one; cut from a slab, 0.1 ms (benchmarks/hotpath.py). NumPy asks for huge pages from 4 MiB on.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["Slabs"]

_SLAB = 8 << 20
_SMALL = 1 << 16
_LARGE = 4 << 20
_ALIGNED = 64


class Slabs:
    """Arrays that are kept for a while and let go in about the order in which they came.

    A slab goes when the last array cut from it does; so does what is not asked for again, with one slab at most.
    Thread-safe without a lock: one that another thread held at a fork would be held in the child for ever.
    """

    def __init__(self) -> None:
        self._rests: list[npt.NDArray[np.uint8]] = []  # what is left of the newest slab, while nobody cuts from it

    def cut(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Uninitialized, uint8 `[nbytes]`. What is small, or large by itself, has memory of its own."""
        if not _SMALL <= nbytes < _LARGE:
            return np.empty(nbytes, np.uint8)
        try:
            rest = self._rests.pop()
        except IndexError:
            rest = np.empty(0, np.uint8)
        if len(rest) < nbytes:
            rest = np.empty(_SLAB, np.uint8)
        self._rests[:] = [rest[-(-nbytes // _ALIGNED) * _ALIGNED :]]
        return rest[:nbytes]
