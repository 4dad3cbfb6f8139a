"""Whether the tokens of an output follow those that are recorded, or repeat them: vLLM's deltas and cumulative outputs.

An output does not say which it is. Its `cumulative_logprob` does: it is the sum over all of the choice's output, so it
is the chunk's own sum where the chunk is all of the output.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from trajstore import SchemaError
from trajstore.ingest import logprob_array, token_array
from trajstore_vllm.delivery import Known

__all__ = ["Chunk", "OutputKind", "recorded_already", "sampled_logprobs"]

OutputKind: TypeAlias = Literal["CUMULATIVE", "DELTA", "FINAL_ONLY"]

_SAME = 1e-9
"""Relative difference of two sums of the same logprobs. They are float32 numbers, added up in float64 on both sides."""

_TELLING = -1e-3
"""A logprob below this is not lost among the rounding of others, none of which is above 0."""


class Chunk(NamedTuple):
    """What one output has of one choice.

    Attributes:
        token_ids: sequence of ints `[n]`. A cumulative output holds vLLM's own list, which may have grown since.
        logprobs: as long, one mapping per position; None where not asked for.
        cumulative_logprob: as delivered.
        ended: it is the choice's last.
        rows: of routing that came with it, None for none.
    """

    token_ids: Any
    logprobs: Any
    cumulative_logprob: Any
    ended: bool
    rows: int | None


def recorded_already(chunk: Chunk, kind: OutputKind | None, known: Known) -> int:
    """How many tokens of a chunk are recorded: none of a delta, of a cumulative output all that the segment has.

    Args:
        kind: None: decided by the sums of logprobs, and by the number of rows where these do not tell.

    Raises:
        SchemaError: no reading fits what was recorded before, or two do.
    """
    held = known.output
    if kind in ("CUMULATIVE", "FINAL_ONLY"):
        _require_prefix(chunk, known)
        return held
    if kind is None and _repeats(chunk, known):
        return held
    sums = _running_sums(chunk)
    total = math.nan if sums is None else float(chunk.cumulative_logprob)
    whole = None if sums is None else bool(_same(sums, total).any())  # any: the list may have grown since
    adds = None if sums is None or math.isnan(known.logprob_sum) else bool(_same(known.logprob_sum + sums[-1], total))
    if kind == "DELTA" or held == 0 or not _starts_with_recorded(chunk, known):
        if (whole if kind is None and held == 0 else adds) is False:
            raise SchemaError(
                f"the logprobs of the {held} tokens recorded and of these {len(chunk.token_ids)} do not add up to the "
                f"output's cumulative_logprob {total:g}; an earlier output of this request was not recorded, or these "
                "are of another one"
            )
        return 0
    if whole is False and adds is False:
        raise SchemaError(
            f"the output begins with the {held} tokens recorded, but its cumulative_logprob {total:g} is neither its "
            "own sum nor that of both; these are of another request"
        )
    if whole is not None and adds is not None and whole != adds:
        return held if whole else 0
    if chunk.rows is not None:
        length = known.prompt + len(chunk.token_ids)
        cumulative, delta = (_explains(chunk.rows, known, at) for at in (length, length + held))
        if cumulative != delta:
            return held if cumulative else 0
    raise SchemaError(
        f"the output begins with the {held} tokens recorded and nothing tells whether it repeats or follows them; give "
        "output_kind=, the request's SamplingParams.output_kind"
    )


def sampled_logprobs(token_ids: npt.NDArray[np.int32], logprobs: Sequence[Any]) -> npt.NDArray[np.float32]:
    """The logprob of each token out of vLLM's one mapping per position, float32 `[n]`.

    Raises:
        SchemaError: a position does not have its token, or no number for it.
    """
    pairs = enumerate(zip(token_ids.tolist(), logprobs, strict=True))
    values = [_logprob(at, token, position) for at, (token, position) in pairs]
    return logprob_array(values, count=len(values))


def _require_prefix(chunk: Chunk, known: Known) -> None:
    """A cumulative output must begin with what is recorded. All of that is looked at only at the end: it costs O(n)."""
    held = known.output
    fits = len(chunk.token_ids) >= held
    if fits and held and chunk.ended:
        fits = _starts_with_recorded(chunk, known)
    elif fits and held:
        fits = _has_last_recorded(chunk, known)
    if not fits:
        raise SchemaError(
            f"a cumulative output of {len(chunk.token_ids)} tokens does not begin with the {held} tokens recorded; "
            "these are deltas, or outputs of another request"
        )


def _repeats(chunk: Chunk, known: Known) -> bool:
    """Whether a chunk is cumulative beyond doubt, told at the cost of what is new in it. The last one is read whole.

    Its tokens behind those recorded are all that the sum has grown by. If it were a delta, the sum would have grown by
    the logprobs of all its tokens, so its first ones would have to be 0.
    """
    held = known.output
    if held == 0 or chunk.ended or math.isnan(known.logprob_sum) or len(chunk.token_ids) < held:
        return False
    sums = _running_sums(chunk, start=held)
    if sums is None or not _same(known.logprob_sum + sums, float(chunk.cumulative_logprob)).any():
        return False
    first = zip(range(held), chunk.token_ids, chunk.logprobs, strict=False)
    return _has_last_recorded(chunk, known) and any(_tells(_logprob(at, token, one)) for at, token, one in first)


def _tells(logprob: Any) -> bool:
    return isinstance(logprob, int | float | np.floating) and bool(logprob < _TELLING)


def _has_last_recorded(chunk: Chunk, known: Known) -> bool:
    held = known.output
    return bool(np.array_equal(token_array(chunk.token_ids[held - 1 : held]), known.token_ids()[-1:]))


def _starts_with_recorded(chunk: Chunk, known: Known) -> bool:
    held = known.output
    if len(chunk.token_ids) < held:
        return False
    return bool(np.array_equal(token_array(chunk.token_ids[:held]), known.token_ids()))


def _logprob(at: int, token: Any, position: Any) -> Any:
    """What vLLM's mapping of a position says of its token."""
    try:
        return position[token].logprob
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise SchemaError(f"position {at} of the output has no logprob of its token {token!r:.80}") from error


def _running_sums(chunk: Chunk, start: int = 0) -> npt.NDArray[np.float64] | None:
    """Sums of the first 0, 1, ... logprobs from `start` on, float64 `[n + 1]`; None where they tell nothing."""
    total = chunk.cumulative_logprob
    if chunk.logprobs is None or total is None:
        return None
    if isinstance(total, bool) or not isinstance(total, int | float | np.floating):
        raise SchemaError(f"cumulative_logprob must be a number, not {type(total).__name__}")
    values = sampled_logprobs(token_array(chunk.token_ids[start:]), chunk.logprobs[start:])
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return sums if math.isfinite(total) and math.isfinite(sums[-1]) else None


def _same(sums: Any, total: float) -> Any:
    return abs(sums - total) <= _SAME * (1 + abs(total))


def _explains(rows: int, known: Known, length: int) -> bool:
    """So many rows are those of a request of this length."""
    start = length - 1 - rows
    return 0 <= start <= known.prompt and known.asked in (None, start)
