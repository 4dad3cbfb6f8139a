"""A recorder around an `AsyncLLM`: many requests in flight, read on the event loop and written by threads."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy.typing as npt

from trajstore import Conflict, RoutingError, SchemaError, SegmentWriter, TrajectoryWriter
from trajstore.ingest import check_choice, check_count, check_finite, check_label
from trajstore.threaded import run_threaded, until_done
from trajstore_vllm.delivery import known_of
from trajstore_vllm.flight import Flight
from trajstore_vllm.outputs import parse_output
from trajstore_vllm.replay import LLMReplay
from trajstore_vllm.requests import Rerecord, engine_label
from trajstore_vllm.segments import Opened, deliver, end_early, fail, open_segment, refuse

__all__ = ["AsyncLLMRecorder"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_WRITERS = 2
"""Threads that write: enough for one to wait for room in the store's buffer while the other checks rows."""


class AsyncLLMRecorder:
    """Generates with an `AsyncLLM` and records it: many requests in flight, one per trajectory.

    Outputs are read on the event loop and written by threads, so a slow store never holds up the engine. Call its
    methods on the loop's thread.

    Args:
        engine: a `vllm.v1.engine.async_llm.AsyncLLM`, started with `enable_return_routed_experts=True`.
        weight_version: label of the weights that it has now.
        rerecord: what requests return of a trajectory's prefix. "rows": the rows that it does not hold, and no others.
            "prefix": all of them again, so that drift against the earlier recordings can be audited.
        every: output tokens after which a request is written; its end always is. What a crash of this process can lose.
        abort_timeout: seconds that a cancelled call waits for the last output of its request.

    Attributes:
        weight_version: of requests to come.
    """

    def __init__(
        self,
        engine: Any,
        *,
        weight_version: str = "",
        rerecord: Rerecord = "rows",
        every: int = 32,
        abort_timeout: float = 30.0,
    ) -> None:
        self.weight_version = check_label(weight_version, name="weight_version")
        self._engine = engine
        self._rerecord: Rerecord = check_choice(rerecord, get_args(Rerecord), name="rerecord")
        self._every = max(1, check_count(every, name="every"))
        self._abort_timeout = check_finite(abort_timeout, name="abort_timeout")
        self._label = engine_label()
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # a task that nobody holds may be collected while it runs
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="trajstore-vllm")

    takes = LLMReplay.takes

    @classmethod
    def for_replay(cls, folder: Path, *, weight_version: str, dtype: str = "auto", seed: int = 0) -> LLMReplay:
        """What `trajstore rerun` and `trajstore resume` use as `--engine vllm`; see `trajstore.engine`."""
        return LLMReplay.for_replay(folder, weight_version=weight_version, dtype=dtype, seed=seed)

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Ids of the requests that have not ended."""
        return tuple(self._flights)

    async def generate(
        self,
        trajectory: TrajectoryWriter,
        context: npt.ArrayLike = (),
        sampling_params: Any = None,
        request_id: str | None = None,
        *,
        base: int | None = None,
        rerecord: Rerecord | None = None,
    ) -> Any:
        """Open a segment, generate, and record all that comes until the request ends, is aborted or fails.

        To resume an aborted trajectory, call it again without context: the engine is given all tokens so far.
        Cancelling the awaiting task aborts the request; what came of it is recorded before the cancellation goes on.

        Args:
            trajectory: one call at a time.
            context, base: the segment's input, as in `TrajectoryWriter.segment`.
            sampling_params: a `vllm.SamplingParams` with n = 1. The request asks for each sampled token's logprob, for
                the rows that `rerecord` says, and for cumulative outputs, whatever these parameters say of that.
            request_id: for `abort`; default the trajectory's id.
            rerecord: default the recorder's.

        Returns:
            The engine's last `RequestOutput`, with all output tokens; None if it delivered none.

        Raises:
            Conflict: a request in flight has this id; or as `TrajectoryWriter.segment`.
            SchemaError, RoutingError: n > 1; or the engine delivered what cannot be, which ends the request.
            Exception: what the engine raises. Tokens that came before are recorded, and the segment is closed as
                `error`.
        """
        flight = Flight(trajectory.id if request_id is None else request_id, self.weight_version)
        if flight.request_id in self._flights:
            raise Conflict(f"request {flight.request_id!r} is in flight; use another id, or abort it first")
        self._flights[flight.request_id] = flight
        task = self._start(self._run(flight, trajectory, context, sampling_params, base, rerecord or self._rerecord))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await self._end(flight, task)
            raise

    async def abort(self, request_id: str | None = None) -> None:
        """End a request, or all in flight. Their `generate` returns what they delivered, with finish reason abort.

        An engine that fails to, or does not answer for `abort_timeout`, is told again with each output that comes.
        """
        flights = [flight for id, flight in self._flights.items() if request_id in (None, id)]
        for flight in flights:
            flight.aborting = True
        if flights:
            await self._abort([flight.request_id for flight in flights])

    def set_weight_version(self, weight_version: str) -> None:
        """Say that the engine has other weights from now on.

        Call it after `pause_generation(mode="keep")` has returned and before `resume_generation`. Where the engine does
        not report weight versions itself, a request in flight gets spans of them that change at the tokens sampled so
        far: those of its newest output, and those that the engine has appended to that output's list since. Of a
        request that has brought no output yet that is none; `pause_generation` waits until outputs have been read.
        """
        self.weight_version = check_label(weight_version, name="weight_version")
        for flight in self._flights.values():
            flight.switch(self.weight_version)

    async def _run(
        self,
        flight: Flight,
        trajectory: TrajectoryWriter,
        context: npt.ArrayLike,
        sampling_params: Any,
        base: int | None,
        rerecord: Rerecord,
    ) -> Any:
        """One request, from its segment's opening to its close."""
        try:
            segment, _, prompt, params = await self._open(flight, trajectory, context, sampling_params, base, rerecord)
            if flight.aborting:
                await self._write(end_early, flight, "aborted before the request was sent")
                return None
            flight.sent = True
            async with contextlib.aclosing(self._engine.generate(prompt, params, flight.request_id)) as outputs:
                await self._record(flight, segment, outputs)
            if not segment.closed:
                await self._write(end_early, flight, "the engine's outputs ended without a last one")
            return flight.last
        except BaseException as error:
            await self._write(fail, flight, error)
            raise
        finally:
            del self._flights[flight.request_id]

    async def _open(
        self,
        flight: Flight,
        trajectory: TrajectoryWriter,
        context: npt.ArrayLike,
        sampling_params: Any,
        base: int | None,
        rerecord: Rerecord,
    ) -> Opened:
        """Open a request's segment; another one where the weights changed meanwhile, for its label cannot."""
        while True:
            opened = await self._write(
                open_segment, flight, trajectory, context, sampling_params, base, rerecord, self._label
            )
            if flight.aborting or opened.weight_version == flight.versions[-1][1]:
                return opened
            await self._write(end_early, flight, "the weights changed before the request was sent")
            context, base = (), None

    async def _record(self, flight: Flight, segment: SegmentWriter, outputs: AsyncIterator[Any]) -> None:
        """Read outputs as they come, and write what came whatever ends them.

        One write is under way at most; what comes meanwhile goes with the next.
        """
        write: asyncio.Task[bool] | None = None
        written = 0
        readable = True
        try:
            async for output in outputs:
                readable = flight.see(output)
                if not readable:
                    break
                if flight.ended:
                    continue
                if flight.aborting:  # the first call may have come before the engine knew the request
                    await self._abort([flight.request_id])
                if write is not None and write.done():
                    write.result()
                    write = None
                if write is None and flight.delivered - written >= self._every:
                    written = flight.delivered
                    write = self._take(flight, segment)
        finally:
            if write is not None:
                await asyncio.wait({write})
                write.result()
            if flight.ended or not readable or flight.delivered > written:
                await self._take(flight, segment)

    def _take(self, flight: Flight, segment: SegmentWriter) -> asyncio.Task[bool]:
        """Read the newest output on this thread, for vLLM goes on appending to its lists, and write it on another."""
        known = known_of(segment, None)
        try:
            delivery = parse_output(flight.last, known, output_kind="CUMULATIVE")
            assert delivery is not None, "an output without the choice is not counted as the newest"
        except (RoutingError, SchemaError) as error:
            return asyncio.create_task(self._write(refuse, segment, error, flight.before))
        return asyncio.create_task(self._write(deliver, flight, segment, delivery, known, flight.before))

    async def _end(self, flight: Flight, task: asyncio.Task[Any]) -> None:
        """Abort the request of a cancelled call, and wait until what came is recorded.

        At the deadline, or if the call is cancelled once more, its last output is not waited for any longer.
        """
        flight.aborting = True
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._abort_timeout
        try:
            if not task.done():
                await self._abort([flight.request_id])
                await asyncio.wait({task}, timeout=max(0.0, deadline - clock()))
        finally:
            if not task.done():
                task.cancel()
                await until_done(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("cancelled request %s ended with: %s", flight.request_id, error)

    async def _abort(self, request_ids: list[str]) -> None:
        """Tell the engine to end requests. Where it cannot, they end otherwise, and that is what their callers hear."""
        task = self._start(self._engine.abort(request_ids))
        await asyncio.wait({task}, timeout=self._abort_timeout)
        if not task.done():
            task.cancel()
            log.warning("the engine did not take the abort of %s in %s s", request_ids, self._abort_timeout)
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.warning("requests %s could not be aborted: %s: %s", request_ids, type(error).__name__, error)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a cancelled call does not ask for it, and asyncio would complain

    async def _write(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """Run it in a writing thread, to its end however often this task is cancelled: no two may write one segment."""
        return await run_threaded(self._writers, function, *args)
