"""At which temperature recorded tokens are scored again: that of the distribution whose logprobs were told. Pure."""

import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError
from trajstore.history import Segment
from trajstore.trajectory import Trajectory

__all__ = ["assumed_engines", "scoring_temperatures"]

_AFTER_TEMPERATURE = {
    "transformers": True,
    "sglang": True,
    "vllm": False,
    "verl": True,
    "verl-vllm": True,
    "verl-sglang": True,
}
"""By engine: whether the logprobs that it tells are those after the temperature. vLLM's are raw unless its
`logprobs_mode` says otherwise, and verl sets that (rollout.yaml of 0.9.1: processed_logprobs)."""


def scoring_temperatures(trajectory: Trajectory, given: float | None) -> npt.NDArray[np.float32]:
    """At which each token is scored, float32 `[T]`; 1 where it was not sampled, or sampled greedily.

    Args:
        given: in place of what is on record.

    Raises:
        SchemaError: it is not positive and finite.
    """
    if given is not None:
        if not 0 < given < np.inf:
            raise SchemaError(f"temperature must be positive and finite, not {given}")
        return np.where(trajectory.loss_mask, given, 1.0).astype(np.float32)
    by_segment = np.array([*(_sampled_at(one) if _tells_it(one) else 1.0 for one in trajectory.segments), 1.0])
    return np.where(trajectory.loss_mask, by_segment[trajectory.segment_ids], 1.0).astype(np.float32)


def assumed_engines(trajectory: Trajectory) -> tuple[str, ...]:
    """Engines of unknown habits that sampled at another temperature than 1: to score their tokens at 1 is to assume."""
    segments = (trajectory.segments[i] for i in np.unique(trajectory.segment_ids[trajectory.loss_mask]))
    found = [one.engine for one in segments if _tells_it(one) is None and _sampled_at(one) != 1.0]
    return tuple(dict.fromkeys(found))


def _sampled_at(segment: Segment) -> float:
    """Temperature of a segment; 1 where it is not on record, and for a greedy one, whose logprobs are told at 1."""
    given = segment.sampling.get("temperature")
    return float(given) if isinstance(given, int | float) and 0 < given < np.inf else 1.0


def _tells_it(segment: Segment) -> bool | None:
    """Whether its logprobs are those after the temperature; None if that is not known.

    A segment whose sampling has vLLM's `logprobs_mode` says so itself.
    """
    mode = segment.sampling.get("logprobs_mode")
    if isinstance(mode, str) and mode.startswith(("processed", "raw")):
        return mode.startswith("processed")
    return _AFTER_TEMPERATURE.get(segment.engine.partition("/")[0])
