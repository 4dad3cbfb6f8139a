"""A worker's sign of life: when its loop last turned, and what keeps it from its work."""

import time

__all__ = ["Pulse"]


class Pulse:
    """Set by a worker's thread, read by any other.

    Attributes:
        trouble: why the worker cannot do its work just now; None if it can.
    """

    def __init__(self) -> None:
        self.trouble: OSError | None = None
        self._beat = time.monotonic()

    def beat(self) -> None:
        """The loop has turned, or has taken a step of something long."""
        self._beat = time.monotonic()

    @property
    def silent(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._beat
