"""Running recorded tokens again: exact on the same weights, by version on others, and equal to plain arithmetic."""

import json
import re

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import trajstore  # noqa: E402
from tests.builders import SPEC, rows  # noqa: E402
from tests.cli.running import invoke  # noqa: E402
from tests.consumers.replayed import PROMPT, aborted_rollout, model_of, save_models  # noqa: E402
from tests.engines.models import plain_forward, tiny_model  # noqa: E402
from trajstore.archiver import Archiver  # noqa: E402
from trajstore.engine import Scored  # noqa: E402
from trajstore_replay import rerun, resume, write_rerun  # noqa: E402
from trajstore_replay.agreement import row_versions  # noqa: E402
from trajstore_transformers import TransformersEngine  # noqa: E402

pytestmark = pytest.mark.torch


class Says:
    """An engine of a few lines: it says what it was given to say."""

    name = "mine/1"

    def __init__(self, logprobs=None, experts=None, margins=None):
        self.logprobs, self.experts, self.margins = logprobs, experts, margins
        self.asked = []

    def score(self, token_ids, *, temperature):
        self.asked.append((token_ids.tolist(), temperature.tolist()))
        given = len(token_ids)
        logprobs = np.full(given, -1.0, np.float32) if self.logprobs is None else self.logprobs[:given]
        margins = None if self.margins is None else self.margins[:given]
        return Scored(
            logprobs=logprobs, routed_experts=None if self.experts is None else self.experts[:given], margins=margins
        )

    def close(self): ...


@pytest.fixture
def mixed(embedded):
    """A rollout whose first 15 tokens v1 sampled, and 25 more v2; rows of both, the prefix again under v2."""
    id = aborted_rollout(embedded)
    with TransformersEngine(model_of("v2"), weight_version="v2", seed=5) as engine:
        done = resume(embedded, id, engine, close="auto")
    assert (done.tokens, done.status) == (25, "truncated")
    return id


@pytest.fixture
def recorded(embedded):
    """Prompt of 3, 4 tokens with logprobs -1, rows 0 to 5, under w1."""
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3], engine="vllm/0.30.0", weight_version="w1") as segment:
        segment.tokens([4, 5, 6, 7], [-1.0] * 4)
        segment.routing(rows(6, 1), start=0)
        segment.close("stop")
    embedded.flush()
    return trajectory.id


def by_version(agreement):
    return {part.weight_version: part for part in agreement.logprobs}


def test_same_weights_and_engine_agree_to_the_last_expert(embedded):
    id = aborted_rollout(embedded)
    with TransformersEngine(model_of("v1"), weight_version="v1") as engine:
        agreement = rerun(embedded, id, engine).agreement
    everything = agreement.routing[0]
    assert (everything.rows, everything.cells, everything.differing) == (26, 26 * 2, 0)
    assert agreement.missing == 1, "the last token has never been an input"
    assert agreement.logprobs[0].tokens == 15
    assert agreement.logprobs[0].max_difference < 5e-5, "one forward against 15: rounding only"
    assert agreement.logprobs[0].extreme_share == 0.0
    assert agreement.worst_rows == ()


