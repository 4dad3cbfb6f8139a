"""Stepping through events: the state at each is what `load` gives there, and what changed is named."""

import numpy as np
import pytest

from tests.builders import SPEC, record_seed_case, rows, seed_rows
from tests.consumers.chains import record_chain
from trajstore.entries import Event
from trajstore.errors import NotFound, SchemaError
from trajstore.events import EventId, LateRouting, PayloadInfo, RoutingObserved
from trajstore_replay import Replay
from trajstore_replay.steps import plan_at, row_segments, timeline, token_segments


def row_changes(step):
    """`(start, stop, before, after)`, recordings by their event."""
    return [(c.start, c.stop, c.before and c.before.event, c.after and c.after.event) for c in step.changes.rows]


@pytest.mark.parametrize("policy", ["last_segment_wins", "as_sampled"])
def test_every_step_is_what_load_gives_until_its_event(store, policy):
    writer = record_chain(store)
    replay = Replay(store, writer.id, policy=policy)
    assert len(replay) == len(store.events(writer.id)) == 14
    for step in replay:
        loaded = store.load(writer.id, policy=policy, until=step.event.id)
        history = step.plan.history
        assert (history.status, history.length, len(history.segments)) == (
            loaded.status,
            len(loaded),
            len(loaded.segments),
        )
        np.testing.assert_array_equal(token_segments(step.plan), loaded.segment_ids)
        np.testing.assert_array_equal(row_segments(step.plan), loaded.routing_source)


def test_a_step_names_new_tokens_and_rows_with_another_winner(embedded):
    writer = record_seed_case(embedded)
    embedded.flush()
    replay = Replay(embedded, writer.id)
    assert replay.goto("2-0").changes.tokens == (0, 5)
    assert replay.goto("2-1").changes.tokens == (5, 8)
    assert row_changes(replay.goto("2-2")) == [(0, 7, None, "2-2")]
    assert replay.goto("3-1").changes.rows == ()
    assert row_changes(replay.goto("3-2")) == [(0, 7, "2-2", "3-2"), (7, 9, None, "3-2")]


def test_under_as_sampled_the_same_event_wins_only_what_it_decided(embedded):
    writer = record_seed_case(embedded)
    embedded.flush()
    replay = Replay(embedded, writer.id, policy="as_sampled")
    assert row_changes(replay.goto("3-2")) == [(7, 9, None, "3-2")]


@pytest.mark.parametrize("policy", ["last_segment_wins", "as_sampled"])
def test_placements_are_kept_only_where_an_event_can_change_none(embedded, policy):
    """Each against a fold of its own: tokens after their rows, weights that the close names, notes, a lost segment."""
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        for at in range(3):
            segment.routing(rows(2, at), start=at)  # its last row has decided nothing yet
            segment.tokens([at])
        segment.no_routing("of the rest")
        segment.close("stop", weight_versions=[("v7", 0, 3)])
    writer.reward(1.0)
    open_one = writer.segment(base=4, context=[8], weight_version="v8")
    open_one.tokens([9])
    open_one.routing(rows(5, 9), start=0, origin="recomputed")
    embedded.flush()
    embedded.get(writer.id).close("aborted", takeover=True)
    writer.late_routing(segment=0, rows=rows(1, 7), start=1)
    embedded.flush()
    again = embedded.get(writer.id).segment(context=[])
    again.tokens([10])
    again.close("stop")
    last = embedded.get(writer.id)
    last.reward(2.0)
    last.close("completed")
    embedded.flush()
    replay = Replay(embedded, writer.id, policy=policy)
    for step in replay:
        alone = plan_at(embedded, writer.id, step.event.id, policy=policy)
        assert step.plan.placements == alone.placements, step.event.id
        recordings = [id(one) for segment in step.plan.history.segments for one in segment.recordings]
        assert all(id(one.recording) in recordings for one in step.plan.placements)


def test_forward_back_and_jumps_agree(embedded):
    writer = record_chain(embedded)
    forward = [(s.event.id, row_changes(s), s.plan.history.length) for s in Replay(embedded, writer.id)]
    replay = Replay(embedded, writer.id)
    backward = []
    step = replay.goto(forward[-1][0])
    while step is not None:
        backward.append((step.event.id, row_changes(step), step.plan.history.length))
        step = replay.back()
    assert backward[::-1] == forward
    assert replay.step.event.id == "1-0"
    assert replay.back() is None
    assert replay.step.index == 0
    replay.goto("5-0")
    assert replay.next() is None
    assert replay.step.event.id == "5-0"


