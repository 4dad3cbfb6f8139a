"""How a command ends on SIGTERM and Ctrl-C."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

__all__ = ["exiting_on_sigterm", "graceful_stop", "signals_held"]


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves through the `with` blocks, as Ctrl-C does, so that no embedded server stays behind."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; a second one ends the process at once. What is ignored stays so:
    a script's Ctrl-C is not meant for what it runs in the background.

    Only ask the event in the main thread, never wait for it there: a handler that sets an event which the thread that
    it interrupts waits for can hang.
    """
    stopped = threading.Event()
    turns = itertools.count()  # one call, so that of two signals that come together the second still counts as such

    def ask(number: int, frame: FrameType | None) -> None:
        if next(turns):
            _end(number, frame)
        stopped.set()

    before = [(one, signal.signal(one, ask)) for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    try:
        yield stopped
    finally:
        for one, handler in before:
            signal.signal(one, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """SIGTERM and Ctrl-C come when the block is over: for what must not be left half done, as a process that is started
    and not known yet.

    A blocked signal would stay so in that process; a handler does not outlive its `exec`. What is ignored stays so,
    there too. In another thread than the main one, which no signal interrupts, nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    with ExitStack() as after:  # all of it, whatever a signal raises meanwhile
        after.callback(_raise_first, came)
        for one in _SIGNALS:
            handler = signal.getsignal(one)
            if handler not in (signal.SIG_IGN, None):  # None: not Python's, and not to be put back by it
                after.callback(signal.signal, one, handler)
                signal.signal(one, lambda number, _: came.append(number))
        yield


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _raise_first(came: list[int]) -> None:
    for number in came[:1]:
        signal.raise_signal(number)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end(number: int, frame: FrameType | None) -> None:
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(sys.__stderr__.fileno(), b"\x1b[?25h\n")  # the live line hides the cursor
    os._exit(128 + number)