def test_each_version_is_counted_apart_and_equals_a_plain_forward(embedded, mixed):
    """One model has one version's weights: the reader sees which part it made."""
    with TransformersEngine(model_of("v1")) as engine:
        found = rerun(embedded, mixed, engine, policy="as_sampled")
    trajectory, agreement = found.trajectory, found.agreement
    plain = plain_forward(model_of("v1"), trajectory.token_ids)
    np.testing.assert_array_equal(np.sort(found.routed_experts, -1), np.sort(plain.experts, -1))
    unequal = np.zeros((52, 2), bool)
    for row in range(51):
        for layer in range(2):
            unequal[row, layer] = set(plain.experts[row, layer]) != set(trajectory.routed_experts[row, layer].tolist())
    np.testing.assert_array_equal(found.differing, unequal)
    parts = {(part.weight_version, part.origin): part for part in agreement.routing}
    assert parts.keys() == {(None, None), ("v1", "computed"), ("v2", "computed")}
    assert (parts["v1", "computed"].rows, parts["v1", "computed"].differing) == (26, 0)
    of_v2 = parts["v2", "computed"]
    assert (of_v2.rows, of_v2.differing, of_v2.layers) == (25, int(unequal.sum()), tuple(unequal.sum(0).tolist()))
    assert of_v2.rows_differing == int(unequal.any(1).sum()) > 0

    log_ratio = plain.logprobs(trajectory.token_ids, 0.8) - trajectory.logprobs[1:]
    log_ratio = log_ratio[-25:]
    told = by_version(agreement)
    assert told["v1"].max_difference < 5e-5
    assert told["v2"].mean_difference == pytest.approx(np.abs(log_ratio).mean(), rel=1e-4)
    assert told["v2"].mean_k3 == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean(), rel=1e-4)
    ratio = np.exp(np.abs(log_ratio))
    assert told["v2"].extreme_share == np.mean(ratio > 2) > 0
    worst = agreement.worst_tokens[0]
    assert worst.position == 27 + int(np.abs(log_ratio).argmax())
    assert worst.weight_version == "v2"


def test_prefix_that_was_prefilled_again_counts_to_the_weights_that_did(embedded, mixed):
    """verl #6046: replacing all rows also replaces those made by older weights; here the table says so."""
    with TransformersEngine(model_of("v2")) as engine:
        agreement = rerun(embedded, mixed, engine).agreement
    (_, part) = agreement.routing
    assert (part.weight_version, part.rows, part.differing) == ("v2", 51, 0)
    assert by_version(agreement)["v1"].max_difference > 0.1, "but v1 sampled the first tokens"


def test_weight_version_compares_only_what_it_recorded(embedded, mixed):
    with TransformersEngine(model_of("v1")) as engine:
        agreement = rerun(embedded, mixed, engine, policy="as_sampled", weight_version="v1").agreement
        assert [(part.weight_version, part.rows) for part in agreement.routing] == [(None, 26), ("v1", 26)]
        assert [(part.weight_version, part.tokens) for part in agreement.logprobs] == [(None, 15), ("v1", 15)]
        with pytest.raises(trajstore.SchemaError, match=r"under weights 'v9'; it has 'v1', 'v2'"):
            rerun(embedded, mixed, engine, weight_version="v9")


def test_a_bare_archive_is_rerun_as_its_store_is(embedded, mixed, tmp_path):
    Archiver(embedded).run(once=True)
    archive = trajstore.open_archive(tmp_path / "store")
    with TransformersEngine(model_of("v1")) as engine:
        assert rerun(archive, mixed, engine).agreement == rerun(embedded, mixed, engine).agreement


def test_a_model_that_routes_otherwise_is_refused_before_its_tokens_are_read(embedded, recorded):
    """As many layers that route, and as many experts per token, make rows of the same shape: of other layers."""
    mine = Says(experts=rows(7, 1))
    mine.routing_spec = msgspec.structs.replace(SPEC, order="sorted")
    assert rerun(embedded, recorded, mine).agreement.routing[0].differing == 0
    asked = len(mine.asked)
    for changed in (
        {"layer_ids": (0, 1, 3), "num_hidden_layers": 4},
        {"num_hidden_layers": 4},
        {"num_experts": SPEC.num_experts + 1},
        {"top_k": SPEC.top_k + 1},
    ):
        mine.routing_spec = msgspec.structs.replace(SPEC, **changed)
        with pytest.raises(trajstore.Conflict, match="Give the model that the rollout began with") as refused:
            rerun(embedded, recorded, mine)
        model = str(refused.value).partition("this model has ")[2]
        assert all(f"{name}={value}" in model for name, value in changed.items())
    assert len(mine.asked) == asked


