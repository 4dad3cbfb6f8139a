"""A thread that repeats a step for as long as it takes, and keeps trying where the server does not answer."""

import logging
import threading
from collections.abc import Callable

from trajstore.errors import TrajstoreError

__all__ = ["RepeatingThread"]

log = logging.getLogger(__name__)

_PAUSE = 0.5


class RepeatingThread:
    """Repeats a step until it is told to stop.

    Args:
        step: to repeat; it returns now and then, so that the thread can stop.
        complaint: what cannot be done while the step fails, for the log.
        changed: wakes the thread where it pauses, and is notified when it ends.

    Attributes:
        name: of the thread.
        stopping: it is to stop.
        ended: it has.
        trouble: why the step fails just now: the server does not answer, or has no room.
        failure: the error that ended it.
    """

    def __init__(self, step: Callable[[], None], *, name: str, complaint: str, changed: threading.Condition) -> None:
        self.name = name
        self.stopping = False
        self.ended = False
        self.trouble: OSError | None = None
        self.failure: TrajstoreError | None = None
        self._step = step
        self._complaint = complaint
        self._changed = changed
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def pause(self, seconds: float) -> None:
        """Wait, inside the step, for a change or so many seconds."""
        with self._changed:
            if not self.stopping:
                self._changed.wait(seconds)

    def _repeat(self) -> None:
        try:
            while not self.stopping:
                try:
                    self._step()
                    self.trouble = None
                except OSError as error:  # Unavailable and StoreFull are such
                    if self.trouble is None:
                        log.warning("%s, and keeps trying: %s", self._complaint, error)
                    self.trouble = error
                    self.pause(_PAUSE)
        except TrajstoreError as error:
            self.failure = error
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()
