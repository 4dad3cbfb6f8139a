"""How a recorded segment was sampled, read for an engine that is to go on with it. Pure.

A segment keeps its engine's own parameters under the engine's own names; vLLM's and SGLang's are known here.
"""

from typing import Any, NamedTuple

from trajstore.errors import SchemaError
from trajstore.history import Segment
from trajstore.ingest import check_count, check_finite

__all__ = ["Settings", "read_settings"]

_LIMITS = ("max_tokens", "max_new_tokens")
_LEAST = ("min_tokens", "min_new_tokens")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1, 1 << 30),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "do_sample": (True,),
    "n": (1,),
}
"""Values at which a parameter changes nothing; 1 << 30 is SGLang's for all tokens."""

_EMPTY: tuple[Any, ...] = ("", [], {}, False)
"""Likewise of all others."""

_WITHOUT_EFFECT = {
    "seed", "sampling_seed", "logprobs", "top_logprobs", "prompt_logprobs", "logprobs_mode", "return_logprob",
    "logprob_start_len", "top_logprobs_num", "return_token_ids", "routed_experts_prompt_start",
    "routed_experts_start_len", "return_routed_experts", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "no_stop_trim", "output_kind", "stream",
}  # fmt: skip
"""Parameters that say what is returned, or with which random numbers: not from which distribution or how far."""

_GREEDY = {"top_p", "top_k", "min_p", "do_sample"}
"""Without effect at temperature 0: the likeliest token is in every choice of tokens."""


class Settings(NamedTuple):
    """How to go on.

    Attributes:
        max_tokens: that the segment was to sample at most; None where it does not say.
        temperature: 0 for greedy; 1 where the segment does not say.
        stop_token_ids: any of these ends the output.
        ignore_eos: the model's own ends of a text do not.
        further: every other parameter that bears on what is sampled, by name; `min_tokens` less what is there.
    """

    max_tokens: int | None
    temperature: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    further: dict[str, Any]


def read_settings(segment: Segment, *, temperature: float | None = None) -> Settings:
    """The settings of a segment.

    Args:
        temperature: in place of the segment's own.

    Raises:
        SchemaError: a number that is none, or out of its range.
    """
    given = {name: value for name, value in segment.sampling.items() if value is not None}
    limits = [given.pop(name) for name in _LIMITS if name in given]
    leasts = [given.pop(name) for name in _LEAST if name in given]
    recorded = given.pop("temperature", 1.0)
    stops = given.pop("stop_token_ids", ())
    ignore_eos = given.pop("ignore_eos", False) is True
    where = "" if temperature is not None else f" of segment {segment.index}"
    heat = check_finite(recorded if temperature is None else temperature, name=f"temperature{where}")
    if heat < 0:
        raise SchemaError(f"temperature{where} is {heat:g}; use 0 for greedy or a positive number")
    further = {
        name: value
        for name, value in given.items()
        if name not in _WITHOUT_EFFECT
        and not (heat == 0 and name in _GREEDY)
        and value not in _NEUTRAL.get(name, _EMPTY)
    }
    least = max((_count(one, "min_tokens", segment) for one in leasts), default=0) - segment.output
    if least > 0:
        further["min_tokens"] = least
    return Settings(
        max_tokens=_count(limits[0], "max_tokens", segment) if limits else None,
        temperature=heat,
        stop_token_ids=tuple(
            _count(one, "a stop token id", segment) for one in (stops if isinstance(stops, list | tuple) else [stops])
        ),
        ignore_eos=ignore_eos,
        further=further,
    )


def _count(value: Any, name: str, segment: Segment) -> int:
    return check_count(value, name=f"{name} of segment {segment.index}")
