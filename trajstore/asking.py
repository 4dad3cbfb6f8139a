"""Asking what may hang: in a thread of its own, one question at a time, by callers who wait only so long."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from trajstore.errors import TrajstoreError

__all__ = ["Question"]

T = TypeVar("T")


class Question(Generic[T]):
    """Asked again and again, by any thread: a server that hangs holds one thread, not one per caller.

    Args:
        what: answers it.
        name: of the thread.
    """

    def __init__(self, what: Callable[[], T], *, name: str) -> None:
        self._what = what
        self._name = name
        self._lock = threading.Lock()
        self._asked: Future[T] | None = None

    def ask(self, seconds: float | None = None) -> Future[T]:
        """The question that is under way, or a new one: its answer, unless it is not done.

        Args:
            seconds: wait no longer; the question stays under way. None: until it is done.
        """
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._in_thread()
            asked = self._asked
        wait([asked], seconds)
        return asked

    def _in_thread(self) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(self._what())
            except TrajstoreError as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                raise

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return future
