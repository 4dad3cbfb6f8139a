"""Histories with something wrong or unusual in them: gaps, rewinds, lost segments, late recordings, foreign tokens."""

import numpy as np
import pytest

import trajstore
from tests.builders import rows
from tests.core.logs import Log
from trajstore.events import RoutingAbsent, TrajectoryClosed, UnknownEvent, WeightVersionSpan
from trajstore.summary import summarize

POLICIES = ("last_segment_wins", "as_sampled")


def two_segments():
    """Five tokens, two more, two more; rows 0-6 and 0-8."""
    log = Log()
    log.segment(0, [1, 2, 3, 4, 5])
    log.tokens([10], [-1.0])
    log.tokens([11], [-1.0])
    log.routing(rows(6, 1), 0)
    log.finish("abort")
    log.segment(weight_version="v2")
    log.tokens([12, 13], [-1.0, -1.0])
    log.routing(rows(8, 2), 0)
    log.finish()
    return log


@pytest.mark.parametrize(
    ("lost", "last_good", "tokens"),
    [
        (["2-1"], "2-0", 5),
        (["2-2"], "2-1", 6),
        (["2-2", "2-3", "2-4"], "2-1", 6),
        (["2-0"], "1-0", 0),
        (["3-0"], "2-4", 7),
        (["3-1"], "3-0", 7),
    ],
)
def test_missing_events_raise_a_gap_whose_last_good_id_loads(lost, last_good, tokens):
    log = two_segments()
    log.drop(*lost)
    with pytest.raises(trajstore.SequenceGap, match=f"until='{last_good}'") as caught:
        log.load()
    assert caught.value.last_good == last_good
    assert len(log.load(until=last_good)) == tokens


def test_a_whole_epoch_that_is_missing_below_a_dependent_one_is_a_gap():
    log = two_segments()
    log.segment(context=[20])
    log.finish()
    log.drop("3-0", "3-1", "3-2", "3-3")
    with pytest.raises(trajstore.SequenceGap) as caught:
        log.load()
    assert caught.value.last_good == "2-4"
    assert len(log.load(until="2-4")) == 7


def test_missing_first_events_leave_no_last_good():
    log = two_segments()
    log.drop("1-0")
    with pytest.raises(trajstore.SequenceGap, match="first events are missing") as caught:
        log.load()
    assert caught.value.last_good == ""


def test_lost_tail_of_a_segment_with_intact_ids_is_a_gap_at_the_resumed_base():
    """A server that lost 2-2 and later took 3-0 from a writer that knew more: the ids meet, the tokens do not."""
    log = two_segments()
    log.drop("2-2", "2-3", "2-4")
    assert [event.id for event in log.events] == ["1-0", "2-0", "2-1", "3-0", "3-1", "3-2", "3-3"]
    with pytest.raises(trajstore.SequenceGap, match=r"3-0 resumes from 7 tokens of 6") as caught:
        log.load()
    assert caught.value.last_good == "2-1"
    assert len(log.load(until="2-1")) == 6


@pytest.mark.parametrize("start", [4, 6, 9])
def test_chunks_that_do_not_meet_are_a_gap(start):
    log = Log()
    log.segment(0, [1, 2, 3])
    good = log.tokens([4, 5])
    log.token_ids = [0] * start
    log.tokens([6])
    log.finish()
    with pytest.raises(trajstore.SequenceGap, match=f"start at {start}, after 5 tokens") as caught:
        log.load()
    assert caught.value.last_good == good == "2-1"
    assert log.load(until=good).token_ids.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("jump", ["ids", "tokens", "base"])
def test_newer_epoch_with_its_base_below_the_gap_folds_normally(jump):
    log = two_segments()
    if jump == "ids":
        log.drop("3-1")
    elif jump == "tokens":
        log.token_ids += [0]
        log.segment(len(log.token_ids))
    else:
        log.drop("2-2", "2-3", "2-4")
    log.token_ids = [1, 2, 3, 4, 5, 10]
    log.segment(6, [30])
    log.tokens([31], [-1.0])
    log.routing(rows(7, 3), 0)
    log.finish()
    loaded = log.load()
    assert loaded.token_ids.tolist() == [1, 2, 3, 4, 5, 10, 30, 31]
    np.testing.assert_array_equal(loaded.routed_experts[:7], rows(7, 3))
    assert loaded.status == "open"


