"""Replay off and on: the main job twice, and how far the trainer was from the rollout, as a table and a picture.

The rollout computes in bfloat16 and the trainer in float32, as is usual, so that the two disagree even under the same
weights. Every step is measured both ways over the same tokens and weights, whichever way it is trained: the runs differ
in what they train on, the two ways of a step only in the replay.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from trajstore_demo.plan import DemoPlan, Journal

__all__ = ["Comparison", "Step", "compare", "draw", "render", "replay_plan"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One optimisation step, by the weights that it began with: both ways, whichever was trained.

    Attributes:
        reward: mean of its trajectories.
        kl: k3 estimate of KL(rollout || trainer), nats per token, without a replay.
        replayed_kl: the same with it.
        disagreement: share of the routers (tokens times layers) that do not use the experts which sampled, without a
            replay.
        replayed_disagreement: the same with it.
    """

    reward: float
    kl: float
    replayed_kl: float
    disagreement: float
    replayed_disagreement: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of both runs, in order; `replay.json`.

    Attributes:
        off, on: trained without the replay, and with it.
    """

    off: list[Step]
    on: list[Step]


def replay_plan(*, groups: int, seed: int, replay: bool) -> DemoPlan:
    """What both runs have in common: a model that can spell, and steps small enough that precision shows."""
    return DemoPlan(groups=groups, seed=seed, replay=replay, rollout_dtype="bfloat16", warm_up=500, learning_rate=2e-4)


def compare(folder: Path, *, groups: int, seed: int, run: Callable[[Path, DemoPlan], object]) -> Comparison:
    """Run `off` and `on` in `folder`, and write `replay.json` and `replay.png` beside them.

    Args:
        run: the main job over a new store.
    """
    for name, replay in (("off", False), ("on", True)):
        run(folder / name, replay_plan(groups=groups, seed=seed, replay=replay))
    found = Comparison(off=_steps(folder / "off", replay=False), on=_steps(folder / "on", replay=True))
    (folder / "replay.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    draw(found, folder / "replay.png")
    return found


def render(comparison: Comparison) -> Table:
    """For a terminal; pairs are without and with the replay."""
    table = Table(title="the trainer beside the rollout: without the replay → with it", title_justify="left")
    table.add_column("")
    table.add_column("trained without", justify="right")
    table.add_column("trained with", justify="right")

    def add(name: str, value: Callable[[Sequence[Step]], str]) -> None:
        table.add_row(name, value(comparison.off), value(comparison.on))

    add("KL of the first step, 10⁻³ nats per token", lambda steps: _pair(steps[0].kl, steps[0].replayed_kl))
    add(
        "KL, median of the steps",
        lambda steps: _pair(
            statistics.median(one.kl for one in steps), statistics.median(one.replayed_kl for one in steps)
        ),
    )
    add(
        "routers that disagree",
        lambda steps: (
            f"{statistics.fmean(one.disagreement for one in steps):.1%} → "
            f"{statistics.fmean(one.replayed_disagreement for one in steps):.1%}"
        ),
    )
    add("reward of the first quarter of the steps", lambda steps: f"{_reward(steps[: _quarter(steps)]):.3f}")
    add("reward of the last quarter", lambda steps: f"{_reward(steps[-_quarter(steps) :]):.3f}")
    return table


def draw(comparison: Comparison, path: Path) -> None:
    """KL, disagreement and reward over the steps of both runs, each as it was trained.

    Args:
        path: .png or .svg.
    """
    import matplotlib as mpl  # only where something is drawn
    from matplotlib import pyplot as plt

    mpl.use("Agg")
    figure, (kl, disagreement, reward) = plt.subplots(1, 3, figsize=(13, 3.8))
    for steps, replay, color in ((comparison.off, False, "C0"), (comparison.on, True, "C1")):
        at = range(1, len(steps) + 1)
        kls = [1e3 * (one.replayed_kl if replay else one.kl) for one in steps]
        shares = [100 * (one.replayed_disagreement if replay else one.disagreement) for one in steps]
        rewards = [one.reward for one in steps]
        kl.plot(at, kls, color=color, label=f"replay {'on' if replay else 'off'}")
        disagreement.plot(at, shares, color=color)
        reward.plot(at, rewards, color=color, alpha=0.25)
        reward.plot(at, _smooth(rewards), color=color)
    kl.set_yscale("log")
    kl.set_ylabel("KL(rollout ‖ trainer), k3, 10⁻³ nats per token")
    disagreement.set_ylabel("routers that disagree, %")
    reward.set_ylabel("reward, and its running mean")
    for axis in (kl, disagreement, reward):
        axis.set_xlabel("optimisation step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*kl.get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _steps(folder: Path, *, replay: bool) -> list[Step]:
    """Of a run that was trained with or without the replay."""
    lines = [line for line in Journal(folder, "trainer").read() if line["kind"] == "step"]
    live, replayed = ("other_", "") if replay else ("", "other_")
    return [
        Step(
            reward=line["reward"],
            kl=line[f"{live}kl"],
            replayed_kl=line[f"{replayed}kl"],
            disagreement=line[f"{live}disagreement"],
            replayed_disagreement=line[f"{replayed}disagreement"],
        )
        for line in lines
    ]


def _pair(without: float, replayed: float) -> str:
    return f"{1e3 * without:.2f} → {1e3 * replayed:.2f}"


def _quarter(steps: Sequence[Step]) -> int:
    return max(1, len(steps) // 4)


def _reward(steps: Sequence[Step]) -> float:
    return statistics.fmean(one.reward for one in steps)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of up to the last eight."""
    return [statistics.fmean(values[max(0, stop - 8) : stop]) for stop in range(1, len(values) + 1)]
