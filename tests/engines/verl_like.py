"""Replicas that answer by a script, and stand-ins of verl's classes as its 0.9.1 has them, for machines without verl.

`tests/live/test_verl.py` puts the same replicas behind verl's real classes.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import trajstore

__all__ = ["SPEC", "FullyAsyncLLMServerClient", "LLMServerClient", "Part", "Replica", "TokenOutput", "expert_rows"]

SPEC = trajstore.RoutingSpec(layer_ids=(1, 2, 3), top_k=2, num_experts=8, num_hidden_layers=4)
"""A dense layer, then three that route."""


def expert_rows(step, start, stop):
    """Rows `[start, stop)` over all hidden layers that say whose they are: `[step, step + 1 + p % 6]` modulo 8."""
    rows = np.zeros((stop - start, 4, 2), np.uint8)
    rows[:, 1:, 0] = step % 8
    rows[:, 1:, 1] = ((step + 1 + np.arange(start, stop) % 6) % 8)[:, None]
    return rows


@dataclass
class TokenOutput:
    """verl's, without pydantic."""

    token_ids: Any
    log_probs: Any = None
    routed_experts: Any = None
    stop_reason: Any = None
    num_preempted: Any = None
    extra_fields: Any = field(default_factory=dict)


@dataclass
class Part:
    """What one engine call brings.

    Attributes:
        token_ids: sampled.
        stop_reason: as verl's servers say.
        step: of the weights: `global_steps`.
        surplus: 1 where the engine also gives the last token's row.
        routed: False where it gives none.
    """

    token_ids: list
    stop_reason: str = "completed"
    step: int = 1
    surplus: int = 0
    routed: bool = True
    cached: int | None = 0

    def output(self, length, output_type=TokenOutput):
        """The output to an input of `length` tokens; logprobs are -token/100."""
        rows = length + len(self.token_ids) - 1 + self.surplus
        return output_type(
            token_ids=self.token_ids,
            log_probs=[-token / 100 for token in self.token_ids],
            routed_experts=expert_rows(self.step, 0, rows) if self.routed else None,
            stop_reason=self.stop_reason,
            extra_fields={"global_steps": self.step, "num_cached_tokens": self.cached},
        )


class Replica:
    """Answers by its script. `asked` are the inputs and parameters of the calls, `waiting` is set where a call hangs.

    A part in the script may be an exception to raise, or "hang".
    """

    def __init__(self, *script, output_type=TokenOutput):
        self.script = list(script)
        self.asked = []
        self.waiting = asyncio.Event()
        self.output_type = output_type

    async def generate(self, prompt_ids, sampling_params, **kwargs):
        self.asked.append((list(prompt_ids), dict(sampling_params)))
        part = self.script.pop(0)
        if part == "hang":
            self.waiting.set()
            await asyncio.Event().wait()
        if isinstance(part, Exception):
            raise part
        return part.output(len(prompt_ids), self.output_type)


class LLMServerClient:
    """Calls the replica that it was given as its load balancer."""

    def __init__(self, config=None, load_balancer_handle=None, **kwargs):
        self.config = config
        self.replica = load_balancer_handle

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        return await self.replica.generate(prompt_ids, sampling_params, request_id=request_id, **kwargs)


class FullyAsyncLLMServerClient(LLMServerClient):
    """Goes on where a request was aborted, and merges as verl 0.9.1."""

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        limit = sampling_params.get("max_tokens")
        sampling_params = dict(sampling_params)
        merged = TokenOutput(token_ids=[], log_probs=[], num_preempted=0)
        while True:
            output = await super().generate(
                request_id=request_id,
                prompt_ids=prompt_ids + merged.token_ids,
                sampling_params=sampling_params,
                **kwargs,
            )
            merged.token_ids.extend(output.token_ids)
            merged.log_probs.extend(output.log_probs)
            if output.routed_experts is not None and output.token_ids:
                new = output.routed_experts
                if merged.routed_experts is not None:
                    new = np.concatenate([merged.routed_experts, new[-len(output.token_ids) :]])
                merged.routed_experts = new
            merged.stop_reason = output.stop_reason
            if limit is not None:
                sampling_params["max_tokens"] = limit - len(merged.token_ids)
                if len(merged.token_ids) >= limit:
                    merged.stop_reason = "length"
                    break
            if output.stop_reason not in ("aborted", "abort"):
                break
        merged.extra_fields["global_steps"] = output.extra_fields["global_steps"]
        return merged
