"""`trajstore demo --compare-replay`: both ways of a step, runs that differ in the replay alone, and what is shown."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

torch = pytest.importorskip("torch")

from trajstore_demo.command import run_demo  # noqa: E402
from trajstore_demo.compare import Comparison, Step, compare, draw, render, replay_plan  # noqa: E402
from trajstore_demo.model import make_model  # noqa: E402
from trajstore_demo.plan import DemoPlan, Journal  # noqa: E402
from trajstore_demo.training import Trainee  # noqa: E402
from trajstore_trainer import padded_batch  # noqa: E402
from trajstore_transformers import SamplingParams, TransformersEngine, record_output  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

STEPS = [
    Step(reward=0.1 * i, kl=4e-3 + i * 1e-3, replayed_kl=2e-3, disagreement=0.05, replayed_disagreement=0.0)
    for i in range(8)
]


def test_trainee_uses_the_experts_that_sampled_if_told_to_and_else_its_own(embedded):
    model = make_model(3)
    with TransformersEngine(model, weight_version="v0", max_batch=1, seed=3) as engine:
        trajectory = embedded.create(routing=engine.routing_spec)
        segment = trajectory.segment(context=[70, 71, 72], engine=engine.name, weight_version="v0")
        engine.add_request(trajectory.id, trajectory.token_ids, SamplingParams(max_tokens=12))
        while not segment.closed:
            for output in engine.step():
                record_output(segment, output)
    embedded.flush()
    batch = padded_batch([embedded.load(trajectory.id, policy="as_sampled")])
    trainee, other = Trainee(model), Trainee(make_model(4))
    for replay in (False, True):
        loss, gap = trainee.loss(batch, torch.tensor([1.0]), replay=replay)
        assert gap.disagreement == 0.0, "the same weights"
        assert gap.kl == pytest.approx(0.0, abs=1e-6)
        assert float(loss.detach()) == pytest.approx(-1.0, abs=1e-4)
    live, replayed = (other.loss(batch, torch.tensor([1.0]), replay=replay)[1] for replay in (False, True))
    assert live.disagreement > 0.2
    assert replayed.disagreement == 0.0
    assert live.kl != replayed.kl
    assert not any(module._forward_hooks for module in other.model.modules()), "nothing is left on the model"


def test_run_with_replay_trains_with_the_experts_of_a_rollout_in_bfloat16(tmp_path):
    plan = DemoPlan(groups=6, warm_up=100, max_tokens=40, replay=True, rollout_dtype="bfloat16")
    report = run_demo(tmp_path / "run", plan, Console(quiet=True), rollout="trajstore_demo.rollout")
    steps = [line for line in Journal(tmp_path / "run", "trainer").read() if line["kind"] == "step"]
    assert len(steps) == len(report.kl) == 3
    assert [line["disagreement"] for line in steps] == [0.0] * 3
    assert sum(line["other_disagreement"] for line in steps) > 0, "else there was nothing to replay"
    assert 1e-6 < steps[0]["kl"] < 0.05, "the same weights in another precision"


def test_runs_differ_in_the_replay_alone_and_each_step_knows_both_ways(tmp_path):
    plans = {}

    def run(folder, plan):
        plans[folder.name] = plan
        plan_folder = folder / "demo"
        plan_folder.mkdir(parents=True)
        line = {"reward": 0.5, "kl": 1.0, "other_kl": 2.0, "disagreement": 0.1, "other_disagreement": 0.2}
        Journal(folder, "trainer").write(kind="step", step=1, **line)
        Journal(folder, "trainer").write(kind="done", seconds={})

    found = compare(tmp_path, groups=8, seed=5, run=run)
    assert plans == {
        "off": replay_plan(groups=8, seed=5, replay=False),
        "on": replay_plan(groups=8, seed=5, replay=True),
    }
    assert plans["off"].rollout_dtype == "bfloat16"
    assert found.off == [Step(reward=0.5, kl=1.0, replayed_kl=2.0, disagreement=0.1, replayed_disagreement=0.2)]
    assert found.on == [Step(reward=0.5, kl=2.0, replayed_kl=1.0, disagreement=0.2, replayed_disagreement=0.1)]
    assert json.loads((tmp_path / "replay.json").read_text())["on"][0]["replayed_kl"] == 1.0
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_both_ways_of_both_runs(tmp_path):
    comparison = Comparison(off=STEPS, on=STEPS[::-1])
    console = Console(width=120, file=io.StringIO())
    console.print(render(comparison))
    shown = console.file.getvalue()
    for text in ("4.00 → 2.00", "11.00 → 2.00", "7.50 → 2.00", "5.0% → 0.0%", "0.050", "0.650"):
        assert text in shown
    draw(comparison, tmp_path / "replay.svg")
    assert "<svg" in (tmp_path / "replay.svg").read_text()


def test_comparison_wants_a_folder_of_its_own(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    command = [sys.executable, "-m", "trajstore", "demo", str(tmp_path), "--compare-replay"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "not empty" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
