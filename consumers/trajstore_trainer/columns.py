"""The columns that every batch has, and the one place where a trajectory's arrays are written into them.

How the tokens of several trajectories share a tensor is each batch's own: `batch.py` pads them, `packed.py` joins them.
Arrays are filled by slices and handed to torch without a copy; no token becomes a Python object.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from trajstore.errors import SchemaError
from trajstore.routing import RoutingSpec
from trajstore.trajectory import Trajectory

__all__ = [
    "Place",
    "Routed",
    "TrajectoryBatch",
    "as_tensors",
    "common_spec",
    "fill_columns",
    "prompt_length",
    "routing_dtype",
]

Place: TypeAlias = slice | tuple[int, slice]
"""Where in a token tensor the tokens of one trajectory go."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrajectoryBatch:
    """What padded and packed batches of B trajectories have in common. `...` is the shape of their token tensors.

    Attributes:
        input_ids: int64 `[...]`, the pad token where there is no token.
        position_ids: int64 `[...]`, position of the token in its trajectory.
        loss_mask: bool `[...]`, True where the policy sampled the token.
        rollout_log_probs: float32 `[...]`, as recorded, NaN and infinite ones too; 0 where `loss_mask` is False.
        logprob_mask: bool `[...]`, True where `loss_mask` is and the recorded logprob is finite.
        routed_experts: uint8, int16 or int32 `[..., L, K]`, 0 where `routing_mask` is False; None if the trajectories
            have no routing spec. uint16 is widened as needed, for torch lacks operators for it.
        routing_mask: bool `[...]`, True where the row is known. A row that is not is no choice of expert 0.
        routing: the trajectories' common spec; None without one. Its `order` is "sorted" where any of theirs is, and so
            are all rows then.
        weight_version_ids: int32 `[...]`, index into `weight_versions`, -1 where not sampled.
        weight_versions: the versions that sampled anything in this batch, in order of appearance.
        rewards: float32 `[B]`, NaN without one.
        ids, groups: of the trajectories, in the order given.
    """

    input_ids: torch.Tensor
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

    def __len__(self) -> int:
        return len(self.ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)


def fill_columns(
    trajectories: Sequence[Trajectory], places: Sequence[Place], shape: tuple[int, ...], *, pad_token_id: int
) -> dict[str, Any]:
    """The fields of `TrajectoryBatch`, tensors as NumPy arrays. Whatever no place covers is padding.

    Args:
        places: of each trajectory, as long as it is; they do not overlap.
        shape: of the token tensors.

    Raises:
        SchemaError: see `common_spec`.
    """
    spec = common_spec(trajectories)
    input_ids = np.full(shape, pad_token_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    loss_mask = np.zeros(shape, np.bool_)
    log_probs = np.zeros(shape, np.float32)
    routing_mask = np.zeros(shape, np.bool_)
    version_ids = np.full(shape, -1, np.int32)
    experts = None if spec is None else np.zeros((*shape, spec.num_layers, spec.top_k), routing_dtype(spec))
    versions: dict[str, int] = {}
    for one, at in zip(trajectories, places, strict=True):
        input_ids[at] = one.token_ids
        position_ids[at] = np.arange(len(one))
        loss_mask[at] = one.loss_mask
        np.copyto(log_probs[at], one.logprobs, where=one.loss_mask)
        numbers = [versions.setdefault(name, len(versions)) for name in one.weight_versions]
        version_ids[at] = np.array([*numbers, -1], np.int32)[one.weight_version_ids]  # -1 finds the last
        routing_mask[at] = one.routing_mask
        if experts is not None and spec is not None and one.routing is not None:
            experts[at] = one.routed_experts
            if one.routing.order != spec.order:
                experts[at].sort(axis=-1)
    rewards = [np.nan if one.reward is None else one.reward for one in trajectories]
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "loss_mask": loss_mask,
        "rollout_log_probs": log_probs,
        "logprob_mask": loss_mask & np.isfinite(log_probs),
        "routed_experts": experts,
        "routing_mask": routing_mask,
        "routing": spec,
        "weight_version_ids": version_ids,
        "weight_versions": tuple(versions),
        "rewards": np.array(rewards, np.float32),
        "ids": tuple(one.id for one in trajectories),
        "groups": tuple(one.group for one in trajectories),
    }


def as_tensors(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The same with torch tensors over the memory of the NumPy arrays."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in columns.items()
    }


class Routed(Protocol):
    """A trajectory, or what stands for one."""

    @property
    def id(self) -> str: ...
    @property
    def routing(self) -> RoutingSpec | None: ...


def common_spec(trajectories: Sequence[Routed]) -> RoutingSpec | None:
    """The one routing spec of all; where only their order differs, the one that says "sorted".

    Raises:
        SchemaError: no trajectories, or their routing specs differ (also a `ValueError`).
    """
    if not trajectories:
        raise SchemaError("a batch needs at least one trajectory")
    first = trajectories[0]
    common = first.routing
    for one in trajectories:
        if _unordered(one.routing) != _unordered(common):
            raise SchemaError(
                f"{first.id} and {one.id} cannot be in one batch, for their routing differs: {first.routing} and "
                f"{one.routing}. Batch by model"
            )
        if one.routing is not None and one.routing.order == "sorted":
            common = one.routing
    return common


def prompt_length(trajectory: Trajectory) -> int:
    """Tokens before the first sampled one; all of them if none was."""
    mask = trajectory.loss_mask
    return int(mask.argmax()) if mask.any() else len(mask)


def routing_dtype(spec: RoutingSpec) -> npt.DTypeLike:
    """The narrowest dtype that torch can work with: it lacks operators for uint16 (NeMo-RL #4240)."""
    stored: np.dtype[Any] = spec.dtype
    return stored if stored == np.uint8 else np.int16 if spec.num_experts <= 32768 else np.int32


def _unordered(spec: RoutingSpec | None) -> RoutingSpec | None:
    return None if spec is None else msgspec.structs.replace(spec, order="engine")
