"""A real AsyncLLM through the recorder: aborts, resumes, new weights and turns, each row against a plain forward."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("vllm", reason="no vLLM in this environment; `make engines-live` builds one")

import trajstore
from tests.live.conftest import random_prompt
from tests.live.model import make_model, noisy_copy, routing_spec
from tests.live.reference import assert_logprobs, assert_rows, forward
from tests.live.vllm_engine import Watched, engine_options, load_weights, sampling
from trajstore_audit import drift_by_layer
from trajstore_vllm import AsyncLLMRecorder, record_output
from trajstore_vllm_demo.cpu import BLOCK, ENVIRONMENT

Run = Callable[[Any], Any]
ENDLESS = 900
"""Tokens of a request that is to be aborted; it takes about half a minute."""


class Engine(NamedTuple):
    """A running AsyncLLM, with weights to choose from."""

    llm: Watched
    weights: tuple[Path, Path, Path]
    spec: trajstore.RoutingSpec


@pytest.fixture(scope="module")
def started(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for this module: its start takes a while."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    folder = tmp_path_factory.mktemp("models")
    w0 = make_model(folder / "w0", dense=(1,))
    w1 = noisy_copy(folder / "w1", of=w0, seed=11)
    w2 = noisy_copy(folder / "w2", of=w1, seed=12)

    async def start() -> Any:
        return Watched(AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_options(w0))))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        llm = run(start())
    yield Engine(llm, (w0, w1, w2), routing_spec(w0))
    llm.shutdown()


@pytest.fixture
def engine(started: Engine, run: Run) -> Engine:
    """The engine with its first weights and nothing cached."""
    run(load_weights(started.llm, started.weights[0], reset=True))
    return started


@pytest.fixture
def recorder(engine: Engine) -> AsyncLLMRecorder:
    """Over the engine; its first weights are "w0"."""
    return AsyncLLMRecorder(engine.llm, weight_version="w0")


@pytest.fixture
def trajectory(store: trajstore.Store, engine: Engine) -> trajstore.TrajectoryWriter:
    """A new one."""
    return store.create(routing=engine.spec)


async def cut_off(
    engine: Engine,
    recorder: AsyncLLMRecorder,
    trajectory: trajstore.TrajectoryWriter,
    context: Any = (),
    *,
    after: int = 40,
    **options: Any,
) -> None:
    """Generate until at least `after` tokens are there, and abort."""
    id = f"{trajectory.id} from {len(trajectory)}"
    generating = asyncio.create_task(
        recorder.generate(trajectory, context, sampling(ENDLESS), request_id=id, **options)
    )
    await delivered(engine, id, after, generating)
    await recorder.abort(id)
    output = await generating
    assert output.outputs[0].finish_reason == "abort"


async def delivered(engine: Engine, request_id: str, tokens: int, *tasks: "asyncio.Task[Any]") -> None:
    """Wait until a request has delivered so many; a task that ends before that has failed."""
    enough = asyncio.create_task(engine.llm.wait(lambda counts: counts[request_id] >= tokens))
    done, _ = await asyncio.wait({enough, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    if enough not in done:
        enough.cancel()
        raise AssertionError(f"the request ended early: {[task.result() for task in done]}")


def load(store: trajstore.Store, trajectory: trajstore.TrajectoryWriter, **options: Any) -> trajstore.Trajectory:
    store.flush()
    return store.load(trajectory.id, **options)


def test_a_whole_request_is_recorded_as_a_plain_forward_routes(store, run, engine, recorder, trajectory, prompt):
    output = run(recorder.generate(trajectory, prompt, sampling(60)))
    t = load(store, trajectory)
    assert t.token_ids.tolist() == [*prompt.tolist(), *output.outputs[0].token_ids]
    assert t.loss_mask.tolist() == [False] * 50 + [True] * 60
    assert t.routing_mask.tolist() == [True] * 109 + [False]  # the last token has never been an input
    assert t.routed_experts.shape == (110, 3, 2)  # of the four layers one is dense
    expected = forward(t.token_ids, (engine.weights[0], None))
    assert_rows(t.routed_experts[:109], expected)
    assert_logprobs(t, expected, range(50, 110))
    (segment,) = t.segments
    assert (segment.engine, segment.weight_version, segment.finish_reason) == ("vllm/0.30.0", "w0", "length")
    assert [(one.start, one.stop, one.origin) for one in segment.recordings] == [(0, 109, "computed")]


def test_an_abort_keeps_tokens_logprobs_and_rows_and_a_resume_asks_for_what_is_missing(
    store, run, engine, recorder, trajectory, prompt
):
    async def scenario() -> None:
        await cut_off(engine, recorder, trajectory, prompt)
        await store.aflush()
        await recorder.generate(store.get(trajectory.id), (), sampling(30))

    run(scenario())
    t = load(store, trajectory)
    first, second = t.segments
    cut = first.end
    assert first.finish_reason == "abort"
    assert cut >= 90
    assert len(t) == cut + 30
    assert t.routing_mask.tolist() == [True] * (len(t) - 1) + [False]
    assert [(one.start, one.stop) for one in first.recordings] == [(0, cut - 1)]
    assert [(one.start, one.stop) for one in second.recordings] == [(cut - 1, len(t) - 1)]
    assert t.routing_source.tolist() == [0] * (cut - 1) + [1] * 30 + [-1]
    expected = forward(t.token_ids, (engine.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, len(t)))


def test_a_prefix_recorded_again_under_the_same_weights_has_no_drift(store, run, engine, recorder, trajectory, prompt):
    async def scenario() -> None:
        await cut_off(engine, recorder, trajectory, prompt)
        await recorder.generate(trajectory, (), sampling(10), rerecord="prefix")

    run(scenario())
    t = load(store, trajectory)
    cut = t.segments[0].end
    cached = t.segments[1].cached_tokens
    assert cached > 0
    assert cached % BLOCK == 0
    assert [(one.start, one.stop, one.origin) for one in t.segments[1].recordings] == [
        (0, cached, "cached"),
        (cached, len(t) - 1, "computed"),
    ]
    assert [(pair.start, pair.stop) for pair in store.overlaps(trajectory.id)] == [(0, cached), (cached, cut - 1)]
    drift = drift_by_layer(store, [trajectory.id])
    assert drift.rows == (cut - 1,) * 3
    assert drift.differing == (0,) * 3
    assert_rows(t.routed_experts[:-1], forward(t.token_ids, (engine.weights[0], None)))


def test_new_weights_after_a_cache_reset_give_two_routings_that_each_fold_tells_apart(
    store, run, engine, recorder, trajectory, prompt
):
    _, w1, w2 = engine.weights

    async def scenario() -> None:
        await cut_off(engine, recorder, trajectory, prompt)
        await load_weights(engine.llm, w1, reset=True)
        recorder.set_weight_version("w1")
        await cut_off(engine, recorder, trajectory, rerecord="prefix")
        await load_weights(engine.llm, w2, reset=True)
        recorder.set_weight_version("w2")
        await recorder.generate(trajectory, (), sampling(20), rerecord="prefix")

    run(scenario())
    newest, sampled = load(store, trajectory), load(store, trajectory, policy="as_sampled")
    a, b = (segment.end for segment in newest.segments[:2])
    end = len(newest)
    under = [forward(newest.token_ids, (weights, None)) for weights in engine.weights]
    assert_rows(newest.routed_experts[: end - 1], under[2])
    for rows, at in ((slice(0, a - 1), 0), (slice(a - 1, b - 1), 1), (slice(b - 1, end - 1), 2)):
        assert_rows(sampled.routed_experts[rows], under[at], rows.start)
    assert sampled.routing_source.tolist() == [0] * (a - 1) + [1] * (b - a) + [2] * (end - b) + [-1]
    assert [newest.weight_version(i) for i in (49, 50, a - 1, a, b - 1, b, end - 1)] == [
        *("", "w0", "w0", "w1", "w1", "w2", "w2"),
    ]
    for tokens, at in ((range(50, a), 0), (range(a, b), 1), (range(b, end), 2)):
        assert_logprobs(newest, under[at], tokens)
    assert min(drift_by_layer(store, [trajectory.id]).differing) > 0


def test_without_a_cache_reset_the_cached_rows_are_those_of_the_old_weights(
    store, run, engine, recorder, trajectory, prompt
):
    w0, w1, _ = engine.weights

    async def scenario() -> None:
        await cut_off(engine, recorder, trajectory, prompt)
        await load_weights(engine.llm, w1, reset=False)
        recorder.set_weight_version("w1")
        await recorder.generate(trajectory, (), sampling(20), rerecord="prefix")

    run(scenario())
    t, sampled = load(store, trajectory), load(store, trajectory, policy="as_sampled")
    cut, cached = t.segments[0].end, t.segments[1].cached_tokens
    assert cached > 0
    assert [one.origin for one in t.segments[1].recordings] == ["cached", "computed"]
    assert (t.routed_experts[:cached] == sampled.routed_experts[:cached]).all()
    mixed = forward(t.token_ids, (w0, cached), (w1, None))  # new weights over the old ones' keys and values
    assert_rows(t.routed_experts[:-1], mixed)
    assert_logprobs(t, mixed, range(cut, len(t)))
    with pytest.raises(AssertionError):
        assert_rows(t.routed_experts[:-1], forward(t.token_ids, (w1, None)))


def test_weights_that_change_under_a_paused_request_are_told_token_by_token(
    store, run, engine, recorder, trajectory, prompt
):
    w0, w1, _ = engine.weights

    async def scenario() -> int:
        generating = asyncio.create_task(recorder.generate(trajectory, prompt, sampling(120), request_id="paused"))
        await delivered(engine, "paused", 30, generating)
        await engine.llm.pause_generation(mode="keep", clear_cache=False)
        switch = engine.llm.delivered("paused")
        await load_weights(engine.llm, w1, reset=False)
        recorder.set_weight_version("w1")
        await engine.llm.resume_generation()
        await generating
        return switch

    switch = run(scenario())
    t = load(store, trajectory)
    assert len(t) == 170
    assert 30 <= switch < 120
    assert t.weight_versions == ("w0", "w1")
    assert [t.weight_version(i) for i in range(50, 170)] == ["w0"] * switch + ["w1"] * (120 - switch)
    expected = forward(t.token_ids, (w0, 50 + switch - 1), (w1, None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 170))


def test_a_tool_turn_supplies_the_row_at_the_boundary(store, run, engine, recorder, trajectory, prompt):
    tool = random_prompt("tool", 7)

    async def scenario() -> None:
        await recorder.generate(trajectory, prompt, sampling(20))
        await recorder.generate(trajectory, tool, sampling(20))

    run(scenario())
    t = load(store, trajectory)
    assert t.loss_mask.tolist() == [False] * 50 + [True] * 20 + [False] * 7 + [True] * 20
    assert t.token_ids[70:77].tolist() == tool.tolist()
    assert [(one.start, one.stop) for one in t.segments[1].recordings] == [(69, 96)]
    assert t.routing_source.tolist() == [0] * 69 + [1] * 27 + [-1]
    expected = forward(t.token_ids, (engine.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, [*range(50, 70), *range(77, 97)])


def test_a_stop_token_is_the_last_token_and_has_its_row_after_the_next_turn(
    store, run, engine, recorder, trajectory, prompt
):
    stops = list(range(4, 256, 8))  # one in eight tokens: it comes soon

    async def scenario() -> None:
        await recorder.generate(trajectory, prompt, sampling(400, stop_token_ids=stops))
        await recorder.generate(trajectory, [9, 10], sampling(5))

    run(scenario())
    t = load(store, trajectory)
    first = t.segments[0]
    assert first.finish_reason == "stop"
    assert int(t.token_ids[first.end - 1]) in stops
    assert t.routing_source[first.end - 1] == 1
    assert_rows(t.routed_experts[:-1], forward(t.token_ids, (engine.weights[0], None)))


def test_32_requests_in_flight_survive_an_abort_of_all_and_new_weights(store, run, engine, recorder):
    w0, w1, _ = engine.weights
    trajectories = [store.create(routing=engine.spec, group=f"g{i // 4}", group_size=4) for i in range(32)]
    prompts = [random_prompt(f"concurrent {i}", 20 + i) for i in range(32)]

    def started(counts: "Counter[str]") -> bool:
        return sum(counts[one.id] >= 10 for one in trajectories) >= 8  # as many as run at once; 24 wait

    async def scenario() -> None:
        generating = [
            asyncio.create_task(recorder.generate(one, prompt, sampling(ENDLESS)))
            for one, prompt in zip(trajectories, prompts, strict=True)
        ]
        await engine.llm.wait(started)
        assert len(recorder.in_flight) == 32
        await recorder.abort()
        await asyncio.gather(*generating)
        assert recorder.in_flight == ()
        await load_weights(engine.llm, w1, reset=True)
        recorder.set_weight_version("w1")
        await asyncio.gather(*(recorder.generate(one, (), sampling(30)) for one in trajectories))

    run(scenario())
    store.flush()
    waiting = 0
    for one, prompt in zip(trajectories, prompts, strict=True):
        t = store.load(one.id)
        first, second = t.segments
        assert [segment.finish_reason for segment in t.segments] == ["abort", "length"]
        assert t.token_ids[: len(prompt)].tolist() == prompt.tolist()
        assert second.output == 30
        assert t.routing_mask.tolist() == [True] * (len(t) - 1) + [False]
        rows = 0 if first.output == 0 else first.end - 1
        if first.output == 0:
            waiting += 1
            assert "aborted" in first.absent[0] or "ended" in first.absent[0]
        else:
            under = forward(t.token_ids, (w0, None))
            assert_rows(t.routed_experts[:rows], under)
            assert_logprobs(t, under, range(len(prompt), first.end))
        under = forward(t.token_ids, (w1, None))
        assert_rows(t.routed_experts[rows : len(t) - 1], under, rows)
        assert_logprobs(t, under, range(first.end, len(t)))
    assert waiting > 0


def test_a_cancelled_rollout_keeps_what_came(store, run, engine, recorder, trajectory, prompt):
    async def scenario() -> None:
        generating = asyncio.create_task(recorder.generate(trajectory, prompt, sampling(ENDLESS), request_id="dropped"))
        await delivered(engine, "dropped", 25, generating)
        generating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await generating
        assert recorder.in_flight == ()
        await recorder.generate(trajectory, (), sampling(5))

    run(scenario())
    t = load(store, trajectory)
    assert t.segments[0].finish_reason == "abort"
    assert t.segments[0].output >= 25
    assert_rows(t.routed_experts[:-1], forward(t.token_ids, (engine.weights[0], None)))


def test_a_request_that_is_aborted_before_its_first_token_says_why_it_has_no_routing(
    store, run, engine, recorder, trajectory, prompt
):
    async def scenario() -> None:
        await engine.llm.pause_generation(mode="keep", clear_cache=False)
        generating = asyncio.create_task(recorder.generate(trajectory, prompt, sampling(10), request_id="early"))
        while "early" not in engine.llm.output_processor.external_req_ids:
            await asyncio.sleep(0)
        await recorder.abort("early")
        await generating
        await engine.llm.resume_generation()
        await recorder.generate(trajectory, (), sampling(10))

    run(scenario())
    t = load(store, trajectory)
    first, second = t.segments
    assert (first.output, first.finish_reason, first.recordings) == (0, "abort", ())
    assert len(first.absent) == 1
    assert [(one.start, one.stop) for one in second.recordings] == [(0, 59)]
    assert_rows(t.routed_experts[:-1], forward(t.token_ids, (engine.weights[0], None)))


@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])
def test_two_choices_of_one_request_are_two_trajectories_in_every_kind_of_output(kind, store, run, engine, prompt):
    from vllm.sampling_params import RequestOutputKind

    trajectories = [store.create(routing=engine.spec) for _ in range(2)]
    segments = [one.segment(context=prompt, engine="vllm", weight_version="w0") for one in trajectories]

    async def scenario() -> None:
        params = sampling(25, n=2, logprobs=0, output_kind=RequestOutputKind[kind])
        async for output in engine.llm.generate({"prompt_token_ids": prompt.tolist()}, params, f"two-{kind}"):
            for choice in output.outputs:
                record_output(segments[choice.index], output, index=choice.index)

    run(scenario())
    assert [segment.closed for segment in segments] == [True, True]
    store.flush()
    loaded = [store.load(one.id) for one in trajectories]
    assert loaded[0].token_ids.tolist() != loaded[1].token_ids.tolist()
    for t in loaded:
        assert len(t) == 75
        expected = forward(t.token_ids, (engine.weights[0], None))
        assert_rows(t.routed_experts[:-1], expected)
        assert_logprobs(t, expected, range(50, 75))


def test_a_cached_prefix_of_another_trajectory_has_its_rows(store, run, engine, recorder, trajectory, prompt):
    other = store.create(routing=engine.spec)

    async def scenario() -> None:
        await recorder.generate(other, prompt, sampling(5))
        await recorder.generate(trajectory, prompt, sampling(5))

    run(scenario())
    t = load(store, trajectory)
    assert t.segments[0].cached_tokens == BLOCK
    assert [one.origin for one in t.segments[0].recordings] == ["cached", "computed"]
    assert (t.routed_experts[:49] == load(store, other).routed_experts[:49]).all()
    np.testing.assert_array_equal(t.token_ids[:50], prompt)
