"""The recorders around an engine: what they ask for, and what stays of a request that ends in any way."""

import asyncio
import importlib.metadata
import threading

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC
from tests.engines.vllm_engine import FakeAsyncLLM, FakeLLM, Params, routed, soon
from tests.engines.vllm_fixtures import Kind, closing, events_of, reasons, recordings
from tests.waiting import one_round, still_waits
from trajstore.events import SegmentOpened, Tokens, WeightVersionSpan
from trajstore.writing import TrajectoryWriter
from trajstore_vllm import AsyncLLMRecorder, LLMRecorder

PROMPT = [11, 12, 13, 14, 15]


def run(coroutine):
    """One test on a loop of its own."""

    async def main():
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(main())


async def begin(engine, recorder, trajectory, context=(), params=None, **options):
    """A call of `generate` whose request is in the engine."""
    before = len(engine.asked)
    task = asyncio.create_task(recorder.generate(trajectory, context, params or Params(), **options))
    await soon(lambda: len(engine.asked) > before or task.done(), "the request was sent")
    return task


async def complete(engine, recorder, trajectory, context=(), params=None, **options):
    """A request that runs to its end."""
    task = await begin(engine, recorder, trajectory, context, params, **options)
    await engine.run()
    return await task


async def aborted(engine, recorder, trajectory, tokens, context=(), params=None, **options):
    """A request that is aborted after some tokens."""
    task = await begin(engine, recorder, trajectory, context, params or Params(max_tokens=100), **options)
    await engine.step(tokens)
    await recorder.abort()
    return await task


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


def test_a_cancelled_call_aborts_its_request_and_keeps_what_came(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert recorder.in_flight == ()

    run(rollout())
    assert engine.aborted == [trajectory.id]
    loaded = embedded.load(trajectory.id)
    assert loaded.finish_reason == "abort"
    assert len(loaded) == 8
    assert loaded.routing_mask.tolist() == [True] * 7 + [False]


def test_a_cancelled_call_does_not_wait_for_ever_for_a_deaf_engine(embedded):
    engine = FakeAsyncLLM()
    engine.deaf = True
    recorder = AsyncLLMRecorder(engine, abort_timeout=0.05)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.requests, "its generator was closed, which aborts a request"

    run(rollout())
    loaded = embedded.load(trajectory.id)
    assert loaded.finish_reason == "abort"
    assert len(loaded) == 9
    assert reasons(embedded, trajectory) == ["cancelled, and the engine brought no last output"]


class DeafToAborts(FakeAsyncLLM):
    """Whose aborts fail, the first `failures` of them."""

    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    async def abort(self, request_id):
        if len(self.aborted) < self.failures:
            self.aborted += request_id
            raise ConnectionError("no way to the engine")
        await super().abort(request_id)


def test_an_abort_that_fails_leaves_a_cancelled_call_cancelled(embedded, caplog):
    engine = DeafToAborts(failures=100)
    recorder = AsyncLLMRecorder(engine, abort_timeout=0.05)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (recorder.in_flight, engine.requests) == ((), {})
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(rollout())
    assert "could not be aborted: ConnectionError: no way to the engine" in caplog.text
    assert embedded.load(trajectory.id).token_ids.tolist() == [*PROMPT, 5, 6, 7]
    assert reasons(embedded, trajectory) == ["cancelled, and the engine brought no last output"]


def test_an_abort_that_fails_is_sent_again_with_the_next_output(embedded):
    engine = DeafToAborts(failures=2)
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(3)
        await recorder.abort()
        await engine.step(2)
        return await task

    assert run(rollout()).outputs[0].finish_reason == "abort"
    assert engine.aborted == [trajectory.id] * 3
    assert len(embedded.load(trajectory.id)) == 10


def test_an_abort_that_the_engine_never_answers_is_given_up(embedded, caplog):
    class Silent(FakeAsyncLLM):
        async def abort(self, request_id):
            await asyncio.Event().wait()

    engine = Silent()
    recorder = AsyncLLMRecorder(engine, abort_timeout=0.05)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT)
        await recorder.abort()
        await engine.run()
        await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(rollout())
    assert "the engine did not take the abort" in caplog.text
    assert embedded.load(trajectory.id).finish_reason == "length"


