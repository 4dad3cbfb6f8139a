"""What engines deliver of one rollout, in the shapes in which they do: objects, bodies, streams; all made up here.

P tokens were the prompt, O the output; the routing has P + O - 1 rows.
"""

import asyncio
import base64
import copy
import io
import json
from collections.abc import AsyncIterator, Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import trajstore_sglang
import trajstore_verl
import trajstore_vllm
from benchmarks.corpora import Rollout
from trajstore import SegmentWriter

__all__ = ["AsyncEngine", "Delivery", "Params", "Sampled", "deliveries", "sampled", "sglang_body", "vllm_body"]


class Sampled(NamedTuple):
    """A rollout as an engine has it when it is done.

    Attributes:
        prompt: `[P]`.
        token_ids, logprobs: `[O]`, in Python's own lists.
        routed: uint8 `[P + O - 1, H, K]`; None where it returns none.
    """

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    routed: npt.NDArray[np.uint8] | None


class Delivery(NamedTuple):
    """All that an engine delivered of a rollout, and the two ways to take it.

    Attributes:
        name: as the tables call it.
        came: objects, bodies or lines, which to hold is to keep them as they are.
        record: into an open segment of the prompt, up to its close.
    """

    name: str
    came: list[Any]
    record: Callable[[SegmentWriter], object]

    def hold(self) -> list[Any]:
        """As little as a program does that keeps it all in memory."""
        return list(self.came)


def sampled(rollout: Rollout, *, routed: bool) -> Sampled:
    """What an engine has of a rollout, with its routing or without."""
    start = rollout.prompt
    return Sampled(
        rollout.tokens[:start].tolist(),
        rollout.tokens[start:].tolist(),
        rollout.logprobs[start:].tolist(),
        rollout.routed[:-1] if routed else None,
    )


def deliveries(made: Sampled) -> list[Delivery]:
    """The same from every engine."""
    (whole,) = _vllm_outputs(made, each=len(made.token_ids))
    deltas = _vllm_outputs(made, each=1)
    reply, answer = vllm_body(made), sglang_body(made)
    lines = [b"data: " + _json(chunk) for chunk in _sglang_answers(made, each=1)]
    verl_output = SimpleNamespace(
        token_ids=made.token_ids,
        log_probs=made.logprobs,
        routed_experts=made.routed,
        stop_reason="length",
        num_preempted=0,
        extra_fields={"global_steps": 1, "num_cached_tokens": 0},
    )
    return [
        Delivery("vLLM RequestOutput", [whole], lambda segment: trajstore_vllm.record_output(segment, whole)),
        Delivery(
            "vLLM, a delta per token",
            deltas,
            lambda segment: [trajstore_vllm.record_output(segment, one, output_kind="DELTA") for one in deltas],
        ),
        Delivery("vLLM HTTP", [reply], lambda segment: trajstore_vllm.record_http(segment, reply)),
        Delivery("SGLang HTTP", [answer], lambda segment: trajstore_sglang.record_response(segment, answer)),
        Delivery("SGLang, a chunk per token", lines, lambda segment: trajstore_sglang.record_stream(segment, lines)),
        Delivery("verl TokenOutput", [verl_output], lambda segment: trajstore_verl.record_output(segment, verl_output)),
    ]


def vllm_body(made: Sampled) -> bytes:
    """The reply of vLLM's `/inference/v1/generate`; its routing is base64 of a `.npy` file."""
    content = []
    for token, logprob in zip(made.token_ids, made.logprobs, strict=True):
        one = {"token": f"token_id:{token}", "logprob": logprob, "bytes": None}
        content.append({**one, "top_logprobs": [one]})
    choice = {"index": 0, "logprobs": {"content": content}, "finish_reason": "length", "token_ids": made.token_ids}
    if made.routed is not None:
        file = io.BytesIO()
        np.save(file, made.routed)
        choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
    return _json({"request_id": "generate-tokens-r", "model": "m", "created": 0, "choices": [choice]})


def sglang_body(made: Sampled) -> bytes:
    """The reply of SGLang's `/generate`; its routing is base64 of int32."""
    (answer,) = _sglang_answers(made, each=len(made.token_ids))
    return _json(answer)


