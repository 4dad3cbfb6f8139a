"""The design's table, literally: prompt 0-4, A B C aborted under v1 (rows 0-6), resumed under v2, D E (rows 0-8)."""

import math

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case
from tests.core.logs import Log

nan = float("nan")

V1 = [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [0, 6], [0, 1]]
"""What segment 0 recorded for rows 0 to 6; each of the three layers alike."""
V2 = [[7, 1], [7, 2], [7, 3], [7, 4], [7, 5], [7, 6], [7, 1], [7, 2], [7, 3]]
"""What segment 1 recorded for rows 0 to 8."""
NONE = [0, 0]

ROUTED = {
    "last_segment_wins": [*V2, NONE],
    "as_sampled": [*V1, V2[7], V2[8], NONE],
}
SOURCE = {
    "last_segment_wins": [1, 1, 1, 1, 1, 1, 1, 1, 1, -1],
    "as_sampled": [0, 0, 0, 0, 0, 0, 0, 1, 1, -1],
}
POLICIES = tuple(ROUTED)


@pytest.fixture
def in_memory():
    log = Log(group="g", group_size=4, metadata={"prompt": "p"})
    log.segment(0, [1, 2, 3, 4, 5], weight_version="v1")
    log.tokens([10, 11, 12], [-0.5, -0.25, -0.125])
    log.routing(_layers(V1), 0)
    log.finish("abort")
    log.segment(weight_version="v2")
    log.tokens([13, 14], [-1.0, -2.0])
    log.routing(_layers(V2), 0)
    log.finish("stop")
    return log


def _layers(pairs):
    return np.repeat(np.array(pairs, np.uint8)[:, None, :], 3, axis=1)


