"""Recording a `RequestOutput`, as `LLM`, `LLMEngine` and `AsyncLLM` hand it out.

Nothing of vLLM is imported: an output is read by the names of its attributes, which is all that versions share.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from trajstore import RoutingError, SchemaError, SegmentWriter
from trajstore.adapter import refusing, weight_spans
from trajstore.ingest import check_choice, check_count, token_array
from trajstore_vllm.chunks import Chunk, OutputKind, recorded_already, sampled_logprobs
from trajstore_vllm.delivery import Delivery, Known, Rows, known_of, read_finish_reason, record_delivery

__all__ = ["choice_of", "parse_output", "record_output", "token_ids_of"]


def record_output(
    segment: SegmentWriter,
    output: Any,
    *,
    index: int = 0,
    output_kind: Any = None,
    prompt_start: int | None = None,
) -> bool:
    """Write what an output has of one choice to the segment whose input was the request's prompt.

    Call it with every output of the request, in order; with n > 1 for each choice with a segment of its own, as all of
    them bring outputs of the others too. The last output closes the segment.

    Args:
        output: a `vllm.RequestOutput`.
        index: which choice.
        output_kind: `SamplingParams.output_kind` of the request. None decides it by what the output holds, and says so
            where that does not tell.
        prompt_start: `SamplingParams.routed_experts_prompt_start` of the request. None: what the segment's sampling
            parameters say, else inferred from the number of rows.

    Returns:
        True once the choice has ended; the segment is closed then.

    Raises:
        Conflict: the request had another prompt than the segment's input.
        RoutingError, SchemaError: the output cannot be what the request brought; nothing of it was written, and the
            segment says why.
        TrajstoreError: what the segment's methods raise.
    """
    if segment.closed and choice_of(output, index) is None:
        return True
    with refusing(segment):
        known = known_of(segment, prompt_start)
        delivery = parse_output(output, known, index=index, output_kind=output_kind)
        return delivery is not None and record_delivery(segment, delivery, known)


def parse_output(
    output: Any, known: Known, *, index: int = 0, output_kind: Any = None, count: int | None = None
) -> Delivery | None:
    """What an output has that the segment has not; None if it does not hold the choice.

    Args:
        output: a `vllm.RequestOutput`.
        known: what the segment knows.
        index, output_kind: as in `record_output`.
        count: tokens of the output that are read, default all that its list holds by now.

    Raises:
        RoutingError, SchemaError: the output is malformed, of another request, or an earlier one was left out.
    """
    kind = _kind(output_kind)
    choice = choice_of(output, index)
    finished = getattr(output, "finished", False) is True
    if choice is None:
        if finished:
            raise SchemaError(f"the request is finished, and its last output has no choice {index}; record all outputs")
        return None
    token_ids = token_ids_of(choice)
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is not None:
        logprobs = _sequence(logprobs, "logprobs")
    if count is not None:
        token_ids, logprobs = token_ids[:count], None if logprobs is None else logprobs[:count]
    if logprobs is not None:
        if len(token_ids) == 0:  # [-0:] of all of them, in versions before 0.30
            logprobs = logprobs[:0]
        if len(logprobs) != len(token_ids):
            raise SchemaError(f"{len(logprobs)} logprobs for {len(token_ids)} output tokens")
    finish_reason = read_finish_reason(getattr(choice, "finish_reason", None))
    if finish_reason is None and finished:
        raise SchemaError(f"the request is finished, but choice {index} has no finish reason")
    routed = _rows(getattr(choice, "routed_experts", None), known)
    chunk = Chunk(
        token_ids,
        logprobs,
        getattr(choice, "cumulative_logprob", None),
        ended=finish_reason is not None,
        rows=None if routed is None else len(routed),
    )
    skip = recorded_already(chunk, kind, known)
    new = token_array(token_ids[skip:], name="token_ids")
    at_ends = known.output == 0 or finish_reason is not None
    prompt = getattr(output, "prompt_token_ids", None) if at_ends else None  # hashing it each time would cost O(P)
    prompt_routed = _rows(getattr(output, "prompt_routed_experts", None), known) if at_ends else None
    return Delivery(
        prompt=None if prompt is None else token_array(prompt, name="prompt_token_ids"),
        token_ids=new,
        logprobs=None if logprobs is None else sampled_logprobs(new, logprobs[skip : len(token_ids)]),
        finish_reason=finish_reason,
        routed_experts=routed if finish_reason is not None else None,
        prompt_routed_experts=prompt_routed,
        cached_tokens=_cached_tokens(output, known),
        retractions=_preemptions(output),
        weight_versions=weight_spans(getattr(choice, "weight_versions", None), output=known.output + len(new))
        if finish_reason is not None
        else (),
        absent=_why_absent(finish_reason, known.output + len(new), len(token_ids), merged=skip < known.output),
    )


def choice_of(output: Any, index: int) -> Any:
    """The choice of this index, wherever it stands; None if the output has none.

    Raises:
        SchemaError: this is no output, or two choices have the index.
    """
    choices = getattr(output, "outputs", None)
    if not isinstance(choices, list | tuple):
        raise SchemaError(f"{type(output).__name__} is no RequestOutput: it has no list of outputs")
    found = [choice for choice in choices if _is(getattr(choice, "index", None), index)]
    if len(found) > 1:
        raise SchemaError(f"two choices of the output have index {index}")
    return found[0] if found else None


def token_ids_of(choice: Any) -> Any:
    """The token ids of a choice, a sequence; vLLM's own list, not a copy.

    Raises:
        SchemaError: it has none.
    """
    return _sequence(getattr(choice, "token_ids", None), "token_ids")


def _is(given: object, index: int) -> bool:
    return isinstance(given, int) and given == index


def _kind(output_kind: Any) -> OutputKind | None:
    """A `RequestOutputKind` or its name."""
    if output_kind is None:
        return None
    kinds: tuple[OutputKind, ...] = get_args(OutputKind)
    return check_choice(getattr(output_kind, "name", output_kind), kinds, name="output kind")


def _sequence(given: Any, name: str) -> Any:
    """Anything that can be counted and cut, text excepted."""
    counted = hasattr(given, "__len__") and hasattr(given, "__getitem__") and getattr(given, "shape", None) != ()
    if isinstance(given, str | bytes | Mapping) or not counted:
        raise SchemaError(f"{name} of the output must be a sequence, not {type(given).__name__}")
    return given


def _rows(given: Any, known: Known) -> Rows | None:
    """Routed experts `[rows, H, K]`; None where none came, or none are wanted."""
    if given is None or known.cells == 0:
        return None
    try:
        rows: Rows = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor on another device
        raise RoutingError(f"routed experts must be integers [rows, layers, K]: {error}") from error
    if rows.ndim != 3 or rows.dtype.kind not in "iu":
        raise RoutingError(
            f"routed experts must be integers [rows, layers, K], not {rows.dtype} of shape {list(rows.shape)}"
        )
    return rows


def _cached_tokens(output: Any, known: Known) -> int | None:
    given = getattr(output, "num_cached_tokens", None)
    if given is None:
        return None
    cached = check_count(given, name="num_cached_tokens")
    if cached > known.prompt:
        raise SchemaError(f"{cached} cached tokens of a prompt of {known.prompt}")
    return cached


def _preemptions(output: Any) -> int:
    given = getattr(getattr(output, "metrics", None), "num_preemptions", None)
    return 0 if given is None else check_count(given, name="num_preemptions")


def _why_absent(finish_reason: str | None, total: int, chunk: int, *, merged: bool) -> str:
    if finish_reason is None:
        return ""
    if total == 0:
        return f"the request ended ({finish_reason}) before its first token"
    if merged and chunk > 1:
        return (
            "the engine returned none: up to vLLM 0.30 it is lost where a slow consumer's deltas were merged; use "
            "CUMULATIVE outputs"
        )
    if finish_reason == "abort":
        return "the engine returned none: up to vLLM 0.20 an abort drops it; or enable_return_routed_experts is off"
    return "the engine returned none: is it started with enable_return_routed_experts?"
