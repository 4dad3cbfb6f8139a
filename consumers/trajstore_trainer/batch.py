"""Trajectories → one padded batch of torch tensors, prompts left-padded and responses right-padded as verl aligns them.

The prompt is everything before the first sampled token; the response is the rest, tool tokens included. Arrays are
filled by slices and handed to torch without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trajstore.errors import SchemaError
from trajstore.routing import RoutingSpec
from trajstore.trajectory import Trajectory

__all__ = ["PaddedBatch", "padded_batch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaddedBatch:
    """B trajectories in W columns: `prompt_width` for the longest prompt, the others for the longest response.

    Every tensor is on the CPU and owns its memory. Column `c` of a row holds the token at position
    `c - (prompt_width - len(prompt))`; what belongs to that token (logprob, weight version, routing) is in its column.

    Attributes:
        input_ids: int64 `[B, W]`, `pad_token_id` where there is no token.
        attention_mask: int64 `[B, W]`, 1 where there is a token.
        position_ids: int64 `[B, W]`, position of the token; 0 in padding before it, the last position after it (verl).
        loss_mask: bool `[B, W]`, True where the policy sampled the token.
        rollout_log_probs: float32 `[B, W]`, as recorded, NaN and infinite ones too; 0 where `loss_mask` is False.
        logprob_mask: bool `[B, W]`, True where `loss_mask` is and the recorded logprob is finite.
        routed_experts: uint8, int16 or int32 `[B, W, L, K]`, 0 where `routing_mask` is False; None if the trajectories
            have no routing spec. uint16 is widened as needed, for torch lacks operators for it.
        routing_mask: bool `[B, W]`, True where the row is known. A row that is not is no choice of expert 0.
        routing: the trajectories' common spec; None without one.
        weight_version_ids: int32 `[B, W]`, index into `weight_versions`, -1 where not sampled.
        weight_versions: the versions that sampled anything in this batch, in order of appearance.
        rewards: float32 `[B]`, NaN without one.
        ids, groups: of the trajectories, in the order of the rows.
        prompt_width: columns before the first response token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    logprob_mask: torch.Tensor
    routed_experts: torch.Tensor | None
    routing_mask: torch.Tensor
    routing: RoutingSpec | None
    weight_version_ids: torch.Tensor
    weight_versions: tuple[str, ...]
    rewards: torch.Tensor
    ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    prompt_width: int

    def __len__(self) -> int:
        return len(self.ids)


def padded_batch(trajectories: Sequence[Trajectory], *, pad_token_id: int = 0) -> PaddedBatch:
    """Collate.

    Args:
        trajectories: at least one; all with the same routing spec, or all without.
        pad_token_id: for `input_ids` where there is no token.

    Raises:
        SchemaError: no trajectories, or their routing specs differ (also a `ValueError`).
    """
    spec = _common_spec(trajectories)
    prompts = [_prompt_length(one) for one in trajectories]
    prompt_width = max(prompts)
    width = prompt_width + max(len(one) - prompt for one, prompt in zip(trajectories, prompts, strict=True))
    shape = (len(trajectories), width)
    input_ids = np.full(shape, pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    loss_mask = np.zeros(shape, np.bool_)
    log_probs = np.zeros(shape, np.float32)
    routing_mask = np.zeros(shape, np.bool_)
    version_ids = np.full(shape, -1, np.int32)
    experts = None if spec is None else np.zeros((*shape, spec.num_layers, spec.top_k), _torch_dtype(spec))
    versions: dict[str, int] = {}
    for row, (one, prompt) in enumerate(zip(trajectories, prompts, strict=True)):
        start = prompt_width - prompt
        at = slice(start, start + len(one))
        input_ids[row, at] = one.token_ids
        attention_mask[row, at] = 1
        position_ids[row, at] = np.arange(len(one))
        position_ids[row, at.stop :] = max(len(one) - 1, 0)
        loss_mask[row, at] = one.loss_mask
        np.copyto(log_probs[row, at], one.logprobs, where=one.loss_mask)
        numbers = [versions.setdefault(name, len(versions)) for name in one.weight_versions]
        version_ids[row, at] = np.array([*numbers, -1], np.int32)[one.weight_version_ids]  # -1 finds the last
        routing_mask[row, at] = one.routing_mask
        if experts is not None:
            experts[row, at] = one.routed_experts
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        position_ids=torch.from_numpy(position_ids),
        loss_mask=torch.from_numpy(loss_mask),
        rollout_log_probs=torch.from_numpy(log_probs),
        logprob_mask=torch.from_numpy(loss_mask & np.isfinite(log_probs)),
        routed_experts=None if experts is None else torch.from_numpy(experts),
        routing_mask=torch.from_numpy(routing_mask),
        routing=spec,
        weight_version_ids=torch.from_numpy(version_ids),
        weight_versions=tuple(versions),
        rewards=torch.tensor(
            [np.nan if one.reward is None else one.reward for one in trajectories], dtype=torch.float32
        ),
        ids=tuple(one.id for one in trajectories),
        groups=tuple(one.group for one in trajectories),
        prompt_width=prompt_width,
    )


def _common_spec(trajectories: Sequence[Trajectory]) -> RoutingSpec | None:
    if not trajectories:
        raise SchemaError("a batch needs at least one trajectory")
    first = trajectories[0]
    for one in trajectories:
        if one.routing != first.routing:
            raise SchemaError(
                f"{first.id} and {one.id} cannot be in one batch, for their routing differs: {first.routing} and "
                f"{one.routing}. Batch by model"
            )
    return first.routing


def _prompt_length(trajectory: Trajectory) -> int:
    """Tokens before the first sampled one; all of them if none was."""
    mask = trajectory.loss_mask
    return int(mask.argmax()) if mask.any() else len(mask)


def _torch_dtype(spec: RoutingSpec) -> npt.DTypeLike:
    """The narrowest dtype that torch can work with: it lacks operators for uint16 (NeMo-RL #4240)."""
    stored: np.dtype[Any] = spec.dtype
    return stored if stored == np.uint8 else np.int16 if spec.num_experts <= 32768 else np.int32
