"""Trajectories and arrays that several tests build."""

import numpy as np
import numpy.typing as npt

import trajstore

__all__ = ["SPEC", "record_seed_case", "rows", "seed_rows"]

SPEC = trajstore.RoutingSpec(layer_ids=(0, 1, 2), top_k=2, num_experts=8, num_hidden_layers=3)
"""Three MoE layers, top-2 of 8 experts."""


def rows(count: int, seed: int = 0, spec: trajstore.RoutingSpec = SPEC) -> npt.NDArray[np.integer]:
    """Random routing rows `[count, L, K]` that pass ingest: distinct experts per layer."""
    order = np.random.default_rng(seed).random((count, spec.num_layers, spec.num_experts)).argsort(axis=-1)
    return order[..., : spec.top_k].astype(spec.dtype)


def seed_rows(segment: int, count: int) -> npt.NDArray[np.integer]:
    """Rows that say where they come from: position p of segment 0 reads `[0, p % 6 + 1]`, of segment 1 `[7, ...]`."""
    made = np.empty((count, SPEC.num_layers, SPEC.top_k), np.uint8)
    made[..., 0] = 0 if segment == 0 else 7
    made[..., 1] = (np.arange(count) % 6 + 1)[:, None]
    return made


def record_seed_case(store: trajstore.Store, **options: object) -> trajstore.TrajectoryWriter:
    """The design's table: prompt 0-4, A B C aborted under v1 (rows 0-6), resumed under v2, D E (rows 0-8)."""
    first = store.create(routing=SPEC, **options)  # type: ignore[arg-type]
    with first.segment(context=[1, 2, 3, 4, 5], engine="test/1", weight_version="v1") as segment:
        segment.tokens([10, 11, 12], [-0.5, -0.25, -0.125])
        segment.routing(seed_rows(0, 7), start=0)
        segment.close("abort")
    again = store.get(first.id)
    with again.segment(engine="test/1", weight_version="v2") as segment:
        segment.tokens([13, 14], [-1.0, -2.0])
        segment.routing(seed_rows(1, 9), start=0)
        segment.close("stop")
    return again
