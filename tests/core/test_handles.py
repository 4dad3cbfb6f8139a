"""What a producer can do with a trajectory and a segment, and what each misuse leads to."""

import asyncio
import threading

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows, seed_rows
from trajstore.limits import EVENT_BYTES
from trajstore.log.flusher import Flusher

nan, inf = float("nan"), float("inf")


def types(store, id):
    return [event.type for event in store.events(id)]


@pytest.fixture
def trajectory(store):
    return store.create(routing=SPEC)


@pytest.fixture
def aborted(store):
    """Prompt 1 2 3, output 4 5, rows 0-3, aborted."""
    made = store.create(routing=SPEC)
    with made.segment(context=[1, 2, 3], weight_version="v1") as segment:
        segment.tokens([4, 5], [-1.0, -2.0])
        segment.routing(rows(4, 1), start=0)
        segment.close("abort")
    return made


# Opening and closing


def test_with_block_that_just_ends_closes_as_abort(store, trajectory):
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2])
        assert not segment.closed
    assert segment.closed
    assert store.load(trajectory.id).finish_reason == "abort"


def test_with_block_left_by_an_exception_closes_as_error_and_lets_it_through(store, trajectory):
    def rollout():
        with trajectory.segment(context=[1]) as segment:
            segment.tokens([2], [-1.0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rollout()
    loaded = store.load(trajectory.id)
    assert loaded.finish_reason == "error"
    assert loaded.token_ids.tolist() == [1, 2], "what was sampled counts"


def test_cancelled_with_block_closes_as_error(store, trajectory):
    async def rollout():
        with trajectory.segment(context=[1]):
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(rollout())
    assert store.load(trajectory.id).finish_reason == "error"


def test_with_block_closed_by_hand_stays_as_it_was_closed(store, trajectory):
    def rollout():
        with trajectory.segment(context=[1]) as segment:
            segment.close("length", cached_tokens=1, retractions=2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rollout()
    (recorded,) = store.load(trajectory.id).segments
    assert (recorded.finish_reason, recorded.cached_tokens, recorded.retractions) == ("length", 1, 2)


def test_segment_without_routing_says_that_it_was_not_recorded(store, trajectory):
    """vLLM #39917: preemption lost routing silently."""
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2])
    assert types(store, trajectory.id)[-2:] == ["RoutingAbsent", "SegmentClosed"]
    assert store.load(trajectory.id).segments[0].absent == ("not recorded",)


def test_absence_with_a_reason_is_not_told_twice(store, trajectory):
    with trajectory.segment(context=[1]) as segment:
        segment.no_routing("feature off")
        segment.close("stop")
    assert store.load(trajectory.id).segments[0].absent == ("feature off",)


def test_routing_of_zero_rows_is_none_at_all(store, trajectory):
    with trajectory.segment(context=[1]) as segment:
        segment.routing(np.empty((0, 3, 2), np.uint8), start=0)
        segment.close("stop")
    assert store.load(trajectory.id).segments[0].absent == ("not recorded",)


def test_absence_may_follow_rows_of_a_part(store, trajectory):
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.routing(rows(2), start=0)
        segment.no_routing("preempted")
        segment.close("abort")
    loaded = store.load(trajectory.id)
    assert loaded.routing_mask.tolist() == [True, True, False]
    assert loaded.segments[0].absent == ("preempted",)


def test_trajectory_without_a_routing_spec_is_told_nothing_of_routing(store):
    plain = store.create()
    with plain.segment(context=[1]) as segment, pytest.raises(trajstore.RoutingError, match="routing=RoutingSpec"):
        segment.routing(rows(1), start=0)
    assert types(store, plain.id) == ["TrajectoryOpened", "SegmentOpened", "SegmentClosed"]
    with pytest.raises(trajstore.RoutingError):
        plain.observe(rows(1), start=0, source="trainer")
    with pytest.raises(trajstore.RoutingError):
        plain.late_routing(rows(1), segment=0, start=0)


@pytest.mark.parametrize("call", ["tokens", "routing", "no_routing", "close"])
def test_closed_segment_takes_nothing_more(store, trajectory, call):
    segment = trajectory.segment(context=[1])
    segment.close("stop")
    count = len(store.events(trajectory.id))
    arguments = {"tokens": ([1],), "routing": (rows(1),), "no_routing": ("x",), "close": ("stop",)}[call]
    with pytest.raises(trajstore.Conflict, match=r"segment 0 is closed; open another one"):
        getattr(segment, call)(*arguments, **({"start": 0} if call == "routing" else {}))
    assert len(store.events(trajectory.id)) == count


def test_second_segment_of_a_handle_waits_for_the_first_to_close(store, trajectory):
    first = trajectory.segment(context=[1])
    with pytest.raises(trajstore.Conflict, match="segment 0 of this handle is still open; close it first"):
        trajectory.segment()
    first.close("stop")
    trajectory.segment().close("stop")
    assert len(store.load(trajectory.id).segments) == 2


@pytest.mark.parametrize(
    "call",
    [lambda handle: handle.segment(), lambda handle: handle.reward(1.0), lambda handle: handle.close()],
    ids=["segment", "reward", "close"],
)
def test_of_two_calls_that_would_open_an_epoch_of_a_resumed_handle_the_second_is_refused_at_once(store, aborted, call):
    """The first reads the tokens that it resumes from: that must not let another one in meanwhile."""
    store.flush()
    handle = store.get(aborted.id)
    load, reading, read_on, opened = handle._load_tokens, threading.Event(), threading.Event(), []

    def slow_load(*args):
        reading.set()
        assert read_on.wait(30)
        return load(*args)

    handle._load_tokens = slow_load
    first = threading.Thread(target=lambda: opened.append(handle.segment()))
    first.start()
    assert reading.wait(30)
    try:
        with pytest.raises(trajstore.Conflict, match="another call of this handle is about to open a segment"):
            call(handle)
    finally:
        read_on.set()
        first.join(30)
    (segment,) = opened
    segment.tokens([6])
    segment.close("stop")
    handle.close()
    store.flush(handle.id)
    loaded = store.load(handle.id)
    assert (loaded.token_ids.tolist(), len(loaded.segments), loaded.status) == ([1, 2, 3, 4, 5, 6], 2, "completed")


def test_call_that_was_refused_leaves_the_handle_free(store, aborted):
    with pytest.raises(trajstore.SchemaError):
        aborted.segment(context=[-1])
    with pytest.raises(trajstore.SchemaError):
        aborted.reward(nan)
    aborted.segment().close("stop")
    aborted.close()
    assert store.load(aborted.id).status == "completed"


@pytest.mark.parametrize("status", ["completed", "truncated", "failed"])
def test_final_trajectory_takes_no_more_epochs(store, trajectory, status):
    trajectory.close(status)
    for handle in (trajectory, store.get(trajectory.id)):
        assert handle.status == status
        for call in (handle.segment, lambda h=handle: h.reward(1.0), handle.close, lambda h=handle: h.close("aborted")):
            with pytest.raises(trajstore.Conflict, match=f"{trajectory.id} is {status}, which is final"):
                call()
    assert types(store, trajectory.id) == ["TrajectoryOpened", "TrajectoryClosed"]


def test_aborted_trajectory_may_be_scored_resumed_and_closed_again(store, aborted):
    aborted.close("aborted")
    assert store.load(aborted.id).status == "aborted"
    again = store.get(aborted.id)
    assert again.status == "aborted"
    again.reward(0.25)
    with again.segment() as segment:
        segment.tokens([6])
        segment.close("stop")
    assert store.load(aborted.id).status == "open"
    again.close("completed")
    loaded = store.load(aborted.id)
    assert (loaded.status, loaded.version, loaded.reward) == ("completed", 2, 0.25)


@pytest.mark.parametrize("call", ["reward", "close"])
def test_handle_that_holds_the_segment_closes_it_first(store, trajectory, call):
    segment = trajectory.segment(context=[1])
    segment.tokens([2])
    trajectory.reward(1.0) if call == "reward" else trajectory.close("failed")
    assert segment.closed
    last = {"reward": "Rewarded", "close": "TrajectoryClosed"}[call]
    assert types(store, trajectory.id)[-3:] == ["RoutingAbsent", "SegmentClosed", last]
    assert store.load(trajectory.id).finish_reason == "abort"


@pytest.mark.parametrize("call", ["reward", "close"])
def test_segment_of_another_writer_is_a_conflict_unless_taken_over(store, trajectory, call):
    segment = trajectory.segment(context=[1])
    segment.tokens([2])
    other = store.get(trajectory.id)
    act = other.reward if call == "reward" else other.close
    argument = 1.0 if call == "reward" else "failed"
    for _ in range(2):
        with pytest.raises(trajstore.Conflict, match=f"another writer's segment is open.*{call} with takeover=True"):
            act(argument)
    act(argument, takeover=True)
    store.flush(trajectory.id)
    segment.tokens([3])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    with pytest.raises(trajstore.Fenced, match=r"store\.get"):
        segment.close("stop")
    loaded = store.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2]
    assert loaded.finish_reason == "lost"