class Params:
    """As `vllm.SamplingParams`, with what a recorder looks at."""

    class Kind(Enum):
        """As `vllm.sampling_params.RequestOutputKind`."""

        CUMULATIVE = 0
        DELTA = 1

    def __init__(self) -> None:
        self.n = 1
        self.logprobs: int | None = None
        self.output_kind = Params.Kind.CUMULATIVE
        self.routed_experts_prompt_start = 0

    def clone(self) -> "Params":
        """As vLLM does it."""
        return copy.copy(self)


class AsyncEngine:
    """As vLLM's `AsyncLLM`, without a model: all requests in flight get their next token in turns, without a pause.

    Every request is answered with the same output.
    """

    def __init__(self, made: Sampled) -> None:
        self._made = made
        self._logprobs = _vllm_logprobs(made)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        """Cumulative outputs, of one token more each; they share one growing list, as vLLM's do."""
        made = self._made
        token_ids: list[int] = []
        logprobs: list[Any] = []
        for token, logprob in zip(made.token_ids, self._logprobs, strict=True):
            await asyncio.sleep(0)
            token_ids.append(token)
            logprobs.append(logprob)
            ended = len(token_ids) == len(made.token_ids)
            choice = SimpleNamespace(
                index=0,
                token_ids=token_ids,
                logprobs=logprobs,
                cumulative_logprob=0.0,
                finish_reason="length" if ended else None,
                routed_experts=made.routed if ended else None,
            )
            yield _vllm_request_output(prompt["prompt_token_ids"], choice)

    async def abort(self, request_id: list[str]) -> None:
        """Nobody asks for it."""


def _vllm_outputs(made: Sampled, *, each: int) -> list[SimpleNamespace]:
    """`RequestOutput`s of a DELTA request that brought `each` tokens at a time."""
    count = len(made.token_ids)
    sums = np.cumsum(made.logprobs).tolist()
    logprobs = _vllm_logprobs(made)
    outputs = []
    for stop in range(each, count + 1, each):
        choice = SimpleNamespace(
            index=0,
            token_ids=made.token_ids[stop - each : stop],
            logprobs=logprobs[stop - each : stop],
            cumulative_logprob=sums[stop - 1],
            finish_reason="length" if stop == count else None,
            routed_experts=made.routed if stop == count else None,
        )
        outputs.append(_vllm_request_output(made.prompt, choice))
    return outputs


def _vllm_request_output(prompt: list[int], choice: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(
        request_id="r",
        prompt_token_ids=prompt,
        outputs=[choice],
        finished=choice.finish_reason is not None,
        num_cached_tokens=0,
        metrics=None,
    )


def _vllm_logprobs(made: Sampled) -> list[dict[int, Any]]:
    """One mapping per position."""
    pairs = zip(made.token_ids, made.logprobs, strict=True)
    return [{token: SimpleNamespace(logprob=logprob, rank=1, decoded_token=None)} for token, logprob in pairs]


def _sglang_answers(made: Sampled, *, each: int) -> list[dict[str, Any]]:
    """Answers of a server with `--incremental-streaming-output` that brought `each` tokens at a time."""
    count = len(made.token_ids)
    answers = []
    for stop in range(each, count + 1, each):
        ids, probs = made.token_ids[stop - each : stop], made.logprobs[stop - each : stop]
        meta: dict[str, Any] = {
            "id": "r",
            "finish_reason": {"type": "length", "length": count} if stop == count else None,
            "prompt_tokens": len(made.prompt),
            "weight_version": "v1",
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(probs, ids, strict=True)],
            "output_token_logprobs_length": stop,
            "reasoning_tokens": 0,
            "completion_tokens": stop,
            "cached_tokens": 0,
        }
        if stop == count:
            meta["weight_versions"] = [{"version": "v1", "start": 0, "end": count}]
            if made.routed is not None:
                meta["routed_experts"] = base64.b64encode(made.routed.astype("<i4").tobytes()).decode()
        answers.append({"text": "", "output_ids": ids, "meta_info": meta})
    return answers


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
