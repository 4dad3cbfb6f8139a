"""Outputs that cannot be, and engines that end otherwise: what was sound before is kept."""

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC
from tests.engines.vllm_engine import FakeAsyncLLM, Params, soon
from tests.engines.vllm_fixtures import reasons
from tests.engines.vllm_rollouts import PROMPT, begin, complete, repeat_an_expert, run
from trajstore_vllm import AsyncLLMRecorder


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