@pytest.mark.parametrize("how", ["reward", "segment"])
def test_after_a_takeover_the_handle_goes_on_without_asking_again(store, trajectory, how):
    trajectory.segment(context=[1])
    other = store.get(trajectory.id)
    if how == "reward":
        other.reward(0.5, takeover=True)
    else:
        other.segment().close("stop")
    other.reward(1.0)
    other.close("completed")
    assert store.load(trajectory.id).status == "completed"


def test_resume_takes_an_open_segment_over_and_its_tokens_count(store, trajectory):
    first = trajectory.segment(context=[1, 2])
    first.tokens([3], [-1.0])
    with store.get(trajectory.id).segment(weight_version="v2") as second:
        assert (second.index, second.base, second.start, second.end) == (1, 3, 3, 3)
        second.tokens([4], [-1.0])
        second.close("stop")
    store.flush(trajectory.id)
    first.tokens([9])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    loaded = store.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2, 3, 4]
    assert [segment.finish_reason for segment in loaded.segments] == ["lost", "stop"]


def test_fenced_error_is_sticky_and_an_exception_under_way_is_not_replaced(store, trajectory):
    def rollout():
        with trajectory.segment(context=[1]) as segment:
            store.get(trajectory.id).segment().close("stop")
            store.flush(trajectory.id)
            segment.tokens([2])
            with pytest.raises(trajstore.Fenced):
                store.flush(trajectory.id)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rollout()
    for call in (trajectory.segment, lambda: trajectory.reward(1.0), trajectory.close):
        with pytest.raises(trajstore.Fenced):
            call()