def test_what_lies_above_a_gap_is_left_out_of_the_state_until_a_segment_goes_on_below_it():
    log = two_segments()
    log.drop("3-1")
    log.reward(1.0)
    log.close("completed")
    with pytest.raises(trajstore.SequenceGap) as caught:
        log.load()
    assert caught.value.last_good == "3-0"


def test_newer_epoch_above_the_gap_does_not_hide_it():
    log = two_segments()
    log.drop("2-2")
    with pytest.raises(trajstore.SequenceGap) as caught:
        log.load()
    assert caught.value.last_good == "2-1"


def test_foreign_tokens_below_a_segment_are_corrupt():
    log = two_segments()
    log.payloads["2-1"] = np.array([99], "<i4").tobytes() + np.array([-1.0], "<f4").tobytes()
    with pytest.raises(trajstore.Corrupt, match="input of segment 1"):
        log.load()
    assert len(log.load(until="2-4")) == 7, "only the later segment tells"


def test_rewinding_twice_leaves_what_lies_below_both_bases():
    log = Log()
    log.segment(0, [1, 2, 3, 4])
    log.tokens([5, 6], [-1.0, -1.0])
    log.routing(rows(6, 1), 0)
    log.finish()
    log.segment(5, [7])
    log.routing(rows(6, 2), 0)
    log.finish()
    log.segment(3, [8, 9, 10])
    log.finish()
    loaded = log.load()
    assert loaded.token_ids.tolist() == [1, 2, 3, 8, 9, 10]
    assert loaded.segment_ids.tolist() == [0, 0, 0, 2, 2, 2]
    assert loaded.routing_source.tolist() == [1, 1, 1, -1, -1, -1]
    assert [segment.counts for segment in loaded.segments] == [3, 3, 6]
    assert [segment.kept for segment in loaded.segments] == [3, 5, 6]
    sampled = log.load("as_sampled")
    assert sampled.routing_source.tolist() == [0, 0, -1, -1, -1, -1], "row 2 decided token 3, which segment 2 brought"


def test_rewound_rows_begin_exactly_at_the_later_base():
    log = Log()
    log.segment(0, [1, 2, 3, 4])
    log.routing(rows(4, 1), 0)
    log.finish()
    log.segment(2, [5, 6])
    outcomes = [[c.outcome for c in log.plan().why(row)] for row in range(4)]
    assert outcomes == [["wins"], ["wins"], ["rewound"], ["rewound"]]
    sampled = [[c.outcome for c in log.plan("as_sampled").why(row)] for row in range(4)]
    assert sampled == [["wins"], ["did not sample the next token"], ["rewound"], ["rewound"]]


def test_rewind_to_zero_starts_over_and_keeps_the_log():
    log = two_segments()
    log.segment(0, [40, 41])
    log.tokens([42], [-1.0])
    log.routing(rows(2, 5), 0)
    log.finish()
    for policy in POLICIES:
        loaded = log.load(policy)
        assert loaded.token_ids.tolist() == [40, 41, 42]
        assert loaded.routing_source.tolist() == [2, 2, -1]
        assert [segment.output for segment in loaded.segments] == [2, 2, 1]
        assert [segment.counts for segment in loaded.segments] == [0, 0, 3]
    assert len(log.load(until="3-3")) == 9


def test_context_only_segment_brings_rows_and_tokens_that_are_not_trained_on():
    log = two_segments()
    log.segment(context=[50, 51])
    log.routing(rows(11, 6), 0)
    log.finish("abort")
    loaded = log.load()
    assert loaded.loss_mask.tolist() == [False] * 5 + [True] * 4 + [False] * 2
    assert loaded.routing_source.tolist() == [2] * 11, "its surplus row 10 is legal"
    assert log.load("as_sampled").routing_source.tolist() == [0] * 6 + [1] * 2 + [2] * 2 + [-1]


def test_segment_taken_over_while_open_is_lost_and_its_tokens_count():
    log = Log()
    log.segment(0, [1, 2])
    log.tokens([3, 4], [-1.0, -1.0])
    assert log.load().finish_reason == ""
    log.segment(weight_version="v2")
    loaded = log.load()
    assert [segment.finish_reason for segment in loaded.segments] == ["lost", ""]
    assert loaded.token_ids.tolist() == [1, 2, 3, 4]
    assert loaded.finish_reason == ""
    log.close("failed")
    loaded = log.load()
    assert [segment.finish_reason for segment in loaded.segments] == ["lost", "lost"]
    assert (loaded.status, loaded.finish_reason) == ("failed", "lost")


