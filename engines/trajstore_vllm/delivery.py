"""What one output or body of vLLM brings to one segment, as plain data, and how that is recorded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from trajstore import RoutingError, SchemaError, SegmentWriter
from trajstore.adapter import place_rows, require_input, split_by_origin
from trajstore.events import FINISH_REASONS, FinishReason, WeightVersionSpan
from trajstore.ingest import check_count
from trajstore.routing import Origin

__all__ = ["Delivery", "Known", "Rows", "known_of", "read_finish_reason", "record_delivery"]

Rows: TypeAlias = npt.NDArray[np.integer[Any]]

_STOPPED = ("repetition", "tool_calls", "function_call", "content_filter")
"""What vLLM also calls an output that it stopped: repeating itself; on the chat route, for what its end reads like."""


class Known(NamedTuple):
    """What a segment already knows of the request whose delivery is read.

    Attributes:
        prompt: tokens of its input, P.
        output: output tokens recorded so far.
        logprob_sum: of these; NaN where one is not known.
        token_ids: gives them, int32 `[output]`.
        asked: the `routed_experts_prompt_start` of the request, None where that is not known.
        cells: expert ids of one row over all hidden layers; 0: no routing is recorded.
    """

    prompt: int
    output: int
    logprob_sum: float
    token_ids: Callable[[], npt.NDArray[np.int32]]
    asked: int | None
    cells: int


class Delivery(NamedTuple):
    """What is new, checked as far as that goes without a store.

    Attributes:
        prompt: int32 `[P]` as the engine echoed it; None where it did not, or it was looked at before.
        token_ids: int32 `[n]`, new.
        logprobs: float32 `[n]`; None where not asked for.
        finish_reason: None while the choice has not ended.
        routed_experts: `[rows, H, K]`, None where there are none.
        prompt_routed_experts: `[rows, H, K]` of the input apart, as vLLM 0.21 gives them.
        cached_tokens: input tokens from the prefix cache, None where not told.
        retractions: how often the engine preempted the request.
        weight_versions: spans over the whole output.
        absent: why a choice that has ended has no routing.
    """

    prompt: npt.NDArray[np.int32] | None
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32] | None
    finish_reason: FinishReason | None
    routed_experts: Rows | None = None
    prompt_routed_experts: Rows | None = None
    cached_tokens: int | None = None
    retractions: int = 0
    weight_versions: tuple[WeightVersionSpan, ...] = ()
    absent: str = ""


def known_of(segment: SegmentWriter, prompt_start: int | None) -> Known:
    """What `segment` knows, and the start that was asked for: as given, else as its sampling parameters say."""
    asked = segment.sampling.get("routed_experts_prompt_start") if prompt_start is None else prompt_start
    spec = segment.spec
    return Known(
        prompt=segment.start,
        output=segment.end - segment.start,
        logprob_sum=segment.logprob_sum,
        token_ids=lambda: segment.token_ids,
        asked=None if asked is None else check_count(asked, name="routed_experts_prompt_start"),
        cells=0 if spec is None else spec.num_hidden_layers * spec.top_k,
    )


def read_finish_reason(given: object) -> FinishReason | None:
    """A finish reason in our words; None is none yet.

    Raises:
        SchemaError: vLLM has no such reason.
    """
    if given is None:
        return None
    if isinstance(given, str):
        for reason in FINISH_REASONS:
            if given == reason:
                return reason
        if given in _STOPPED:
            return "stop"
    raise SchemaError(f"vLLM knows no finish reason {given!r:.80}; known are {', '.join((*FINISH_REASONS, *_STOPPED))}")


def record_delivery(
    segment: SegmentWriter, delivery: Delivery, known: Known, *, weight_versions: Sequence[WeightVersionSpan] = ()
) -> bool:
    """Write a delivery to its segment: all of it, or nothing.

    Args:
        known: what it was read with.
        weight_versions: spans to close with where the engine told none.

    Returns:
        True if that closed the segment.

    Raises:
        Conflict: the engine was given another input, or the segment is closed.
        RoutingError, SchemaError: what cannot be; nothing was written.
    """
    if delivery.prompt is not None:
        require_input(segment, delivery.prompt)
    recordings = [] if segment.spec is None else _recordings(delivery, known)
    segment.record(delivery.token_ids, delivery.logprobs, routing=recordings)
    if delivery.finish_reason is None:
        return False
    if segment.spec is not None and not recordings:
        segment.no_routing(_why_none(delivery))
    segment.close(
        delivery.finish_reason,
        cached_tokens=delivery.cached_tokens,
        retractions=delivery.retractions,
        weight_versions=delivery.weight_versions or weight_versions,
    )
    return True


def _recordings(delivery: Delivery, known: Known) -> list[tuple[Rows, int, Origin]]:
    """Rows with their places and origins."""
    length = known.prompt + known.output + len(delivery.token_ids)
    placed: list[tuple[Rows, int]] = []
    asked = known.asked
    if delivery.prompt_routed_experts is not None:
        start = known.prompt - len(delivery.prompt_routed_experts)
        if start < 0:
            raise RoutingError(f"{len(delivery.prompt_routed_experts)} routed rows for {known.prompt} prompt tokens")
        placed.append((delivery.prompt_routed_experts, start))
        asked = known.prompt
    if delivery.routed_experts is not None:
        count = len(delivery.routed_experts)
        start = place_rows(count, length=length, asked=asked, surplus=False, prompt=known.prompt)
        placed.append((delivery.routed_experts, start))
    return [
        part
        for rows, start in placed
        for part in split_by_origin(rows, start, cached=delivery.cached_tokens, prompt=known.prompt)
    ]


def _why_none(delivery: Delivery) -> str:
    if delivery.routed_experts is not None:
        return "no row from the asked start on: that of the last token comes with the next segment"
    return delivery.absent
