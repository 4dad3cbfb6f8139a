"""Running what may wait beside an event loop: on a thread, and to its end however often the waiting task is cancelled.

A handle serves one task at a time, so a cancelled one must not leave while its thread still writes.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, ParamSpec, TypeVar

__all__ = ["run_threaded", "until_done"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


async def run_threaded(
    threads: Executor | None,
    call: Callable[_Arguments, _Result],
    *args: _Arguments.args,
    **kwargs: _Arguments.kwargs,
) -> _Result:
    """The result of a call on a thread.

    Args:
        threads: whose; None for those of the event loop.

    Raises:
        CancelledError: this task was cancelled, and the call has ended; what it raised is dropped.
        Exception: what the call raises.
    """
    work = asyncio.get_running_loop().run_in_executor(threads, partial(call, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await until_done(work)
        if not work.cancelled():
            work.exception()  # looked at, or asyncio would complain: the cancellation tells more
        raise


async def until_done(work: "asyncio.Future[Any]") -> None:
    """Wait for it, however often this task is cancelled meanwhile."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})