# Tokens


@pytest.mark.parametrize("call", ["tokens", "routing", "close", "segment"])
def test_handle_whose_call_was_interrupted_takes_no_more_and_another_goes_on(store, trajectory, monkeypatch, call):
    """Ctrl-C in a notebook: the event may be on its way, and the handle does not count its tokens."""
    segment = trajectory.segment(context=[1, 2])
    segment.tokens([3])
    append = Flusher.append

    def interrupt(*event):
        append(*event)
        raise KeyboardInterrupt

    calls = {
        "tokens": lambda: segment.tokens([4]),
        "routing": lambda: segment.routing(rows(2, 1), start=0),
        "close": lambda: segment.close("stop"),
        "segment": lambda: trajectory.close("aborted"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(Flusher, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calls[call]()
    for later in calls.values():
        with pytest.raises(trajstore.Conflict, match="was interrupted"):
            later()
    store.flush()
    handle = store.get(trajectory.id)
    handle.close("completed", takeover=True)
    loaded = store.load(trajectory.id)
    assert loaded.status == "completed"
    assert loaded.token_ids.tolist() == ([1, 2, 3, 4] if call == "tokens" else [1, 2, 3])


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
def test_tokens_in_chunks_of_any_integer_dtype(store, trajectory, dtype):
    with trajectory.segment(context=np.array([1, 2], dtype)) as segment:
        segment.tokens(np.array([3], dtype), np.array([-0.5], np.float64))
        segment.tokens([], [])
        segment.tokens(np.array([4, 5], dtype), [-0.25, -0.125])
        segment.close("stop")
    loaded = store.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(loaded.logprobs, [nan, nan, -0.5, -0.25, -0.125])
    assert types(store, trajectory.id).count("Tokens") == 2, "an empty chunk is no event"


def test_logprobs_that_are_not_known_are_nan_and_trained_on(store, trajectory):
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2, 3])
        segment.tokens([4], [-1.0])
        segment.close("stop")
    loaded = store.load(trajectory.id)
    np.testing.assert_array_equal(loaded.logprobs, [nan, nan, nan, -1.0])
    assert loaded.loss_mask.tolist() == [False, True, True, True]
    assert loaded.nonfinite_logprobs == 0, "not known is not NaN"


def test_logprobs_that_are_not_finite_are_kept_and_flagged(store, trajectory):
    """SkyRL #1909: a rare non-finite logprob killed runs."""
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2, 3, 4], [nan, -inf, -1.0])
        segment.tokens([5], [inf])
        segment.close("stop")
    loaded = store.load(trajectory.id)
    np.testing.assert_array_equal(loaded.logprobs, [nan, nan, -inf, -1.0, inf])
    assert loaded.nonfinite_logprobs == 3
    assert [event.header.nonfinite for event in store.events(trajectory.id) if event.type == "Tokens"] == [2, 1]
    assert store.list()[0].nonfinite == 3


