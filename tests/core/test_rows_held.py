"""`rows_held`: from where on an engine must return rows, as a handle keeps count and as the log tells a new one."""

import numpy as np
import pytest

from tests.builders import SPEC, rows


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
