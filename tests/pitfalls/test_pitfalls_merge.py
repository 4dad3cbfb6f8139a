"""Merge and alignment: what went wrong in other projects when segments were put together (PITFALLS.md, 1 to 10)."""

import dataclasses

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case
from trajstore.blob import from_blob, to_blob

ONE = trajstore.RoutingSpec(layer_ids=(0,), top_k=1, num_experts=100, num_hidden_layers=1)
"""One layer, one expert: a row is a number."""


def numbers(*values):
    return np.array(values, np.int32).reshape(-1, 1, 1)


def routed(loaded):
    return [
        int(row) if known else None
        for row, known in zip(loaded.routed_experts[:, 0, 0], loaded.routing_mask, strict=True)
    ]


def test_full_sequence_routing_of_a_resumed_request_overlays_the_prefix(store):
    """verl #6029 (the seed): full-sequence routing was concatenated on resume, the prefix duplicated."""
    id = record_seed_case(store).id
    for policy in ("last_segment_wins", "as_sampled"):
        loaded = store.load(id, policy=policy)
        assert len(loaded) == len(loaded.routed_experts) == 10
        assert int(loaded.routing_mask.sum()) == 9


def test_policy_is_named_and_recorded_and_the_log_keeps_every_segment(store):
    """verl #6046 (a day later), #6054: replacing all rows also replaced those made by older weights."""
    id = record_seed_case(store).id
    by_policy = {policy: store.load(id, policy=policy) for policy in ("last_segment_wins", "as_sampled")}
    assert {policy: loaded.policy for policy, loaded in by_policy.items()} == {policy: policy for policy in by_policy}
    assert by_policy["last_segment_wins"].routing_source.tolist() == [1] * 9 + [-1]
    assert by_policy["as_sampled"].routing_source.tolist() == [0] * 7 + [1] * 2 + [-1]
    first, second = (segment.recordings[0] for segment in by_policy["as_sampled"].segments)
    assert len(store.recorded_rows(id, first)) == 7
    assert len(store.recorded_rows(id, second)) == 9


@pytest.mark.parametrize("surplus", [0, 1])
def test_surplus_final_row_shifts_nothing(store, surplus):
    """verl's tail slice `[-m:]` shifts every row by one when the engine returns `len` instead of `len-1` rows."""
    trajectory = store.create(routing=ONE)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5])
        segment.routing(numbers(10, 11, 12, 13, 14)[: 4 + surplus], start=0)
        segment.close("stop")
    assert routed(store.load(trajectory.id)) == [10, 11, 12, 13, 14 if surplus else None]


def test_rows_recomputed_after_a_retraction_are_not_what_sampled(store):
    """miles #3277, sglang #39633: retraction pairs old logprobs with new routes."""
    trajectory = store.create(routing=ONE)
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4], [-0.5, -0.25])
        segment.routing(numbers(10, 11, 12), start=0, origin="recomputed")
        segment.close("stop", retractions=1)
    assert routed(store.load(trajectory.id)) == [10, 11, 12, None]
    assert routed(store.load(trajectory.id, policy="as_sampled")) == [None] * 4
    assert store.load(trajectory.id).segments[0].retractions == 1


def test_boundary_row_is_a_hole_until_the_next_turn_brings_it(store):
    """verifiers #2616: the row at a turn boundary was dropped."""
    trajectory = store.create(routing=ONE)
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3])
        segment.routing(numbers(10, 11), start=0)
        segment.close("stop")
    assert routed(store.load(trajectory.id)) == [10, 11, None]
    with trajectory.segment(context=[50, 51]) as turn:  # what the tool said
        turn.tokens([4])
        turn.routing(numbers(22, 23, 24), start=2)
        turn.close("stop")
    for policy in ("last_segment_wins", "as_sampled"):
        loaded = store.load(trajectory.id, policy=policy)
        assert routed(loaded) == [10, 11, 22, 23, 24, None]
        assert loaded.routing_source.tolist() == [0, 0, 1, 1, 1, -1]