def test_many_tokens_are_split_into_events_and_come_back_whole(embedded):
    count = EVENT_BYTES // 8 + 1000
    ids = np.arange(count, dtype=np.int32) % 50_000
    logprobs = -np.arange(count, dtype=np.float32)
    trajectory = embedded.create()
    with trajectory.segment(context=[7]) as segment:
        segment.tokens(ids, logprobs)
        assert segment.end == count + 1
        segment.close("length")
    chunks = [event.header for event in embedded.events(trajectory.id) if event.type == "Tokens"]
    assert [(chunk.start, chunk.count) for chunk in chunks] == [(1, EVENT_BYTES // 8), (1 + EVENT_BYTES // 8, 1000)]
    loaded = embedded.load(trajectory.id)
    np.testing.assert_array_equal(loaded.token_ids[1:], ids)
    np.testing.assert_array_equal(loaded.logprobs[1:], logprobs)


def test_many_rows_are_split_into_events_and_come_back_whole(embedded):
    wide = trajstore.RoutingSpec(layer_ids=tuple(range(64)), top_k=8, num_experts=512, num_hidden_layers=64)
    count = EVENT_BYTES // wide.row_bytes + 3
    trajectory = embedded.create(routing=wide)
    recorded = np.tile(rows(7, spec=wide), (count // 7 + 1, 1, 1))[:count]
    with trajectory.segment(context=np.zeros(count, int)) as segment:
        segment.routing(recorded, start=0)
        segment.close("stop")
    starts = [
        (event.header.start, event.header.rows) for event in embedded.events(trajectory.id) if event.type == "Routing"
    ]
    assert starts == [(0, count - 3), (count - 3, 3)]
    np.testing.assert_array_equal(embedded.load(trajectory.id).routed_experts, recorded)


def test_what_the_caller_does_to_its_arrays_afterwards_changes_nothing(store, trajectory):
    context, ids = np.array([1, 2], np.int32), np.array([3, 4], np.int32)
    logprobs, recorded = np.array([-1.0, -2.0], np.float32), rows(3)
    with trajectory.segment(context=context) as segment:
        segment.tokens(ids, logprobs)
        segment.routing(recorded, start=0)
        for array in (context, ids, logprobs, recorded):
            array[...] = 0
        segment.close("stop")
    loaded = store.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(loaded.logprobs, [nan, nan, -1.0, -2.0])
    np.testing.assert_array_equal(loaded.routed_experts[:3], rows(3))


def test_metadata_and_sampling_are_copies(store):
    metadata, sampling = {"tags": ["a"]}, {"stop": ["x"], "temperature": 0.7}
    trajectory = store.create(metadata=metadata)
    segment = trajectory.segment(context=[1], sampling=sampling)
    metadata["tags"].append("b")
    sampling["stop"].append("y")
    trajectory.metadata["tags"].append("c")
    segment.close("stop")
    loaded = store.load(trajectory.id)
    assert loaded.metadata == {"tags": ["a"]}
    assert loaded.segments[0].sampling == {"stop": ["x"], "temperature": 0.7}


# Empty, rewound, resumed


def test_empty_segments_are_first_class(store, trajectory):
    """miles #1672, vime #49: an aborted turn has no routes or no tokens."""
    trajectory.segment(context=[1, 2]).close("abort")
    trajectory.segment().close("abort")
    with trajectory.segment() as segment:
        segment.tokens([3], [-1.0])
        segment.close("stop")
    loaded = store.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2, 3]
    assert [(s.base, s.context, s.output, s.end) for s in loaded.segments] == [(0, 2, 0, 2), (2, 0, 0, 2), (2, 0, 1, 3)]
    assert loaded.segment_ids.tolist() == [0, 0, 2]


def test_get_gives_the_tokens_to_resume_with(store, aborted):
    again = store.get(aborted.id)
    assert len(again) == len(aborted) == 5
    assert again.token_ids.tolist() == aborted.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert again.token_ids.dtype == np.int32
    assert (again.group, again.routing, again.metadata) == (None, SPEC, {})
    tokens = again.token_ids
    tokens[0] = 99
    assert again.token_ids[0] == 1, "a copy"


def test_rewound_tokens_leave_the_trajectory_and_stay_in_the_log(store, aborted):
    with store.get(aborted.id).segment(base=np.int64(4), context=[60], weight_version="v2") as segment:
        assert (segment.base, segment.start) == (4, 5)
        segment.tokens([7], [-3.0])
        segment.close("stop")
    loaded = store.load(aborted.id)
    assert loaded.token_ids.tolist() == [1, 2, 3, 4, 60, 7]
    assert loaded.routing_source.tolist() == [0, 0, 0, 0, -1, -1]
    assert store.load(aborted.id, until="2-3").token_ids.tolist() == [1, 2, 3, 4, 5]
    assert store.get(aborted.id).token_ids.tolist() == [1, 2, 3, 4, 60, 7]
    with store.get(aborted.id).segment(base=0, context=[8]) as segment:
        segment.close("stop")
    assert store.load(aborted.id).token_ids.tolist() == [8]
    assert [s.counts for s in store.load(aborted.id).segments] == [0, 0, 1]


@pytest.mark.parametrize("base", [6, 2**40])
def test_base_above_the_tokens_is_a_conflict(store, aborted, base):
    with pytest.raises(trajstore.Conflict, match=f"base {base} lies outside the 5 tokens"):
        store.get(aborted.id).segment(base=base)


def test_handle_keeps_its_own_tokens_through_rewinds_and_its_fold_agrees(store, aborted):
    aborted.segment(base=2, context=[9]).close("abort")
    with aborted.segment(base=3) as segment:
        segment.tokens([10])
    assert aborted.token_ids.tolist() == [1, 2, 9, 10]
    assert store.load(aborted.id).token_ids.tolist() == [1, 2, 9, 10]


# Routing beyond its own segment's time


def test_surplus_row_is_legal_and_rows_past_the_end_are_not(store, trajectory):
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3])
        segment.routing(rows(3), start=0)
        for bad in ({"rows": rows(4), "start": 0}, {"rows": rows(1), "start": 3}):
            with pytest.raises(
                trajstore.RoutingError, match=r"reach past the 3 tokens.*record tokens before"
            ) as caught:
                segment.routing(**bad)
            assert caught.value.row == 3
        segment.close("stop")
    assert types(store, trajectory.id).count("Routing") == 1
    assert store.load(trajectory.id).routing_mask.tolist() == [True] * 3


@pytest.mark.parametrize("start", [-1, 1.5, None, True, "0"])
def test_start_is_a_position(trajectory, start):
    segment = trajectory.segment(context=[1, 2])
    with pytest.raises(trajstore.RoutingError, match="start must be a position"):
        segment.routing(rows(1), start=start)


def test_late_recording_folds_as_its_segments_last_whatever_came_since(store, aborted):
    """Pitfall 9: before or after the newer segment, the fold is the same."""
    twin = store.create(routing=SPEC)
    with twin.segment(context=[1, 2, 3], weight_version="v1") as segment:
        segment.tokens([4, 5], [-1.0, -2.0])
        segment.routing(rows(4, 1), start=0)
        segment.close("abort")
    aborted.late_routing(segment=0, rows=rows(3, 7), start=1)
    for handle in (aborted, twin):
        with handle.segment(weight_version="v2") as segment:
            segment.tokens([6], [-1.0])
            segment.routing(rows(2, 2), start=0)
            segment.close("stop")
    twin.late_routing(segment=0, rows=rows(3, 7), start=1)
    for policy in ("last_segment_wins", "as_sampled"):
        one, other = (store.load(handle.id, policy=policy) for handle in (aborted, twin))
        np.testing.assert_array_equal(one.routed_experts, other.routed_experts)
        np.testing.assert_array_equal(one.routing_source, other.routing_source)
    assert one.routing_source.tolist() == [0, 0, 0, 0, -1, -1]
    np.testing.assert_array_equal(one.routed_experts[1:4], rows(3, 7))


def test_late_recording_and_observation_after_the_close(store, aborted):
    aborted.close("completed")
    before = store.load(aborted.id)
    for handle in (aborted, store.get(aborted.id)):
        handle.observe(rows(5, 3), start=0, source="trainer", weight_version="v9")
    unchanged = store.load(aborted.id)
    np.testing.assert_array_equal(unchanged.routed_experts, before.routed_experts)
    store.get(aborted.id).late_routing(segment=0, rows=rows(1, 4), start=4, origin="unknown")
    late = store.load(aborted.id)
    assert late.routing_mask.tolist() == [True] * 5
    assert late.status == "completed"
    assert [note.id for note in store.notes(aborted.id)] == ["note 1-0", "note 2-0", "note 3-0"]
    assert [r.source for s in late.segments for r in s.recordings] == ["", "late"]


def test_late_recording_of_a_segment_that_is_open_or_not_there_is_refused(store, aborted):
    with aborted.segment() as segment:
        with pytest.raises(trajstore.Conflict, match="segment 1 is still open; record to it directly"):
            aborted.late_routing(segment=1, rows=rows(1), start=0)
        with pytest.raises(trajstore.Conflict, match="segment 1 is open with another writer"):
            store.get(aborted.id).late_routing(segment=1, rows=rows(1), start=0)
        aborted.late_routing(segment=0, rows=rows(1), start=0)
        segment.close("stop")
    with pytest.raises(trajstore.Conflict, match="there is no segment 2"):
        aborted.late_routing(segment=2, rows=rows(1), start=0)
    with pytest.raises(trajstore.SchemaError, match="segment must be"):
        aborted.late_routing(segment=-1, rows=rows(1), start=0)
    with pytest.raises(trajstore.SchemaError, match="no origin"):
        aborted.late_routing(segment=0, rows=rows(1), start=0, origin="guessed")
    with pytest.raises(trajstore.RoutingError, match="past the 5 tokens"):
        aborted.late_routing(segment=0, rows=rows(6), start=0)
    assert len(store.notes(aborted.id)) == 1


def test_loser_of_a_race_leaves_no_late_recording_on_the_winners_segment(store, aborted):
    """A note stays for ever: one past the winner's end would make the trajectory unreadable."""
    loser, winner = store.get(aborted.id), store.get(aborted.id)
    winner.segment().close("stop")
    store.flush(aborted.id)
    segment = loser.segment()
    segment.tokens([6, 7, 8], [-1.0] * 3)
    segment.close("stop")
    with pytest.raises(trajstore.Fenced):
        loser.late_routing(segment=1, rows=rows(8), start=0)
    assert store.notes(aborted.id) == []
    assert len(store.load(aborted.id)) == 5


def test_observation_past_the_end_or_without_a_source_is_refused(store, aborted):
    with pytest.raises(trajstore.RoutingError, match="past the 5 tokens"):
        aborted.observe(rows(6), start=0, source="trainer")
    with pytest.raises(trajstore.SchemaError, match="source must be a string"):
        aborted.observe(rows(2), start=0, source=None)
    assert store.notes(aborted.id) == []


def test_notes_of_several_handles_are_all_kept(store, aborted):
    handles = [store.get(aborted.id) for _ in range(4)]
    threads = [
        threading.Thread(target=handle.observe, args=(rows(5, i),), kwargs={"start": 0, "source": f"trainer-{i}"})
        for i, handle in enumerate(handles)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(note.header.source for note in store.notes(aborted.id)) == [f"trainer-{i}" for i in range(4)]
    assert [note.at.epoch for note in store.notes(aborted.id)] == [1, 2, 3, 4]


# Rewards


def test_newest_reward_counts_with_its_components(store, aborted):
    aborted.reward(np.float32(0.5), components={"format": 1})
    aborted.reward(-1.0, components={"length": -0.5, "answer": np.float64(0.25)})
    loaded = store.load(aborted.id)
    assert loaded.reward == -1.0
    assert loaded.reward_components == {"length": -0.5, "answer": 0.25}
    assert store.load(aborted.id, until="3-0").reward == 0.5


@pytest.mark.parametrize(
    "call",
    [
        {"reward": nan},
        {"reward": "good"},
        {"reward": 1.0, "components": {"a": inf}},
        {"reward": 1, "components": {3: 1}},
    ],
)
def test_reward_that_is_no_finite_number_is_refused_before_anything_happens(store, trajectory, call):
    segment = trajectory.segment(context=[1])
    count = len(store.events(trajectory.id))
    with pytest.raises(trajstore.SchemaError):
        trajectory.reward(**call)
    assert not segment.closed
    assert len(store.events(trajectory.id)) == count


# Bad input leaves nothing behind


@pytest.mark.parametrize(
    "options",
    [
        {"context": [1.5]},
        {"context": [-1]},
        {"context": [[1]]},
        {"engine": 5},
        {"weight_version": None},
        {"weight_version": "x" * 1001},
        {"engine": "\ud800"},
        {"sampling": {"seed": 2**70}},
        {"sampling": {"top_p": nan}},
        {"base": 1.0},
        {"base": -1},
        {"base": "0"},
    ],
)
def test_segment_that_is_refused_opens_no_epoch(store, aborted, options):
    with pytest.raises(trajstore.SchemaError):
        aborted.segment(**options)
    assert [event.at.epoch for event in store.events(aborted.id)][-1] == 2
    assert len(aborted) == 5
    aborted.segment().close("stop")
    assert len(store.load(aborted.id).segments) == 2


@pytest.mark.parametrize(
    ("call", "arguments", "error"),
    [
        ("tokens", ([1.0],), trajstore.SchemaError),
        ("tokens", ([1, 2], [-1.0]), trajstore.SchemaError),
        ("tokens", ([1], ["a"]), trajstore.SchemaError),
        ("no_routing", (None,), trajstore.SchemaError),
        ("close", ("done",), trajstore.SchemaError),
        ("close", (None,), trajstore.SchemaError),
    ],
)
def test_segment_call_that_is_refused_writes_nothing_and_the_segment_goes_on(store, trajectory, call, arguments, error):
    segment = trajectory.segment(context=[1])
    with pytest.raises(error):
        getattr(segment, call)(*arguments)
    assert types(store, trajectory.id) == ["TrajectoryOpened", "SegmentOpened"]
    segment.tokens([2])
    segment.close("stop")
    assert store.load(trajectory.id).token_ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"cached_tokens": -1},
        {"cached_tokens": "3"},
        {"cached_tokens": 1.5},
        {"retractions": -1},
        {"retractions": None},
        {"weight_versions": [("v1", 0, 3)]},
        {"weight_versions": [("v1", 1, 0)]},
        {"weight_versions": [("v1", 0, 2), ("v2", 1, 2)]},
        {"weight_versions": [(1, 0, 2)]},
        {"weight_versions": [("v1", 0.0, 2.0)]},
        {"weight_versions": [("v1", -1, 2)]},
    ],
)
def test_close_with_bad_details_is_refused_and_the_segment_stays_open(store, trajectory, options):
    segment = trajectory.segment(context=[1])
    segment.tokens([2, 3])
    with pytest.raises(trajstore.SchemaError):
        segment.close("stop", **options)
    assert not segment.closed
    assert types(store, trajectory.id)[-1] == "Tokens"


