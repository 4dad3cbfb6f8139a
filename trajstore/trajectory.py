"""A folded trajectory: what `store.load` returns and a trainer consumes. Data only; `fold.py` fills it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trajstore.history import Segment
from trajstore.routing import RoutingArray, RoutingSpec

__all__ = ["RoutedRows", "Trajectory"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedRows:
    """The routing of some rows and layers of a trajectory.

    Attributes:
        start: position of the first row.
        routed_experts: uint8 or uint16 `[rows, layers, K]`; 0 where `routing_mask` is False.
        routing_mask: bool `[rows]`: False where no recording counts.
        routing_source: int16 `[rows]`: index of the segment whose recording it is, -1 for none.
    """

    start: int
    routed_experts: RoutingArray
    routing_mask: npt.NDArray[np.bool_]
    routing_source: npt.NDArray[np.int16]

    def only(self, layers: Sequence[int]) -> "RoutedRows":
        """The same rows with these layers of the layer axis, in this order."""
        routed = np.ascontiguousarray(self.routed_experts[:, list(layers)])
        return replace(self, routed_experts=routed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One rollout of one prompt under a named fold policy. T tokens, L routing layers, K experts per token.

    Every array owns its memory. `segment_ids`, `routing_source` and `weight_version_ids` are -1 for none.

    Attributes:
        id: of the trajectory.
        token_ids: int32 `[T]`.
        logprobs: float32 `[T]`, natural log of the sampling probability; NaN where not sampled or not recorded.
        loss_mask: bool `[T]`, True where the policy sampled the token.
        segment_ids: int16 `[T]`, index into `segments` of the segment that brought the token.
        weight_version_ids: int32 `[T]`, index into `weight_versions`.
        weight_versions: the versions that sampled tokens of this trajectory, in order of appearance.
        routed_experts: uint8 or uint16 `[T, L, K]`, 0 where `routing_mask` is False; None without a routing spec.
        routing_mask: bool `[T]`, True where a row is known.
        routing_source: int16 `[T]`, index into `segments` of the segment whose recording gave the row.
        policy: the fold policy that chose the rows.
        at: id of the last event folded.
        status: open, completed, truncated, failed or aborted.
        finish_reason: of the last segment: stop, length, abort, error, lost; "" while it is open.
        reward, reward_components: the newest; None and empty without one.
        group, group_size, metadata, routing: as given at `create`.
        segments: every segment, rewound ones too.
        nonfinite_logprobs: sampled tokens whose recorded logprob is NaN or infinite.
        version: how often the trajectory was closed.
    """

    id: str
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    loss_mask: npt.NDArray[np.bool_]
    segment_ids: npt.NDArray[np.int16]
    weight_version_ids: npt.NDArray[np.int32]
    weight_versions: tuple[str, ...]
    routed_experts: RoutingArray | None
    routing_mask: npt.NDArray[np.bool_]
    routing_source: npt.NDArray[np.int16]
    policy: str
    at: str
    status: str
    finish_reason: str = ""
    reward: float | None = None
    reward_components: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None
    group_size: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    routing: RoutingSpec | None = None
    segments: tuple[Segment, ...] = ()
    nonfinite_logprobs: int = 0
    version: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def weight_version(self, position: int) -> str:
        """Version of the weights that sampled the token at `position`; "" where it was not sampled."""
        index = int(self.weight_version_ids[position])
        return self.weight_versions[index] if index >= 0 else ""
