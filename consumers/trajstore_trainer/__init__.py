"""A trainer's side of the store: finished trajectories in, torch tensors out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trajstore_trainer.balance import balance, micro_batches
from trajstore_trainer.batch import PaddedBatch, padded_batch
from trajstore_trainer.columns import TrajectoryBatch
from trajstore_trainer.counts import Counts
from trajstore_trainer.dataset import TrajectoryDataset
from trajstore_trainer.exports import (
    read_batch,
    read_trajectories,
    to_slime,
    to_verl,
    write_batch,
    write_trajectories,
)
from trajstore_trainer.filtered import Filtered
from trajstore_trainer.packed import PackedBatch, packed_batch
from trajstore_trainer.rank_routing import RankRouting, RoutingPlace, read_routing
from trajstore_trainer.reader import ReadyTrajectories, TrajectoryReader
from trajstore_trainer.replay.megatron import MegatronRouter, as_megatron
from trajstore_trainer.selection import Selection
from trajstore_trainer.slices import Span, context_spans, pipeline_layers, routing_layers, take

if TYPE_CHECKING:
    from trajstore_trainer.observe import observing
    from trajstore_trainer.replay.router_replay import RouterReplay

__all__ = [
    "Counts",
    "Filtered",
    "MegatronRouter",
    "PackedBatch",
    "PaddedBatch",
    "RankRouting",
    "ReadyTrajectories",
    "RouterReplay",
    "RoutingPlace",
    "Selection",
    "Span",
    "TrajectoryBatch",
    "TrajectoryDataset",
    "TrajectoryReader",
    "as_megatron",
    "balance",
    "context_spans",
    "micro_batches",
    "observing",
    "packed_batch",
    "padded_batch",
    "pipeline_layers",
    "read_batch",
    "read_routing",
    "read_trajectories",
    "routing_layers",
    "take",
    "to_slime",
    "to_verl",
    "write_batch",
    "write_trajectories",
]

_NEED_TRANSFORMERS = {
    "RouterReplay": "trajstore_trainer.replay.router_replay",
    "observing": "trajstore_trainer.observe",
}
"""Imported when they are asked for: reading and collating need torch only."""


def __getattr__(name: str) -> Any:
    if name in _NEED_TRANSFORMERS:
        return getattr(import_module(_NEED_TRANSFORMERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