def test_close_takes_numpy_integers_and_weight_version_spans(store, trajectory):
    with trajectory.segment(context=[1], weight_version="v3") as segment:
        segment.tokens([2, 3, 4])
        segment.close(
            "abort",
            cached_tokens=np.int64(1),
            retractions=np.int32(2),
            weight_versions=[("v3", np.int64(0), np.int64(1)), ("v4", 1, 3)],
        )
    loaded = store.load(trajectory.id)
    assert [loaded.weight_version(i) for i in range(4)] == ["", "v3", "v4", "v4"]
    assert (loaded.segments[0].cached_tokens, loaded.segments[0].retractions) == (1, 2)


def test_names_that_are_no_plain_strings_do_not_end_the_writer(store):
    trajectory = store.create(group=np.str_("g"), routing=SPEC)
    with trajectory.segment(context=[1], engine=np.str_("e/1"), weight_version=np.str_("v1")) as segment:
        segment.no_routing(np.str_("off"))
        segment.close(np.str_("stop"))
    trajectory.reward(1.0, components={np.str_("a"): 1.0})
    trajectory.close(np.str_("completed"))
    store.flush()
    loaded = store.load(trajectory.id)
    assert (loaded.group, loaded.segments[0].engine, loaded.finish_reason, loaded.status) == (
        "g",
        "e/1",
        "stop",
        "completed",
    )


