"""`rows_held`: from where on an engine must return rows, as a handle keeps count and as the log tells a new one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import SPEC, rows
from trajstore.history import merge_spans


def record(trajectory, context, output, start, stop, **options):
    """A segment with some output tokens and rows `[start, stop)`."""
    with trajectory.segment(context=context, **options) as segment:
        segment.record([9] * output, [-0.5] * output, routing=[(rows(stop - start), start, "computed")])
        segment.close("abort")


def held_by_the_fold(store, id):
    """Rows before the first hole of the folded trajectory."""
    mask = store.load(id).routing_mask
    return int(np.argmin(mask)) if not mask.all() else len(mask)


def steps():
    """What is recorded, step by step, and the rows held after it."""
    yield ([1, 2, 3], 2, 0, 4, {}), 4  # all but the last token's
    yield ([], 2, 4, 6, {}), 6  # exactly the rows not held
    yield ([7], 2, 7, 9, {}), 6  # a lost row
    yield ([], 1, 6, 9, {}), 9  # comes with the next segment
    yield ([], 1, 0, 11, {}), 11  # a prefix again, with a surplus row
    yield ([5], 1, 4, 5, {"base": 4}), 5  # rewound
    yield ([], 1, 0, 1, {"base": 2}), 2


def test_a_handle_and_the_log_count_the_same_rows_as_the_fold_has(embedded):
    trajectory = embedded.create(routing=SPEC)
    for (context, output, start, stop, options), held in steps():
        record(trajectory, context, output, start, stop, **options)
        assert trajectory.rows_held == held
        assert embedded.get(trajectory.id).rows_held == held
        assert held_by_the_fold(embedded, trajectory.id) == held


@pytest.mark.parametrize(
    ("recordings", "held"),
    [
        ([(10, 21), (0, 10)], 21),  # the later rows first
        ([(10, 21), (0, 9)], 9),
        ([(15, 21), (5, 12), (0, 6), (11, 15)], 21),
        ([(3, 5)], 0),
    ],
)
def test_rows_that_are_recorded_out_of_order_count_once_the_hole_before_them_is_filled(embedded, recordings, held):
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=range(20)) as segment:
        routing = [(rows(stop - start), start, "computed") for start, stop in recordings]
        segment.record([1, 2], [-1.0, -1.0], routing=routing)
        segment.close("abort")
    assert trajectory.rows_held == held
    assert embedded.get(trajectory.id).rows_held == held
    assert held_by_the_fold(embedded, trajectory.id) == held


@pytest.mark.parametrize(("base", "held"), [(None, 9), (8, 8), (6, 6)])
def test_a_new_handle_knows_the_rows_behind_a_hole(embedded, base, held):
    first = embedded.create(routing=SPEC)
    record(first, [1, 2, 3], 3, 0, 4)
    record(first, [4], 2, 6, 9)
    again = embedded.get(first.id)
    assert again.rows_held == 4
    record(again, [], 0, 4, 6, base=base)
    assert again.rows_held == held
    assert embedded.get(first.id).rows_held == held
    assert held_by_the_fold(embedded, first.id) == held


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_merged_spans_hold_the_same_rows_in_order_and_apart(spans):
    merged = merge_spans(spans)
    assert {row for start, stop in merged for row in range(start, stop)} == {
        row for start, stop in spans for row in range(start, stop)
    }
    assert all(start < stop for start, stop in merged)
    assert all(before[1] < after[0] for before, after in pairwise(merged))


def test_a_late_recording_counts_for_whoever_reads_it(embedded):
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
        segment.close("stop")
    trajectory.late_routing(rows(3), segment=0, start=0)
    assert trajectory.rows_held == 0
    assert embedded.get(trajectory.id).rows_held == 3


def test_a_segment_knows_its_sampling_parameters_and_the_sum_of_its_logprobs(embedded):
    trajectory = embedded.create()
    given = {"temperature": 0.5, "stop": ["x"]}
    with trajectory.segment(context=[1], sampling=given) as segment:
        assert segment.sampling == given
        assert segment.logprob_sum == 0.0
        segment.tokens([2, 3], [-0.5, -0.25])
        segment.tokens([4], [-1.0])
        assert segment.logprob_sum == -1.75
        segment.sampling["stop"].append("changed")
        segment.close("stop")
    assert embedded.load(trajectory.id).segments[0].sampling == given
    with trajectory.segment() as segment:
        segment.tokens([5])
        segment.tokens([6], [-1.0])
        assert np.isnan(segment.logprob_sum)


@pytest.mark.parametrize("logprobs", [[np.inf, -np.inf], [np.nan, 0.0]])
def test_logprobs_that_are_not_finite_have_no_sum(embedded, logprobs):
    with embedded.create().segment(context=[1]) as segment:
        segment.tokens([2, 3], logprobs)
        assert np.isnan(segment.logprob_sum)