def test_rerun_refuses_a_model_whose_other_layers_route(embedded, tmp_path):
    id = aborted_rollout(embedded)
    tiny_model("qwen3_moe", dtype=torch.float32, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    result = invoke("rerun", tmp_path / "store", id, "--model", tmp_path / "other")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "records layer_ids=(1, 3)" in result.stderr
    assert "this model has layer_ids=(0, 1)" in result.stderr


def test_anything_with_score_serves_and_gets_tokens_and_temperatures(embedded, recorded):
    mine = Says(logprobs=np.log([1, 1, 1, 0.5, 0.25, 0.125, 0.9]).astype(np.float32))
    agreement = rerun(embedded, recorded, mine, tau=3.0).agreement
    assert mine.asked == [([1, 2, 3, 4, 5, 6, 7], [1.0] * 7)], "vLLM's logprobs are those before the temperature"
    assert agreement.routing == ()
    log_ratio = np.log([0.5, 0.25, 0.125, 0.9]) + 1.0
    assert agreement.logprobs[0].mean_k3 == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean(), rel=1e-6)
    assert agreement.logprobs[0].extreme_share == np.mean(np.abs(log_ratio) > np.log(3))
    assert agreement.logprobs[0].max_difference == pytest.approx(np.abs(log_ratio).max(), rel=1e-6)


@pytest.mark.parametrize(
    ("engine", "temperature", "expected"),
    [
        ("transformers/5", 0.5, 0.5),
        ("transformers/5", 0, 1.0),
        ("sglang/0.5.23", 0.5, 0.5),
        ("sglang-like/1", 0.5, 1.0),
        ("vllm/0.30.0", 0.5, 1.0),
        ("verl", 0.5, 0.5),
        ("verl-vllm/0.9.1", 0.5, 0.5),
        ("verl-sglang/0.9.1", 0.5, 0.5),
    ],
)
def test_tokens_are_scored_at_the_temperature_of_what_their_engine_reports(embedded, engine, temperature, expected):
    trajectory = embedded.create()
    with trajectory.segment(context=[1, 2], engine=engine, sampling={"temperature": temperature}) as segment:
        segment.tokens([3], [-1.0])
    embedded.flush()
    mine = Says()
    rerun(embedded, trajectory.id, mine)
    rerun(embedded, trajectory.id, mine, temperature=0.25)
    assert [heat for _, heat in mine.asked] == [[1.0, 1.0, expected], [1.0, 1.0, 0.25]]


@pytest.mark.parametrize(
    ("engine", "mode", "expected"),
    [("vllm/0.30.0", "processed_logprobs", 0.5), ("verl-vllm/0.9.1", "raw_logprobs", 1.0), ("x/1", "raw_logits", 1.0)],
)
def test_segment_that_names_its_logprobs_mode_is_believed(embedded, engine, mode, expected):
    trajectory = embedded.create()
    with trajectory.segment(
        context=[1], engine=engine, sampling={"temperature": 0.5, "logprobs_mode": mode}
    ) as segment:
        segment.tokens([3], [-1.0])
    embedded.flush()
    mine = Says()
    assert rerun(embedded, trajectory.id, mine).agreement.assumed == ()
    assert mine.asked[0][1] == [1.0, expected]


def test_temperature_of_an_engine_that_is_not_known_is_named_as_an_assumption(embedded):
    trajectory = embedded.create()
    for engine, temperature in [("other/1", 0.5), ("", 0.7), ("other/1", 0.2), ("same/1", 1.0), ("greedy/1", 0)]:
        context = [] if len(trajectory) else [1]
        with trajectory.segment(context=context, engine=engine, sampling={"temperature": temperature}) as segment:
            segment.tokens([3], [-1.0])
    embedded.flush()
    assert rerun(embedded, trajectory.id, Says()).agreement.assumed == ("other/1", "")
    assert rerun(embedded, trajectory.id, Says(), temperature=0.5).agreement.assumed == ()