@pytest.mark.parametrize("status", ["open", "done", None, "lost"])
def test_status_that_cannot_close_is_refused_and_the_others_named(store, trajectory, status):
    with pytest.raises(trajstore.SchemaError, match="completed, truncated, failed, aborted"):
        trajectory.close(status)
    assert trajectory.status == "open"
    assert types(store, trajectory.id) == ["TrajectoryOpened"]


def test_bad_rows_write_nothing_and_say_which_layer_and_row(store, trajectory):
    segment = trajectory.segment(context=[1, 2, 3, 4])
    bad = rows(4)
    bad[2, 1] = 0
    with pytest.raises(trajstore.RoutingError, match="layer 1, row 2") as caught:
        segment.routing(bad, start=0)
    assert (caught.value.layer, caught.value.row) == (1, 2)
    with pytest.raises(trajstore.SchemaError, match="no origin"):
        segment.routing(rows(4), start=0, origin="guessed")
    assert types(store, trajectory.id) == ["TrajectoryOpened", "SegmentOpened"]


def test_create_refuses_an_id_that_exists_and_bad_options(store):
    store.create(id="t-1")
    with pytest.raises(trajstore.Conflict, match=r"ids are never reused; store.get\('t-1'\)"):
        store.create(id="t-1")
    store.flush()
    for options in (
        {"id": "a/b"},
        {"group": ""},
        {"group_size": 2},
        {"group": "g", "group_size": 0},
        {"routing": {"top_k": 2}},
        {"metadata": {"a": object()}},
        {"metadata": {"a": 2**70}},
    ):
        with pytest.raises(trajstore.SchemaError):
            store.create(**options)
    assert [summary.id for summary in store.list()] == ["t-1"]


