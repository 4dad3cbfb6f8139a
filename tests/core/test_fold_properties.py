"""The fold against an oracle that knows nothing of plans, over random histories."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.core.logs import Log
from tests.core.oracle import expected_fold
from trajstore.events import SegmentOpened, Tokens

POLICIES = ("last_segment_wins", "as_sampled")
WIDE = trajstore.RoutingSpec(layer_ids=(1, 3), top_k=2, num_experts=300, num_hidden_layers=4)
NARROW = trajstore.RoutingSpec(layer_ids=(0, 1), top_k=2, num_experts=256, num_hidden_layers=2)


@st.composite
def recordings(draw, end):
    """(start, rows) within `[0, end)`; the surplus row at `end - 1` is legal."""
    start = draw(st.integers(0, end - 1))
    return start, draw(st.integers(1, end - start))


@st.composite
def histories(draw):
    log = Log(routing=draw(st.sampled_from([NARROW, WIDE])))
    spec = log.events[0].header.routing
    made = 0
    ends: list[int] = []
    over: list[bool] = []

    def fresh_rows(start, count):
        """Rows that no other recording has, so that equal arrays mean equal choices."""
        nonlocal made
        made += 1
        rows = np.empty((count, spec.num_layers, spec.top_k), spec.dtype)
        rows[..., 0] = made
        rows[..., 1] = 100 + np.arange(start, start + count)[:, None]
        return rows

    def note():
        kind = draw(st.sampled_from(["late", "observe"]))
        candidates = [i for i, end in enumerate(ends) if over[i] and end]
        if kind == "late" and candidates:
            segment = draw(st.sampled_from(candidates))
            start, count = draw(recordings(ends[segment]))
            origin = draw(st.sampled_from(["computed", "recomputed", "cached"]))
            log.late(segment, fresh_rows(start, count), start, origin=origin)
        elif log.token_ids:
            start, count = draw(recordings(len(log.token_ids)))
            log.observe(fresh_rows(start, count), start, epoch=draw(st.sampled_from([None, 0])))

    token = iter(range(1000, 10_000))
    for _ in range(draw(st.integers(0, 5))):
        if over:
            over[-1] = True
        length = len(log.token_ids)
        base = draw(st.one_of(st.just(length), st.integers(0, length)))
        context = [next(token) for _ in range(draw(st.integers(0, 3)))]
        log.segment(base, context, weight_version=f"v{draw(st.integers(0, 3))}")
        ends.append(len(log.token_ids))
        over.append(False)
        for _ in range(draw(st.integers(0, 4))):
            match draw(st.sampled_from(["tokens", "routing", "routing", "absent", "note"])):
                case "tokens":
                    ids = [next(token) for _ in range(draw(st.integers(1, 3)))]
                    probs = draw(st.sampled_from([None, -0.5, float("nan"), float("-inf")]))
                    log.tokens(ids, None if probs is None else [probs] * len(ids))
                    ends[-1] = len(log.token_ids)
                case "routing" if ends[-1]:
                    start, count = draw(recordings(ends[-1]))
                    origin = draw(st.sampled_from(["computed", "computed", "cached", "recomputed", "unknown"]))
                    log.routing(fresh_rows(start, count), start, origin=origin)
                case "absent":
                    log.absent("not now")
                case "note":
                    note()
        if draw(st.booleans()):
            log.finish(draw(st.sampled_from(["stop", "length", "abort", "error"])))
            over[-1] = True
        for _ in range(draw(st.integers(0, 1))):
            note()
        match draw(st.sampled_from(["", "", "reward", "close"])):
            case "reward":
                log.reward(draw(st.floats(-1, 1)))
            case "close":
                log.close(draw(st.sampled_from(["aborted", "completed"])))
    return log


def assert_same(loaded, expected, spec):
    n = len(expected.tokens)
    for array, dtype, shape in [
        (loaded.token_ids, np.int32, (n,)),
        (loaded.logprobs, np.float32, (n,)),
        (loaded.loss_mask, np.bool_, (n,)),
        (loaded.segment_ids, np.int16, (n,)),
        (loaded.weight_version_ids, np.int32, (n,)),
        (loaded.routing_mask, np.bool_, (n,)),
        (loaded.routing_source, np.int16, (n,)),
        (loaded.routed_experts, spec.dtype, (n, spec.num_layers, spec.top_k)),
    ]:
        assert array.dtype == dtype
        assert array.shape == shape
        assert array.base is None, "verifiers #1783: a view would pin the whole array"
        assert array.flags.owndata
        assert array.flags.c_contiguous
    np.testing.assert_array_equal(loaded.token_ids, [token.id for token in expected.tokens])
    np.testing.assert_array_equal(loaded.logprobs, np.array([token.logprob for token in expected.tokens], np.float32))
    assert loaded.loss_mask.tolist() == [token.sampled for token in expected.tokens]
    assert loaded.segment_ids.tolist() == [token.segment for token in expected.tokens]
    assert [loaded.weight_version(i) for i in range(n)] == [token.weight_version for token in expected.tokens]
    sampled = [token.weight_version for token in expected.tokens if token.sampled]
    assert loaded.weight_versions == tuple(dict.fromkeys(sampled))
    assert loaded.routing_mask.tolist() == [row is not None for row in expected.rows]
    assert loaded.routing_source.tolist() == expected.sources
    for p, row in enumerate(expected.rows):
        np.testing.assert_array_equal(
            loaded.routed_experts[p], np.zeros(loaded.routed_experts.shape[1:]) if row is None else row
        )
    assert (loaded.status, loaded.finish_reason) == (expected.status, expected.finish_reason)
    assert (loaded.reward, loaded.version) == (expected.reward, expected.version)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fold_equals_the_oracle_at_any_event_under_both_policies(data):
    log = data.draw(histories())
    until = data.draw(st.sampled_from([None, *(event.id for event in log.events)]))
    for policy in POLICIES:
        assert_same(log.load(policy, until), expected_fold(log, policy, until), log.events[0].header.routing)


@settings(max_examples=200, deadline=None)
@given(histories())
def test_why_names_the_recording_that_wins_and_an_outcome_for_each_other(log):
    for policy in POLICIES:
        plan, expected = log.plan(policy), expected_fold(log, policy)
        for p in range(len(expected.tokens)):
            candidates = plan.why(p)
            wins = [candidate.recording.event for candidate in candidates if candidate.outcome == "wins"]
            assert wins == ([expected.winners[p]] if expected.winners[p] else [])
            segments = [candidate.recording.segment for candidate in candidates]
            assert segments == sorted(segments, reverse=True), "newest segment first"


@settings(max_examples=200, deadline=None)
@given(histories())
def test_fold_fetches_the_winning_payloads_only_and_each_once(log):
    for policy in POLICIES:
        log.load(policy)
        expected = expected_fold(log, policy)
        surviving = {token.id for token in expected.tokens}
        bring = {
            event.id
            for event in log.events
            if isinstance(event.header, Tokens | SegmentOpened)
            and surviving & set(np.frombuffer(log.payloads[event.id], "<i4").tolist())
        }
        assert sorted(log.asked) == sorted(bring | {winner for winner in expected.winners if winner})
        assert [event.id for event in log.plan(policy).needed()] == log.asked


@settings(max_examples=100, deadline=None)
@given(histories(), st.randoms(use_true_random=False))
def test_late_notes_of_different_segments_may_arrive_in_any_order(log, random):
    """Pitfall 9: "last" is by segment order, not by arrival."""
    before = [log.load(policy) for policy in POLICIES]
    keys = {
        note.id: (random.random() if getattr(note.header, "segment", None) is None else note.header.segment)
        for note in log.notes
    }
    log.notes = sorted(log.notes, key=lambda note: keys[note.id])  # stable: within a segment the order remains
    for policy, old in zip(POLICIES, before, strict=True):
        now = log.load(policy)
        np.testing.assert_array_equal(now.routed_experts, old.routed_experts)
        np.testing.assert_array_equal(now.routing_source, old.routing_source)


def test_superseded_segments_cost_no_payload():
    log = Log(routing=NARROW)
    rows = np.tile(np.array([[[1, 2], [3, 4]]], np.uint8), (8, 1, 1))
    log.segment(0, [1, 2, 3, 4])
    log.tokens([5], [-1.0])
    for _ in range(50):
        log.routing(rows[:5], 0)
        log.finish("abort")
        log.segment()
    log.tokens([6], [-1.0])
    newest = log.routing(rows[:6], 0)
    log.load()
    assert log.asked == ["2-0", "2-1", "52-1", newest]
