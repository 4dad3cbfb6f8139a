"""What `benchmarks/router_replay.py` measures: rollouts resumed as they say, gaps by their formulas, goals decided."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.replay_gap import measure_gap
from benchmarks.replay_plot import draw
from benchmarks.replay_rollouts import ModelSize, make_model, perturbed, record_rollouts
from benchmarks.router_replay import CASES, POLICIES, QUICK, Case, measure_gaps, run
from tests.builders import record_seed_case
from trajstore_trainer import padded_batch

pytestmark = pytest.mark.torch

SMALL = ModelSize(layers=3)


def test_every_rollout_is_aborted_half_way_and_resumed_under_the_later_weights(embedded):
    model = make_model(SMALL)
    ids = record_rollouts(embedded, model, perturbed(model, 0.03), count=3, tokens=10)
    for id in ids:
        one = embedded.load(id)
        assert [(segment.finish_reason, segment.weight_version) for segment in one.segments] == [
            ("abort", "v1"),
            ("length", "v2"),
        ]
        assert np.bincount(one.segment_ids[one.loss_mask]).tolist() == [5, 5]
        assert embedded.load(id, policy="as_sampled").routing_mask.tolist() == [True] * (len(one) - 1) + [False]


def test_gap_is_what_its_words_say(embedded):
    """By hand: three sampled tokens at twice, once and half the rollout's probability, one router of six per token."""
    embedded.flush()
    record = record_seed_case(embedded)
    embedded.flush()
    batch = padded_batch([embedded.load(record.id, policy="as_sampled")])
    shift = torch.zeros_like(batch.rollout_log_probs)
    shift[0, 5:8] = torch.tensor([math.log(2.5), 0.0, -math.log(1.5)])
    sets = batch.routed_experts.long().sort(-1).values.clone()
    sets[0, 3, 1] = torch.tensor([2, 5])
    gap = measure_gap(batch, batch.rollout_log_probs + shift, sets, batch)
    rows = int(batch.routing_mask.sum())
    assert (gap.routers, gap.tokens) == pytest.approx((1 / (3 * rows), 1 / rows))
    expected = [(r - 1 - math.log(r)) for r in (2.5, 1.0, 1 / 1.5, 1.0, 1.0)]
    assert gap.kl == pytest.approx(np.mean(expected), rel=1e-5)
    assert gap.kl_error == pytest.approx(np.std(expected, ddof=1) / 5**0.5, rel=1e-5)
    assert gap.extreme == pytest.approx((1 / 5, 2 / 5))


@pytest.mark.parametrize("case", [Case("same"), Case("resumed", resumed=0.03, trained=0.03)])
def test_a_replay_as_sampled_executes_what_the_rollout_did(case, tmp_path):
    gaps = measure_gaps(make_model(SMALL), case, QUICK._replace(rollouts=8), tmp_path)
    assert list(gaps) == list(POLICIES)
    assert gaps["as_sampled"].routers == 0
    assert gaps[None].routers > 0
    if case.resumed:
        assert gaps["last_segment_wins"].routers > 0, "rows of the newer weights are not those that sampled"
    assert {len(gap.ratios) for gap in gaps.values()} == {8 * QUICK.tokens}


@torch.no_grad()
def test_noise_is_relative_to_each_tensor():
    model = make_model(SMALL)
    for before, after in zip(model.parameters(), perturbed(model, 0.02).parameters(), strict=True):
        size = float((after - before).square().mean().sqrt() / before.square().mean().sqrt().clamp_min(1e-12))
        assert size == pytest.approx(0.02, rel=0.4) or not before.any()


def test_report_decides_every_goal_and_is_drawn(tmp_path):
    heard = []
    report = run(QUICK, tmp_path, show=heard.append)
    assert heard == report.tables
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    gaps, costs = report.tables
    assert [row[:2] for row in gaps.rows] == [[case.name, policy or "none"] for case in CASES for policy in POLICIES]
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert len(costs.rows) == 2 * len(QUICK.sizes)
    assert sum(goal.name.startswith("KL") for goal in report.goals) == 4
    assert json.loads(json.dumps(report.as_json()))["goals"]
    draw(gaps, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