def test_nothing_is_scored_in_vain(embedded, recorded):
    """A large model takes minutes to load and to run."""
    mine = Says()
    for wrong in ({"weight_version": "v9"}, {"rows": (0, 8)}, {"temperature": -1.0}, {"tau": 1.0}):
        with pytest.raises(trajstore.SchemaError):
            rerun(embedded, recorded, mine, **wrong)
    assert mine.asked == []


def test_rows_bound_what_is_compared_and_what_is_read(embedded, recorded):
    mine = Says(experts=rows(7, 2))
    found = rerun(embedded, recorded, mine, rows=(2, 4))
    assert len(mine.asked[0][0]) == 5, "one token more, for engines that give a row with the next token"
    assert np.flatnonzero(found.compared).tolist() == [2, 3]
    assert found.agreement.logprobs[0].tokens == 1
    assert found.agreement.routing[0].rows == 2
    for wrong in [(3, 3), (0, 8), (-1, 2)]:
        with pytest.raises(trajstore.SchemaError, match="it has 7 tokens"):
            rerun(embedded, recorded, mine, rows=wrong)


def test_near_tie_is_a_difference_that_the_engine_nearly_decided_the_other_way(embedded, recorded):
    experts = rows(6, 1)
    experts[1, 0] = [(set(range(8)) - set(experts[1, 0].tolist())).pop(), experts[1, 0, 1]]
    experts[4, 2] = [(set(range(8)) - set(experts[4, 2].tolist())).pop(), experts[4, 2, 1]]
    experts[5, 1] = experts[5, 1, ::-1].copy()
    margins = np.full((6, 3), 0.5, np.float32)
    margins[1, 0] = 1e-3
    margins[0, 0] = 0.0  # nothing differs there
    found = rerun(embedded, recorded, Says(experts=experts, margins=margins), tie_tolerance=1e-2)
    everything = found.agreement.routing[0]
    assert (everything.rows, everything.differing, everything.near_ties, everything.order_changes) == (6, 2, 1, 1)
    assert everything.layers == (1, 0, 1)
    assert np.argwhere(found.near_ties).tolist() == [[1, 0]]
    assert [one.row for one in found.agreement.worst_rows] == [4, 1], "near ties come last"
    worst = found.agreement.worst_rows[0]
    assert (worst.layer, worst.recorded, worst.engine) == (2, tuple(rows(6, 1)[4, 2]), tuple(experts[4, 2]))


def test_engine_without_the_last_row_and_one_with_all_agree(embedded, recorded):
    wide = np.concatenate([rows(6, 1), rows(1, 9)])
    counts = [rerun(embedded, recorded, Says(experts=experts)).agreement.routing for experts in (wide, wide[:6])]
    assert counts[0] == counts[1]
    with pytest.raises(trajstore.RoutingError, match="5 rows for 7 tokens"):
        rerun(embedded, recorded, Says(experts=wide[:5]))


def test_routing_of_another_model_is_refused(embedded, recorded):
    other = trajstore.RoutingSpec(layer_ids=(0, 1), top_k=2, num_experts=8, num_hidden_layers=2)
    with pytest.raises(trajstore.RoutingError, match=r"shape \[7, 2, 2\], expected \[rows, 3, 2\]"):
        rerun(embedded, recorded, Says(experts=rows(7, 1, other)))
    with pytest.raises(trajstore.SchemaError, match=r"logprobs of shape \[3\] for 7 tokens"):
        rerun(embedded, recorded, Says(logprobs=np.zeros(3, np.float32)))


def test_logprobs_that_are_not_finite_are_counted_and_not_compared(embedded):
    """SkyRL #1909: a rare non-finite logprob killed runs."""
    trajectory = embedded.create()
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2, 3, 4], [-1.0, np.nan, -np.inf])
    embedded.flush()
    agreement = rerun(embedded, trajectory.id, Says()).agreement
    assert (agreement.logprobs[0].tokens, agreement.unscored) == (1, 2)


