"""Pairs of recordings of the same rows of the same tokens."""

from itertools import pairwise

from hypothesis import given, settings

from tests.builders import record_seed_case, rows
from tests.core.logs import Log
from tests.core.test_fold_properties import histories
from trajstore.events import SegmentOpened
from trajstore.overlaps import find_overlaps


def pairs(log):
    return [(o.start, o.stop, o.first.event, o.second.event) for o in find_overlaps(log.plan().history)]


def three_segments(third_base=None):
    log = Log()
    log.segment(0, [1, 2, 3])
    log.tokens([4, 5])
    log.routing(rows(4), 0)
    log.finish()
    log.segment()
    log.tokens([6])
    log.routing(rows(3), 2)
    log.finish()
    log.segment(third_base, [7])
    log.routing(rows(len(log.token_ids)), 0)
    log.finish()
    return log


def test_each_pair_of_recordings_that_share_rows_is_found():
    assert pairs(three_segments()) == [(2, 4, "2-2", "3-2"), (0, 4, "2-2", "4-1"), (2, 5, "3-2", "4-1")]


def test_rows_at_or_above_a_later_base_are_other_tokens():
    assert pairs(three_segments(third_base=3)) == [(2, 4, "2-2", "3-2"), (0, 3, "2-2", "4-1"), (2, 3, "3-2", "4-1")]
    assert pairs(three_segments(third_base=2)) == [(2, 4, "2-2", "3-2"), (0, 2, "2-2", "4-1")]
    assert pairs(three_segments(third_base=0)) == [(2, 4, "2-2", "3-2")]


def test_recordings_of_one_segment_and_late_ones_pair_too():
    log = Log()
    log.segment(0, [1, 2, 3, 4])
    first = log.routing(rows(3), 0)
    second = log.routing(rows(2), 2)
    log.finish()
    late = log.late(0, rows(1), 2)
    assert pairs(log) == [(2, 3, first, second), (2, 3, first, late), (2, 3, second, late)]


def test_observations_come_last_and_pair_with_what_counts_and_each_other():
    log = three_segments(third_base=3)
    a, b = log.observe(rows(4), 0), log.observe(rows(2), 1)
    assert pairs(log)[3:] == [
        (0, 3, "2-2", a),
        (2, 3, "3-2", a),
        (0, 4, "4-1", a),
        (1, 3, "2-2", b),
        (2, 3, "3-2", b),
        (1, 3, "4-1", b),
        (1, 3, a, b),
    ]


def test_observation_pairs_with_recordings_of_the_tokens_that_it_saw():
    """Rewound rows with those that were rewound, not with what stands there now."""
    log = three_segments()
    before = log.observe(rows(6), 0)
    log.segment(2, [7, 8, 9, 10])
    again = log.routing(rows(5), 0)
    log.finish()
    after = log.observe(rows(6), 0)
    assert pairs(log)[5:] == [
        (0, 4, "2-2", before),
        (2, 5, "3-2", before),
        (0, 6, "4-1", before),
        (0, 2, again, before),
        (0, 2, "2-2", after),
        (0, 2, "4-1", after),
        (0, 5, again, after),
        (0, 2, before, after),
    ]


def test_observation_that_does_not_say_what_it_saw_pairs_below_every_rewind():
    log = three_segments(third_base=3)
    untold = log.observe(rows(4), 0, epoch=0)
    assert pairs(log)[3:] == [(0, 3, "2-2", untold), (2, 3, "3-2", untold), (0, 3, "4-1", untold)]
    log = three_segments()
    untold = log.observe(rows(4), 0, epoch=0)
    assert pairs(log)[3:] == [(0, 4, "2-2", untold), (2, 4, "3-2", untold), (0, 4, "4-1", untold)]


@settings(max_examples=200, deadline=None)
@given(histories())
def test_overlaps_equal_an_oracle_row_by_row(log):
    """A token is told by its position and the last segment, of those that had opened, that began at or below it."""
    history = log.plan().history
    opened = [(event.at.epoch, event.header.base) for event in log.events if isinstance(event.header, SegmentOpened)]
    rewinding = [new.base for old, new in pairwise(history.segments) if new.base < old.end]

    def token(recording, p):
        last = recording.epoch or opened[-1][0]
        if not recording.epoch and any(p >= base for base in rewinding):
            return object()  # equal to no other
        return max(epoch for epoch, base in opened if epoch <= last and base <= p)

    recordings = [recording for segment in history.segments for recording in segment.recordings]
    everything = [*recordings, *history.observations]
    expected = {
        (p, first.event, second.event)
        for j, second in enumerate(everything)
        for first in everything[:j]
        for p in range(max(first.start, second.start), min(first.stop, second.stop))
        if token(first, p) == token(second, p)
    }
    found = {(p, o.first.event, o.second.event) for o in find_overlaps(history) for p in range(o.start, o.stop)}
    assert found == expected


def test_overlaps_of_a_store_name_the_notes(store):
    trajectory = record_seed_case(store)
    trajectory.observe(rows(9), start=0, source="trainer", weight_version="v3")
    found = store.overlaps(trajectory.id)
    assert [(o.start, o.stop, o.first.event, o.second.event) for o in found] == [
        (0, 7, "2-2", "3-2"),
        (0, 7, "2-2", "note 1-0"),
        (0, 9, "3-2", "note 1-0"),
    ]
    assert (found[-1].second.source, found[-1].second.weight_version, found[-1].second.segment) == ("trainer", "v3", -1)
