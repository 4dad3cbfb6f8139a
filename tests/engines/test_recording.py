"""From the real engine into the store and back: the seed's case, and what each kind of output leaves behind."""

from dataclasses import fields

import numpy as np
import pytest

import trajstore
from tests.engines.driving import drain
from tests.engines.models import plain_forward, prompt, tiny_model
from trajstore.archiver import Archiver
from trajstore.events import RoutingAbsent
from trajstore_transformers import SamplingParams, TransformersEngine, record_output

pytestmark = pytest.mark.torch

PROMPT = prompt(5)
GREEDY = SamplingParams(max_tokens=50, temperature=0)


class Run:
    """The seed's case through an engine: two models' weights, one trajectory at a time, read back from the store."""

    def __init__(self, store, family):
        self.store = store
        self.models = {"v1": tiny_model(family, seed=1), "v2": tiny_model(family, seed=2)}
        self.engine = TransformersEngine(tiny_model(family, seed=1), weight_version="v1")

    def load_weights(self, version):
        if self.engine.weight_version != version:
            self.engine.update_weights(self.models[version].state_dict(), version)

    def start_and_abort(self):
        """Prompt 0-4, A B C, aborted under v1; returns the trajectory's id."""
        self.load_weights("v1")
        trajectory = self.store.create(routing=self.engine.routing_spec)
        segment = self.segment(trajectory, context=PROMPT)
        self.engine.add_request(trajectory.id, trajectory.token_ids, GREEDY)
        for _ in range(3):
            assert not record_output(segment, self.engine.step()[0])
        assert record_output(segment, self.engine.abort_request(trajectory.id))
        return trajectory.id

    def resume(self, id):
        """D E under v2, from what the store holds."""
        self.load_weights("v2")
        trajectory = self.store.get(id)
        segment = self.segment(trajectory, context=[])
        self.engine.add_request(id, trajectory.token_ids, SamplingParams(max_tokens=2, temperature=0))
        assert not record_output(segment, self.engine.step()[0])
        assert record_output(segment, self.engine.step()[0])

    def segment(self, trajectory, context):
        return trajectory.segment(
            base=None, context=context, engine=self.engine.name, weight_version=self.engine.weight_version
        )

    def archive(self):
        self.store.flush()
        Archiver(self.store).run(once=True)

    def where(self, id):
        """Per segment's epoch, where its events lie: {"hot"}, {"archive"}."""
        events = self.store.events(id)
        return [
            {"hot" if event.stored == "hot" else "archive" for event in events if event.at.epoch == epoch}
            for epoch in (2, 3)
        ]


@pytest.fixture(params=["qwen3_moe_dense_first", "mixtral"])
def run(request, embedded):
    run = Run(embedded, request.param)
    yield run
    run.engine.close()


def test_the_resumed_rollout_folds_without_duplicate_hot_archived_and_mixed(run):
    """verl #6029: full-sequence routing concatenated on resume, prefix duplicated; verl #6046: old rows replaced."""
    mixed = run.start_and_abort()
    run.archive()
    run.resume(mixed)
    hot = run.start_and_abort()
    run.resume(hot)
    policies = ("last_segment_wins", "as_sampled")
    loaded = {("mixed", policy): run.store.load(mixed, policy=policy) for policy in policies}
    loaded |= {("hot", policy): run.store.load(hot, policy=policy) for policy in policies}
    assert run.where(mixed) == [{"archive"}, {"hot"}]
    assert run.where(hot) == [{"hot"}, {"hot"}]
    run.archive()
    assert run.where(hot) == [{"archive"}, {"archive"}]
    loaded |= {("archived", policy): run.store.load(hot, policy=policy) for policy in policies}

    for (where, policy), trajectory in loaded.items():
        assert_is_the_seed_case(run, trajectory, policy)
        assert_same_arrays(trajectory, loaded["hot", policy], where)