def test_rows_that_a_recomputed_recording_hides_are_missing_again(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(rows(2), start=0)
        segment.routing(rows(1, 1), start=2)
        segment.routing(rows(1, 2), start=2, origin="recomputed")
    embedded.flush()
    replay = Replay(embedded, writer.id, policy="as_sampled")
    assert row_changes(replay.goto("2-4")) == [(2, 3, "2-3", None)]


def test_a_rewind_is_named_and_its_rows_are_no_change(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4, 5])
        segment.routing(rows(4), start=0)
    with writer.segment(base=3, context=[9]) as segment:
        segment.tokens([10])
    embedded.flush()
    step = Replay(embedded, writer.id).goto("3-0")
    assert (step.changes.rewound, step.changes.tokens) == ((3, 5), (3, 4))
    assert step.changes.rows == ()
    assert row_segments(step.plan).tolist() == [0, 0, 0, -1]


def test_until_ends_the_steps_and_an_unknown_event_is_named(embedded):
    writer = record_seed_case(embedded)
    embedded.flush()
    replay = Replay(embedded, writer.id, until="2-2")
    assert [step.event.id for step in replay] == ["1-0", "2-0", "2-1", "2-2"]
    with pytest.raises(NotFound, match=r"no event 3-0 among those of .*the last of them is 2-2"):
        replay.goto("3-0")
    with pytest.raises(NotFound, match="9-9"):
        Replay(embedded, writer.id, until="9-9")
    with pytest.raises(SchemaError, match="not an event id"):
        replay.goto("yesterday")


def test_a_late_recording_changes_the_state_when_it_arrived(embedded):
    writer = record_seed_case(embedded)
    embedded.flush()
    writer.late_routing(segment=1, rows=seed_rows(1, 9)[3:5], start=3)
    writer.observe(seed_rows(0, 4), start=0, source="trainer", weight_version="v9")
    embedded.flush()
    replay = Replay(embedded, writer.id)
    assert [step.event.id for step in replay][-2:] == ["note 1-0", "note 2-0"]
    assert row_changes(replay.goto("note 1-0")) == [(3, 5, "3-2", "note 1-0")]
    assert replay.goto("note 2-0").changes.rows == ()
    assert len(replay.step.plan.history.observations) == 1


def note(number, header, time):
    return Event(at=EventId(number, 0), header=header, nonce=1, time=time, note=True)


def test_notes_stand_by_time_but_never_before_their_segment_is_over(embedded):
    """Their writers' clocks may be wrong; their own order and the segment that they speak of are not."""
    events = embedded.events(record_seed_case(embedded).id)
    payload = PayloadInfo(nbytes=6, crc=0)
    late = LateRouting(segment=1, start=0, rows=1, payload=payload)
    seen = RoutingObserved(source="trainer", start=0, rows=1, payload=payload)
    early = [note(1, late, time=events[0].time - 100), note(2, seen, time=events[0].time - 100)]
    assert [event.id for event in timeline(events, early)][-3:] == ["3-3", "note 1-0", "note 2-0"]
    assert timeline(events, [note(1, seen, time=events[0].time - 100)])[1].id == "note 1-0"
    assert timeline(events, [note(1, seen, time=events[-1].time + 100)])[-1].id == "note 1-0"


def test_behind_a_hole_there_is_no_state_until_a_segment_goes_on_below(embedded, monkeypatch):
    writer = record_seed_case(embedded)
    with writer.segment(base=3, context=[]) as segment:
        segment.tokens([20])
        segment.routing(rows(3), start=0)
    embedded.flush()
    log = embedded.events(writer.id)
    monkeypatch.setattr(embedded, "events", lambda _: [event for event in log if event.id != "2-1"])
    replay = Replay(embedded, writer.id)
    steps = {step.event.id: step for step in replay}
    assert steps["2-0"].problem == ""
    for id in ("2-2", "3-0", "3-2"):
        assert steps[id].plan is None
        assert "until='2-0' loads the state before the gap" in steps[id].problem
    assert steps["4-0"].plan.history.length == 3
    assert steps["4-0"].changes.rewound == (3, 5)  # against the newest state before the hole
    replay.goto("1-0")
    assert replay.goto("4-0").changes == steps["4-0"].changes
    assert row_changes(replay.goto("4-2")) == [(0, 3, None, "4-2")]