def test_truncated_tokens_take_every_column_with_them(store):
    """verl #6089, miles #893, verifiers #1423: tokens truncated, routes not."""
    trajectory = store.create(routing=ONE)
    with trajectory.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3, 4, 5], [-3.0, -4.0, -5.0])
        segment.routing(numbers(10, 11, 12, 13, 14), start=0)
        segment.close("length")
    trajectory.segment(base=3).close("abort")
    loaded = store.load(trajectory.id)
    columns = (
        "token_ids",
        "logprobs",
        "loss_mask",
        "segment_ids",
        "weight_version_ids",
        "routed_experts",
        "routing_mask",
        "routing_source",
    )
    assert {name: len(getattr(loaded, name)) for name in columns} == dict.fromkeys(columns, 3)
    assert loaded.token_ids.tolist() == [1, 2, 3]
    assert routed(loaded) == [10, 11, 12]
    assert loaded.logprobs[2] == -3.0
    assert loaded.weight_version(2) == "v1"


def test_turns_without_tokens_or_without_routes_are_turns(store):
    """miles #1672, vime #49: an aborted turn has no routes or no tokens."""
    trajectory = store.create(routing=ONE)
    with trajectory.segment(context=[1, 2]) as segment:
        segment.no_routing("aborted before the first token")
        segment.close("abort")
    with trajectory.segment() as segment:
        segment.tokens([3, 4])
        segment.close("abort")
    with trajectory.segment() as segment:
        segment.tokens([5])
        segment.routing(numbers(14), start=3)
        segment.close("stop")
    loaded = store.load(trajectory.id)
    assert routed(loaded) == [None, None, None, 14, None]
    assert loaded.segment_ids.tolist() == [0, 0, 1, 1, 2]
    assert [segment.absent for segment in loaded.segments] == [
        ("aborted before the first token",),
        ("not recorded",),
        (),
    ]


def test_no_field_of_a_trajectory_is_left_behind_on_its_way_to_the_trainer(store):
    """verl #5368, NeMo-RL #2849: a fixed key list dropped the field."""
    trajectory = record_seed_case(store, group="g", group_size=1, metadata={"prompt": "p"})
    trajectory.reward(0.5, components={"format": 0.5})
    with trajectory.segment() as segment:
        segment.tokens([15], [float("nan")])
        segment.close("stop")
    trajectory.close("completed")
    loaded = store.load(trajectory.id)
    arrived = from_blob(to_blob(loaded))
    for field in dataclasses.fields(loaded):
        sent, got = getattr(loaded, field.name), getattr(arrived, field.name)
        assert sent not in (None, "", 0, (), {}) if not isinstance(sent, np.ndarray) else len(sent), field.name
        if isinstance(sent, np.ndarray):
            assert got.dtype == sent.dtype, field.name
            np.testing.assert_array_equal(got, sent, err_msg=field.name)
        else:
            assert got == sent, field.name


def test_last_is_by_order_of_segments_not_of_arrival(store):
    """Pitfall 9: a late recording of an older segment arrives after a newer one."""
    trajectory = store.create(routing=ONE)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.close("abort")
    with trajectory.segment() as segment:
        segment.tokens([4])
        segment.routing(numbers(20, 21), start=0)
        segment.close("stop")
    trajectory.late_routing(segment=0, rows=numbers(10, 11, 12), start=0)
    loaded = store.load(trajectory.id)
    assert routed(loaded) == [20, 21, 12, None]
    assert loaded.routing_source.tolist() == [1, 1, 0, -1]


def test_rewound_tokens_stay_in_the_log_not_in_the_trajectory(store):
    """Pitfall 10: the next segment's input is shorter."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.close("stop")
    with trajectory.segment(base=3, context=[60]) as segment:
        segment.close("stop")
    assert store.load(trajectory.id).token_ids.tolist() == [1, 2, 3, 60]
    assert store.load(trajectory.id, until="2-1").token_ids.tolist() == [1, 2, 3, 4]
    assert [event.type for event in store.events(trajectory.id)].count("Tokens") == 1