def assert_seed_case(t, policy):
    assert len(t) == 10
    assert t.token_ids.dtype == np.int32
    assert t.token_ids.tolist() == [1, 2, 3, 4, 5, 10, 11, 12, 13, 14]
    assert t.logprobs.dtype == np.float32
    np.testing.assert_array_equal(t.logprobs, [nan, nan, nan, nan, nan, -0.5, -0.25, -0.125, -1.0, -2.0])
    assert t.loss_mask.dtype == np.bool_
    assert t.loss_mask.tolist() == [False] * 5 + [True] * 5
    assert t.segment_ids.dtype == np.int16
    assert t.segment_ids.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert [t.weight_version(i) for i in range(10)] == ["", "", "", "", "", "v1", "v1", "v1", "v2", "v2"]
    assert t.weight_version_ids.tolist() == [-1, -1, -1, -1, -1, 0, 0, 0, 1, 1]
    assert t.weight_versions == ("v1", "v2")
    assert t.routed_experts.dtype == np.uint8
    np.testing.assert_array_equal(t.routed_experts, _layers(ROUTED[policy]))
    assert t.routing_mask.dtype == np.bool_
    assert t.routing_mask.tolist() == [True] * 9 + [False], "9 rows for 10 tokens: no duplicate, none invented"
    assert t.routing_source.dtype == np.int16
    assert t.routing_source.tolist() == SOURCE[policy]
    assert t.policy == policy
    assert t.status == "open"
    assert t.finish_reason == "stop"
    assert t.reward is None
    assert t.reward_components == {}
    assert t.nonfinite_logprobs == 0
    assert t.version == 0
    assert t.routing == SPEC
    first, second = t.segments
    assert (first.index, first.base, first.context, first.output, first.end) == (0, 0, 5, 3, 8)
    assert (first.epoch, first.kept, first.counts, first.weight_version) == (2, 8, 8, "v1")
    assert (first.finish_reason, second.finish_reason) == ("abort", "stop")
    assert (second.index, second.base, second.context, second.output, second.end) == (1, 8, 0, 2, 10)
    assert (second.epoch, second.kept, second.counts, second.weight_version) == (3, 10, 10, "v2")
    assert [(r.start, r.stop, r.origin, r.source) for s in t.segments for r in s.recordings] == [
        (0, 7, "computed", ""),
        (0, 9, "computed", ""),
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_seed_case_folds_to_ten_tokens_and_nine_rows(in_memory, policy):
    """verl #6029: the resumed request's rows cover the whole sequence, and were concatenated."""
    loaded = in_memory.load(policy)
    assert_seed_case(loaded, policy)
    assert (loaded.group, loaded.group_size, loaded.metadata) == ("g", 4, {"prompt": "p"})
    assert loaded.at == "3-3"


def test_last_segment_wins_is_the_default(in_memory, store):
    assert in_memory.plan().policy == "last_segment_wins"
    id = record_seed_case(store).id
    assert store.load(id).policy == "last_segment_wins"


@pytest.mark.parametrize("policy", POLICIES)
def test_seed_case_from_the_hot_log(store, policy):
    trajectory = record_seed_case(store, group="g", group_size=4, metadata={"prompt": "p"})
    store.flush()
    loaded = store.load(trajectory.id, policy=policy)
    assert_seed_case(loaded, policy)
    assert loaded.id == trajectory.id
    assert (loaded.group, loaded.group_size, loaded.metadata) == ("g", 4, {"prompt": "p"})


UNTIL = {
    # event: tokens, finish_reason, rows' source under last_segment_wins, under as_sampled
    "1-0": (0, "", [], []),
    "2-0": (5, "", [-1] * 5, [-1] * 5),
    "2-1": (8, "", [-1] * 8, [-1] * 8),
    "2-2": (8, "", [0] * 7 + [-1], [0] * 7 + [-1]),
    "2-3": (8, "abort", [0] * 7 + [-1], [0] * 7 + [-1]),
    "3-0": (8, "", [0] * 7 + [-1], [0] * 7 + [-1]),
    "3-1": (10, "", [0] * 7 + [-1] * 3, [0] * 7 + [-1] * 3),
    "3-2": (10, "", [1] * 9 + [-1], [0] * 7 + [1] * 2 + [-1]),
    "3-3": (10, "stop", [1] * 9 + [-1], [0] * 7 + [1] * 2 + [-1]),
}


def test_until_gives_the_state_at_every_event_also_within_one_flush(store):
    trajectory = record_seed_case(store)
    store.flush()
    assert [event.id for event in store.events(trajectory.id)] == list(UNTIL)
    for at, (tokens, finish_reason, last_wins, as_sampled) in UNTIL.items():
        for policy, sources in (("last_segment_wins", last_wins), ("as_sampled", as_sampled)):
            state = store.load(trajectory.id, policy=policy, until=at)
            assert (len(state), state.at, state.status) == (tokens, at, "open")
            assert state.finish_reason == finish_reason
            assert state.routing_source.tolist() == sources
            assert state.routing_mask.tolist() == [source >= 0 for source in sources]
            assert state.token_ids.tolist() == [1, 2, 3, 4, 5, 10, 11, 12, 13, 14][:tokens]


@pytest.mark.parametrize("missing", ["4-0", "2-9", "0-1"])
def test_until_an_event_that_is_not_there_is_not_found(store, missing):
    id = record_seed_case(store).id
    with pytest.raises(trajstore.NotFound, match=f"no event {missing}.*the last is 3-3"):
        store.load(id, until=missing)


def test_provenance_says_why_each_row_is_what_it_is(in_memory):
    def why(policy, row):
        return [(c.recording.segment, c.outcome) for c in in_memory.plan(policy).why(row)]

    for row in range(7):
        assert why("last_segment_wins", row) == [(1, "wins"), (0, "overridden")]
        assert why("as_sampled", row) == [(1, "did not sample the next token"), (0, "wins")]
    for row in (7, 8):
        assert why("last_segment_wins", row) == [(1, "wins")]
        assert why("as_sampled", row) == [(1, "wins")]
    assert why("last_segment_wins", 9) == why("as_sampled", 9) == []
    assert in_memory.plan("as_sampled").why(3)[1].recording.event == "2-2"


def test_unknown_policy_is_refused_and_the_policies_named(in_memory):
    with pytest.raises(trajstore.SchemaError, match="last_segment_wins and as_sampled"):
        in_memory.plan("newest")


def test_seed_case_has_one_overlap_of_seven_rows(store):
    id = record_seed_case(store).id
    (overlap,) = store.overlaps(id)
    assert (overlap.start, overlap.stop) == (0, 7)
    assert (overlap.first.segment, overlap.second.segment) == (0, 1)
    np.testing.assert_array_equal(store.recorded_rows(id, overlap.first), _layers(V1))
    np.testing.assert_array_equal(store.recorded_rows(id, overlap.second), _layers(V2))


def test_trajectory_without_routing_spec_has_no_rows(store):
    trajectory = store.create()
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3], [-1.0])
        segment.close("stop")
    loaded = store.load(trajectory.id)
    assert loaded.routed_experts is None
    assert loaded.routing is None
    assert loaded.routing_mask.tolist() == [False] * 3
    assert loaded.routing_source.tolist() == [-1] * 3
    assert math.isclose(loaded.logprobs[2], -1.0)
    assert [event.type for event in store.events(trajectory.id)][-2:] == ["Tokens", "SegmentClosed"]
