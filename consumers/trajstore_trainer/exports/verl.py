"""A padded batch as verl's: the keys, shapes and dtypes that its agent loops put into a `DataProto`.

Written against verl 0.9.1, `AgentLoopWorker._postprocess`. verl is not imported; `tensordict` is, when called.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from trajstore.errors import SchemaError
from trajstore.trajectory import Trajectory
from trajstore_trainer.batch import PaddedBatch, padded_batch
from trajstore_trainer.exports.routed import MissingRow, all_layers

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["to_verl"]


def to_verl(batch: PaddedBatch | Sequence[Trajectory], *, missing_row: MissingRow = 0) -> "TensorDict":
    """Export; `DataProto.from_tensordict(to_verl(batch))` makes verl's own of it.

    P and R are the widths of prompts and responses, W = P + R, H all hidden layers of the model.

    Args:
        batch: padded, or trajectories to pad with 0 (`padded_batch` takes verl's fixed widths and a pad token).
        missing_row: see `MissingRow`. verl itself knows only 0.

    Returns:
        Tensors that own their memory:
        prompts int64 `[B, P]`, responses int64 `[B, R]`, input_ids, attention_mask and position_ids int64 `[B, W]`;
        response_mask int64 `[B, R]`, 1 where the policy sampled the token and its logprob is finite;
        rollout_log_probs float32 `[B, R]`, 0 elsewhere, left out if no trajectory has a finite one (then the mask is 1
        for every sampled token);
        routed_experts int16 or int32 `[B, W, H, K]`, row and token in one column, left out without routing;
        routing_mask bool `[B, W]` beside it, which verl does not look at: where it is False there is no row;
        rm_scores float32 `[B, R]`, the reward at the last token, left out unless every trajectory has one;
        uid and trajectory_id, non-tensor: the group (the trajectory's id without one), for GRPO; the trajectory's id.

    Raises:
        SchemaError: `tensordict` is not installed, or see `padded_batch`.
    """
    try:
        from tensordict import NonTensorStack, TensorDict
    except ModuleNotFoundError:
        raise SchemaError(
            "to_verl needs tensordict, which is not installed; run: pip install 'trajstore[tensordict]'"
        ) from None
    batch = (batch if isinstance(batch, PaddedBatch) else padded_batch(batch)).to("cpu")
    responses = slice(batch.prompt_width, None)
    trained = batch.logprob_mask if batch.logprob_mask.any() else batch.loss_mask
    found = {
        "prompts": batch.input_ids[:, : batch.prompt_width],
        "responses": batch.input_ids[:, responses],
        "response_mask": trained[:, responses].long(),
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    if batch.logprob_mask.any():
        found["rollout_log_probs"] = batch.rollout_log_probs.where(batch.logprob_mask, 0.0)[:, responses]
    if batch.routed_experts is not None and batch.routing is not None:
        dtype = np.int16 if batch.routing.num_experts <= 32768 else np.int32
        routed, known = batch.routed_experts.numpy(), batch.routing_mask.numpy()
        wide = all_layers(routed, known, batch.routing, dtype=dtype, missing_row=missing_row)
        found["routed_experts"] = torch.from_numpy(wide)
        found["routing_mask"] = batch.routing_mask
    if not batch.rewards.isnan().any():
        found["rm_scores"] = _at_last_token(batch)[:, responses]
    groups = [id if group is None else group for id, group in zip(batch.ids, batch.groups, strict=True)]
    owned = {name: one if name == "routed_experts" else one.clone() for name, one in found.items()}  # most are views
    return TensorDict(
        owned | {"uid": NonTensorStack(*groups), "trajectory_id": NonTensorStack(*batch.ids)},
        batch_size=[len(batch)],
    )


def _at_last_token(batch: PaddedBatch) -> torch.Tensor:
    """Rewards `[B, W]`, each in the column of its trajectory's last token."""
    scores = torch.zeros(batch.input_ids.shape)
    width = batch.attention_mask.shape[1]
    last = width - 1 - batch.attention_mask.flip(1).argmax(1)
    scores[torch.arange(len(batch)), last] = batch.rewards
    return scores
