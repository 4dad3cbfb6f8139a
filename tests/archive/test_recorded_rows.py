"""Recordings read in part: any rows of them, which rows are stored once for two, and while a compaction moves them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trajstore
from tests.archive.sound import WIDE, grow
from tests.archive.test_compaction import collect, compacted
from tests.builders import rows
from trajstore.archive.reader import shared_runs
from trajstore.entries import Extent

PACKS = ("00/00000001-A", "00/00000002-B")


def places(extents):
    """Where each row of a payload lies; None for one that is in no pack."""
    return [(extent.pack, extent.row + i) if extent.pack else None for extent in extents for i in range(extent.rows)]


extents = st.lists(st.builds(Extent, st.sampled_from((*PACKS, "")), st.integers(0, 6), st.integers(1, 5)), max_size=6)


@given(one=extents, other=extents)
def test_shared_runs_are_the_rows_that_lie_at_the_same_place(one, other):
    found = shared_runs(one, other)
    equal = [a is not None and a == b for a, b in zip(places(one), places(other), strict=False)]
    assert [at for first, stop in found for at in range(first, stop)] == np.flatnonzero(equal).tolist()
    assert all(a[1] < b[0] for a, b in pairwise(found)), "as few runs as can be"


def recordings(recorded):
    return [one for segment in recorded.history.segments for one in segment.recordings]


@pytest.mark.parametrize("archived", [False, True])
def test_any_rows_of_any_recording_are_those_of_the_whole(durable, archive, archived):
    trajectory = durable.create(routing=WIDE)
    given_ = [rows(60, seed=1, spec=WIDE), rows(60, seed=1, spec=WIDE)]
    given_[1][[7, 8, 30]] = rows(3, seed=2, spec=WIDE)
    for number, routed in enumerate(given_):
        with trajectory.segment(context=np.arange(60) if not number else []) as segment:
            segment.tokens([1])
            segment.routing(routed[5:], start=5)
    if archived:
        trajectory.close("completed")
        archive()
    recorded = durable.recordings(trajectory.id)
    first, second = recordings(recorded)
    for recording, routed in zip((first, second), given_, strict=True):
        for runs in ([(5, 60)], [(5, 6)], [(7, 9), (30, 31), (58, 60)], [(20, 40), (40, 41)]):
            expected = np.concatenate([routed[start:stop] for start, stop in runs])
            np.testing.assert_array_equal(recorded.rows(recording, runs), expected)
        assert recorded.rows(recording, []).shape == (0, 8, 8)
    shared = recorded.shared(first, second, 6, 50)
    assert shared == ([(6, 7), (9, 30), (31, 50)] if archived else [])
    np.testing.assert_array_equal(recorded.token_ids(first), np.append(np.arange(60), 1))
    assert recorded.without_routing().routed_experts is None
    assert len(recorded.without_routing()) == 62


def test_rows_are_found_again_after_a_compaction(durable, archive, folder):
    for number in range(4):
        grow(durable, "t", number)
        archive()
    recorded = trajstore.open_archive(folder).recordings("t")
    stored = {event.stored for event in recorded.events}
    expected = [durable.recorded_rows("t", one) for one in recordings(recorded)]
    compacted(durable.archive)
    assert collect(durable.archive)
    for one, routed in zip(recordings(recorded), expected, strict=True):
        np.testing.assert_array_equal(recorded.rows(one, [(one.start, one.stop)]), routed)
    assert {event.stored for event in recorded.events}.isdisjoint(stored)


def test_trajectory_without_routing_has_no_recordings(embedded):
    trajectory = embedded.create()
    embedded.flush()
    with pytest.raises(trajstore.NotFound, match="without a routing spec"):
        embedded.recordings(trajectory.id).spec  # noqa: B018


def test_a_listing_can_be_gone_through_by_partition(embedded):
    ids = {embedded.create().id for _ in range(12)}
    embedded.flush()
    parts = [{one.id for one in embedded.list(partition=number)} for number in range(embedded.partitions)]
    assert all(parts)
    assert (parts[0] & parts[1], parts[0] | parts[1]) == (set(), ids)
    with pytest.raises(trajstore.SchemaError, match=r"partition 2 does not lie in \[0, 2\)"):
        embedded.list(partition=2)
