"""The two halves of a recording client, to mix into verl's: around its resume loop, and between that and the server.

verl's own loop stays in charge of budgets, retries and when a request is over. `client.py` puts the halves in place.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy.typing as npt

from trajstore import Conflict, NotFound, RoutingSpec, Store, TrajectoryWriter, TrajstoreError
from trajstore.adapter import as_reason, refusing, require_input
from trajstore.events import Status
from trajstore.fold import Policy
from trajstore.ingest import token_array
from trajstore.segment_writer import SegmentWriter
from trajstore.threaded import run_threaded
from trajstore_verl.recording import record_output
from trajstore_verl.token_output import output_fields
from trajstore_verl.turn import Turn, find_turn

__all__ = ["RecordedCalls", "RecordedRollouts"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_STOP_REASONS = {"stop": "completed", "length": "length"}

if TYPE_CHECKING:

    class _Client:
        """What the class mixed into has."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        async def generate(
            self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
        ) -> Any: ...

else:
    _Client = object


class _Rollout:
    """One turn of one trajectory while it is generated. Leaving its block ends a segment that no output has ended.

    Attributes:
        turn: as found when it began.
        generated: the tokens that the trajectory had of it then.
    """

    def __init__(self, store: Store, writer: TrajectoryWriter, turn: Turn, engine: str) -> None:
        self.turn = turn
        self.generated: list[int] = writer.token_ids[turn.start : turn.stop].tolist()
        self._store = store
        self._writer = writer
        self._engine = engine
        self._base: int | None = turn.base
        self._context = turn.context
        self._segment: SegmentWriter | None = None

    def open(self, prompt_ids: npt.ArrayLike, sampling_params: Mapping[str, Any]) -> SegmentWriter:
        """The segment of the next engine call, whose input must be `prompt_ids`.

        On return it and all before it are acknowledged: no engine works for a writer that was fenced, and what was
        generated so far survives this process.
        """
        segment = self._segment = self._writer.segment(
            base=self._base,
            context=self._context,
            engine=self._engine,
            sampling=json.loads(json.dumps(dict(sampling_params), default=repr, skipkeys=True)),
        )
        self._base, self._context = None, self._context[:0]
        with refusing(segment):
            require_input(segment, prompt_ids)
        self._store.flush(self._writer.id)
        return segment

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._segment is not None and not self._segment.closed:
            await run_threaded(None, _end, self._segment, error)


_rollout: ContextVar[_Rollout | None] = ContextVar("trajstore_verl_rollout", default=None)
"""Of this task. verl passes what it does not know on to the server, so nothing can ride in its arguments."""


