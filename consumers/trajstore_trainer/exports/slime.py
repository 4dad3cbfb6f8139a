"""A trajectory as slime's `Sample`: the fields that its rollouts fill and its trainer reads.

Written against THUDM/slime, `slime/utils/types.py` (miles has the same fields). slime is not imported.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError
from trajstore.trajectory import Trajectory
from trajstore_trainer.columns import prompt_length
from trajstore_trainer.exports.routed import MissingRow, all_layers

__all__ = ["to_slime"]


def to_slime(trajectory: Trajectory, *, missing_row: MissingRow = 0) -> dict[str, Any]:
    """Export one trajectory; `Sample.from_dict(to_slime(trajectory))` makes slime's own of it.

    T tokens, R of them from the first sampled one on, H all hidden layers of the model.

    Args:
        missing_row: see `MissingRow`. slime replays 0 as expert 0, and refuses a sample with too many such rows.

    Returns:
        tokens: list of int, T; response_length: R;
        loss_mask: list of int, R, 1 where the policy sampled the token and its logprob is finite;
        rollout_log_probs: list of float, R, 0.0 elsewhere; None if no logprob is finite (then the mask is 1 for every
        sampled token);
        rollout_routed_experts: int32 `[T - 1, H, K]`, for the last token's row is never replayed; None without routing;
        weight_versions: list of str, one for each run of tokens that one segment sampled under one version;
        status: pending (open here), completed, truncated, aborted or failed; reward: float or None;
        metadata: the trajectory's own, and trajectory_id, group, routing_policy, and missing_routed_spans: `[start,
        stop)` of every run of rows that are not known, but for the last token's.

    Raises:
        SchemaError: no token was sampled, so there is nothing to train on.
    """
    prompt = prompt_length(trajectory)
    if prompt == len(trajectory):
        raise SchemaError(f"{trajectory.id} has no sampled token: there is no response for slime to train on")
    finite = trajectory.loss_mask & np.isfinite(trajectory.logprobs)
    recorded = bool(finite.any())
    trained = finite if recorded else trajectory.loss_mask
    routed = None
    if trajectory.routed_experts is not None and trajectory.routing is not None:
        routed = all_layers(
            trajectory.routed_experts[:-1],
            trajectory.routing_mask[:-1],
            trajectory.routing,
            dtype=np.int32,
            missing_row=missing_row,
        )
    return {
        "tokens": trajectory.token_ids.tolist(),  # slime's own fields are Python lists
        "response_length": len(trajectory) - prompt,
        "loss_mask": trained[prompt:].astype(int).tolist(),
        "rollout_log_probs": np.where(finite, trajectory.logprobs, 0.0)[prompt:].tolist() if recorded else None,
        "rollout_routed_experts": routed,
        "weight_versions": _version_runs(trajectory),
        "status": "pending" if trajectory.status == "open" else trajectory.status,
        "reward": trajectory.reward,
        "metadata": {
            **trajectory.metadata,
            "trajectory_id": trajectory.id,
            "group": trajectory.group,
            "routing_policy": trajectory.policy,
            "missing_routed_spans": [] if routed is None else _runs(~trajectory.routing_mask[:-1]),
        },
    }


def _version_runs(trajectory: Trajectory) -> list[str]:
    """slime appends a version after every engine call, however often it repeats."""
    sampled = trajectory.loss_mask
    ids = np.stack([trajectory.segment_ids[sampled], trajectory.weight_version_ids[sampled]])
    begins = np.flatnonzero(np.append(True, (ids[:, 1:] != ids[:, :-1]).any(axis=0)))
    return [trajectory.weight_versions[i] for i in ids[1, begins]]


def _runs(mask: npt.NDArray[np.bool_]) -> list[list[int]]:
    """`[start, stop)` of every run of True."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    found: list[list[int]] = edges.reshape(-1, 2).tolist()
    return found
