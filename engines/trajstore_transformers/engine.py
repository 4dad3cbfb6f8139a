"""The engine: continuous batching over one model, step by step."""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from trajstore import Conflict, RoutingSpec, SchemaError, TrajectoryWriter
from trajstore.engine import Scored
from trajstore.ingest import check_count, check_label, token_array
from trajstore_transformers.batch import Batch
from trajstore_transformers.forward import Forward
from trajstore_transformers.replay import end_tokens, load_model, read_tokens, resume
from trajstore_transformers.request import Request, RequestOutput, SamplingParams
from trajstore_transformers.sampling import Sampler
from trajstore_transformers.weights import copy_weights

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """Generates with a Hugging Face mixture-of-experts model, and delivers the routing of every token with its tokens.

    One thread uses it at a time. All random numbers come from one generator: the same seed and the same calls in the
    same order give the same tokens on the same machine. What a request draws depends on who shares its batch; what it
    gets at temperature 0 does not, to the precision of the model's dtype.

    Args:
        model: a causal language model whose routers can be read (see `capture.ROUTERS`). It is put into eval mode, and
            gets hooks that `close` removes.
        weight_version: label of the weights that the model has now.
        max_batch: requests in flight at most; others wait.
        seed: of the random numbers.

    Attributes:
        name: "transformers/" and its version.
        weight_version: label of the weights in use.
        routing_spec: which layers route, and how; for `store.create(routing=...)`.
        takes: see `trajstore.engine.Resumer`; nothing, for it samples from the whole distribution.

    Raises:
        SchemaError: the model is not supported, which the message explains; or an argument is out of range.
    """

    takes: frozenset[str] = frozenset()

    def __init__(
        self, model: PreTrainedModel, *, weight_version: str = "0", max_batch: int = 16, seed: int = 0
    ) -> None:
        if check_count(max_batch, name="max_batch") < 1:
            raise SchemaError("max_batch is 0; an engine must be allowed at least one request in flight")
        self.name = f"transformers/{transformers.__version__}"
        self.weight_version = check_label(weight_version, name="weight_version")
        self._model = model.eval()  # type: ignore[no-untyped-call]
        self._max_batch = max_batch
        self._sampler = Sampler(check_count(seed, name="seed"), model.device)
        config = model.config.get_text_config(decoder=True)
        self._vocab_size = int(config.vocab_size)
        self._context_length: int | None = getattr(config, "max_position_embeddings", None)
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: Batch | None = None
        self._closed = False
        self._forward = Forward(model)
        self.routing_spec: RoutingSpec = self._forward.spec

    @property
    def has_unfinished_requests(self) -> bool:
        """Some request has not delivered its last output."""
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt_token_ids: npt.ArrayLike, params: SamplingParams | None = None
    ) -> None:
        """Queue a request; a step to come begins it.

        Args:
            request_id: any string that no unfinished request has.
            prompt_token_ids: integers `[P]`. To resume a trajectory: all of its tokens.
            params: default `SamplingParams()`. The output also ends, with "length", at the model's context length.

        Raises:
            SchemaError: no or bad id, empty prompt, a token outside the vocabulary, or a prompt as long as the context.
            Conflict: the id is in use, or the engine is closed.
        """
        self._require_usable()
        if not isinstance(request_id, str) or not request_id:
            raise SchemaError(f"{request_id!r} cannot be a request id; use a string of at least one character")
        if request_id in self._requests:
            raise Conflict(f"request {request_id!r} is unfinished; use another id, or abort it first")
        prompt = token_array(prompt_token_ids, name="prompt_token_ids")
        if len(prompt) == 0:
            raise SchemaError(f"request {request_id!r} has an empty prompt; there is nothing to continue")
        self._require_known(prompt, f"request {request_id!r}: prompt_token_ids")
        params = params if params is not None else SamplingParams()
        limit = params.max_tokens
        if self._context_length is not None:
            limit = min(limit, self._context_length - len(prompt))
        if limit < 1:
            raise SchemaError(
                f"request {request_id!r}: {len(prompt)} prompt tokens leave no room in a context of "
                f"{self._context_length}"
            )
        request = Request(request_id, prompt, params, limit)
        self._requests[request_id] = request
        self._waiting.append(request)

    def step(self) -> list[RequestOutput]:
        """One token for every request in flight: the running ones decode, then waiting ones take the free places.

        Returns:
            One output per request with news, in the order of their `add_request`.

        Raises:
            Conflict: the engine is closed, or its model is in training mode.
            SchemaError: the model's logits are not finite. What was generated before is kept: abort delivers it.
        """
        self._require_evaluating()
        with torch.inference_mode():
            if self._running is not None:
                self._running.decode(self._forward, self._sampler)
                self._drop_finished()
            self._admit()
        return self._deliver()

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request between two steps.

        Returns:
            Its last output: what no output has told yet, and all of its routing. None for an id that is not unfinished.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self._abort([request])
        return request.report()

    def abort_all(self) -> list[RequestOutput]:
        """End all requests, as `abort_request`; in the order of their `add_request`."""
        self._abort(self._requests.values())
        return self._deliver()

    def update_weights(self, weights: Mapping[str, Tensor], weight_version: str) -> None:
        """Copy new weights into the model's own parameters.

        Args:
            weights: by the names of the model's `state_dict()`, all of them; see `weights.copy_weights`.
            weight_version: their label.

        Raises:
            Conflict: a request is unfinished (it would go on under other weights than it began with), or the engine is
                closed.
            SchemaError: the weights do not fit the model; nothing was changed.
        """
        self._require_usable()
        if self._requests:
            raise Conflict(
                f"{len(self._requests)} requests are unfinished under weights {self.weight_version!r}; abort_all(), "
                "update, and add them again"
            )
        label = check_label(weight_version, name="weight_version")
        copy_weights(self._model, weights)
        self.weight_version = label

    # Recorded rollouts: `trajstore.engine.Scorer` and `Resumer`

    @classmethod
    def for_replay(cls, folder: Path, *, weight_version: str, dtype: str = "auto", seed: int = 0) -> Self:
        """An engine over the model in a folder; see `trajstore.engine`.

        Raises:
            NotFound, SchemaError: see `replay.load_model`.
        """
        return cls(load_model(folder, dtype=dtype), weight_version=weight_version, seed=seed)

    def score(self, token_ids: npt.NDArray[np.int32], *, temperature: npt.NDArray[np.float32] | None = None) -> Scored:
        """Teacher-force tokens: the logprob of each given those before it, and the routing of all.

        What is in flight is not touched. Memory is that of the cache of T tokens and of the logits of some hundred.

        Args:
            token_ids: int32 `[T]`.
            temperature: float32 `[T]`, positive; default 1.

        Raises:
            SchemaError: no tokens, tokens outside the vocabulary or beyond the context, or a temperature that is none.
            Conflict: the engine is closed, or its model is in training mode.
        """
        self._require_evaluating()
        ids = token_array(token_ids)
        self._require_known(ids, "the tokens to score")
        if len(ids) == 0:
            raise SchemaError("there are no tokens to score")
        if self._context_length is not None and len(ids) > self._context_length:
            raise SchemaError(f"{len(ids)} tokens to score exceed the model's context of {self._context_length}")
        divisor = np.ones(len(ids), np.float32) if temperature is None else np.asarray(temperature, np.float32)
        if divisor.shape != ids.shape or not (np.isfinite(divisor) & (divisor > 0)).all():
            raise SchemaError(f"score takes one positive temperature for each of the {len(ids)} tokens")
        return read_tokens(self._forward, ids, divisor)

    def resume(
        self,
        trajectory: TrajectoryWriter,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
        further: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Go on with a trajectory to the end of one segment, and record it; see `trajstore.engine.Resumer`.

        Raises:
            Conflict, SchemaError: see `replay.resume`.
        """
        if further:
            raise SchemaError(f"{self.name} does not sample by {', '.join(sorted(further))}")
        ends = () if ignore_eos else end_tokens(self._model)
        asked = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": ignore_eos,
        }
        return resume(self, trajectory, SamplingParams(max_tokens, temperature, (*stop_token_ids, *ends)), asked)

    def close(self) -> None:
        """Take the hooks off the model and let go of the cache. What is unfinished can still be aborted."""
        self._closed = True
        self._forward.close()
        self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _admit(self) -> None:
        """Prefill as many waiting requests as there are free places."""
        free = self._max_batch - (len(self._running.requests) if self._running is not None else 0)
        admitted = [self._waiting[i] for i in range(min(free, len(self._waiting)))]
        if not admitted:
            return
        batch = Batch.prefill(admitted, self._forward, self._sampler)
        for _ in admitted:
            self._waiting.popleft()
        batch.drop_finished()
        if self._running is None:
            self._running = batch
        elif batch.requests:
            self._running.join(batch)
        self._drop_finished()

    def _abort(self, requests: Iterable[Request]) -> None:
        """Mark requests as aborted that are not finished, and free their places."""
        for request in requests:
            if request.finish_reason == "":
                request.finish_reason = "abort"
        self._waiting = deque(request for request in self._waiting if request.finish_reason == "")
        self._drop_finished()

    def _drop_finished(self) -> None:
        if self._running is not None:
            self._running.drop_finished()
            if not self._running.requests:
                self._running = None

    def _deliver(self) -> list[RequestOutput]:
        """Outputs of all requests with news; those that are finished are forgotten."""
        news = [request for request in self._requests.values() if request.has_news]
        for request in news:
            if request.finish_reason != "":
                del self._requests[request.id]
        return [request.report() for request in news]

    def _require_known(self, token_ids: npt.NDArray[np.int32], name: str) -> None:
        at = int(token_ids.argmax()) if len(token_ids) else 0
        if len(token_ids) and token_ids[at] >= self._vocab_size:
            raise SchemaError(f"{name}[{at}] is {token_ids[at]}, outside the vocabulary of {self._vocab_size} tokens")

    def _require_evaluating(self) -> None:
        self._require_usable()
        if self._model.training:
            raise Conflict("the model is in training mode, so it would not sample from its weights; call model.eval()")

    def _require_usable(self) -> None:
        if self._closed:
            raise Conflict("this engine is closed; make another one")