class RecordedCalls(_Client):
    """Goes between verl's resume loop and the client that calls a server: records each output as it comes."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any:
        """As verl's `LLMServerClient.generate`; within a recorded rollout its output becomes a segment.

        Raises:
            Conflict: the loop sends another input than the trajectory's tokens.
            SchemaError, RoutingError: the output cannot be right; only the reason is stored.
            Fenced: another process has taken the trajectory over.
        """
        rollout = _rollout.get()
        if rollout is None:
            return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)
        limit = _limit(sampling_params)[1]
        segment = await run_threaded(None, rollout.open, prompt_ids, sampling_params)
        output = await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)
        await run_threaded(None, _record, segment, output, limit)
        return output


class RecordedRollouts(_Client):
    """Goes around verl's resume loop: finds the trajectory, and hands its fold back instead of verl's own merge.

    A trajectory is one rollout: every turn of an agent loop, every part of an aborted turn. It holds no rollout between
    two turns; what it knows is in the store. Clients are sent to other processes: each opens the store anew.

    Args:
        open_store: opens the store, e.g. `functools.partial(trajstore.open, url)`; must be picklable.
        routing: of the model. None: tokens alone are recorded and handed back, whatever rows the servers return.
        policy: the fold that is handed back.
        engine: as in the segments.

    Other arguments are those of verl's client.
    """

    output_type: Callable[..., Any]
    """verl's `TokenOutput`."""

    def __init__(
        self,
        *args: Any,
        open_store: Callable[[], Store],
        routing: RoutingSpec | None,
        policy: Policy = "last_segment_wins",
        engine: str = "verl",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.engine = engine
        self._open_store = open_store
        self._routing = routing
        self._policy = policy
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._generating: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None, "_opening": None, "_generating": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._opening = threading.Lock()

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        trajectory_id: str | None = None,
        group: str | None = None,
        group_size: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As verl's `FullyAsyncLLMServerClient.generate`, recorded.

        What a dead process has generated of this turn is not generated again: the engine goes on from there, within
        what is left of the budget. A turn that was generated to its end is handed out from the store.

        Args:
            trajectory_id: of the rollout, the same in every turn. Give one that a restarted process finds again (step,
                sample and number in the group, say). Default the `request_id`, which names a new rollout: one whose
                turn was generated before is refused, for recycled ids would train on another step's tokens.
            group, group_size, metadata: for `store.create`, if the trajectory is a new one.

        Returns:
            verl's `TokenOutput`, its fields as `output_fields` says.

        Raises:
            Conflict: the prompt is not one of this trajectory's; or the trajectory is final, was generated before, or
                is being generated: the second of two calls at once would fence the first.
            Fenced: another process has taken the trajectory over.
            SchemaError, RoutingError: an output cannot be right.
            TrajstoreError: what the store raises.
        """
        prompt = token_array(prompt_ids, name="prompt_ids")
        id = str(request_id) if trajectory_id is None else trajectory_id
        created = {"group": group, "group_size": group_size, "metadata": metadata}
        if id in self._generating:
            raise Conflict(f"{id} is being generated by this client; a trajectory is generated by one call at a time")
        self._generating.add(id)
        try:
            return await self._generate(
                request_id, prompt, dict(sampling_params), id, created, resumes=trajectory_id is not None, extra=kwargs
            )
        finally:
            self._generating.discard(id)

    async def _generate(
        self,
        request_id: str,
        prompt: npt.NDArray[Any],
        sampling_params: dict[str, Any],
        id: str,
        created: Mapping[str, Any],
        *,
        resumes: bool,
        extra: Mapping[str, Any],
    ) -> Any:
        """One turn, with verl's own loop in the middle."""
        rollout = await run_threaded(None, self._begin, id, prompt, resumes, created)
        turn = rollout.turn
        done = turn.stop - turn.start
        if done:
            sampling_params = self._rest(sampling_params, done)
        if turn.finish_reason or (done and _limit(sampling_params)[1] == 0):
            return await run_threaded(None, self._hand_back, turn, id, None)
        token = _rollout.set(rollout)
        try:
            async with rollout:
                output = await super().generate(
                    request_id,
                    prompt_ids=[*prompt.tolist(), *rollout.generated],
                    sampling_params=sampling_params,
                    **extra,
                )
        finally:
            _rollout.reset(token)
        return await run_threaded(None, self._hand_back, turn, id, output)

    async def close_trajectory(self, id: str, *, status: Status = "completed", reward: float | None = None) -> None:
        """Score and end a rollout, so that it is folded and published; acknowledged on return.

        An agent loop may, after its last turn; a reward worker does it with `store.get(id)`.

        Raises:
            NotFound, Conflict, TrajstoreError: as `store.get`, `reward` and `close` of the handle, and `store.flush`.
        """
        await run_threaded(None, self._close, id, status, reward)

    def close(self) -> None:
        """Flush and close the store, if this process has opened it."""
        with self._opening:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def _opened(self) -> Store:
        with self._opening:
            if self._store is None:
                self._store = self._open_store()
            return self._store

    def _begin(self, id: str, prompt: npt.NDArray[Any], resumes: bool, created: Mapping[str, Any]) -> _Rollout:
        store = self._opened()
        try:
            history = store.plan(id).history
        except NotFound:
            new = store.create(id=id, routing=self._routing, **created)
            return _Rollout(store, new, Turn(0, prompt, len(prompt), len(prompt), ""), self.engine)
        writer = store.get(id)
        if len(writer) != history.length:
            raise Conflict(f"{id}: another process writes to this trajectory; one at a time generates a rollout")
        turn = find_turn(history, writer.token_ids, prompt)
        if turn.finish_reason and not resumes:
            raise Conflict(
                f"the turn after these {len(prompt)} tokens of {id} was generated before. A request id must be new for "
                "every rollout; to have a recorded one handed out again, name it by trajectory_id="
            )
        return _Rollout(store, writer, turn, self.engine)

    def _rest(self, sampling_params: dict[str, Any], done: int) -> dict[str, Any]:
        """The parameters with what is left of the budget after `done` tokens."""
        name, limit = _limit(sampling_params)
        if limit is None:  # as verl does in the first place
            configured = getattr(self, "_configured_response_length", None)
            limit = None if configured is None else configured()
        return sampling_params if limit is None else {**sampling_params, name: max(0, limit - done)}

    def _hand_back(self, turn: Turn, id: str, output: Any) -> Any:
        """The fold as verl's output; `output` is verl's own merge, None if the engine was not asked."""
        store = self._opened()
        store.flush(id)
        trajectory = store.load(id, policy=self._policy)
        if output is None:
            fields = output_fields(trajectory, start=turn.start, stop=turn.stop)
            return self.output_type(**fields, stop_reason=_STOP_REASONS[turn.finish_reason or "length"])
        fields = output_fields(trajectory, start=turn.start)
        if fields["token_ids"][turn.stop - turn.start :] != list(output.token_ids):
            raise Conflict(f"{id}: the trajectory does not end with what was generated; another process wrote to it")
        said = {name: value for name, value in fields["extra_fields"].items() if value is not None}
        return self.output_type(
            **{**fields, "extra_fields": {**output.extra_fields, **said}}, stop_reason=output.stop_reason
        )

    def _close(self, id: str, status: Status, reward: float | None) -> None:
        store = self._opened()
        writer = store.get(id)
        if reward is not None:
            writer.reward(reward)
        writer.close(status)
        store.flush(id)


def _record(segment: SegmentWriter, output: Any, max_tokens: int | None) -> None:
    record_output(segment, output, max_tokens=max_tokens)


def _end(segment: SegmentWriter, error: BaseException | None) -> None:
    """Close a segment that no output has ended; `error` is on its way and tells more than a failure to."""
    try:
        if isinstance(error, Exception) and not isinstance(error, TrajstoreError) and segment.spec is not None:
            segment.no_routing(as_reason(f"the engine failed: {type(error).__name__}: {error}"))
        segment.close("error" if isinstance(error, Exception) else "abort")
    except TrajstoreError as failure:
        if failure is not error:
            log.warning("segment %d of a rollout could not be closed: %s", segment.index, failure)


def _limit(sampling_params: Mapping[str, Any]) -> tuple[str, int | None]:
    """By which name verl is told how many tokens to generate at most, and how many."""
    for name in ("max_tokens", "max_new_tokens"):
        if name in sampling_params:
            return name, sampling_params[name]
    return "max_tokens", None
