"""Trajectories → one packed batch: their tokens end to end in one row, with `cu_seqlens` for varlen attention.

Which trajectories to pack together is decided in `balance.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trajstore.errors import SchemaError
from trajstore.trajectory import Trajectory
from trajstore_trainer.columns import TrajectoryBatch, as_tensors, fill_columns

__all__ = ["PackedBatch", "packed_batch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch(TrajectoryBatch):
    """B trajectories in one row of N tokens, in the order given.

    Every tensor is on the CPU and owns its memory. The tensors of `TrajectoryBatch` are `[N]`; trajectory `i` lies at
    `cu_seqlens_padded[i]` and has `cu_seqlens[i + 1] - cu_seqlens[i]` tokens. `position_ids` count on through the
    padding behind a trajectory, so that they are 0 where one begins and nowhere else.

    Attributes:
        cu_seqlens: int32 `[B + 1]`, 0 and the running sum of the lengths.
        cu_seqlens_padded: int32 `[B + 1]`, the same with the padding of each; equal to `cu_seqlens` without any. It is
            the one for FlashAttention; Megatron-Core's `PackedSeqParams` has both, under these names.
        max_seqlen: the longest of them, padding included.
    """

    cu_seqlens: torch.Tensor
    cu_seqlens_padded: torch.Tensor
    max_seqlen: int


def packed_batch(trajectories: Sequence[Trajectory], *, align: int = 1, pad_token_id: int = 0) -> PackedBatch:
    """Collate.

    Args:
        trajectories: at least one; all with the same routing spec but for its order, or all without.
        align: every trajectory is padded to a multiple of this many tokens: of `2 * context_size` for zigzag context
            parallelism, times the tensor-parallel size with sequence parallelism.
        pad_token_id: for `input_ids` where there is no token.

    Raises:
        SchemaError: no trajectories, their routing specs differ, or `align` is not positive (also a `ValueError`).
    """
    if align < 1:
        raise SchemaError(f"align must be at least 1, not {align}")
    lengths = np.array([len(one) for one in trajectories], np.int64)
    padded = -(-lengths // align) * align
    stops = padded.cumsum()
    places = [
        slice(stop - room, stop - room + length)
        for stop, room, length in zip(stops.tolist(), padded.tolist(), lengths.tolist(), strict=True)
    ]
    columns = fill_columns(trajectories, places, (int(padded.sum()),), pad_token_id=pad_token_id)
    for at, stop in zip(places, stops.tolist(), strict=True):
        columns["position_ids"][at.stop : stop] = np.arange(at.stop - at.start, stop - at.start)
    return PackedBatch(
        **as_tensors(columns),
        cu_seqlens=_running_sum(lengths),
        cu_seqlens_padded=_running_sum(padded),
        max_seqlen=int(padded.max()),
    )


def _running_sum(lengths: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
