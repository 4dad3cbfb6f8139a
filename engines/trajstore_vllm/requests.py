"""What a recorder asks vLLM for: a request's sampling parameters, and what of them its segment keeps."""

from typing import Any, Literal, TypeAlias, get_args

from trajstore import NotFound, SchemaError, TrajectoryWriter
from trajstore.ingest import check_choice
from trajstore_vllm.capabilities import capabilities

__all__ = ["Rerecord", "engine_label", "first_row", "request_params", "sampling_of"]

Rerecord: TypeAlias = Literal["rows", "prefix"]
"""Which rows a resumed request returns: those that the trajectory does not hold, or those of its whole prefix again."""

_KEPT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "bad_words",
    "logprobs",
    "routed_experts_prompt_start",
)
"""Sampling parameters that a segment keeps, if they are set."""


def first_row(trajectory: TrajectoryWriter, *, base: int, prompt: int, rerecord: Rerecord) -> int:
    """The first row that a request is to return.

    Args:
        base: tokens of the trajectory that its input begins with.
        prompt: tokens of its input.
        rerecord: see `Rerecord`.

    Raises:
        SchemaError: there is no such `rerecord`.
    """
    if check_choice(rerecord, get_args(Rerecord), name="rerecord") == "prefix":
        return 0
    if trajectory.routing is None:
        return prompt
    return min(trajectory.rows_held, base)


def request_params(given: Any, *, start: int, cumulative: bool) -> Any:
    """A copy of a `vllm.SamplingParams` for a request that is recorded.

    Args:
        given: None: vLLM's defaults.
        start: first row to return. A vLLM before 0.22 cannot be asked, and returns them all.
        cumulative: every output shall hold all so far. Deltas would be merged behind a slow consumer, and lose routing.

    Raises:
        SchemaError: n > 1: the choices of a request cannot go on in one trajectory.
    """
    if given is None:
        from vllm import SamplingParams  # only needed where none was given

        given = SamplingParams()
    if getattr(given, "n", 1) != 1:
        raise SchemaError(
            f"n={given.n!r}: a trajectory takes one choice; make one request for each, or give each choice a segment "
            "of a trajectory of its own and record_output(..., index=)"
        )
    params = given.clone()
    if params.logprobs is None:
        params.logprobs = 0  # of the sampled token alone
    if cumulative:
        params.output_kind = type(params.output_kind)["CUMULATIVE"]
    if hasattr(params, "routed_experts_prompt_start"):
        params.routed_experts_prompt_start = start
    return params


def sampling_of(params: Any) -> dict[str, Any]:
    """What of a request's parameters its segment keeps, plain JSON data."""
    kept = {name: getattr(params, name, None) for name in _KEPT}
    return {name: value for name, value in kept.items() if value is not None and value != []}


def engine_label() -> str:
    """As segments name the engine: "vllm/0.30.0", or "vllm" where no vLLM is installed here. Logs what it loses."""
    try:
        known = capabilities()
    except NotFound:
        return "vllm"
    known.warn()
    return known.label
