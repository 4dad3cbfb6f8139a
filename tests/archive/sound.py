"""A small archive that has everything: lookup tables, parts in many packs, rows stored once, notes, two shapes."""

import numpy as np

import trajstore
from tests.builders import record_seed_case, rows
from trajstore.archiver import Archiver

__all__ = ["WIDE", "fold", "folds", "grow", "make"]

WIDE = trajstore.RoutingSpec(layer_ids=tuple(range(8)), top_k=8, num_experts=128, num_hidden_layers=8)

POLICIES = ("last_segment_wins", "as_sampled")


def make(store, *, records):
    """Archive trajectories until partition 0 has so many records; returns their ids."""
    names = (f"grown-{i}" for i in range(100))
    grown = {store.keys.partition(name): name for name in names}  # one in each partition
    ids = sorted(grown.values())
    number = 0
    while store.archive.manifest(0).refresh() < records:
        for id in grown.values():
            grow(store, id, number)
        trajectory = record_seed_case(store, id=f"seed-{number}", group="g")
        trajectory.reward(0.5)
        trajectory.close("completed")
        if number % 3 == 2:
            trajectory.observe(rows(4, seed=number), start=1, source="trainer")
        ids.append(trajectory.id)
        store.flush()
        Archiver(store).run(once=True)
        number += 1
    return ids


def grow(store, id, number):
    """One more segment, which records all rows anew: the same ones."""
    writer = store.get(id) if number else store.create(id=id, routing=WIDE)
    length = len(writer)
    with writer.segment(context=[] if number else np.arange(40), weight_version=f"v{number}") as segment:
        length += 0 if number else 40
        segment.tokens(np.arange(8) + length, np.full(8, -0.5))
        segment.routing(rows(600, seed=9, spec=WIDE)[: length + 7], start=0)
        segment.close("abort")


def fold(archive, id, policy="last_segment_wins"):
    """Everything that a trainer would be given, as bytes."""
    t = archive.load(id, policy=policy)
    arrays = (t.token_ids, t.logprobs, t.loss_mask, t.segment_ids, t.routing_mask, t.routing_source, t.routed_experts)
    return t.status, t.reward, *(array.tobytes() for array in arrays)


def folds(archive, ids):
    """By id, under every policy."""
    return {id: [fold(archive, id, policy) for policy in POLICIES] for id in ids}
