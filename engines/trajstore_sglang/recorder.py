"""Generating with a SGLang server and recording it, as one call: a rollout worker's side of the engine."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from ulid import ULID

from trajstore import Conflict, SchemaError, SegmentWriter, TrajectoryWriter, Unavailable
from trajstore.adapter import EngineCapabilities, as_reason
from trajstore.ingest import check_choice, check_finite, check_id
from trajstore.threaded import run_threaded, until_done
from trajstore_sglang.capabilities import capabilities
from trajstore_sglang.client import SGLangClient
from trajstore_sglang.parsing import UNLABELLED
from trajstore_sglang.recording import StreamRecording, record_response
from trajstore_sglang.reply import Reply

__all__ = ["Rerecord", "SGLangRecorder"]

log = logging.getLogger(__name__)

Rerecord = Literal["rows", "prefix"]
"""Which rows of its input a resumed request is asked for: those that the trajectory lacks, or all, to audit drift."""

_RERECORDS: tuple[Rerecord, ...] = get_args(Rerecord)

_REPEAT = 1.0
"""Seconds after which an abort is sent again: one that comes before its request has no effect."""

_FLUSH = 5.0
"""Seconds for which a refused flush is asked for again."""

_UPDATED = "Weights were updated"
"""How SGLang begins to say that only the flush of its cache was refused."""


class SGLangRecorder:
    """Generates with one server, and records every request as a segment of its trajectory.

    async with SGLangRecorder("http://127.0.0.1:30000") as recorder:
        reply = await recorder.generate(trajectory, prompt, {"max_new_tokens": 256})

    Any number of requests run at once, one at a time for each trajectory. The event loop is never blocked: parsing and
    writing happen on threads.

    Args:
        url, api_key: of the server, as in `SGLangClient`.
        timeout: seconds that a request may take, pauses of the server included; then it is aborted, and what came is
            recorded as an abort.
        abort_timeout: seconds for an aborted request to come back with what it has.
        rerecord: see `Rerecord`.
        stream: record tokens as they are sampled, so that a killed worker loses none of them. SGLang sends all tokens
            again with each new one, unless its server runs with --incremental-streaming-output.

    Attributes:
        client: the server's other routes.
        capabilities: of the server's version.
        weight_version: label of the server's weights as last heard of, "" where nobody labelled them.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        timeout: float = 600.0,
        abort_timeout: float = 30.0,
        rerecord: Rerecord = "rows",
        stream: bool = False,
    ) -> None:
        self.client = SGLangClient(url, api_key=api_key)
        self.timeout = check_finite(timeout, name="timeout")
        self.abort_timeout = check_finite(abort_timeout, name="abort_timeout")
        self.rerecord: Rerecord = check_choice(rerecord, _RERECORDS, name="rerecord")
        self.stream = stream
        self.capabilities: EngineCapabilities
        self.weight_version = ""
        self._routes: bool | None = None  # None: the server does not tell
        self._flights: dict[str, _Flight] = {}

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        try:
            info = await self.client.server_info()
            self.capabilities = capabilities(str(info.get("version", "")))
            self.capabilities.warn()
            routes = info.get("enable_return_routed_experts")
            self._routes = routes if isinstance(routes, bool) else None
            self._heard(str((await self.client.model_info()).get("weight_version") or ""))
        except BaseException:
            await self.client.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.abort()
        finally:
            await self.client.__aexit__()

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Ids of the requests that have not come back."""
        return tuple(self._flights)

    async def generate(
        self,
        trajectory: TrajectoryWriter,
        context: npt.ArrayLike = (),
        sampling_params: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        *,
        base: int | None = None,
        rerecord: Rerecord | None = None,
        stream: bool | None = None,
    ) -> Reply:
        """One request: the input is all of the trajectory and the new context, and its answer becomes a segment.

        Without a context it resumes what was aborted. A request that is aborted, here, at the server or by the
        deadline, returns with the finish reason `abort` and what it has. If the awaiting task is cancelled, the request
        is aborted and recorded before the cancellation goes on.

        Args:
            context, base: as in `TrajectoryWriter.segment`.
            sampling_params: SGLang's, for one output.
            request_id: of letters, digits and ._:@+=~-, not in use; default a new one.
            rerecord, stream: default the recorder's.

        Returns:
            The answer; the last chunk where it was streamed. The tokens are in the trajectory.

        Raises:
            Conflict: the request id is in flight; the trajectory has a routing spec and the server returns no routing;
                or as `TrajectoryWriter.segment`.
            SchemaError, RoutingError: SGLang refused the request, or its answer was; the segment is closed as `error`.
            Unavailable: no answer; the segment is closed as `abort` and has what came.
        """
        params = dict(sampling_params or {})
        if params.get("n", 1) != 1:
            raise SchemaError("a segment is one output; ask for n = 1, with a trajectory for each")
        if trajectory.routing is not None and self._routes is False:
            raise Conflict(
                f"{self.client.url} returns no routing: start its server with --enable-return-routed-experts, or "
                "create the trajectory without a routing spec"
            )
        mode: Rerecord = check_choice(rerecord or self.rerecord, _RERECORDS, name="rerecord")
        name = str(ULID()) if request_id is None else check_id(request_id)
        if name in self._flights:
            raise Conflict(f"request {name!r} is in flight; ids of requests in flight are distinct")
        flight = self._flights[name] = _Flight(name)
        flight.work = asyncio.create_task(
            self._generate(flight, trajectory, context, base, params, mode, self.stream if stream is None else stream)
        )
        try:
            return await self._watch(flight)
        finally:
            del self._flights[name]

    async def abort(self, request_id: str | None = None) -> None:
        """Abort one of this recorder's requests, or all of them, and wait until they are recorded.

        Their `generate` returns with what they have. It is no error if there is no such request.
        """
        names = list(self._flights) if request_id is None else [request_id]
        flights = [self._flights[name] for name in names if name in self._flights]
        for flight in flights:
            flight.stop.set()
        if flights:
            await asyncio.wait([flight.work for flight in flights], timeout=self.abort_timeout + self.client.timeout)

    async def update_weights_from_disk(
        self, model_path: str, *, weight_version: str, flush_cache: bool = True, timeout: float = 600.0
    ) -> None:
        """Load weights from a path that the server can read, and label what is sampled from now on.

        A moment after an abort SGLang still refuses to flush its cache, though it has changed the weights; then the
        flush is asked for again, for some seconds.

        Raises:
            Conflict: SGLang says that it failed. If it is the flush of the cache that was refused, because requests run
                or wait, the weights and their version have changed all the same, and so has `weight_version`.
        """
        try:
            await self.client.update_weights_from_disk(
                model_path, weight_version=weight_version, flush_cache=flush_cache, timeout=timeout
            )
        except Conflict as refused:
            if _UPDATED not in str(refused):
                raise
            self.weight_version = weight_version  # as its answers tell from now on, though /model_info tells the old
            if not await self._flushed():
                raise
        self.weight_version = weight_version

    async def _flushed(self) -> bool:
        """Whether the cache could be flushed soon after all."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _FLUSH
        while not self._flights and clock() < deadline:
            with contextlib.suppress(Conflict):
                await self.client.flush_cache()
                return True
            await asyncio.sleep(_FLUSH / 20)
        return False

    async def update_weight_version(self, weight_version: str) -> None:
        """Label the weights that the server has, which came by another way (NCCL, shared memory)."""
        await self.client.update_weight_version(weight_version)
        self.weight_version = weight_version

    def _heard(self, version: str) -> None:
        if version:
            self.weight_version = "" if version == UNLABELLED else version

    async def _watch(self, flight: "_Flight") -> Reply:
        """Wait for a request's work, and see to it that it is over, and recorded, whatever ends the waiting."""
        stop = asyncio.create_task(flight.stop.wait())
        try:
            await asyncio.wait({flight.work, stop}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            await self._bring_back(flight)
        except asyncio.CancelledError:
            await self._bring_back(flight)
            if flight.work.done() and not flight.work.cancelled() and flight.work.exception() is not None:
                log.warning("cancelled request %s ended with: %s", flight.name, flight.work.exception())
            raise
        finally:
            stop.cancel()
        if flight.work.cancelled():
            raise Unavailable(
                f"{self.client.url} did not answer request {flight.name}, nor its abort within {self.abort_timeout} s; "
                "the trajectory has what came"
            )
        return flight.work.result()

    async def _bring_back(self, flight: "_Flight") -> None:
        """Abort a request that is not over until it has come back and is recorded; give it up at the deadline."""
        flight.stop.set()
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.abort_timeout
        try:
            while not flight.work.done() and (left := deadline - clock()) > 0:
                try:
                    await self.client.abort_request(flight.rid, timeout=min(left, self.client.timeout))
                except (Unavailable, Conflict) as error:
                    log.warning("request %s could not be aborted: %s", flight.name, error)
                await asyncio.wait({flight.work}, timeout=max(0.0, min(_REPEAT, deadline - clock())))
        finally:
            if not flight.work.done():
                flight.work.cancel()
                await until_done(flight.work)

    async def _generate(
        self,
        flight: "_Flight",
        trajectory: TrajectoryWriter,
        context: npt.ArrayLike,
        base: int | None,
        params: dict[str, Any],
        rerecord: Rerecord,
        stream: bool,
    ) -> Reply:
        """Open the segment, ask, record, close. Runs as a task of its own: it ends with a closed segment."""
        segment = await run_threaded(
            None,
            trajectory.segment,
            context=context,
            base=base,
            engine=self.capabilities.label,
            weight_version=self.weight_version,
            sampling=params,
        )
        try:
            if flight.stop.is_set():
                return await run_threaded(None, _end, segment, "aborted before it was sent")
            start_len = None
            body: dict[str, Any] = {
                "rid": flight.rid,
                "input_ids": (await run_threaded(None, _tokens_of, trajectory)).tolist(),
                "sampling_params": params,
                "return_logprob": True,
                "stream": stream,
                "return_prompt_token_ids": not stream,  # a stream would repeat them with every token
            }
            if trajectory.routing is not None:
                start_len = trajectory.rows_held if rerecord == "rows" else 0
                body |= {"return_routed_experts": True, "routed_experts_start_len": start_len}
            ask = self._streamed if stream else self._whole
            reply = await ask(segment, body, start_len)
            self._heard(reply.weight_version)
            return reply
        except (Unavailable, asyncio.CancelledError) as error:
            if not segment.closed:
                await run_threaded(
                    None, _end, segment, as_reason(f"no answer: {error}") if str(error) else "given up without answer"
                )
            raise
        finally:
            if not segment.closed:
                await run_threaded(None, segment.close, "error")

    async def _whole(self, segment: SegmentWriter, body: dict[str, Any], start_len: int | None) -> Reply:
        answer = await self.client.generate(body)
        return await run_threaded(None, record_response, segment, answer, start_len=start_len)

    async def _streamed(self, segment: SegmentWriter, body: dict[str, Any], start_len: int | None) -> Reply:
        recording = StreamRecording(segment, start_len=start_len)
        async with contextlib.aclosing(self.client.stream(body)) as parts:  # SGLang aborts what nobody reads any more
            async for lines in parts:
                await run_threaded(None, _add_all, recording, lines)
        return await run_threaded(None, recording.end)


class _Flight:
    """A request that has not come back.

    Its `rid` at the server ends with a sign that no request id has: SGLang aborts by prefix, and of such ids none is
    the beginning of another.
    """

    work: asyncio.Task[Reply]

    def __init__(self, name: str) -> None:
        self.name = name
        self.rid = f"{name}$"
        self.stop = asyncio.Event()


def _tokens_of(trajectory: TrajectoryWriter) -> npt.NDArray[np.int32]:
    return trajectory.token_ids


def _add_all(recording: StreamRecording, lines: list[bytes]) -> None:
    for line in lines:
        recording.add(line)


def _end(segment: SegmentWriter, reason: str) -> Reply:
    """Close a segment whose request has no end of its own."""
    return StreamRecording(segment).end(reason)
