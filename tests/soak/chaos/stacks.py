"""What a process of a chaos run is at: asked by a signal, it writes the stacks of all its threads to its log."""

import faulthandler
import signal

__all__ = ["ASK", "MARK", "tell_when_asked"]

ASK = signal.SIGUSR1
MARK = b" in _run_module_as_main\n"
"""What the last stack ends with: the main thread's, of a process begun by `python -m`."""


def tell_when_asked() -> None:
    """From here on it does; before, the signal would end it."""
    faulthandler.register(ASK)