def assert_is_the_seed_case(run, trajectory, policy):
    """The design's table: who won each row, and that the row is what that winner's weights route."""
    assert len(trajectory) == 10
    np.testing.assert_array_equal(trajectory.token_ids[:5], PROMPT)
    assert trajectory.loss_mask.tolist() == [False] * 5 + [True] * 5
    assert trajectory.segment_ids.tolist() == [0] * 8 + [1] * 2
    assert [trajectory.weight_version(i) for i in range(10)] == [""] * 5 + ["v1"] * 3 + ["v2"] * 2
    assert trajectory.routing_mask.tolist() == [True] * 9 + [False]
    winners = {"last_segment_wins": [1] * 9, "as_sampled": [0] * 7 + [1] * 2}[policy]
    assert trajectory.routing_source.tolist() == [*winners, -1]
    assert trajectory.finish_reason == "length"
    assert [segment.finish_reason for segment in trajectory.segments] == ["abort", "length"]

    layer_ids = run.engine.routing_spec.layer_ids
    assert trajectory.routing.layer_ids == layer_ids
    plain = {version: plain_forward(model, trajectory.token_ids) for version, model in run.models.items()}
    assert (np.sort(plain["v1"].experts[:7], -1) != np.sort(plain["v2"].experts[:7], -1)).any(axis=(1, 2)).all()
    for row, winner in enumerate(winners):
        expected = plain["v1" if winner == 0 else "v2"].experts[row]
        np.testing.assert_array_equal(
            np.sort(trajectory.routed_experts[row], -1), np.sort(expected, -1), err_msg=f"row {row} under {policy}"
        )
    assert not trajectory.routed_experts[9].any()
    scores = {version: forward.logprobs(trajectory.token_ids) for version, forward in plain.items()}
    expected = [*scores["v1"][4:7], *scores["v2"][7:9]]
    np.testing.assert_allclose(trajectory.logprobs[5:], expected, atol=2e-6, rtol=0)


def assert_same_arrays(one, other, where):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=f"{field.name}, {where}")


def test_a_request_aborted_before_any_forward_says_why_it_has_no_routing(run):
    """vLLM: a zero-token abort has neither tokens nor routing; absence is explicit."""
    trajectory = run.store.create(routing=run.engine.routing_spec)
    segment = run.segment(trajectory, context=PROMPT)
    run.engine.add_request(trajectory.id, trajectory.token_ids)
    assert record_output(segment, run.engine.abort_request(trajectory.id))
    loaded = run.store.load(trajectory.id)
    assert loaded.token_ids.tolist() == PROMPT.tolist()
    assert not loaded.routing_mask.any()
    assert loaded.finish_reason == "abort"
    reasons = [e.header.reason for e in run.store.events(trajectory.id) if isinstance(e.header, RoutingAbsent)]
    assert reasons == ["aborted before its first forward"]


def test_outputs_of_a_batch_go_to_their_own_segments(run):
    """verifiers #2616: a tool turn's row at the boundary arrives with the next segment."""
    segments = {}
    for i in range(3):
        trajectory = run.store.create(id=f"t{i}", routing=run.engine.routing_spec)
        segments[trajectory.id] = run.segment(trajectory, context=prompt(3 + i, i))
        run.engine.add_request(trajectory.id, trajectory.token_ids, SamplingParams(max_tokens=2 + 2 * i))
    for id, got in drain(run.engine).items():
        ended = [record_output(segments[id], output) for output in got.outputs]
        assert ended == [False] * (len(ended) - 1) + [True]
    tool = run.store.get("t1")
    boundary = len(tool) - 1
    segment = run.segment(tool, context=[7, 8])
    run.engine.add_request("t1", tool.token_ids, SamplingParams(max_tokens=3))
    for output in drain(run.engine)["t1"].outputs:
        record_output(segment, output)
    loaded = run.store.load("t1", policy="as_sampled")
    assert len(loaded) == 4 + 4 + 2 + 3
    assert loaded.routing_mask.tolist() == [True] * 12 + [False]
    assert loaded.routing_source.tolist() == [0] * boundary + [1] * (12 - boundary) + [-1]
    expected = plain_forward(run.models["v1"], loaded.token_ids).experts[:-1]
    np.testing.assert_array_equal(np.sort(loaded.routed_experts[:-1], -1), np.sort(expected, -1))
    for id in ("t0", "t2"):
        assert run.store.load(id).routing_mask.sum() == len(run.store.load(id)) - 1


def test_an_output_of_another_prompt_is_refused_unwritten(run):
    trajectory = run.store.create(routing=run.engine.routing_spec)
    segment = run.segment(trajectory, context=PROMPT)
    run.engine.add_request("a", PROMPT[:4], SamplingParams(max_tokens=1))
    with pytest.raises(trajstore.Conflict, match="had 4 prompt tokens, the segment's input has 5"):
        record_output(segment, run.engine.step()[0])
    assert len(trajectory) == 5