def test_a_call_that_is_cancelled_twice_leaves_no_work_behind(embedded):
    engine = FakeAsyncLLM()
    engine.deaf = True
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(3)
        task.cancel()
        await soon(lambda: engine.aborted, "the abort was sent")
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (recorder.in_flight, engine.requests) == ((), {})
        assert asyncio.all_tasks() == {asyncio.current_task()}
        engine.deaf = False
        await complete(engine, recorder, trajectory)

    run(rollout())
    assert [s.finish_reason for s in embedded.load(trajectory.id).segments] == ["abort", "length"]


class Held(Params):
    """Parameters at which the opening of a segment waits, in its thread."""

    opening, may_open = threading.Event(), threading.Event()

    def clone(self):
        self.opening.set()
        assert self.may_open.wait(30)
        return super().clone()


@pytest.fixture
def held():
    yield Held
    Held.may_open.set()
    Held.opening, Held.may_open = threading.Event(), threading.Event()


def test_a_thread_that_writes_is_waited_for_however_often_a_call_is_cancelled(embedded, held):
    recorder = AsyncLLMRecorder(FakeAsyncLLM())
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = asyncio.create_task(recorder.generate(trajectory, PROMPT, held()))
        assert await asyncio.to_thread(held.opening.wait, 30)
        for _ in range(3):
            for one in asyncio.all_tasks() - {asyncio.current_task()}:
                one.cancel()  # as a loop does that shuts down
            assert await still_waits(task)
        held.may_open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert recorder.in_flight == ()
        trajectory.segment().close("abort")

    run(rollout())
    assert reasons(embedded, trajectory)[0] == "cancelled, and the engine brought no last output"


def test_an_abort_that_comes_before_the_engine_knows_the_request_still_ends_it(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    early, late = embedded.create(routing=SPEC), embedded.create(routing=SPEC)

    async def rollout():
        never_sent = asyncio.create_task(recorder.generate(early, PROMPT, Params()))
        await one_round(never_sent)
        assert recorder.in_flight == (early.id,)
        await recorder.abort(early.id)
        assert await never_sent is None
        task = await begin(engine, recorder, late, PROMPT, Params(max_tokens=100))
        engine.deaf = True
        await recorder.abort(late.id)
        engine.deaf = False
        await engine.step()
        return await task

    output = run(rollout())
    assert output.outputs[0].finish_reason == "abort"
    assert [params.max_tokens for _, params in engine.asked] == [100]
    assert reasons(embedded, early) == ["aborted before the request was sent"]
    assert embedded.load(early.id).finish_reason == "abort"
    assert len(embedded.load(late.id)) == 6


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


def repeat_an_expert(output):
    if output.finished:
        output.outputs[0].routed_experts[2] = 5


@pytest.mark.parametrize("sampled", [1, 4, 31, 100])
def test_a_last_output_that_cannot_be_ends_the_request_and_leaves_the_tokens_before_it(embedded, sampled):
    """Of 31 or 100 tokens the last 30 or 3 were not written yet."""
    engine = FakeAsyncLLM()
    engine.spoil = repeat_an_expert
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)
    with pytest.raises(trajstore.RoutingError, match="row 2 repeats an expert"):
        run(complete(engine, recorder, trajectory, PROMPT, Params(max_tokens=sampled)))
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids.tolist() == [*PROMPT, *range(5, 4 + sampled)]
    assert np.isfinite(loaded.logprobs[5:]).all()
    assert not loaded.routing_mask.any()
    assert loaded.finish_reason == "error"
    (reason,) = reasons(embedded, trajectory)
    assert reason.startswith("refused: layer 0, row 2")
    engine.spoil = lambda output: None
    run(complete(engine, recorder, trajectory))
    assert embedded.load(trajectory.id).routing_mask.tolist() == [True] * (7 + sampled) + [False], "it can be resumed"


def test_tokens_before_an_output_that_cannot_be_are_kept_in_mid_request(embedded):
    """Outputs are read every 10 tokens; at the 20th, its newest has no logprob."""
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, every=10)
    trajectory = embedded.create(routing=SPEC)

    def forget(output):
        if len(output.outputs[0].token_ids) == 20:
            output.outputs[0].logprobs[19] = {}

    async def rollout():
        engine.spoil = forget
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(10)
        await soon(lambda: len(trajectory) == 15, "the first 10 are written")
        await engine.run()
        with pytest.raises(trajstore.SchemaError, match="position 9 of the output has no logprob"):
            await task

    run(rollout())
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids.tolist() == [*PROMPT, *range(5, 24)]
    assert loaded.finish_reason == "error"


