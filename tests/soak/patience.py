"""Waiting for a server that was killed and is on its way back."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import trajstore

__all__ = ["PATIENCE", "once_there"]

PATIENCE = 30.0
"""Seconds; a flusher looks every second, a server is away for two at most."""

Result = TypeVar("Result")


def once_there(call: Callable[[], Result]) -> Result:
    """The call's result, asked for again as long as the server does not answer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except trajstore.Unavailable:
            if time.monotonic() > deadline:
                raise
            threading.Event().wait(0.05)
