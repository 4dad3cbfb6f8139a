"""What `benchmarks/engines.py` measures: deliveries that all record the same rollout, and goals decided."""

import asyncio
import json
import math
import time

import numpy as np
import pytest

from benchmarks.corpora import Corpus
from benchmarks.deliveries import AsyncEngine, Params, deliveries, sampled
from benchmarks.engines import SPEC, Size, run
from benchmarks.measure import spent_in_turns
from trajstore_vllm import AsyncLLMRecorder

TINY = Size(tokens=80, repeats=1, requests=2, request_tokens=48)

ROLLOUT = next(Corpus("real", 6, lengths=(160,)).rollouts())


def assert_recorded(store, id, routed):
    store.flush()
    folded = store.load(id)
    np.testing.assert_array_equal(folded.token_ids, ROLLOUT.tokens)
    np.testing.assert_array_equal(folded.logprobs, ROLLOUT.logprobs)
    assert [segment.finish_reason for segment in folded.segments] == ["length"]
    if routed:
        np.testing.assert_array_equal(folded.routed_experts[:-1], ROLLOUT.routed[:-1])
        assert folded.routing_mask.tolist() == [True] * 159 + [False]


@pytest.mark.parametrize("routed", [True, False])
def test_every_delivery_records_the_same_rollout(embedded, routed):
    for delivery in deliveries(sampled(ROLLOUT, routed=routed)):
        trajectory = embedded.create(routing=SPEC if routed else None)
        with trajectory.segment(context=ROLLOUT.tokens[: ROLLOUT.prompt]) as segment:
            delivery.record(segment)
            assert segment.closed, delivery.name
        assert_recorded(embedded, trajectory.id, routed)
        assert len(delivery.hold()) == (140 if "per token" in delivery.name else 1)


def test_async_engine_delivers_the_same_rollout_to_every_request(embedded):
    recorder = AsyncLLMRecorder(AsyncEngine(sampled(ROLLOUT, routed=True)))
    trajectories = [embedded.create(routing=SPEC) for _ in range(3)]

    async def record():
        prompt = ROLLOUT.tokens[: ROLLOUT.prompt]
        await asyncio.gather(*(recorder.generate(trajectory, prompt, Params()) for trajectory in trajectories))

    asyncio.run(record())
    for trajectory in trajectories:
        assert_recorded(embedded, trajectory.id, routed=True)


def test_report_decides_every_goal(tmp_path):
    heard = []
    report = run(TINY, tmp_path, show=heard.append)
    assert heard == report.tables
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert [len(table.rows) for table in report.tables] == [6, 6, 2, 2]
    assert all(math.isfinite(goal.value) for goal in report.goals)
    assert [goal.name for goal in report.goals] == [
        "decoding, vLLM HTTP: of the speed of base64 alone",
        "decoding, SGLang HTTP: of the speed of base64 alone",
    ]
    assert report.goals_as_text().count("\n") == 1
    document = json.loads(json.dumps(report.as_json()))
    assert [goal["met"] for goal in document["goals"]] == [goal.met for goal in report.goals]


def test_one_topic_alone_is_measured(tmp_path):
    (table,) = run(TINY, tmp_path, only="decoding").tables
    assert table.title.startswith("Decoding")


def test_ways_are_timed_in_turns_by_all_clocks():
    calls = []
    begun = time.perf_counter(), time.process_time()
    spent = spent_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    ended = time.perf_counter(), time.process_time()
    assert calls == ["b", "a", "a", "b", "b", "a"], "one round more than is measured, each begins with another"
    assert [len(found) for found in spent.values()] == [2, 2]
    both = [*spent["a"], *spent["b"]]
    assert 0 < sum(one.wall for one in both) <= ended[0] - begun[0]
    assert 0 <= sum(one.process for one in both) <= ended[1] - begun[1]
