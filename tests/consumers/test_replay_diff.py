"""Two segments, or two trajectories, beside each other, against hand-made differences and a recorded vLLM chain."""

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.chains import record_chain
from tests.engines.vllm_fixtures import case
from trajstore.errors import SchemaError
from trajstore_replay import compare, segment_side, trajectory_side


def sampled(store, tokens, logprobs, given=None, **options):
    """A trajectory of 2 prompt tokens and these."""
    writer = store.create(routing=SPEC, **options)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens(tokens, logprobs)
        if given is not None:
            segment.routing(given, start=0)
    store.flush()
    return writer.id


@pytest.mark.parametrize(("second", "first"), [(1, 0), (2, 0), (2, 1)])
def test_segments_of_a_recorded_chain_differ_as_its_fixtures_say(embedded, first, second):
    id = record_chain(embedded).id
    expected = case(f"10_chain_reset_seg{second + 1}")[f"drift_vs_seg{first + 1}"]
    found = compare(segment_side(embedded, id, first), segment_side(embedded, id, second))
    routing = found.routing
    assert (routing.rows, routing.rows_differing, routing.sets) == (
        expected["rows"],
        expected["rows_set_differs"],
        expected["cells_set_differs"],
    )
    assert list(routing.sets_by_layer) == expected["per_layer_set_differs"]
    assert routing.layers == (0, 1, 2, 3)
    assert found.tokens.shared == found.tokens.equal == found.tokens.first_length
    assert found.logprobs.compared == 0  # no token of theirs was sampled twice
    assert not found.is_none


def test_the_first_cell_that_differs_is_named(embedded):
    given = rows(6, 1)
    other = given.copy()
    other[3, 1] = (given[3, 1] + 1) % 8
    other[4] = other[4, :, ::-1]
    ids = [sampled(embedded, [3, 4, 5, 6, 7], [-1.0] * 5, one) for one in (given, other)]
    routing = compare(*(trajectory_side(embedded, id) for id in ids)).routing
    assert (routing.first_row, routing.first_layer) == (3, 1)
    assert (routing.first_experts, routing.second_experts) == (
        tuple(given[3, 1].tolist()),
        tuple(other[3, 1].tolist()),
    )
    assert (routing.cells, routing.sets, routing.orders, routing.rows_differing) == (18, 1, 3, 1)
    assert routing.sets_by_layer == (0, 1, 0)


def test_logprobs_are_compared_where_equal_tokens_were_sampled(embedded):
    first = sampled(embedded, [3, 4, 5, 6], [-1.0, -2.0, -0.5, float("nan")])
    second = sampled(embedded, [3, 4, 9, 6], [-1.25, -2.0, -9.0, -1.0])
    found = compare(trajectory_side(embedded, first), trajectory_side(embedded, second), tolerance=0.1)
    tokens, logprobs = found.tokens, found.logprobs
    assert (tokens.first_divergence, tokens.first_token, tokens.second_token, tokens.shared) == (4, 5, 9, 0)
    assert (logprobs.compared, logprobs.max_abs, logprobs.mean_abs, logprobs.max_at) == (2, 0.25, 0.125, 2)
    assert (logprobs.above, logprobs.first_above, logprobs.nonfinite) == (1, 2, 0)
    again = compare(trajectory_side(embedded, first), trajectory_side(embedded, first))
    assert (again.is_none, again.tokens.shared, again.logprobs.compared) == (True, 6, 0)


def test_infinite_logprobs_are_left_out_and_counted(embedded):
    ids = [sampled(embedded, [3, 4], [-1.0, value]) for value in (float("-inf"), -2.0)]
    logprobs = compare(*(trajectory_side(embedded, id) for id in ids)).logprobs
    assert (logprobs.compared, logprobs.nonfinite, logprobs.max_abs) == (1, 1, 0.0)


def test_a_logprob_that_one_side_lacks_is_a_difference(embedded):
    nan, infinite = float("nan"), float("-inf")
    first, second, third = (
        trajectory_side(embedded, sampled(embedded, [3, 4], logprobs, rows(3)))
        for logprobs in ([-1.0, nan], [-1.0, -2.0], [nan, infinite])
    )
    for one, other, differing in ((first, second, 1), (second, third, 2), (first, third, 2)):
        found = compare(one, other)
        assert (found.logprobs.nonfinite_differing, found.is_none) == (differing, False)
    again = trajectory_side(embedded, sampled(embedded, [3, 4], [nan, infinite], rows(3)))
    found = compare(third, again)
    assert (found.logprobs.nonfinite, found.logprobs.nonfinite_differing, found.is_none) == (2, 0, True)


def test_a_token_that_one_side_was_given_is_a_difference(embedded):
    first = sampled(embedded, [3, 4], None)
    given = embedded.create(routing=SPEC)
    with given.segment(context=[1, 2, 3, 4]):
        pass
    embedded.flush()
    found = compare(trajectory_side(embedded, first), trajectory_side(embedded, given.id))
    assert (found.tokens.is_none, found.logprobs.sampled_once, found.is_none) == (True, 2, False)


def test_rows_or_a_routing_spec_that_one_side_lacks_are_a_difference(embedded):
    full, none = (trajectory_side(embedded, sampled(embedded, [3, 4], None, given)) for given in (rows(3), None))
    for found in (compare(full, none), compare(none, full)):
        assert (found.tokens.is_none, found.routing.sets, found.is_none) == (True, 0, False)
    assert compare(none, none).is_none
    unrouted = []
    for _ in range(2):
        writer = embedded.create()
        with writer.segment(context=[1, 2]) as segment:
            segment.tokens([3, 4])
        embedded.flush()
        unrouted.append(trajectory_side(embedded, writer.id))
    assert not compare(none, unrouted[0]).is_none
    found = compare(*unrouted)
    assert (found.routing, found.routing_note, found.is_none) == (None, "", True)


