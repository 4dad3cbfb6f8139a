"""The trainer process: makes the first weights, reads finished groups from the store, takes GRPO steps, publishes."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import trajstore
from trajstore_demo.model import WeightFiles, make_model
from trajstore_demo.plan import DemoPlan, Journal, StageTimes
from trajstore_demo.task import END, passages
from trajstore_trainer import PaddedBatch, TrajectoryReader, padded_batch

__all__ = ["advantages", "policy_loss", "warm_up"]

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
                gaps = []
                for _ in range(_EPOCHS):
                    loss, gap = policy_loss(model, batch, advantage)
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
                kl=gaps[0],
                versions=sorted({int(name[1:]) for name in batch.weight_versions}),
                tokens=int(batch.loss_mask.sum()),
            )
        journal.write(kind="done", seconds=times.seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
