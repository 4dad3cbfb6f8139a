"""Generating with vLLM and recording what it delivers: one recorder around an `AsyncLLM`, one around an `LLM`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from trajstore import Conflict, RoutingError, SchemaError, SegmentWriter, TrajectoryWriter, TrajstoreError
from trajstore.adapter import refusing
from trajstore.events import WeightVersionSpan
from trajstore.ingest import check_choice, check_count, check_finite, check_label
from trajstore_vllm.delivery import Delivery, Known, known_of, record_delivery
from trajstore_vllm.outputs import choice_of, parse_output, record_output
from trajstore_vllm.requests import Rerecord, engine_label, first_row, request_params, sampling_of

__all__ = ["AsyncLLMRecorder", "LLMRecorder"]

_Result = TypeVar("_Result")

_WRITERS = 2
"""Threads that write: enough for one to wait for room in the store's buffer while the other checks rows."""

_REASON = 500
"""Characters of an engine's error that the log keeps."""


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
        self._flights: dict[str, _Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # a task that nobody holds may be collected while it runs
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="trajstore-vllm")

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
        flight = _Flight(trajectory.id if request_id is None else request_id, self.weight_version)
        if flight.request_id in self._flights:
            raise Conflict(f"request {flight.request_id!r} is in flight; use another id, or abort it first")
        self._flights[flight.request_id] = flight
        task = asyncio.create_task(
            self._run(flight, trajectory, context, sampling_params, base, rerecord or self._rerecord)
        )
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await self._end(flight, task)
            raise

    async def abort(self, request_id: str | None = None) -> None:
        """End a request, or all in flight. Their `generate` returns what they delivered, with finish reason abort."""
        flights = [flight for id, flight in self._flights.items() if request_id in (None, id)]
        for flight in flights:
            flight.aborting = True
        if flights:
            await self._engine.abort([flight.request_id for flight in flights])

    def set_weight_version(self, weight_version: str) -> None:
        """Say that the engine has other weights from now on.

        Call it after `pause_generation(mode="keep")` has returned and before `resume_generation`. Where the engine does
        not report weight versions itself, a request in flight gets spans of them that change at the tokens delivered so
        far.
        """
        self.weight_version = check_label(weight_version, name="weight_version")
        for flight in self._flights.values():
            flight.versions.append((flight.delivered, self.weight_version))

    async def _run(
        self,
        flight: "_Flight",
        trajectory: TrajectoryWriter,
        context: npt.ArrayLike,
        sampling_params: Any,
        base: int | None,
        rerecord: Rerecord,
    ) -> Any:
        """One request, from its segment's opening to its close."""
        try:
            segment, prompt, params = await self._write(
                _open, flight, trajectory, context, sampling_params, base, rerecord, self._label
            )
            if flight.aborting:
                await self._write(_end_early, segment, "aborted before the request was sent")
                return None
            async with contextlib.aclosing(self._engine.generate(prompt, params, flight.request_id)) as outputs:
                last = await self._record(flight, segment, outputs)
            if not segment.closed:
                await self._write(_end_early, segment, "the engine's outputs ended without a last one")
            return last
        except BaseException as error:
            await self._write(_fail, flight, error)
            raise
        finally:
            del self._flights[flight.request_id]

    async def _record(self, flight: "_Flight", segment: SegmentWriter, outputs: AsyncIterator[Any]) -> Any:
        """Read outputs as they come, and write what came whatever ends them.

        One write is under way at most; what comes meanwhile goes with the next.
        """
        last: Any = None
        write: asyncio.Task[bool] | None = None
        written = 0
        try:
            async for last in outputs:
                flight.see(last)
                if flight.ended:
                    continue
                if flight.aborting:  # the first call may have come before the engine knew the request
                    await self._engine.abort([flight.request_id])
                if write is not None and write.done():
                    write.result()
                    write = None
                if write is None and flight.delivered - written >= self._every:
                    written = flight.delivered
                    write = self._take(flight, segment, last)
        finally:
            if write is not None:
                await asyncio.wait({write})
                write.result()
            if flight.ended or flight.delivered > written:
                await self._take(flight, segment, last)
        return last

    def _take(self, flight: "_Flight", segment: SegmentWriter, output: Any) -> "asyncio.Task[bool]":
        """Read an output on this thread, for vLLM goes on appending to the lists in it, and write it on another."""
        known = known_of(segment, None)
        try:
            delivery = parse_output(output, known, output_kind="CUMULATIVE")
        except (RoutingError, SchemaError) as error:
            return asyncio.create_task(self._write(_refuse, segment, error))
        return asyncio.create_task(self._write(_deliver, segment, delivery, known, flight.spans))

    async def _end(self, flight: "_Flight", task: "asyncio.Task[Any]") -> None:
        """Abort the request of a cancelled call, and wait until what came is recorded."""
        flight.aborting = True
        if not task.done():
            await self._engine.abort([flight.request_id])
            await asyncio.wait({task}, timeout=self._abort_timeout)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=self._abort_timeout)

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a cancelled call does not ask for it, and asyncio would complain

    async def _write(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """Run it in a writing thread, to its end even if this task is cancelled: no two may write one segment."""
        future = asyncio.get_running_loop().run_in_executor(self._writers, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise


class LLMRecorder:
    """Generates with an `LLM`, a batch of trajectories at a time, and records it.

    Args:
        llm: a `vllm.LLM`, made with `enable_return_routed_experts=True`.
        weight_version: label of the weights that it has now.
        rerecord: as in `AsyncLLMRecorder`.

    Attributes:
        weight_version: of requests to come.
    """

    def __init__(self, llm: Any, *, weight_version: str = "", rerecord: Rerecord = "rows") -> None:
        self.weight_version = check_label(weight_version, name="weight_version")
        self._llm = llm
        self._rerecord: Rerecord = check_choice(rerecord, get_args(Rerecord), name="rerecord")
        self._label = engine_label()

    def set_weight_version(self, weight_version: str) -> None:
        """Say that the engine has other weights from now on."""
        self.weight_version = check_label(weight_version, name="weight_version")

    def generate(
        self,
        trajectories: Sequence[TrajectoryWriter],
        contexts: Sequence[npt.ArrayLike] | None = None,
        sampling_params: Any = None,
        *,
        rerecord: Rerecord | None = None,
    ) -> list[Any]:
        """One segment of each trajectory, generated as one batch.

        Args:
            trajectories: different ones.
            contexts: new input of each; default none, which resumes them all.
            sampling_params: a `vllm.SamplingParams` with n = 1, or one for each trajectory.
            rerecord: default the recorder's.

        Returns:
            The engine's `RequestOutput` of each.

        Raises:
            SchemaError: not one context or parameters for each, or n > 1.
            Conflict: as `TrajectoryWriter.segment`.
            ExceptionGroup: outputs that cannot be; all others are recorded.
            Exception: what the engine raises; the segments are closed as `error`.
        """
        count = len(trajectories)
        inputs: Sequence[npt.ArrayLike] = [()] * count if contexts is None else contexts
        params = list(sampling_params) if isinstance(sampling_params, list | tuple) else [sampling_params] * count
        if len(inputs) != count or len(params) != count:
            raise SchemaError(f"{count} trajectories, {len(inputs)} contexts and {len(params)} sampling parameters")
        mode = rerecord or self._rerecord
        with contextlib.ExitStack() as open_segments:
            segments, prompts, asked = [], [], []
            for trajectory, context, given in zip(trajectories, inputs, params, strict=True):
                flight = _Flight(trajectory.id, self.weight_version)
                segment, prompt, own = _open(
                    flight, trajectory, context, given, None, mode, self._label, cumulative=False
                )
                segments.append(open_segments.enter_context(segment))
                prompts.append(prompt)
                asked.append(own)
            outputs = list(self._llm.generate(prompts, asked, use_tqdm=False))
            if len(outputs) != count:
                raise SchemaError(f"the engine returned {len(outputs)} outputs for {count} requests")
            refused: list[Exception] = []
            for segment, output in zip(segments, outputs, strict=True):
                try:
                    record_output(segment, output, output_kind="FINAL_ONLY")
                except TrajstoreError as error:
                    refused.append(error)
            if refused:
                raise ExceptionGroup(f"{len(refused)} of {count} outputs could not be recorded", refused)
        return outputs


class _Flight:
    """A request that has not ended.

    Attributes:
        request_id: as the engine knows it.
        segment: once it is open.
        aborting: somebody wants it to end.
        ended: its last output has come.
        delivered: output tokens that have come.
        versions: labels of the weights, by the output token from which on they sample.
    """

    def __init__(self, request_id: str, weight_version: str) -> None:
        self.request_id = request_id
        self.segment: SegmentWriter | None = None
        self.aborting = False
        self.ended = False
        self.delivered = 0
        self.versions = [(0, weight_version)]

    def see(self, output: Any) -> None:
        """Count what a cumulative output brings."""
        choice = choice_of(output, 0)
        self.delivered = len(getattr(choice, "token_ids", ()))
        self.ended = bool(getattr(output, "finished", False)) or getattr(choice, "finish_reason", None) is not None

    def spans(self, total: int) -> tuple[WeightVersionSpan, ...]:
        """Weight versions of `total` output tokens; none where they never changed."""
        ends = [*(start for start, _ in self.versions[1:]), total]
        spans = [
            WeightVersionSpan(name, at, end) for (at, name), end in zip(self.versions, ends, strict=True) if at < end
        ]
        return tuple(spans) if len(self.versions) > 1 else ()


# What writing threads do


def _open(
    flight: _Flight,
    trajectory: TrajectoryWriter,
    context: npt.ArrayLike,
    sampling_params: Any,
    base: int | None,
    rerecord: Rerecord,
    engine: str,
    *,
    cumulative: bool = True,
) -> tuple[SegmentWriter, dict[str, list[int]], Any]:
    """Open the segment of a request; its prompt and parameters for the engine."""
    kept = len(trajectory) if base is None else check_count(base, name="base")
    start = first_row(trajectory, base=kept, prompt=kept + int(np.size(context)), rerecord=rerecord)
    params = request_params(sampling_params, start=start, cumulative=cumulative)
    flight.segment = trajectory.segment(
        context=context,
        base=base,
        engine=engine,
        weight_version=flight.versions[0][1],
        sampling=sampling_of(params),
    )
    return flight.segment, {"prompt_token_ids": trajectory.token_ids.tolist()}, params


def _deliver(
    segment: SegmentWriter,
    delivery: Delivery,
    known: Known,
    spans: Callable[[int], Sequence[WeightVersionSpan]],
) -> bool:
    with refusing(segment):
        total = known.output + len(delivery.token_ids)
        return record_delivery(segment, delivery, known, weight_versions=spans(total))


def _refuse(segment: SegmentWriter, error: TrajstoreError) -> bool:
    with refusing(segment):
        raise error


def _end_early(segment: SegmentWriter, reason: str) -> None:
    """Close a segment whose request brought no end of its own."""
    if segment.spec is not None:
        segment.no_routing(reason)
    segment.close("abort")


def _fail(flight: _Flight, error: BaseException) -> None:
    """Close the segment of a request that failed, if it is open; `error` is on its way and tells more than this can."""
    segment = flight.segment
    if segment is None or segment.closed:
        return
    with contextlib.suppress(TrajstoreError):
        if isinstance(error, asyncio.CancelledError):
            _end_early(segment, "cancelled, and the engine brought no last output")
        elif segment.spec is not None and not isinstance(error, TrajstoreError):
            segment.no_routing(f"the engine failed: {type(error).__name__}: {error}"[:_REASON])
    segment.__exit__(type(error), error, None)
