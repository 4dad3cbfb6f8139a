"""A batch's routing as Megatron-Core's `RouterReplay` takes it: one tensor of expert ids per router. No Megatron here.

`RouterReplay.set_replay_data(as_megatron(batch, routers=...))`. Megatron-Core has neither a mask nor layer ids: it
hands the tensors out in the order in which the routers were made (megatron/core/transformer/moe/router_replay.py), so
the caller says which router is which.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from trajstore.errors import RoutingError, SchemaError
from trajstore_trainer.batch import PaddedBatch
from trajstore_trainer.packed import PackedBatch
from trajstore_trainer.rank_routing import RankRouting
from trajstore_trainer.replay.rows import ReplayRows, token_places

__all__ = ["MegatronRouter", "Missing", "as_megatron"]

Missing: TypeAlias = Literal["negative", "distinct"]


class MegatronRouter(NamedTuple):
    """A router of this rank.

    Attributes:
        layer: global id of its layer, 0-based (Megatron's `layer_number` - 1); of an MTP layer, its number among those.
        kind: MTP layers count their `layer_number` from 1 again, and are no decoder layers (NeMo-RL #3903).
    """

    layer: int
    kind: Literal["decoder", "mtp"] = "decoder"


def as_megatron(
    batch: PaddedBatch | PackedBatch | RankRouting,
    *,
    routers: Sequence[MegatronRouter] | None = None,
    missing: Missing = "negative",
) -> list[Tensor]:
    """Expert ids of each router.

    Args:
        batch: padded `[B, W]`, whose tokens are given sequence first, as Megatron's hidden states lie: token `w` of row
            `b` is at `w * B + b`; packed `[T]`, in its order; or what `read_routing` read for this rank, in its order.
        routers: of this rank, in the order in which they were made. Default: all layers of the batch, in its order.
        missing: what stands where a row is not known. "negative": all -1, where NeMo-RL lets the live router decide and
            Megatron-Core itself fails. "distinct": ids 0 to K-1, which Megatron-Core takes for a choice; only where no
            other token sees the difference, in padding and at the last token of a sequence.

    Returns:
        int64 `[tokens, K]` per router. Those of MTP layers have no recorded rows: theirs are all -1; leave their
        `RouterReplayAction` unset.

    Raises:
        SchemaError: the batch has no routing, or an unknown `missing`.
        RoutingError: a router of a layer without rows; or `missing="distinct"` and a token amid a sequence is missing.
    """
    if missing not in get_args(Missing):
        raise SchemaError(f'missing must be "negative" or "distinct", not {missing!r}')
    if isinstance(batch, RankRouting):
        layer_ids, experts, known = batch.layer_ids, batch.routed_experts, batch.routing_mask
    else:
        rows = ReplayRows(batch)
        layer_ids, experts, known = rows.spec.layer_ids, rows.experts, rows.mask
    routers = [MegatronRouter(layer) for layer in layer_ids] if routers is None else list(routers)
    absent = [router.layer for router in routers if router.kind == "decoder" and router.layer not in layer_ids]
    if absent:
        raise RoutingError(
            f"layers {absent} have no recorded routing; the batch's rows are of layers {list(layer_ids)}. "
            "Name routers by the global 0-based id of their layer, dense layers counted",
            layer=absent[0],
        )
    if missing == "distinct":
        _require_only_ends_missing(batch, known)
    width = experts.shape[-1]
    stand_in = torch.arange(width) if missing == "distinct" else torch.full((width,), -1)
    order = torch.arange(len(known)).reshape(batch.routing_mask.shape).t().reshape(-1).to(known.device)
    made = []
    for router in routers:
        if router.kind == "mtp":
            made.append(torch.full((len(known), width), -1, device=known.device))
            continue
        of_layer = experts[:, layer_ids.index(router.layer)].to(torch.int64)
        made.append(torch.where(known[:, None], of_layer, stand_in.to(known.device))[order])
    return made


def _require_only_ends_missing(batch: PaddedBatch | PackedBatch | RankRouting, known: Tensor) -> None:
    for name, position, start, stop in _followed(batch):
        lost = (~known[start:stop]).nonzero()
        if len(lost):
            raise RoutingError(
                f"{name} has no recorded routing for {len(lost)} tokens that others follow, the first at position "
                f"{position + int(lost[0])}; experts made up for them would change every later token. Leave the "
                'trajectory out, or use missing="negative" with a router that decides there itself',
                row=position + int(lost[0]),
            )


def _followed(batch: PaddedBatch | PackedBatch | RankRouting) -> Iterator[tuple[str, int, int, int]]:
    """Runs of tokens that have a later one in their sequence: its name, their first position, from where to where."""
    if not isinstance(batch, RankRouting):
        for id, (start, stop) in zip(batch.ids, token_places(batch), strict=True):
            yield id, 0, start, max(start, stop - 1)
        return
    at = 0
    for span in batch.spans:
        last = span.stop - (span.stop == batch.lengths[span.sequence])
        yield f"trajectory {span.sequence} of the rank", span.start, at, at + max(0, last - span.start)
        at += span.rows
