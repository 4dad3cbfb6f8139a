"""The trainer process: makes the first weights, reads finished groups from the store, takes GRPO steps, publishes."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import trajstore
from trajstore_demo.model import WeightFiles, make_model
from trajstore_demo.plan import DemoPlan, Journal, StageTimes
from trajstore_demo.task import END, passages
from trajstore_trainer import PaddedBatch, RouterReplay, TrajectoryReader, padded_batch
from trajstore_transformers.capture import RouterCapture

__all__ = ["Gap", "Trainee", "advantages", "policy_loss", "warm_up"]

_PATIENCE = 120.0
_CLIP = 0.2
_EPOCHS = 2
_PIECE = 64


def advantages(rewards: torch.Tensor, groups: tuple[str | None, ...]) -> torch.Tensor:
    """Rewards `[B]` relative to their group: (reward - mean) / (std + 1e-4), as in GRPO (DeepSeekMath, eq. 3)."""
    result = torch.zeros_like(rewards)
    for group in set(groups):
        members = torch.tensor([i for i, name in enumerate(groups) if name == group])
        scores = rewards[members]
        result[members] = (scores - scores.mean()) / (scores.std(correction=0) + 1e-4)
    return result


def policy_loss(model: torch.nn.Module, batch: PaddedBatch, advantage: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Clipped surrogate over the sampled tokens, and how far the trainer's logprobs are from the rollout's.

    Args:
        advantage: `[B]`.

    Returns:
        The loss, a mean over tokens, and the mean k3 estimate of KL(rollout || trainer) in nats per token.
    """
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    logprobs = -cross_entropy(logits[:, :-1].transpose(1, 2).float(), batch.input_ids[:, 1:], reduction="none")
    mask = batch.loss_mask[:, 1:]
    log_ratio = torch.where(mask, logprobs - batch.rollout_log_probs[:, 1:], 0.0)
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantage[:, None])
    count = mask.sum().clamp(min=1)
    kl = ((ratio - 1 - log_ratio) * mask).sum() / count
    return -(gain * mask).sum() / count, float(kl.detach())


class Gap(NamedTuple):
    """How far the trainer is from the rollout over one batch.

    Attributes:
        kl: as `policy_loss` tells.
        disagreement: share of the routers (tokens times layers) that did not use the experts which sampled.
    """

    kl: float
    disagreement: float


class Trainee:
    """The model in training, whose routers may be made to choose the experts that sampled."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._replay = RouterReplay(model)

    def loss(self, batch: PaddedBatch, advantage: torch.Tensor, *, replay: bool) -> tuple[torch.Tensor, Gap]:
        """The loss of one forward, and its distance from the rollout.

        Args:
            batch: folded `as_sampled`.
            advantage: `[B]`.
        """
        with self._replay.forcing(batch) if replay else nullcontext():
            capture = RouterCapture(self.model)  # within: its hooks see what the replay's have put in
            try:
                with capture.recording() as recorded:
                    loss, kl = policy_loss(self.model, batch, advantage)
                executed = recorded.experts(batch.input_ids.numel())[:, list(capture.layer_ids)]
            finally:
                capture.close()
        assert batch.routed_experts is not None
        rows = batch.routed_experts.long().sort(-1).values
        differing = (executed.sort(-1).values.reshape(rows.shape) != rows).any(-1)[batch.routing_mask]
        return loss, Gap(kl, float(differing.double().mean()))


def warm_up(model: torch.nn.Module, plan: DemoPlan) -> None:
    """Teach the model to spell: next-byte prediction on pieces of the passages."""
    rng = np.random.default_rng(plan.seed)
    text = np.concatenate([[*line, END] for line in passages()])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(plan.warm_up):
        starts = rng.integers(0, len(text) - _PIECE, 16)
        pieces = torch.from_numpy(np.stack([text[start : start + _PIECE] for start in starts]))
        logits = model(input_ids=pieces).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def main(folder: Path) -> None:
    """Run in a process of its own over an embedded store."""
    torch.set_num_threads(1)
    plan, journal, times = DemoPlan.of(folder), Journal(folder, "trainer"), StageTimes()
    model, weights = make_model(plan.seed), WeightFiles(folder / "demo" / "weights")
    with times.measure("warm up"):
        warm_up(model, plan)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.learning_rate)
    trainee = Trainee(model)
    with trajstore.open(folder, create=False) as store:
        weights.publish(0, model)
        reader = TrajectoryReader(store)
        left = plan.groups
        for step in range(1, plan.steps + 1):
            with times.measure("wait for groups"):
                ready = reader.take(groups=min(plan.groups_per_step, left), timeout=_PATIENCE)
            left -= len(ready)
            with times.measure("train"):
                batch = padded_batch([one for group in ready for one in group.trajectories], pad_token_id=END)
                advantage = advantages(batch.rewards, batch.groups)
                with torch.no_grad():
                    _, other = trainee.loss(batch, advantage, replay=not plan.replay)
                gaps = []
                for _ in range(_EPOCHS):
                    loss, gap = trainee.loss(batch, advantage, replay=plan.replay)
                    gaps.append(gap)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
            with times.measure("publish weights"):
                weights.publish(step, model)
            reader.acknowledge(ready)
            journal.write(
                kind="step",
                step=step,
                groups=len(ready),
                reward=float(batch.rewards.mean()),
                kl=gaps[0].kl,
                disagreement=gaps[0].disagreement,
                other_kl=other.kl,
                other_disagreement=other.disagreement,
                versions=sorted({int(name[1:]) for name in batch.weight_versions}),
                tokens=int(batch.loss_mask.sum()),
            )
        journal.write(kind="done", seconds=times.seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
