"""A small mixture-of-experts model that has learnt to spell, and rollouts of it in bfloat16, recorded in a store.

Every rollout is partial: aborted half-way and resumed from the store, which prefills its prefix anew, under the same
weights or under others.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import trajstore
from trajstore_transformers import SamplingParams, TransformersEngine, record_output

__all__ = ["ModelSize", "make_model", "perturbed", "record_rollouts", "train"]

ROOT = Path(__file__).parents[1]
TEXTS = (ROOT / "LICENSE", ROOT / "examples" / "trajstore_demo" / "passages.txt")
"""What it learns to spell: files that do not change from one version to the next."""

_PIECE = 96


class ModelSize(NamedTuple):
    """Of a Qwen3-MoE whose first layer is dense."""

    hidden: int = 96
    expert_hidden: int = 48
    layers: int = 6
    experts: int = 16
    top_k: int = 4


def make_model(size: ModelSize, *, seed: int = 0) -> PreTrainedModel:
    """Random weights in float32, in eval mode. Bytes are its tokens."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        moe_intermediate_size=size.expert_hidden,
        num_hidden_layers=size.layers,
        mlp_only_layers=[0],
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def train(model: PreTrainedModel, steps: int, *, seed: int = 0) -> float:
    """Next-byte prediction on pieces of `TEXTS`; routers and experts specialise. The last step's loss."""
    text = _text()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    value = float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps) + 1e-5
        pieces = torch.from_numpy(np.stack([text[at : at + _PIECE] for at in _starts(rng, 16)]))
        logits = model(input_ids=pieces).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = float(loss.detach())
    return value


def perturbed(model: PreTrainedModel, scale: float, *, seed: int = 0) -> PreTrainedModel:
    """A copy whose weights are off by Gaussian noise of `scale` times each tensor's root mean square."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * parameter.square().mean().sqrt() * noise)
    return changed


def record_rollouts(
    store: trajstore.Store, model: PreTrainedModel, later: PreTrainedModel, *, count: int, tokens: int, seed: int = 0
) -> list[str]:
    """Sample rollouts in bfloat16: half of the tokens under `model`, aborted, the rest under `later`. Their ids."""
    serving = copy.deepcopy(model)
    torch.nn.Module.to(serving, torch.bfloat16)
    text, rng = _text(), np.random.default_rng(seed)
    with TransformersEngine(serving, weight_version="v1", max_batch=count, seed=seed) as engine:
        begun = [store.create(routing=engine.routing_spec) for _ in range(count)]
        prompts = [text[at : at + int(rng.integers(16, 48))] for at in _starts(rng, count)]
        _generate(engine, begun, prompts, tokens // 2, aborted=True)
        engine.update_weights({name: value.to(torch.bfloat16) for name, value in later.state_dict().items()}, "v2")
        resumed = [store.get(one.id) for one in begun]
        _generate(engine, resumed, [np.empty(0, np.int64)] * count, tokens - tokens // 2, aborted=False)
    for one in resumed:
        one.close("truncated")
    store.flush()
    return [one.id for one in resumed]


def _generate(
    engine: TransformersEngine,
    trajectories: Sequence[trajstore.TrajectoryWriter],
    contexts: Sequence[npt.NDArray[np.int64]],
    tokens: int,
    *,
    aborted: bool,
) -> None:
    """One segment of each, `tokens` tokens long, which end by themselves or are aborted."""
    segments = {}
    for trajectory, context in zip(trajectories, contexts, strict=True):
        segments[trajectory.id] = trajectory.segment(
            context=context, engine=engine.name, weight_version=engine.weight_version
        )
        engine.add_request(trajectory.id, trajectory.token_ids, SamplingParams(max_tokens=tokens + aborted))
    for _ in range(tokens):
        for output in engine.step():
            record_output(segments[output.request_id], output)
    for output in engine.abort_all():
        record_output(segments[output.request_id], output)


def _text() -> npt.NDArray[np.int64]:
    return np.frombuffer(b"\n".join(path.read_bytes() for path in TEXTS), np.uint8).astype(np.int64)


def _starts(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    return rng.integers(0, len(_text()) - _PIECE, count)
