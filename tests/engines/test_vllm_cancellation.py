"""Cancelled and aborted calls of `AsyncLLMRecorder`: what came is kept, nothing is left behind."""

import asyncio

import pytest

from tests.builders import SPEC
from tests.engines.vllm_engine import FakeAsyncLLM, Params, soon
from tests.engines.vllm_fixtures import reasons
from tests.engines.vllm_rollouts import PROMPT, begin, complete, run
from tests.waiting import one_round, still_waits
from trajstore_vllm import AsyncLLMRecorder


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
