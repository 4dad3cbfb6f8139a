"""What of a batch is replayed: routing rows in the order in which a model sees the tokens, in any form of batch."""

from typing import Protocol

import torch
from torch import Tensor

from trajstore.errors import RoutingError, SchemaError
from trajstore.routing import RoutingSpec
from trajstore_trainer.batch import PaddedBatch
from trajstore_trainer.packed import PackedBatch

__all__ = ["ReplayRows", "RoutedBatch", "token_places"]


class RoutedBatch(Protocol):
    """A batch with routing: padded `[B, W]`, packed `[T]`, or any other arrangement of tokens `[...]`."""

    @property
    def routed_experts(self) -> Tensor | None:
        """Integers `[..., L, K]`."""

    @property
    def routing_mask(self) -> Tensor:
        """Bool `[...]`, True where the row is known."""

    @property
    def routing(self) -> RoutingSpec | None:
        """What the L layers are."""


class ReplayRows:
    """Rows of N tokens, checked, and their copies on the devices that asked for them.

    Attributes:
        spec: of the rows.
        experts: integers `[N, L, K]`.
        mask: bool `[N]`, True where the row is known.

    Raises:
        SchemaError: the batch has no routing.
        RoutingError: shapes that do not fit together, or a known row with an expert that there is not.
    """

    def __init__(self, batch: RoutedBatch) -> None:
        if batch.routed_experts is None or batch.routing is None:
            raise SchemaError(
                "the batch has no routing to replay: its trajectories were created with routing=None. Train on it "
                "without a replay, or record with a RoutingSpec"
            )
        self.spec = batch.routing
        cell = (self.spec.num_layers, self.spec.top_k)
        given, mask = batch.routed_experts, batch.routing_mask
        if given.shape != (*mask.shape, *cell) or given.is_floating_point() or mask.dtype != torch.bool:
            raise RoutingError(
                f"routed_experts are {given.dtype} {list(given.shape)} and routing_mask is {mask.dtype} "
                f"{list(mask.shape)}; expected integers {[*mask.shape, *cell]} (layers and top_k of the batch's "
                "routing spec) and bool"
            )
        self.experts = given.detach().reshape(-1, *cell)
        self.mask = mask.detach().reshape(-1)
        self._require_in_range()
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.mask)

    def layer(self, layer_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Experts int64 `[N, K]` of one layer, by its global id, and bool `[N, 1]` where they are known."""
        if device not in self._copies:
            # Waits for nothing where the batch is pinned.
            self._copies[device] = (
                self.experts.to(device, non_blocking=True),
                self.mask.to(device, non_blocking=True)[:, None],
            )
        experts, mask = self._copies[device]
        return experts[:, self.spec.layer_ids.index(layer_id)].to(torch.int64), mask

    def _require_in_range(self) -> None:
        if self.experts.numel() == 0:
            return
        low, high = (int(bound) for bound in self.experts.aminmax())
        if low >= 0 and high < self.spec.num_experts:
            return
        outside = ((self.experts < 0) | (self.experts >= self.spec.num_experts)) & self.mask[:, None, None]
        if outside.any():
            row, layer, k = (int(i) for i in outside.nonzero()[0])
            raise RoutingError(
                f"the batch's token {row} is routed to expert {int(self.experts[row, layer, k])} at layer "
                f"{self.spec.layer_ids[layer]}, outside [0, {self.spec.num_experts})",
                layer=self.spec.layer_ids[layer],
                row=row,
            )


def token_places(batch: PaddedBatch | PackedBatch) -> list[tuple[int, int]]:
    """From where to where the tokens of each trajectory lie in the flattened batch."""
    if isinstance(batch, PaddedBatch):
        mask = batch.attention_mask.cpu()
        starts = mask.argmax(dim=1) + torch.arange(len(mask)) * mask.shape[1]
        lengths = mask.sum(dim=1)
    else:
        starts, lengths = batch.cu_seqlens_padded[:-1].cpu(), batch.cu_seqlens.cpu().diff()
    return list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