def test_resume_of_an_aborted_trajectory_is_open_again_and_counts_its_closes():
    log = two_segments()
    log.close("aborted")
    assert (log.load().status, log.load().version) == ("aborted", 1)
    log.reward(0.5)
    assert log.load().status == "aborted", "a score does not resume it"
    log.segment()
    assert (log.load().status, log.load().version) == ("open", 1)
    log.finish()
    log.close("completed")
    assert (log.load().status, log.load().version) == ("completed", 2)
    assert log.load(until="4-0").status == "aborted"


def test_late_recording_of_a_segment_beyond_until_is_left_out():
    log = two_segments()
    log.late(1, rows(8, 7), 0)
    assert log.load(until="2-4").routing_source.tolist() == [0] * 6 + [-1]
    np.testing.assert_array_equal(log.load().routed_experts[:8], rows(8, 7))


def test_late_recording_counts_once_its_segment_is_over():
    log = two_segments()
    log.late(0, rows(6, 7), 0)
    np.testing.assert_array_equal(log.load(until="2-3").routed_experts[:6], rows(6, 1))
    np.testing.assert_array_equal(log.load(until="2-4").routed_experts[:6], rows(6, 7))
    np.testing.assert_array_equal(log.load("as_sampled").routed_experts[:6], rows(6, 7))


@pytest.mark.parametrize("count", [6, 9], ids=["within the segment", "past its end"])
def test_late_recording_of_a_turn_in_whose_place_a_server_holds_anothers_does_not_fold(count):
    log = two_segments()
    mine, lost = (f"{nonce:016x}" for nonce in (log.events[1].nonce, 99))
    log.late(0, rows(count, 7), 0, turn=lost)
    assert [r.source for s in log.plan().history.segments for r in s.recordings] == ["", ""]
    np.testing.assert_array_equal(log.load("as_sampled").routed_experts[:6], rows(6, 1))
    log.late(0, rows(6, 8), 0, turn=mine)
    np.testing.assert_array_equal(log.load("as_sampled").routed_experts[:6], rows(6, 8))


def test_late_recording_past_what_a_server_has_left_of_its_segment_does_not_fold():
    """It is the same turn, but the rows may be of tokens that are lost: which, nobody can tell."""
    log = two_segments()
    log.late(1, rows(10, 7), 0, turn=f"{log.events[-1].nonce:016x}")
    np.testing.assert_array_equal(log.load().routed_experts[:8], rows(8, 2))


def test_late_recording_that_tells_no_turn_is_of_whatever_segment_has_its_number():
    """So they were written before notes told it, and one that does not fit is an error, as it was."""
    log = two_segments()
    log.late(0, rows(6, 7), 0)
    np.testing.assert_array_equal(log.load("as_sampled").routed_experts[:6], rows(6, 7))
    log.late(0, rows(9, 8), 0)
    with pytest.raises(trajstore.RoutingError, match=r"note 2-0 has rows 0 to 8, but segment 0 ends at 7"):
        log.load()


def test_rows_past_the_segments_end_are_refused_and_the_surplus_row_is_legal():
    log = Log()
    log.segment(0, [1, 2])
    log.tokens([3], [-1.0])
    log.routing(rows(3), 0)
    assert log.load().routing_mask.tolist() == [True] * 3
    log.routing(rows(1), 3)
    with pytest.raises(trajstore.RoutingError, match="segment 0 ends at 3"):
        log.load()
    assert len(log.load(until="2-2")) == 3


def test_surplus_row_serves_until_a_later_segment_has_that_row():
    log = Log()
    log.segment(0, [1, 2])
    log.tokens([3], [-1.0])
    log.routing(rows(3, 1), 0)
    log.finish()
    log.segment(context=[4])
    assert log.load().routing_source.tolist() == [0, 0, 0, -1]
    assert log.load("as_sampled").routing_source.tolist() == [0, 0, -1, -1], "row 2 decided what segment 1 brought"
    log.routing(rows(4, 2), 0)
    assert log.load().routing_source.tolist() == [1, 1, 1, 1]
    assert log.load("as_sampled").routing_source.tolist() == [0, 0, 1, -1]


def test_unknown_event_stops_the_fold_and_until_before_it_loads():
    log = two_segments()
    log.add(UnknownEvent(type="Compressed", version=1, fields={}))
    with pytest.raises(trajstore.SchemaError, match=r"event 3-4 is a Compressed of schema version 1.*until="):
        log.load()
    assert len(log.load(until="3-3")) == 9