@pytest.mark.parametrize("token_ids", [None, 7, np.array(7), "text"])
def test_an_output_whose_tokens_cannot_be_counted_ends_the_request_at_once(embedded, token_ids):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    def lose(output):
        output.outputs[0].token_ids = token_ids

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=100))
        await engine.step(3)
        engine.spoil = lose
        await engine.step(1)
        with pytest.raises(trajstore.SchemaError, match="token_ids of the output must be a sequence"):
            await task
        assert not engine.requests, "its generator was closed, which aborts a request"

    run(rollout())
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids.tolist() == [*PROMPT, 5, 6, 7]
    assert loaded.finish_reason == "error"
    (reason,) = reasons(embedded, trajectory)
    assert reason.startswith("refused: token_ids")


def test_outputs_without_the_choice_bring_nothing_until_the_last(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    def another(output):
        output.outputs[0].index = 1

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=9))
        await engine.step(3)
        engine.spoil = another
        await engine.run()
        with pytest.raises(trajstore.SchemaError, match="its last output has no choice 0"):
            await task

    run(rollout())
    assert embedded.load(trajectory.id).token_ids.tolist() == [*PROMPT, 5, 6, 7]


@pytest.mark.parametrize(
    ("finish_reason", "kind", "words"),
    [("length", trajstore.Conflict, "another input"), ("tired", trajstore.SchemaError, "finish reason 'tired'")],
)
def test_of_a_request_of_another_prompt_nothing_is_kept(embedded, finish_reason, kind, words):
    engine = FakeAsyncLLM()
    trajectory = embedded.create(routing=SPEC)

    def swap(output):
        output.prompt_token_ids = [1, 2, 3, 4, 5]
        if output.finished:
            output.outputs[0].finish_reason = finish_reason

    engine.spoil = swap
    with pytest.raises(kind, match=words):
        run(complete(engine, AsyncLLMRecorder(engine), trajectory, PROMPT, Params(max_tokens=9)))
    loaded = embedded.load(trajectory.id)
    assert loaded.token_ids.tolist() == PROMPT
    assert loaded.finish_reason == "error"
    (reason,) = reasons(embedded, trajectory)
    assert words in reason


def test_a_stream_that_just_ends_is_an_abort(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine)
    trajectory = embedded.create(routing=SPEC)

    class Silent(FakeAsyncLLM):
        async def generate(self, prompt, sampling_params, request_id):
            return
            yield

    assert run(AsyncLLMRecorder(Silent()).generate(trajectory, PROMPT, Params())) is None
    assert reasons(embedded, trajectory) == ["the engine's outputs ended without a last one"]
    assert run(complete(engine, recorder, trajectory)).finished, "it can be resumed"


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


def test_weights_that_change_in_mid_request_become_spans(embedded):
    """Before 0.32 nothing in an output says so: the tokens delivered at the switch are the old weights'."""
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=6))
        await engine.step(2)
        engine.weights = 1
        recorder.set_weight_version("v2")
        await engine.step(3)
        recorder.set_weight_version("v3")
        await engine.run()
        await task

    run(rollout())
    spans = (WeightVersionSpan("v1", 0, 2), WeightVersionSpan("v2", 2, 5), WeightVersionSpan("v3", 5, 6))
    assert closing(embedded, trajectory).weight_versions == spans
    loaded = embedded.load(trajectory.id)
    assert [loaded.weight_version(at) for at in range(5, 11)] == ["v1", "v1", "v2", "v2", "v2", "v3"]


def test_tokens_that_nobody_has_read_yet_at_the_switch_are_the_old_weights(embedded):
    """vLLM has appended them to the list that its outputs share."""
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=6))
        await engine.step(2)
        (request,) = engine.requests.values()
        request.step()
        request.step()
        recorder.set_weight_version("v2")
        await engine.run()
        await task

    run(rollout())
    assert closing(embedded, trajectory).weight_versions == (
        WeightVersionSpan("v1", 0, 4),
        WeightVersionSpan("v2", 4, 6),
    )


