"""What a process of a chaos run is at: asked by a signal, it writes the stacks of all its threads to its log."""

import faulthandler
import signal

__all__ = ["ASK", "MARK", "tell_when_asked"]

ASK = signal.SIGUSR1
MARK = b"(most recent call first)"
"""What each stack begins with."""


def tell_when_asked() -> None:
    """From here on it does; before, the signal would end it."""
    faulthandler.register(ASK)