def test_rows_of_a_request_whose_weights_changed_go_to_the_version_of_the_token_they_decided(embedded):
    """With k tokens at the switch, rows below P + k - 1 are the old weights' (docs/engines.md)."""
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3], weight_version="w1") as segment:
        segment.tokens([4, 5, 6, 7], [-1.0] * 4)
        segment.routing(rows(6), start=0)
        segment.close("length", weight_versions=[("w1", 0, 2), ("w2", 2, 4)])
    embedded.flush()
    assert row_versions(embedded.load(trajectory.id)).tolist() == ["w1"] * 4 + ["w2"] * 2 + [""]


def test_file_holds_the_comparison_row_by_row(embedded, mixed, tmp_path):
    with TransformersEngine(model_of("v1")) as engine:
        found = rerun(embedded, mixed, engine)
    write_rerun(tmp_path / "rerun.npz", found)
    with np.load(tmp_path / "rerun.npz") as file:
        np.testing.assert_array_equal(file["token_ids"][:12], PROMPT)
        np.testing.assert_array_equal(file["logprobs"], found.logprobs)
        np.testing.assert_array_equal(file["recorded_experts"], found.trajectory.routed_experts)
        again = (np.sort(file["experts"], -1) != np.sort(file["recorded_experts"], -1)).any(-1)
        np.testing.assert_array_equal(file["differing"], again & file["compared"][:, None])
        assert json.loads(str(file["agreement"]))["engine"] == found.agreement.engine
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["rerun.npz"]


def test_command_tells_versions_apart_in_words_and_json(embedded, mixed, tmp_path):
    save_models(tmp_path)
    options = ("rerun", tmp_path / "store", mixed, "--model", tmp_path / "v1", "--policy", "as_sampled")
    shown = invoke(*options)
    assert shown.exit_code == 0
    for line in (r"v1 +computed +26 +0 +0 +0\.00%", r"v2 +computed +25 ", "differing rows by layer: 1: "):
        assert re.search(line, shown.stdout), shown.stdout
    document = json.loads(invoke(*options, "--json", "--out", tmp_path / "x.npz").stdout)
    everything, of_v1, of_v2 = document["routing"]
    assert (of_v1["weight_version"], of_v1["differing"]) == ("v1", 0)
    assert everything["share"] == of_v2["differing"] / 102 > 0
    assert (tmp_path / "x.npz").exists()


def test_command_names_what_it_assumes(embedded, tmp_path):
    save_models(tmp_path)
    trajectory = embedded.create()
    with trajectory.segment(context=PROMPT, engine="other/1", sampling={"temperature": 0.5}) as segment:
        segment.tokens([3], [-1.0])
    embedded.flush()
    shown = invoke("rerun", tmp_path / "store", trajectory.id, "--model", tmp_path / "v1")
    assert re.search(r"assumed +other/1 tells logprobs before the temperature; else give --temperature", shown.stdout)


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (("--rows", "3"), 2, "names no rows"),
        (("--out", "/nowhere/x.npz"), 2, "there is no folder /nowhere"),
        (("--engine", "nix"), 1, "engines that serve replay: transformers"),
        (("--until", "9-9"), 1, "9-9"),
        (("--rows", "3:9"), 1, "rows 3:9"),
        (("--weight-version", "v9"), 1, "under weights 'v9'; it has 'w1'"),
        (("--tau", "1"), 2, "tau"),
    ],
)
def test_command_refuses_what_cannot_be(embedded, recorded, tmp_path, options, code, why):
    refused = invoke("rerun", tmp_path / "store", recorded, "--model", tmp_path, *options)
    assert refused.exit_code == code
    assert why in refused.stderr
    assert "loading" not in refused.stderr or "--engine" in options
