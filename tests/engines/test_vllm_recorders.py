"""The recorders over `AsyncLLM` and `LLM`: what they ask for, and what they record of it."""

import asyncio
import importlib.metadata

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC
from tests.engines.vllm_engine import FakeAsyncLLM, FakeLLM, Params, routed, soon
from tests.engines.vllm_fixtures import Kind, events_of, reasons, recordings
from tests.engines.vllm_rollouts import PROMPT, aborted, begin, complete, run
from trajstore.events import SegmentOpened, Tokens
from trajstore_vllm import AsyncLLMRecorder, LLMRecorder


def test_a_request_is_recorded_from_its_opening_to_its_close(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)
    params = Params(max_tokens=3, temperature=0.5)
    output = run(complete(engine, recorder, trajectory, PROMPT, params))
    assert output.outputs[0].token_ids == [5, 6, 7]
    assert (params.output_kind, params.logprobs) == (Kind.DELTA, None), "the caller's own are as they were"
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids.tolist() == [*PROMPT, 5, 6, 7]
    np.testing.assert_array_equal(loaded.logprobs[5:], np.float32([-0.1, -0.2, -0.3]))
    np.testing.assert_array_equal(loaded.routed_experts[:7], routed(0, 7))
    assert loaded.routing_mask.tolist() == [True] * 7 + [False]
    assert loaded.weight_version(5) == "v1"
    assert loaded.finish_reason == "length"
    (opened,) = events_of(embedded, trajectory, SegmentOpened)
    assert opened.engine == "vllm"
    assert opened.sampling == {
        "max_tokens": 3,
        "temperature": 0.5,
        "logprobs": 0,
        "routed_experts_prompt_start": 0,
    }
    assert recorder.in_flight == ()


