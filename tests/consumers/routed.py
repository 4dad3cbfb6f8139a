"""Batches of trajectories with random routing for a model, what its MoE layers really execute, and plain gating."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

import trajstore
from tests.builders import rows
from trajstore_trainer import padded_batch
from trajstore_trainer.packed import packed_batch
from trajstore_transformers.capture import find_routers

__all__ = ["FORMS", "executed", "executed_sets", "forward", "known", "routing_of", "trajectories"]

VOCABULARY = 64

FORMS = {"padded": padded_batch, "packed": packed_batch, "packed and aligned": partial(packed_batch, align=8)}
"""How trajectories become a batch, by name."""


def routing_of(model):
    """The spec of a model of `tests.engines.models`."""
    routers, hidden = find_routers(model)
    config = model.config
    return trajstore.RoutingSpec(
        layer_ids=tuple(routers),
        top_k=config.num_experts_per_tok,
        num_experts=next(iter(routers.values())).num_experts,
        num_hidden_layers=hidden,
    )


def trajectories(store, spec, lengths=(9, 5, 12), *, holes=True, seed=0):
    """Folded trajectories of 2 to 4 prompt tokens, with random rows; of each the last is missing, and with holes row 2.

    Random rows are hardly ever what a router chooses.
    """
    made = []
    for i, length in enumerate(lengths):
        rng = np.random.default_rng(100 * seed + i)
        prompt = 2 + i % 3
        writer = store.create(routing=spec)
        with writer.segment(context=rng.integers(1, VOCABULARY, prompt), weight_version="v1") as segment:
            segment.tokens(rng.integers(1, VOCABULARY, length - prompt), np.full(length - prompt, -1.0))
            recorded = rows(length - 1, 100 * seed + i, spec)
            if holes:
                segment.routing(recorded[:2], start=0)
                segment.routing(recorded[3:], start=3)
            else:
                segment.routing(recorded, start=0)
            segment.close("stop")
        writer.close("completed")
        made.append(writer)
    store.flush()
    return [store.load(one.id) for one in made]


def forward(model, batch):
    """Logits `[..., V]` of a padded or packed batch, in its own shape."""
    if batch.input_ids.ndim == 2:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
    return model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False).logits[0]


def known(batch):
    """Recorded expert sets, sorted `[M, L, K]`, of the M tokens whose row is known."""
    return batch.routed_experts[batch.routing_mask].long().sort(-1).values


@contextmanager
def executed(model):
    """What the experts of each layer are called with: `{layer id: [(ids [N, K], weights [N, K]), ...]}`."""
    seen = {}
    with_experts = {
        layer_id: next(module for name, module in layer.named_modules() if name.endswith(".experts"))
        for layer_id, layer in enumerate(model.get_decoder().layers)
        if layer_id in find_routers(model)[0]
    }
    handles = [
        experts.register_forward_pre_hook(
            lambda _, args, kwargs, layer_id=layer_id: seen.setdefault(layer_id, []).append(_call(args, kwargs)),
            with_kwargs=True,
        )
        for layer_id, experts in with_experts.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _call(args, kwargs):
    _, ids, weights = (*args, *kwargs.values())
    return ids.detach().clone(), weights.detach().clone()


def executed_sets(seen, batch, call=0):
    """Sorted ids `[..., L, K]` of one forward, in the batch's shape."""
    stacked = torch.stack([seen[layer_id][call][0].sort(-1).values for layer_id in sorted(seen)], 1)
    return stacked.reshape(*batch.routing_mask.shape, *stacked.shape[1:])