def test_a_switch_behind_the_tokens_that_were_kept_is_none(embedded):
    """The last output, with the last token, came before the switch and was read and refused after it."""
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=6))
        await engine.step(5)
        engine.spoil = repeat_an_expert
        (request,) = engine.requests.values()
        request.step()
        recorder.set_weight_version("v2")
        with pytest.raises(trajstore.RoutingError):
            await task

    run(rollout())
    assert len(embedded.load(trajectory.id)) == 10
    assert closing(embedded, trajectory).weight_versions == (WeightVersionSpan("v1", 0, 5),)


@pytest.mark.parametrize("ends", ["fails", "is refused", "is cancelled", "is aborted"])
def test_weights_that_change_in_mid_request_are_told_however_it_ends(embedded, ends):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1", abort_timeout=0.05)
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = await begin(engine, recorder, trajectory, PROMPT, Params(max_tokens=6))
        await engine.step(2)
        recorder.set_weight_version("v2")
        await engine.step(3)
        if ends == "fails":
            engine.fail(ConnectionError("EngineCore died"))
        elif ends == "is refused":
            engine.spoil = repeat_an_expert
            await engine.step()
        elif ends == "is cancelled":
            engine.deaf = True
            task.cancel()
        else:
            await recorder.abort()
            recorder.set_weight_version("v3")  # of what comes after it
        await asyncio.gather(task, return_exceptions=True)

    run(rollout())
    loaded = embedded.load(trajectory.id)
    assert [loaded.weight_version(at) for at in range(5, len(loaded))] == ["v1"] * 2 + ["v2"] * 3


def test_weights_that_change_before_a_segment_is_open_are_its_label(embedded, held):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)

    async def rollout():
        task = asyncio.create_task(recorder.generate(trajectory, PROMPT, held()))
        assert await asyncio.to_thread(held.opening.wait, 30)
        recorder.set_weight_version("v2")
        held.may_open.set()
        await soon(lambda: engine.requests, "the request was sent")
        await engine.run()
        await task

    run(rollout())
    (segment,) = embedded.load(trajectory.id).segments
    assert (segment.weight_version, segment.weight_versions) == ("v2", ())


def test_weights_that_change_while_a_segment_opens_get_one_with_their_label(embedded, monkeypatch):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)
    opened, may_go_on = threading.Event(), threading.Event()
    token_ids = TrajectoryWriter.token_ids

    def late(self):
        opened.set()
        assert may_go_on.wait(30)
        return token_ids.fget(self)

    monkeypatch.setattr(TrajectoryWriter, "token_ids", property(late))

    async def rollout():
        task = asyncio.create_task(recorder.generate(trajectory, PROMPT, Params()))
        assert await asyncio.to_thread(opened.wait, 30)
        recorder.set_weight_version("v2")
        may_go_on.set()
        await soon(lambda: engine.requests, "the request was sent")
        await engine.run()
        await task

    run(rollout())
    loaded = embedded.load(trajectory.id)
    assert [(s.base, s.context, s.output, s.weight_version, s.weight_versions) for s in loaded.segments] == [
        (0, 5, 0, "v1", ()),
        (5, 0, 4, "v2", ()),
    ]
    assert reasons(embedded, trajectory) == ["the weights changed before the request was sent"]
    assert engine.asked[0][0] == PROMPT
    assert loaded.loss_mask.tolist() == [False] * 5 + [True] * 4
    assert loaded.routing_mask.tolist() == [True] * 8 + [False]


def test_spans_that_the_engine_reports_are_taken_instead(embedded):
    engine = FakeAsyncLLM()
    recorder = AsyncLLMRecorder(engine, weight_version="v1")
    trajectory = embedded.create(routing=SPEC)

    def report(output):
        output.outputs[0].weight_versions = [("v1", 0, 1), ("v2", 1, 4)] if output.finished else None

    async def rollout():
        engine.spoil = report
        task = await begin(engine, recorder, trajectory, PROMPT)
        await engine.step(2)
        recorder.set_weight_version("v2")
        await engine.run()
        await task

    run(rollout())
    assert closing(embedded, trajectory).weight_versions == (
        WeightVersionSpan("v1", 0, 1),
        WeightVersionSpan("v2", 1, 4),
    )


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
