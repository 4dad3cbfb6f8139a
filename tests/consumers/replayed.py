"""Rollouts that a small model generates and is cut off from, and models that differ a little, in memory and on disk."""

import numpy as np
import torch

from tests.engines.models import prompt, tiny_model
from trajstore_transformers import SamplingParams, TransformersEngine, record_output

__all__ = ["aborted_rollout", "begin_rollout", "model_of", "save_models"]

PROMPT = prompt(12)


def model_of(version, *, dtype=torch.float32):
    """Model "v1", or "v2": the same with noise on every matrix, so that routing and logprobs drift."""
    model = tiny_model("qwen3_moe_dense_first", dtype=torch.float32, seed=1)
    if version == "v2":
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for weights in model.parameters():
                if weights.ndim > 1:
                    weights.add_(0.05 * weights.std() * torch.randn(weights.shape, generator=generator))
    return model.to(dtype)


def save_models(folder):
    """Folders `v1` and `v2` as `save_pretrained` writes them."""
    for version in ("v1", "v2"):
        model_of(version).save_pretrained(folder / version)


def begin_rollout(store, engine, *, tokens, limit=40, temperature=0.8, sampling=None, **options):
    """A rollout in mid-segment, `tokens` sampled and recorded: handle and open segment."""
    trajectory = store.create(**({"routing": engine.routing_spec} | options))
    segment = trajectory.segment(
        context=PROMPT,
        engine=engine.name,
        weight_version=engine.weight_version,
        sampling=sampling or {"temperature": temperature, "max_tokens": limit},
    )
    engine.add_request(trajectory.id, trajectory.token_ids, SamplingParams(limit, temperature))
    for _ in range(tokens):
        for output in engine.step():
            record_output(segment, output)
    return trajectory, segment


def aborted_rollout(store, *, tokens=15, **options):
    """Prompt and `tokens` sampled under v1, aborted with its routing; the trajectory's id."""
    with TransformersEngine(model_of("v1"), weight_version="v1", seed=3) as engine:
        trajectory, segment = begin_rollout(store, engine, tokens=tokens, **options)
        assert record_output(segment, engine.abort_request(trajectory.id))
    trajectory.close("aborted")
    store.flush()
    assert np.count_nonzero(store.load(trajectory.id).loss_mask) == tokens
    return trajectory.id
