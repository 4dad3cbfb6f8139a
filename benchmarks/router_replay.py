"""What replayed routing does for the gap between rollout and training, and what it costs.

A small Qwen3-MoE learns to spell, from the licence and some old prose, and generates in bfloat16; every rollout is
aborted half-way and resumed, which prefills its prefix anew. A trainer computes the logprobs of the sampled tokens, in
float32 and under bfloat16 autocast: with the same weights (precision is the only cause), with others that came after
the rollout, and with others that came between abort and resume; each without a replay and with the rows of either
fold. "routers" and "tokens" compare what the trainer executed with what the rollout sampled from.

    python -m benchmarks.router_replay [--quick] [--json FILE] [--plot FILE]
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

import trajstore
from benchmarks.measure import in_turns
from benchmarks.replay_gap import TAUS, Gap, executed_sets, measure_gap, sampled_logprobs
from benchmarks.replay_rollouts import ModelSize, make_model, perturbed, record_rollouts, train
from benchmarks.tables import Cell, Goal, Report, Table
from trajstore.fold import Policy
from trajstore_trainer import PaddedBatch, RouterReplay, padded_batch

__all__ = ["FULL", "POLICIES", "QUICK", "Case", "ReplayScale", "measure_gaps", "run"]

POLICIES: tuple[Policy | None, ...] = (None, "last_segment_wins", "as_sampled")
"""None: no replay."""

OVERHEAD = 0.10


class ReplayScale(NamedTuple):
    """How much is measured.

    Attributes:
        steps: that the model is trained.
        rollouts, tokens: sampled, and how long.
        sizes: of models whose forward is timed.
        repeats: rounds of what is timed.
    """

    steps: int
    rollouts: int
    tokens: int
    sizes: tuple[ModelSize, ...]
    repeats: int


FULL = ReplayScale(
    steps=300,
    rollouts=96,
    tokens=128,
    sizes=(ModelSize(), ModelSize(hidden=512, expert_hidden=256, layers=4, experts=64, top_k=8)),
    repeats=9,
)
QUICK = ReplayScale(steps=2, rollouts=4, tokens=16, sizes=(ModelSize(layers=2),), repeats=2)


class Case(NamedTuple):
    """Which weights sampled, and how the trainer computes.

    Attributes:
        name: as the table calls it.
        resumed: noise on the weights under which the rollouts were resumed.
        trained: noise on the weights of the trainer.
        autocast: whether it computes in bfloat16, over float32 weights.
    """

    name: str
    resumed: float = 0.0
    trained: float = 0.0
    autocast: bool = False

    @property
    def precision_only(self) -> bool:
        """Whether precision is all that differs."""
        return self.resumed == self.trained == 0.0


CASES = (
    Case("same weights, float32"),
    Case("same weights, bfloat16 autocast", autocast=True),
    Case("weights changed by 1 % after the rollout", trained=0.01),
    Case("weights changed by 3 % after the rollout", trained=0.03),
    Case("weights changed by 1 % between abort and resume", resumed=0.01, trained=0.01),
    Case("weights changed by 3 % between abort and resume", resumed=0.03, trained=0.03),
)


def run(scale: ReplayScale, folder: Path, *, show: Callable[[Table], object] = lambda _: None) -> Report:
    """Measure.

    Args:
        folder: where to write; what is written goes again.
        show: hears each table as soon as it is there.
    """
    model = make_model(ModelSize())
    train(model, scale.steps)
    gaps = {case: measure_gaps(model, case, scale, folder) for case in CASES}
    costs = {size: measure_overhead(size, scale) for size in scale.sizes}
    report = Report([_gap_table(gaps), _cost_table(costs)], [*_gap_goals(gaps), *_cost_goals(costs)])
    for table in report.tables:
        show(table)
    return report


def measure_gaps(model: PreTrainedModel, case: Case, scale: ReplayScale, folder: Path) -> dict[Policy | None, Gap]:
    """The gap of one case, by what is replayed."""
    trainer = perturbed(model, case.trained)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="store-") as own,
        trajstore.open(Path(own) / "store", partitions=1) as store,
    ):
        later = perturbed(model, case.resumed)
        ids = record_rollouts(store, model, later, count=scale.rollouts, tokens=scale.tokens)
        used = padded_batch([store.load(id, policy="as_sampled") for id in ids])
        newest = padded_batch([store.load(id, policy="last_segment_wins") for id in ids])
    gaps = {}
    for policy in POLICIES:
        batch = newest if policy == "last_segment_wins" else used
        with torch.no_grad(), _replayed(trainer, batch if policy else None), _precision(autocast=case.autocast):
            logprobs, sets = executed_sets(trainer, batch)
        gaps[policy] = measure_gap(batch, logprobs, sets, used)
    return gaps


def measure_overhead(size: ModelSize, scale: ReplayScale) -> dict[str, tuple[float, float]]:
    """Seconds of a forward, and of a forward with its backward: without a replay and with one, medians in turns."""
    model = make_model(size)
    replay = RouterReplay(model)
    batch = _random_batch(replay, size, rollouts=8, tokens=256 if scale.repeats > 2 else 32)

    def forward(batch: PaddedBatch, replayed: PaddedBatch | None) -> None:
        with torch.no_grad(), _forced(replay, replayed):
            sampled_logprobs(model, batch)

    def step(batch: PaddedBatch, replayed: PaddedBatch | None) -> None:
        with _forced(replay, replayed):
            loss = -(sampled_logprobs(model, batch) * batch.loss_mask).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    seconds = {}
    for name, way in (("forward", forward), ("forward and backward", step)):
        timed = in_turns(
            {"live": lambda way=way: way(batch, None), "replayed": lambda way=way: way(batch, batch)},  # type: ignore[misc]
            repeats=scale.repeats,
        )
        seconds[name] = (statistics.median(timed["live"]), statistics.median(timed["replayed"]))
    return seconds


def _random_batch(replay: RouterReplay, size: ModelSize, *, rollouts: int, tokens: int) -> PaddedBatch:
    """Random tokens and routing, the last row of each missing as ever."""
    generator = torch.Generator().manual_seed(0)
    spec = trajstore.RoutingSpec(
        layer_ids=replay.layer_ids,
        top_k=size.top_k,
        num_experts=size.experts,
        num_hidden_layers=replay.num_hidden_layers,
    )
    with tempfile.TemporaryDirectory() as folder, trajstore.open(Path(folder) / "store", partitions=1) as store:
        ids = []
        for _ in range(rollouts):
            scores = torch.rand((tokens - 1, spec.num_layers, spec.num_experts), generator=generator)
            writer = store.create(routing=spec)
            with writer.segment(context=[1, 2, 3]) as segment:
                segment.tokens(torch.randint(0, 256, (tokens - 3,), generator=generator).numpy())
                segment.routing(scores.topk(spec.top_k).indices.numpy(), start=0)
                segment.close("stop")
            ids.append(writer.id)
        store.flush()
        return padded_batch([store.load(id) for id in ids])


def _replayed(model: PreTrainedModel, batch: PaddedBatch | None) -> AbstractContextManager[None]:
    return _forced(RouterReplay(model), batch)


def _forced(replay: RouterReplay, batch: PaddedBatch | None) -> AbstractContextManager[None]:
    return contextlib.nullcontext() if batch is None else replay.forcing(batch)


@contextlib.contextmanager
def _precision(*, autocast: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        yield


def _gap_table(gaps: dict[Case, dict[Policy | None, Gap]]) -> Table:
    rows: list[list[Cell]] = [
        [
            case.name,
            policy or "none",
            gap.kl * 1e3,
            gap.kl_error * 1e3,
            gap.kl / by_policy[None].kl,
            100 * gap.routers,
            100 * gap.tokens,
            *(100 * share for share in gap.extreme),
            len(gap.ratios),
        ]
        for case, by_policy in gaps.items()
        for policy, gap in by_policy.items()
    ]
    columns = ["trainer", "replay", "KL k3 e-3", "+-", "to none", "routers %", "tokens %"]
    return Table(
        "Rollout in bfloat16 against a trainer",
        [*columns, *(f"F({tau:g}) %" for tau in TAUS), "sampled"],
        rows,
    )


def _cost_table(costs: dict[ModelSize, dict[str, tuple[float, float]]]) -> Table:
    rows: list[list[Cell]] = [
        [f"{_named(size)}, {what}", 1e3 * live, 1e3 * replayed, 100 * (replayed / live - 1)]
        for size, measured in costs.items()
        for what, (live, replayed) in measured.items()
    ]
    return Table("Cost of a replay, float32", ["model", "live ms", "replayed ms", "more %"], rows)


def _gap_goals(gaps: dict[Case, dict[Policy | None, Gap]]) -> Iterator[Goal]:
    for case, by_policy in gaps.items():
        if case.precision_only:
            for policy in POLICIES[1:]:
                share = by_policy[policy].kl / by_policy[None].kl
                yield Goal(f"KL, {case.name}: {policy} to no replay", share, "<=", 0.5)


def _cost_goals(costs: dict[ModelSize, dict[str, tuple[float, float]]]) -> Iterator[Goal]:
    for size, measured in costs.items():
        live, replayed = measured["forward"]
        yield Goal(f"forward, {_named(size)}: replay's part", replayed / live - 1, "<=", OVERHEAD)


def _named(size: ModelSize) -> str:
    return f"{size.layers} layers of {size.hidden}, top {size.top_k} of {size.experts}"


def main() -> None:
    """Print the tables, then the goals."""
    parser = argparse.ArgumentParser(description="What replayed routing does for the gap between rollout and training.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of some seconds; its figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the gaps into this PNG or SVG (matplotlib)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            QUICK if options.quick else FULL,
            Path(folder),
            show=lambda table: print(table.as_text(), end="\n\n", flush=True),
        )
    print(report.goals_as_text())
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if options.plot:
        from benchmarks.replay_plot import draw  # matplotlib only where something is drawn

        draw(report.tables[0], options.plot)


if __name__ == "__main__":
    main()