def test_rows_behind_the_first_other_token_are_of_other_sequences(embedded):
    writer = embedded.create(routing=SPEC)
    given = rows(5, 1)
    other = given.copy()
    other[4] = (given[4] + 1) % 8
    with writer.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5], [-1.0, -1.0])
        segment.routing(given, start=0)
    with writer.segment(base=3, context=[]) as segment:
        segment.tokens([4, 6], [-1.5, -1.0])
        segment.routing(other, start=0)
    embedded.flush()
    found = compare(segment_side(embedded, writer.id, 0), segment_side(embedded, writer.id, -1))
    assert (found.tokens.shared, found.tokens.equal, found.tokens.first_divergence) == (3, 4, 4)
    assert (found.logprobs.compared, found.logprobs.max_abs) == (1, 0.5)
    assert (found.routing.rows, found.routing.sets, found.routing.only_first) == (4, 0, 0)


def test_a_segment_is_compared_with_the_rows_that_it_recorded_itself(embedded):
    writer = record_seed_case(embedded)
    embedded.flush()
    routing = compare(segment_side(embedded, writer.id, 0), segment_side(embedded, writer.id, 1)).routing
    assert (routing.rows, routing.only_first, routing.only_second) == (7, 0, 1)
    assert routing.rows_differing == 7
    assert routing.shared == 0


def test_rows_that_a_segment_took_from_an_earlier_one_are_not_its_own(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(rows(3, 1), start=0)
    with writer.segment() as segment:
        segment.tokens([5, 6])
        segment.routing(rows(2, 2), start=3)
    embedded.flush()
    routing = compare(segment_side(embedded, writer.id, 0), segment_side(embedded, writer.id, 1)).routing
    assert (routing.rows, routing.only_first, routing.only_second) == (0, 3, 1)


def test_recordings_in_other_parts_are_laid_beside_each_other(embedded):
    given = rows(6, 1)
    ids = []
    for cut in (3, 2):
        writer = embedded.create(routing=SPEC)
        with writer.segment(context=[1, 2, 3]) as segment:
            segment.tokens([4, 5, 6, 7])
            segment.routing(given[:cut], start=0)
            segment.routing(given[cut:], start=cut)
        ids.append(writer.id)
    embedded.flush()
    routing = compare(*(trajectory_side(embedded, id) for id in ids)).routing
    assert (routing.rows, routing.sets, routing.orders, routing.only_first) == (6, 0, 0, 0)


def test_the_same_recording_is_not_read_to_be_compared_with_itself(embedded):
    id = record_chain(embedded).id
    routing = compare(trajectory_side(embedded, id), trajectory_side(embedded, id, until="4-2")).routing
    assert (routing.rows, routing.shared, routing.sets) == (137, 137, 0)


def test_before_and_after_a_copy_nothing_differs(embedded, tmp_path):
    id = record_chain(embedded).id
    with trajstore.open(tmp_path / "other", partitions=1) as other:
        copy = record_chain(other).id
        found = compare(trajectory_side(embedded, id), trajectory_side(other, copy))
        sampled_tokens = int(embedded.load(id).loss_mask.sum())
        assert (found.is_none, found.tokens.shared, found.logprobs.compared) == (True, 0, sampled_tokens)
        assert (found.routing.shared, found.routing.rows, found.routing.sets) == (0, 137, 0)


def test_layers_are_matched_by_global_id_and_other_models_are_not_compared(embedded):
    """verl #5037, slime #810."""
    late = trajstore.RoutingSpec(layer_ids=(1, 2), top_k=2, num_experts=8, num_hidden_layers=3)
    larger = trajstore.RoutingSpec(layer_ids=(0, 1, 2), top_k=2, num_experts=16, num_hidden_layers=3)
    given = rows(3, 5)
    ids = []
    for spec, some in ((SPEC, given), (late, given[:, 1:]), (larger, given), (None, None)):
        writer = embedded.create(routing=spec)
        with writer.segment(context=[1, 2]) as segment:
            segment.tokens([3, 4])
            if some is not None:
                segment.routing(some, start=0)
        ids.append(writer.id)
    embedded.flush()
    first, second, third, fourth = (trajectory_side(embedded, id) for id in ids)
    routing = compare(first, second).routing
    assert (routing.layers, routing.rows, routing.sets) == ((1, 2), 3, 0)
    assert (routing.layers_first, routing.layers_second) == ((0,), ())
    assert (compare(second, first).routing.layers_second, compare(first, second).is_none) == ((0,), False)
    assert "different models: top 2 of 8 experts, and top 2 of 16" in compare(first, third).routing_note
    assert "without a routing spec" in compare(first, fourth).routing_note


def test_sorted_rows_have_no_order_to_compare(embedded):
    sorted_spec = trajstore.RoutingSpec(
        layer_ids=(0, 1, 2), top_k=2, num_experts=8, num_hidden_layers=3, order="sorted"
    )
    ids = []
    for spec in (SPEC, sorted_spec):
        writer = embedded.create(routing=spec)
        with writer.segment(context=[1, 2]) as segment:
            segment.tokens([3])
            segment.routing(np.full((2, 3, 2), [5, 1]), start=0)
        ids.append(writer.id)
    embedded.flush()
    routing = compare(*(trajectory_side(embedded, id) for id in ids)).routing
    assert (routing.sets, routing.orders) == (0, None)


def test_a_segment_that_is_not_there_is_an_error(embedded):
    id = record_seed_case(embedded).id
    embedded.flush()
    with pytest.raises(SchemaError, match="has 2 segments, counted from 0; there is no segment 2"):
        segment_side(embedded, id, 2)
