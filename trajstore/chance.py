"""Random bits, many at a time: for nonces and ids.

Each draw from the operating system lets another thread have the interpreter. Where a writer works beside it, that costs
up to 5 ms, and was half of what a small trajectory took (benchmarks/hotpath.py).
"""

import secrets
import struct

__all__ = ["Chance"]

_DRAWN = 256


class Chance:
    """Words of 64 random bits, each given once. Thread-safe; not for use on both sides of a fork."""

    def __init__(self) -> None:
        self._words: list[int] = []

    def word(self) -> int:
        """64 random bits."""
        while True:
            try:
                return self._words.pop()
            except IndexError:
                drawn = secrets.randbits(64 * _DRAWN).to_bytes(8 * _DRAWN, "little")
                self._words.extend(struct.unpack(f"<{_DRAWN}Q", drawn))
