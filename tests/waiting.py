"""Waiting, with a deadline, for what another thread, process or task brings about."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["eventually", "one_round", "still_waits", "until"]


def until(condition: Callable[[], Any], *, seconds: float, what: str = "") -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not so within {seconds:g} s {what}".rstrip()
        threading.Event().wait(0.005)
    return value


async def eventually(condition: Callable[[], object], *, seconds: float = 30.0) -> None:
    """On an event loop: let other tasks run until this is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def still_waits(task: "asyncio.Task[object]") -> bool:
    """Whether a task goes on waiting, after others had the time to end it."""
    _, pending = await asyncio.wait({task}, timeout=0.02)
    return bool(pending)


async def one_round(task: "asyncio.Task[object]") -> None:
    """Let a new task come to where it first waits, and no further."""
    await asyncio.wait({task}, timeout=0)
