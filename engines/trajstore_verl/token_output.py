"""verl's `TokenOutput`, both ways: what a server returned as what is recorded, and a fold as what verl expects. Pure.

verl is not imported: its outputs are read by their attributes. P tokens were the request's input, O its output; L
layers route of H hidden layers, K experts per token.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore import RoutingError, RoutingSpec, SchemaError, Trajectory
from trajstore.adapter import place_rows, split_by_origin
from trajstore.events import FinishReason
from trajstore.ingest import check_count, check_label, logprob_array, token_array
from trajstore.routing import Origin

__all__ = ["ParsedOutput", "output_fields", "parse_output"]

_FINISH_REASONS: dict[str, FinishReason] = {
    "aborted": "abort",
    "abort": "abort",
    "stop": "stop",
    "length": "length",
    "error": "error",
}
"""By `stop_reason`. What is not here ended by itself; verl's "completed" stands for both stop and length."""

_MISSING = object()


class ParsedOutput(NamedTuple):
    """One inner engine call's output, checked but for the expert ids.

    Attributes:
        token_ids: int32 `[O]`.
        logprobs: float32 `[O]`, None where the server was not asked.
        routing: `(rows, start, origin)` of each recording, rows `[n, L or H, K]`.
        absent: why there is no routing; "" where there is, or none is recorded.
        finish_reason: stop, length, abort or error.
        weight_version: the server's training step, "" where it did not say.
        cached_tokens: of the input, from a prefix cache; None where the server did not say.
        preempted: how often the engine dropped the request's state and computed it again.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32] | None
    routing: list[tuple[npt.NDArray[np.integer], int, Origin]]
    absent: str
    finish_reason: FinishReason
    weight_version: str
    cached_tokens: int | None
    preempted: int


def parse_output(output: object, *, length: int, max_tokens: int | None = None, routes: bool = True) -> ParsedOutput:
    """Read a `TokenOutput` of a request whose input was `length` tokens.

    Rows are placed by their absolute position: verl's servers return those of the whole sequence, so they begin at 0,
    and number P + O - 1, or one more from engines that add the last token's.

    Args:
        output: anything with verl's attributes.
        max_tokens: output tokens that were asked for at most; tells "length" from "stop" where verl says "completed".
        routes: False where no routing is recorded: rows are not looked at.

    Raises:
        SchemaError: attributes are missing or of another type, the logprobs are not one per token, or more tokens were
            cached than the input has. A preempted request may have found some of its own output in the cache.
        RoutingError: the rows are not those of this request.
    """
    token_ids = token_array(_get(output, "token_ids"))
    log_probs = _get(output, "log_probs")
    extra = _get(output, "extra_fields")
    if not isinstance(extra, Mapping):
        raise SchemaError(f"extra_fields of verl's output must map names to values, not {type(extra).__name__}")
    finish_reason = _finish_reason(_get(output, "stop_reason"), len(token_ids), max_tokens)
    cached = _count(extra.get("num_cached_tokens"), "num_cached_tokens")
    preempted = _count(_get(output, "num_preempted"), "num_preempted") or 0
    if cached is not None and cached > length and not preempted:
        raise SchemaError(f"{cached} cached tokens of an input of {length}")
    routed_experts = _get(output, "routed_experts")
    rows = _rows(routed_experts) if routes else None
    absent = _absent(rows, len(token_ids), length, finish_reason) if routes else ""
    routing: list[tuple[npt.NDArray[np.integer], int, Origin]] = []
    if rows is not None and not absent:
        start = place_rows(len(rows), length=length + len(token_ids), asked=0)
        routing = split_by_origin(rows, start, cached=cached, prompt=length, recomputed=preempted > 0)
    return ParsedOutput(
        token_ids=token_ids,
        logprobs=None if log_probs is None else logprob_array(log_probs, count=len(token_ids)),
        routing=routing,
        absent=absent,
        finish_reason=finish_reason,
        weight_version=_weight_version(extra.get("global_steps")),
        cached_tokens=cached,
        preempted=preempted,
    )


def output_fields(trajectory: Trajectory, *, start: int, stop: int | None = None) -> dict[str, Any]:
    """The fields of the `TokenOutput` that verl expects for the turn whose output is tokens `[start, stop)`.

    Args:
        trajectory: a fold under any policy.
        stop: default the end of the trajectory.

    Returns:
        `token_ids`, `log_probs`: lists `[stop - start]`; `log_probs` is empty where none was recorded, and has NaN
        where some were not. `routed_experts`: `[stop - 1, H, K]`, uint8 or else signed (torch lacks operations on
        uint16), of the whole sequence as a server returns them, 0 in dense layers and where a row is missing; None
        where all are. `num_preempted`. `extra_fields`: `trajectory_id`, `routing_policy`, `missing_routed_rows` (how
        many of the rows are only zeros, for verl has no mask), and where the turn has tokens, `global_steps`,
        `min_global_steps`, `max_global_steps`, `num_cached_tokens` as verl reports them.
    """
    end = len(trajectory) if stop is None else stop
    rows = max(0, end - 1)
    mask = trajectory.routing_mask[:rows]
    probs = trajectory.logprobs[start:end]
    extra: dict[str, Any] = {
        "trajectory_id": trajectory.id,
        "routing_policy": trajectory.policy,
        "missing_routed_rows": 0 if trajectory.routing is None else rows - int(np.count_nonzero(mask)),
    }
    brought = sorted({int(index) for index in trajectory.segment_ids[start:end]})
    if brought:
        first, last = (_step(trajectory.weight_version(at)) for at in (start, end - 1))
        extra |= {"global_steps": last, "min_global_steps": first, "max_global_steps": last}
        extra["num_cached_tokens"] = trajectory.segments[brought[0]].cached_tokens
    return {
        "token_ids": trajectory.token_ids[start:end].tolist(),
        "log_probs": [] if np.isnan(probs).all() else probs.tolist(),
        "routed_experts": _all_layers(trajectory, rows) if mask.any() else None,
        "num_preempted": sum(trajectory.segments[index].retractions for index in brought),
        "extra_fields": extra,
    }


def _get(output: object, name: str) -> Any:
    value = getattr(output, name, _MISSING)
    if value is _MISSING:
        raise SchemaError(f"a {type(output).__name__} has no {name}: it is not a TokenOutput of verl 0.9 or newer")
    return value


def _rows(routed_experts: Any) -> npt.NDArray[np.integer] | None:
    if routed_experts is None:
        return None
    try:
        rows = np.asarray(routed_experts)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor on another device
        raise RoutingError(f"routed_experts must be one array [rows, layers, top_k]: {error}") from error
    if rows.ndim != 3 or rows.dtype.kind not in "iu":
        raise RoutingError(
            f"routed_experts must be integers [rows, layers, top_k], not {rows.dtype} of shape {list(rows.shape)}"
        )
    return rows


def _absent(rows: npt.NDArray[np.integer] | None, output: int, length: int, finish_reason: FinishReason) -> str:
    if rows is not None and len(rows):
        if output == 0 and len(rows) > length:
            return f"{len(rows)} rows came without the tokens that they belong to: verl dropped those"
        return ""
    if output == 0:
        return "ended before its first token"
    if finish_reason == "abort":
        return "an aborted request came without routing; vLLM up to 0.20 returns none then"
    return (
        "the server returned none; is actor_rollout_ref.rollout.enable_rollout_routing_replay set, and can its engine?"
    )


def _finish_reason(stop_reason: object, output: int, max_tokens: int | None) -> FinishReason:
    if not isinstance(stop_reason, str | None):
        raise SchemaError(f"stop_reason of verl's output must be text or None, not {type(stop_reason).__name__}")
    ended: FinishReason = "length" if max_tokens is not None and output >= max_tokens else "stop"
    return _FINISH_REASONS.get(stop_reason or "", ended)


def _count(value: Any, name: str) -> int | None:
    return None if value is None else check_count(value, name=f"{name} of verl's output")


def _weight_version(global_steps: Any) -> str:
    if global_steps is None:
        return ""
    if not isinstance(global_steps, str | int | np.integer) or isinstance(global_steps, bool):
        raise SchemaError(f"global_steps of verl's output must be a number, not {type(global_steps).__name__}")
    return check_label(str(global_steps), name="global_steps")


def _step(weight_version: str) -> int | str | None:
    """verl's number of a weight version; its label if that is none, None without one."""
    try:
        return int(weight_version)
    except ValueError:
        return weight_version or None


def _all_layers(trajectory: Trajectory, rows: int) -> npt.NDArray[np.integer]:
    """Rows `[rows, H, K]`, zeros in the layers that do not route."""
    spec, routed = trajectory.routing, trajectory.routed_experts
    if spec is None or routed is None:
        raise SchemaError(f"{trajectory.id} was created without a routing spec and has no routing")
    wide = np.zeros((rows, spec.num_hidden_layers, spec.top_k), _signed(spec))
    wide[:, list(spec.layer_ids)] = routed[:rows]
    return wide


def _signed(spec: RoutingSpec) -> np.dtype[np.integer]:
    if spec.num_experts <= 256:
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if spec.num_experts <= 1 << 15 else np.int32)