def test_a_resumed_request_asks_for_exactly_the_rows_not_held(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        output = await aborted(engine, recorder, trajectory, 3, PROMPT)
        assert output.outputs[0].finish_reason == "abort"
        engine.weights = 1
        recorder.set_weight_version("v2")
        again = embedded.get(trajectory.id)  # as another process would
        assert again.rows_held == 7
        await aborted(engine, recorder, again, 2)
        await complete(engine, recorder, again, [400, 401], Params(max_tokens=2))

    run(rollout())
    assert [params.routed_experts_prompt_start for _, params in engine.asked] == [0, 7, 9]
    assert [len(prompt) for prompt, _ in engine.asked] == [5, 8, 12]
    assert recordings(embedded, trajectory) == [(0, 7, "computed"), (7, 9, "computed"), (9, 13, "computed")]
    loaded = embedded.load(trajectory.id)
    assert loaded.routing_mask.tolist() == [True] * 13 + [False]
    assert loaded.routing_source.tolist() == [0] * 7 + [1] * 2 + [2] * 4 + [-1]
    np.testing.assert_array_equal(loaded.routed_experts[:13], np.concatenate([routed(0, 7), routed(7, 13, 1)]))
    assert [loaded.weight_version(at) for at in (4, 5, 7, 8, 9, 10, 12)] == ["", "v1", "v1", "v2", "v2", "", "v2"]
    assert [segment.finish_reason for segment in loaded.segments] == ["abort", "abort", "length"]


def test_a_prefix_that_is_recorded_again_can_be_audited(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        await aborted(engine, recorder, trajectory, 3, PROMPT)
        engine.weights = 1
        await complete(engine, recorder, trajectory, rerecord="prefix")

    run(rollout())
    assert engine.asked[1][1].routed_experts_prompt_start == 0
    loaded = embedded.load(trajectory.id)
    np.testing.assert_array_equal(loaded.routed_experts[:-1], routed(0, 11, 1))
    assert recordings(embedded, trajectory) == [(0, 7, "computed"), (0, 11, "computed")]


def test_a_rewound_trajectory_asks_from_where_it_goes_on(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        await complete(engine, recorder, trajectory, PROMPT)
        await complete(engine, recorder, trajectory, [300], base=3)

    run(rollout())
    assert engine.asked[1][0] == [*PROMPT[:3], 300]
    assert engine.asked[1][1].routed_experts_prompt_start == 3
    assert embedded.load(trajectory.id).routing_mask.tolist() == [True] * 7 + [False]


def test_rows_that_a_segment_lost_are_asked_for_again(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    def lose(output):
        output.outputs[0].routed_experts = None

    async def rollout():
        await complete(engine, recorder, trajectory, PROMPT)
        engine.spoil = lose
        await complete(engine, recorder, trajectory)
        engine.spoil = lambda output: None
        await complete(engine, recorder, trajectory)

    run(rollout())
    assert [params.routed_experts_prompt_start for _, params in engine.asked] == [0, 8, 8]
    assert embedded.load(trajectory.id).routing_mask.tolist() == [True] * 16 + [False]


def test_a_vllm_that_cannot_be_asked_returns_all_rows_and_they_are_placed_from_0(embedded):
    """vLLM before 0.22 has no `routed_experts_prompt_start`."""
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        for context in (PROMPT, []):
            params = Params()
            del params.routed_experts_prompt_start
            await complete(engine, recorder, trajectory, context, params)

    run(rollout())
    assert recordings(embedded, trajectory) == [(0, 8, "computed"), (0, 12, "computed")]


def test_a_trajectory_without_routing_asks_for_no_rows(embedded):
    engine = FakeAsyncLLM()
    trajectory = embedded.create()
    run(complete(engine, AsyncLLMRecorder(engine), trajectory, PROMPT, Params(max_tokens=1)))
    assert engine.asked[0][1].routed_experts_prompt_start == len(PROMPT)
    assert len(embedded.load(trajectory.id)) == 6
    assert recordings(embedded, trajectory) == reasons(embedded, trajectory) == []


def test_many_requests_in_flight_do_not_mix(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, every=4)
    trajectories = [embedded.create(id=f"t{i:02}", routing=SPEC) for i in range(32)]

    async def rollout():
        tasks = [
            await begin(engine, recorder, one, [100 + i] * (3 + i), Params(max_tokens=5 + i))
            for i, one in enumerate(trajectories)
        ]
        await engine.step(20)
        await recorder.abort("t20")
        assert len(recorder.in_flight) > 8
        await engine.run()
        await asyncio.gather(*tasks)

    run(rollout())
    for i, trajectory in enumerate(trajectories):
        loaded = embedded.load(trajectory.id)
        length = (3 + i) + (20 if i == 20 else 5 + i)
        assert len(loaded) == length
        assert loaded.token_ids[: 3 + i].tolist() == [100 + i] * (3 + i)
        assert loaded.token_ids[3 + i :].tolist() == list(range(3 + i, length))
        assert loaded.routing_mask.sum() == length - 1
        assert loaded.finish_reason == ("abort" if i == 20 else "length")


def test_tokens_are_written_in_batches_while_a_request_runs(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, every=10)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=35))
        for done in (10, 20, 30):
            await engine.step(10)
            await soon(lambda done=done: len(trajectory) == 5 + done, f"{done} tokens are recorded")
        await engine.run()
        await task

    run(rollout())
    assert [header.count for header in events_of(embedded, trajectory, Tokens)] == [10, 10, 10, 5]


def test_what_came_before_an_engine_failed_is_kept(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(2)
        engine.fail(ConnectionError("EngineCore died"))
        with pytest.raises(ConnectionError, match="EngineCore died"):
            await task

    run(rollout())
    assert embedded.load(trajectory.id).finish_reason == "error"
    assert len(embedded.load(trajectory.id)) == 7
    assert reasons(embedded, trajectory) == ["the engine failed: ConnectionError: EngineCore died"]


@pytest.mark.parametrize("count", [400])
def test_a_store_that_hangs_does_not_hold_up_the_engine(own_server, run_name, count):
    """The writer is a background thread; outputs are taken even while its buffer is full."""
    store = trajstore.open(own_server.url(run_name), partitions=2, timeout=20.0, buffer_bytes=4096)
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, every=1)
    trajectories = [store.create(routing=SPEC) for _ in range(4)]
    store.flush()

    async def rollout():
        tasks = [await begin(engine, recorder, one, PROMPT, Params(max_tokens=count)) for one in trajectories]
        own_server.pause()
        try:
            await engine.step(count)
            assert all(request.finished for request in engine.requests.values())
            assert all(request.pending is None for request in engine.requests.values()), "all outputs were taken"
            assert not any(task.done() for task in tasks), "and not all are written"
        finally:
            own_server.resume()
        await asyncio.gather(*tasks)

    run(rollout())
    with store:
        for trajectory in trajectories:
            loaded = store.load(trajectory.id)
            assert len(loaded) == 5 + count
            assert loaded.routing_mask.sum() == 4 + count


def test_what_cannot_be_asked_is_refused_before_a_segment_opens(embedded):
    recorder = AsyncLLMRecorder(FakeAsyncLLM())
    trajectory = embedded.create(routing=SPEC)
    with pytest.raises(trajstore.SchemaError, match="n=2: a trajectory takes one choice"):
        run(recorder.generate(trajectory, PROMPT, Params(n=2)))
    with pytest.raises(trajstore.SchemaError, match="rerecord"):
        run(recorder.generate(trajectory, PROMPT, Params(), rerecord="all"))
    with pytest.raises(trajstore.SchemaError, match="rerecord"):
        AsyncLLMRecorder(FakeAsyncLLM(), rerecord="all")
    assert [event.type for event in embedded.events(trajectory.id)] == ["TrajectoryOpened"]
    assert recorder.in_flight == ()


def test_the_installed_version_is_recorded_and_what_it_loses_logged(embedded, monkeypatch, caplog):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)
    run(complete(engine, recorder, trajectory, PROMPT))
    (opened,) = events_of(embedded, trajectory, SegmentOpened)
    assert opened.engine == "vllm/0.20.0"
    assert "vllm/0.20.0: an aborted request returns no routed experts" in caplog.text


def test_an_id_in_flight_is_not_used_twice(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    one, other = embedded.create(routing=SPEC), embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, one, PROMPT, request_id="r")
        with pytest.raises(trajstore.Conflict, match="'r' is in flight"):
            await recorder.generate(other, PROMPT, Params(), "r")
        await engine.run()
        await task

    run(rollout())
    assert len(other) == 0


def test_a_batch_of_an_llm_is_recorded_and_resumed(embedded):
    llm = FakeLLM()
    recorder = LLMRecorder(llm, weight_version="v1")
    trajectories = [embedded.create(id=f"t{i}", routing=SPEC) for i in range(3)]
    params = [Params(max_tokens=2 + i) for i in range(3)]
    outputs = recorder.generate(trajectories, [[7] * (1 + i) for i in range(3)], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 3, 4]
    recorder.set_weight_version("v2")
    llm.weights = 1
    recorder.generate(trajectories, sampling_params=Params(max_tokens=1))
    assert [asked.routed_experts_prompt_start for _, asked in llm.asked] == [0, 0, 0, 2, 4, 6]
    for i, trajectory in enumerate(trajectories):
        loaded = embedded.load(trajectory.id)
        assert loaded.loss_mask.tolist() == [False] * (1 + i) + [True] * (3 + i)
        assert loaded.weight_versions == ("v1", "v2")
        np.testing.assert_array_equal(
            loaded.routed_experts[:-1], np.concatenate([routed(0, 2 + 2 * i), routed(2 + 2 * i, 3 + 2 * i, 1)])
        )


def test_one_refused_output_of_a_batch_leaves_the_others(embedded):
    llm = FakeLLM()
    trajectories = [embedded.create(id=f"t{i}", routing=SPEC) for i in range(3)]

    def cut(output):
        if output.finished and len(output.prompt_token_ids) == 2:
            output.outputs[0].routed_experts = output.outputs[0].routed_experts[1:]

    llm.spoil = cut
    with pytest.raises(ExceptionGroup, match="1 of 3 outputs") as caught:
        LLMRecorder(llm).generate(trajectories, [[7], [7, 8], [7, 8, 9]], Params(max_tokens=2))
    (error,) = caught.value.exceptions
    assert isinstance(error, trajstore.RoutingError)
    assert [len(embedded.load(one.id)) for one in trajectories] == [3, 2, 5]
    assert embedded.load("t1").finish_reason == "error"
    with pytest.raises(trajstore.SchemaError, match="3 trajectories, 1 contexts"):
        LLMRecorder(llm).generate(trajectories, [[7]], Params())


def test_an_llm_that_fails_is_the_reason_that_its_segments_keep(embedded):
    class Failing(FakeLLM):
        def generate(self, prompts, sampling_params, *, use_tqdm):
            raise ValueError("the prompt is too long")

    trajectories = [embedded.create(routing=SPEC) for _ in range(2)]
    with pytest.raises(ValueError, match="too long"):
        LLMRecorder(Failing()).generate(trajectories, [[7], [8]], Params())
    for trajectory in trajectories:
        assert reasons(embedded, trajectory) == ["the engine failed: ValueError: the prompt is too long"]
        assert embedded.load(trajectory.id).finish_reason == "error"
