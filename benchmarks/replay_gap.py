"""How far a trainer is from the rollout that it trains on: in the probability of each token, and in routing."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trajstore_trainer import PaddedBatch
from trajstore_transformers.capture import RouterCapture

__all__ = ["TAUS", "Gap", "executed_sets", "measure_gap", "sampled_logprobs"]

TAUS = (2.0, 1.1)
"""Of F(tau). The paper on R3 takes 2 (arXiv:2510.11370); tokens of a small model are hardly ever so far apart."""


class Gap(NamedTuple):
    """Over all sampled tokens of some trajectories.

    Attributes:
        kl: mean k3 estimate of KL(rollout || trainer), in nats per token: r - 1 - log r with r = trainer / rollout.
        kl_error: standard error of that mean.
        routers: share of (token, layer) cells whose expert set differs from the one that the rollout used.
        tokens: share of tokens with such a cell in any layer.
        extreme: F(tau) by tau of `TAUS`: share of sampled tokens whose two probabilities differ by more than tau.
        ratios: float64 `[n]`, log of trainer / rollout of each sampled token.
    """

    kl: float
    kl_error: float
    routers: float
    tokens: float
    extreme: tuple[float, ...]
    ratios: npt.NDArray[np.float64]


def measure_gap(batch: PaddedBatch, logprobs: Tensor, sets: Tensor, used: PaddedBatch) -> Gap:
    """Compare.

    Args:
        logprobs: `[B, W]` of the trainer.
        sets: `[B, W, L, K]`, the experts that the trainer executed, sorted.
        used: the same trajectories with the rows that the rollout used, i.e. folded `as_sampled`.
    """
    at = batch.logprob_mask
    ratios = (logprobs - batch.rollout_log_probs)[at].double()
    assert used.routed_experts is not None
    differing = (sets != used.routed_experts.long().sort(-1).values).any(-1)[used.routing_mask]
    k3 = ratios.exp() - 1 - ratios
    return Gap(
        kl=float(k3.mean()),
        kl_error=float(k3.std() / len(k3) ** 0.5),
        routers=float(differing.double().mean()),
        tokens=float(differing.any(-1).double().mean()),
        extreme=tuple(float((ratios.abs() > np.log(tau)).double().mean()) for tau in TAUS),
        ratios=ratios.numpy(),
    )


def sampled_logprobs(model: PreTrainedModel, batch: PaddedBatch) -> Tensor:
    """Logprob `[B, W]` of every token given those before it, 0 for the first column. One forward."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits
    of_next = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(of_next, (1, 0))


def executed_sets(model: PreTrainedModel, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Logprobs, and the experts that were executed: sorted ids `[B, W, L, K]`. Under a replay they are the replayed."""
    capture = RouterCapture(model)  # its hooks come behind those of a replay that is open
    try:
        with capture.recording() as recorded:
            logprobs = sampled_logprobs(model, batch)
        experts = recorded.experts(batch.input_ids.numel())[:, list(capture.layer_ids)]
    finally:
        capture.close()
    return logprobs, experts.sort(-1).values.reshape(*batch.input_ids.shape, *experts.shape[1:])
