"""Trajectories → one padded batch of torch tensors, prompts left-padded and responses right-padded as verl aligns them.

The prompt is everything before the first sampled token; the response is the rest, tool tokens included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trajstore.errors import SchemaError
from trajstore.trajectory import Trajectory
from trajstore_trainer.columns import TrajectoryBatch, as_tensors, common_spec, fill_columns, prompt_length

__all__ = ["PaddedBatch", "padded_batch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaddedBatch(TrajectoryBatch):
    """B trajectories in W columns: `prompt_width` for the longest prompt, the others for the longest response.

    Every tensor is on the CPU and owns its memory. Column `c` of a row holds the token at position
    `c - (prompt_width - len(prompt))`; what belongs to that token (logprob, weight version, routing) is in its column.
    The tensors of `TrajectoryBatch` are `[B, W]`; `position_ids` are 0 in the padding before a trajectory, its last
    position in the padding after it (verl).

    Attributes:
        attention_mask: int64 `[B, W]`, 1 where there is a token.
        prompt_width: columns before the first response token.
    """

    attention_mask: torch.Tensor
    prompt_width: int


def padded_batch(
    trajectories: Sequence[Trajectory],
    *,
    pad_token_id: int = 0,
    prompt_width: int | None = None,
    response_width: int | None = None,
) -> PaddedBatch:
    """Collate.

    Args:
        trajectories: at least one; all with the same routing spec but for its order, or all without.
        pad_token_id: for `input_ids` where there is no token.
        prompt_width, response_width: columns for prompts and responses, where every batch must have the same; default
            what the longest needs.

    Raises:
        SchemaError: no trajectories, their routing specs differ, or one does not fit the widths (also a `ValueError`).
    """
    common_spec(trajectories)
    prompts = [prompt_length(one) for one in trajectories]
    responses = [len(one) - prompt for one, prompt in zip(trajectories, prompts, strict=True)]
    width = _width("prompt", prompts, prompt_width, trajectories)
    shape = (len(trajectories), width + _width("response", responses, response_width, trajectories))
    places = [
        (row, slice(width - prompt, width - prompt + len(one)))
        for row, (one, prompt) in enumerate(zip(trajectories, prompts, strict=True))
    ]
    columns = fill_columns(trajectories, places, shape, pad_token_id=pad_token_id)
    attention_mask = np.zeros(shape, np.int64)
    for row, at in places:
        attention_mask[row, at] = 1
        columns["position_ids"][row, at.stop :] = max(at.stop - at.start - 1, 0)
    return PaddedBatch(**as_tensors(columns), attention_mask=torch.from_numpy(attention_mask), prompt_width=width)


def _width(part: str, lengths: Sequence[int], given: int | None, trajectories: Sequence[Trajectory]) -> int:
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if given is not None and lengths[longest] > given:
        raise SchemaError(
            f"the {part} of {trajectories[longest].id} has {lengths[longest]} tokens and does not fit {part}_width "
            f"{given}; widen it, or leave the trajectory out"
        )
    return lengths[longest] if given is None else given
