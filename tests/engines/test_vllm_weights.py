"""Weights that change under `AsyncLLMRecorder`: the version of each token."""

import asyncio
import threading

import pytest

import trajstore
from tests.builders import SPEC
from tests.engines.vllm_engine import FakeAsyncLLM, Params, soon
from tests.engines.vllm_fixtures import closing, reasons
from tests.engines.vllm_rollouts import PROMPT, begin, repeat_an_expert, run
from trajstore.events import WeightVersionSpan
from trajstore.writing import TrajectoryWriter
from trajstore_vllm import AsyncLLMRecorder


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