def test_get_of_what_is_not_there_is_not_found(store):
    with pytest.raises(trajstore.NotFound, match="no trajectory 'nothing'"):
        store.get("nothing")
    with pytest.raises(KeyError):
        store.load("nothing")


def test_repr_tells_where_a_handle_stands(store, aborted):
    assert repr(store.get(aborted.id)) == f"<TrajectoryWriter {aborted.id}: open, 5 tokens, epoch 2>"


def test_seed_case_written_by_two_handles_has_one_input_digest_per_segment(store):
    trajectory = record_seed_case(store)
    digests = [event.header.input_digest for event in store.events(trajectory.id) if event.type == "SegmentOpened"]
    assert len({*digests}) == 2
    assert all(len(digest) == 32 for digest in digests)
    np.testing.assert_array_equal(store.load(trajectory.id).routed_experts[:9], seed_rows(1, 9))


def test_handle_on_a_log_with_a_hole_goes_on_below_it(store, aborted):
    """What lies above the hole stays in the log and leaves the trajectory."""
    for token in (6, 7):
        with store.get(aborted.id).segment() as segment:
            segment.tokens([token])
    store.flush()
    lost = [str(entry.at) for entry in store.hot.read(aborted.id)[0] if entry.at.epoch == 3]
    store.wire.call("XDEL", store.keys.entries(aborted.id), *lost)
    with pytest.raises(trajstore.SequenceGap) as gap:
        store.load(aborted.id)
    assert gap.value.last_good == "2-3"
    again = store.get(aborted.id)
    assert list(again.token_ids) == [1, 2, 3, 4, 5]
    with again.segment(weight_version="v2") as segment:
        segment.tokens([8])
        segment.close("stop")
    store.flush()
    healed = store.load(aborted.id)
    assert list(healed.token_ids) == [1, 2, 3, 4, 5, 8]
    assert [one.epoch for one in healed.segments] == [2, 5]
    assert store.events(aborted.id)[-1].at.epoch == 5