def test_event_outside_of_any_open_segment_is_refused():
    log = two_segments()
    log.add(RoutingAbsent(reason="late"))
    with pytest.raises(trajstore.SchemaError, match="stands outside"):
        log.load()
    log = Log()
    log.claim(TrajectoryClosed(status="completed"))
    log.add(RoutingAbsent(reason="late"))
    with pytest.raises(trajstore.SchemaError, match="stands outside"):
        log.load()


def test_empty_trajectory_folds_to_empty_arrays():
    loaded = Log().load()
    assert len(loaded) == 0
    assert loaded.routed_experts.shape == (0, 3, 2)
    assert loaded.weight_versions == ()
    assert (loaded.status, loaded.finish_reason, loaded.at) == ("open", "", "1-0")


def test_weight_versions_come_in_order_of_appearance():
    """slime #2092: a segment whose weights changed on the way; the label it opened with came last."""
    log = Log()
    log.segment(0, [1], weight_version="v2")
    log.tokens([2, 3, 4, 5])
    log.finish(weight_versions=(WeightVersionSpan("v1", 0, 2), WeightVersionSpan("v2", 2, 4)))
    loaded = log.load()
    assert loaded.weight_versions == ("v1", "v2")
    assert loaded.weight_version_ids.tolist() == [-1, 0, 0, 1, 1]
    log.segment(4, [6], weight_version="v3")
    log.tokens([7])
    loaded = log.load()
    assert [loaded.weight_version(i) for i in range(6)] == ["", "v1", "v1", "v2", "", "v3"]
    assert loaded.weight_versions == ("v1", "v2", "v3")


def test_output_that_no_weight_version_span_covers_has_the_segments_label():
    log = Log()
    log.segment(0, [1], weight_version="v1")
    log.tokens([2, 3, 4, 5])
    log.finish(weight_versions=(WeightVersionSpan("v2", 1, 2), WeightVersionSpan("v3", 3, 4)))
    loaded = log.load()
    assert [loaded.weight_version(i) for i in range(5)] == ["", "v1", "v2", "v1", "v3"]
    assert loaded.weight_versions == ("v1", "v2", "v3")


@pytest.mark.parametrize("event", ["2-1", "2-3"])
def test_payload_of_the_wrong_length_is_corrupt_and_names_its_event(event):
    log = two_segments()
    log.drop("3-0", "3-1", "3-2", "3-3")
    log.payloads[event] = log.payloads[event][:-1]
    with pytest.raises(trajstore.Corrupt, match=event):
        log.load()


def test_recomputed_rows_never_count_as_sampled():
    """miles #3277, sglang #39633."""
    log = Log()
    log.segment(0, [1, 2])
    log.tokens([3, 4], [-1.0, -1.0])
    log.routing(rows(3), 0, origin="recomputed")
    log.finish(retractions=1)
    assert log.load().routing_mask.tolist() == [True] * 3 + [False]
    assert log.load("as_sampled").routing_mask.tolist() == [False] * 4
    assert [c.outcome for c in log.plan("as_sampled").why(1)] == ["recomputed"]


def test_observations_never_enter_a_fold():
    log = two_segments()
    before = {policy: log.load(policy) for policy in POLICIES}
    log.observe(rows(9, 8), 0)
    for policy in POLICIES:
        after = log.load(policy)
        np.testing.assert_array_equal(after.routed_experts, before[policy].routed_experts)
        np.testing.assert_array_equal(after.routing_mask, before[policy].routing_mask)
        assert "note 1-0" not in log.asked


def test_a_segment_without_a_label_has_the_version_that_its_close_gives_to_all_of_its_output():
    log = Log()
    log.segment(0, [1, 2, 3], weight_version="")
    log.tokens([10, 11])
    log.routing(rows(4, 1), 0)
    log.finish("abort", weight_versions=(WeightVersionSpan("v7", 0, 2),))
    log.segment(weight_version="")
    log.tokens([12, 13])
    log.routing(rows(6, 2), 0)
    log.finish(weight_versions=(WeightVersionSpan("v8", 1, 2),))
    first, second = log.load().segments
    assert (first.weight_version, first.recordings[0].weight_version) == ("v7", "v7")
    assert (second.weight_version, second.recordings[0].weight_version) == ("", "")  # nobody said so of its first token
    assert [log.load().weight_version(i) for i in range(3, 7)] == ["v7", "v7", "", "v8"]
    assert summarize("t", log.events).weight_version == "v8"