@pytest.mark.parametrize(
    "misuse",
    [
        lambda store, segment: segment.close("stop", weight_versions=[("a", 0)]),
        lambda store, segment: segment.close("stop", weight_versions=None),
        lambda store, segment: segment.close("stop", weight_versions=[5]),
        lambda store, segment: store.create().reward(1.0, components=[1]),
        lambda store, segment: store.load(5),
        lambda store, segment: store.get(segment),
        lambda store, segment: store.list(status=5),
        lambda store, segment: store.list(status=["open", 5]),
        lambda store, segment: store.wait("x", timeout="soon"),
        lambda store, segment: segment.tokens([1], np.array(["2020-01-01"], "M8[D]")),
        lambda store, segment: segment.tokens([1], [1j]),
        lambda store, segment: trajstore.RoutingSpec(layer_ids=5, top_k=1, num_experts=2, num_hidden_layers=1),
        lambda store, segment: trajstore.open(None),
        lambda store, segment: trajstore.open_archive(5),
        lambda store, segment: trajstore.open("x", timeout="soon"),
    ],
)
def test_wrong_kinds_of_input_are_schema_errors(store, trajectory, misuse):
    segment = trajectory.segment(context=[1])
    with pytest.raises(trajstore.SchemaError):
        misuse(store, segment)


def test_routing_spec_takes_numpy_integers():
    spec = trajstore.RoutingSpec(
        layer_ids=np.arange(2), top_k=np.int64(2), num_experts=np.uint8(8), num_hidden_layers=2
    )
    assert spec == trajstore.RoutingSpec(layer_ids=(0, 1), top_k=2, num_experts=8, num_hidden_layers=2)
    assert type(spec.top_k) is int
