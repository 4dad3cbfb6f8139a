"""A real SGLang server through the recorder: aborts, retractions, new weights; each row against a plain forward."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("sglang", reason="no SGLang in this environment; `make engines-live` builds one")

import httpx

import trajstore
from tests.live.conftest import random_prompt
from tests.live.model import make_model, noisy_copy, routing_spec
from tests.live.reference import assert_logprobs, assert_rows, forward
from tests.live.server import eventually, serving
from trajstore_audit import drift_by_layer
from trajstore_sglang import SGLangRecorder, record_batch, record_response

Run = Callable[[Any], Any]
ENDLESS = 800
STAND_INS = Path(__file__).with_name("sglang_cpu")
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "all",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(STAND_INS),
}


class Server(NamedTuple):
    """A running server, with weights to choose from."""

    http: httpx.Client
    weights: tuple[Path, Path, Path]
    spec: trajstore.RoutingSpec

    def load(self, version: int) -> None:
        """Other weights under the label "w<version>", and an empty cache."""
        self.settle()
        body = {"model_path": str(self.weights[version]), "weight_version": f"w{version}"}
        assert self.http.post("/update_weights_from_disk", json=body).json()["success"]

    def settle(self) -> None:
        """Wait until nothing runs: an aborted request is back a moment earlier, in which a flush is refused."""
        eventually(lambda: self.http.post("/flush_cache").is_success)

    @asynccontextmanager
    async def recorder(self, **options: Any) -> AsyncIterator[SGLangRecorder]:
        """Over this server."""
        async with SGLangRecorder(str(self.http.base_url), **options) as recorder:
            yield recorder

    def decoded(self) -> int:
        """Tokens that it has sampled after the first ones of its requests, since its start."""
        found = re.search(
            r'^sglang:realtime_tokens_total\{[^}]*mode="decode"[^}]*\} (\S+)', self.http.get("/metrics").text, re.M
        )
        return 0 if found is None else int(float(found[1]))

    async def decodes(self, tokens: int, *tasks: "asyncio.Task[Any]") -> None:
        """Wait until it has sampled so many more; a task that ends before that has failed."""
        goal = self.decoded() + tokens
        while await asyncio.to_thread(self.decoded) < goal:
            done = [task for task in tasks if task.done()]
            assert not done, f"a request ended early: {[task.result() for task in done]}"
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this module: its start takes half a minute."""
    folder = tmp_path_factory.mktemp("models")
    w0 = make_model(folder / "w0")
    w1 = noisy_copy(folder / "w1", of=w0, seed=11)
    w2 = noisy_copy(folder / "w2", of=w1, seed=12)
    flags = {
        "model_path": w0,
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "enable_return_routed_experts": True,
        "max_total_tokens": 4096,
        "max_running_requests": 8,
        "chunked_prefill_size": 512,
        "mem_fraction_static": 0.3,
        "skip_server_warmup": True,
        "enable_metrics": True,
        "decode_log_interval": 1,  # the metrics move with it
    }
    with serving("sglang.launch_server", flags, ENVIRONMENT, folder / "server.log") as http:
        yield Server(http, (w0, w1, w2), routing_spec(w0))


@pytest.fixture
def server(started: Server) -> Server:
    """The server with its first weights and nothing cached."""
    started.load(0)
    return started


@pytest.fixture
def trajectory(store: trajstore.Store, server: Server) -> trajstore.TrajectoryWriter:
    """A new one."""
    return store.create(routing=server.spec)


def sampling(max_new_tokens: int, **options: Any) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "temperature": 1.0, "ignore_eos": True} | options


async def cut_off(
    server: Server,
    recorder: SGLangRecorder,
    trajectory: trajstore.TrajectoryWriter,
    context: Any = (),
    *,
    after: int = 40,
    **options: Any,
) -> None:
    """Generate until about `after` tokens are there, and abort."""
    generating = asyncio.create_task(recorder.generate(trajectory, context, sampling(ENDLESS), **options))
    await server.decodes(after, generating)
    await recorder.abort()
    assert (await generating).finish_reason == "abort"


def load(store: trajstore.Store, trajectory: trajstore.TrajectoryWriter, **options: Any) -> trajstore.Trajectory:
    store.flush()
    return store.load(trajectory.id, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_request_is_recorded_as_a_plain_forward_routes(stream, store, run, server, trajectory, prompt):
    async def scenario() -> None:
        async with server.recorder(stream=stream) as recorder:
            reply = await recorder.generate(trajectory, prompt, sampling(40))
            assert stream or reply.prompt_token_ids.tolist() == list(prompt), "the server echoes what it was given"

    run(scenario())
    t = load(store, trajectory)
    assert len(t) == 90
    assert t.loss_mask.tolist() == [False] * 50 + [True] * 40
    assert t.routing_mask.tolist() == [True] * 89 + [False]
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 90))
    (segment,) = t.segments
    assert (segment.engine, segment.weight_version, segment.finish_reason) == ("sglang/0.5.23", "w0", "length")
    assert [(one.start, one.stop, one.origin) for one in segment.recordings] == [(0, 89, "computed")]


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_keeps_tokens_logprobs_and_rows_and_a_resume_asks_for_what_is_missing(
    stream, store, run, server, trajectory, prompt
):
    async def scenario() -> None:
        async with server.recorder(stream=stream) as recorder:
            await cut_off(server, recorder, trajectory, prompt)
            await store.aflush()
            await recorder.generate(store.get(trajectory.id), (), sampling(20))

    run(scenario())
    t = load(store, trajectory)
    first, second = t.segments
    cut = first.end
    assert first.finish_reason == "abort"
    assert first.output >= 30
    assert len(t) == cut + 20
    assert t.routing_mask.tolist() == [True] * (len(t) - 1) + [False]
    assert [(one.start, one.stop) for one in first.recordings] == [(0, cut - 1)]
    assert t.routing_source.tolist() == [0] * (cut - 1) + [1] * 20 + [-1]
    assert second.recordings[0].start == cut - 1
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, len(t)))


def test_a_prefix_recorded_again_under_the_same_weights_has_no_drift(store, run, server, trajectory, prompt):
    async def scenario() -> None:
        async with server.recorder(rerecord="prefix") as recorder:
            await cut_off(server, recorder, trajectory, prompt)
            await recorder.generate(trajectory, (), sampling(10))

    run(scenario())
    t = load(store, trajectory)
    cut, cached = t.segments[0].end, t.segments[1].cached_tokens
    assert cached > 0
    assert [(one.start, one.stop, one.origin) for one in t.segments[1].recordings] == [
        (0, cached, "cached"),
        (cached, len(t) - 1, "computed"),
    ]
    drift = drift_by_layer(store, [trajectory.id])
    assert drift.rows == (cut - 1,) * 4
    assert drift.differing == (0,) * 4
    assert_rows(t.routed_experts[:-1], forward(t.token_ids, (server.weights[0], None)))


def test_new_weights_after_a_flush_give_two_routings_that_each_fold_tells_apart(store, run, server, trajectory, prompt):
    async def scenario() -> None:
        async with server.recorder(rerecord="prefix") as recorder:
            await cut_off(server, recorder, trajectory, prompt)
            await asyncio.to_thread(server.settle)
            await recorder.update_weights_from_disk(str(server.weights[1]), weight_version="w1")
            await cut_off(server, recorder, trajectory)
            await asyncio.to_thread(server.settle)
            await recorder.update_weights_from_disk(str(server.weights[2]), weight_version="w2")
            await recorder.generate(trajectory, (), sampling(20))

    run(scenario())
    newest, sampled = load(store, trajectory), load(store, trajectory, policy="as_sampled")
    a, b = (segment.end for segment in newest.segments[:2])
    end = len(newest)
    under = [forward(newest.token_ids, (weights, None)) for weights in server.weights]
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


def test_without_a_flush_the_cached_rows_are_those_of_the_old_weights(store, run, server, trajectory, prompt):
    w0, w1, _ = server.weights

    async def scenario() -> None:
        async with server.recorder(rerecord="prefix") as recorder:
            await recorder.generate(trajectory, prompt, sampling(40))
            await recorder.update_weights_from_disk(str(w1), weight_version="w1", flush_cache=False)
            await recorder.generate(trajectory, (), sampling(20))

    run(scenario())
    t, sampled = load(store, trajectory), load(store, trajectory, policy="as_sampled")
    assert t.segments[1].cached_tokens == 89
    assert [one.origin for one in t.segments[1].recordings] == ["cached", "computed"]
    assert (t.routed_experts[:89] == sampled.routed_experts[:89]).all()
    mixed = forward(t.token_ids, (w0, 89), (w1, None))  # new weights over the old ones' keys and values
    assert_rows(t.routed_experts[:-1], mixed)
    assert_logprobs(t, mixed, range(90, 110))


def test_an_aborted_request_leaves_one_old_row_more_in_a_cache_that_is_not_flushed(
    store, run, server, trajectory, prompt
):
    w0, w1, _ = server.weights

    async def scenario() -> None:
        async with server.recorder() as recorder:
            await cut_off(server, recorder, trajectory, prompt)
            await recorder.update_weights_from_disk(str(w1), weight_version="w1", flush_cache=False)
            await recorder.generate(trajectory, (), sampling(20))

    run(scenario())
    t = load(store, trajectory)
    cut = t.segments[0].end
    assert t.routing_source.tolist() == [0] * (cut - 1) + [1] * 20 + [-1]
    # An abort comes after one more decode step, whose keys, values and row the cache keeps. The new request computes
    # row cut - 1 again, samples by that, and then gives it up for the one in the cache.
    assert_rows(t.routed_experts[:cut], forward(t.token_ids, (w0, None)))
    assert_logprobs(t, forward(t.token_ids, (w0, cut - 1), (w1, None)), [cut])


def test_a_retraction_across_new_weights_is_told_by_its_origin(store, run, server, trajectory, prompt):
    w0, w1, _ = server.weights

    async def scenario() -> None:
        async with server.recorder() as recorder:
            generating = asyncio.create_task(recorder.generate(trajectory, prompt, sampling(120)))
            await server.decodes(40, generating)
            await recorder.client.pause_generation("retract")
            await recorder.update_weights_from_disk(str(w1), weight_version="w1")
            await recorder.client.continue_generation()
            assert (await generating).retractions > 0

    run(scenario())
    t = load(store, trajectory)
    (segment,) = t.segments
    assert len(t) == 170
    assert segment.retractions > 0
    assert {one.origin for one in segment.recordings} == {"recomputed"}
    assert t.weight_versions == ("w0", "w1")
    versions = [t.weight_version(i) for i in range(50, 170)]
    switch = versions.index("w1")
    assert versions == ["w0"] * switch + ["w1"] * (120 - switch)
    old, new = (forward(t.token_ids, (weights, None)) for weights in (w0, w1))
    assert_rows(t.routed_experts[:-1], new)  # of the tokens that the old weights sampled, too
    assert_logprobs(t, old, range(50, 50 + switch))
    assert_logprobs(t, new, range(50 + switch, 170))


def test_a_pause_in_place_across_new_weights_is_told_token_by_token(store, run, server, trajectory, prompt):
    w0, w1, _ = server.weights

    async def scenario() -> None:
        async with server.recorder() as recorder:
            generating = asyncio.create_task(recorder.generate(trajectory, prompt, sampling(120)))
            await server.decodes(40, generating)
            await recorder.client.pause_generation("in_place")
            await recorder.update_weights_from_disk(str(w1), weight_version="w1", flush_cache=False)
            await recorder.client.continue_generation()
            await generating

    run(scenario())
    t = load(store, trajectory)
    assert t.weight_versions == ("w0", "w1")
    switch = [t.weight_version(i) for i in range(50, 170)].index("w1")
    # The step in flight at the pause ran under the old weights, and its token is the first that SGLang says is new.
    expected = forward(t.token_ids, (w0, 50 + switch), (w1, None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 170))


def test_a_tool_turn_supplies_the_row_at_the_boundary(store, run, server, trajectory, prompt):
    tool = random_prompt("tool", 7)
    stops = list(range(4, 256, 4))  # one in four tokens: it comes soon

    async def scenario() -> None:
        async with server.recorder() as recorder:
            await recorder.generate(trajectory, prompt, sampling(200, stop_token_ids=stops, ignore_eos=False))
            await recorder.generate(trajectory, tool, sampling(15))

    run(scenario())
    t = load(store, trajectory)
    first = t.segments[0]
    end = first.end
    assert first.finish_reason == "stop"
    assert int(t.token_ids[end - 1]) in [2, *stops]
    assert t.token_ids[end : end + 7].tolist() == tool.tolist()
    assert t.loss_mask.tolist() == [False] * 50 + [True] * first.output + [False] * 7 + [True] * 15
    assert t.routing_source.tolist() == [0] * (end - 1) + [1] * 22 + [-1]
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, [*range(50, end), *range(end + 7, end + 22)])


def test_32_requests_in_flight_survive_an_abort_of_all_and_new_weights(store, run, server):
    w0, w1, _ = server.weights
    trajectories = [store.create(routing=server.spec, group=f"g{i // 4}", group_size=4) for i in range(32)]
    prompts = [random_prompt(f"concurrent {i}", 20 + i) for i in range(32)]

    async def scenario() -> None:
        async with server.recorder() as recorder:
            generating = [
                asyncio.create_task(recorder.generate(one, prompt, sampling(200)))
                for one, prompt in zip(trajectories, prompts, strict=True)
            ]
            await server.decodes(160, *generating)  # eight run at once, the others wait
            assert len(recorder.in_flight) == 32
            await recorder.abort()
            await asyncio.gather(*generating)
            assert recorder.in_flight == ()
            await asyncio.to_thread(server.settle)
            await recorder.update_weights_from_disk(str(w1), weight_version="w1")
            await asyncio.gather(*(recorder.generate(one, (), sampling(12)) for one in trajectories))

    run(scenario())
    store.flush()
    waiting = 0
    for one, prompt in zip(trajectories, prompts, strict=True):
        t = store.load(one.id)
        first, second = t.segments
        assert [segment.finish_reason for segment in t.segments] == ["abort", "length"]
        assert t.token_ids[: len(prompt)].tolist() == prompt.tolist()
        assert second.output == 12
        assert t.routing_mask.tolist() == [True] * (len(t) - 1) + [False]
        rows = 0 if first.output == 0 else first.end - 1
        if first.output == 0:
            waiting += 1
            assert len(first.absent) == 1
        else:
            under = forward(t.token_ids, (w0, None))
            assert_rows(t.routed_experts[:rows], under)
            assert_logprobs(t, under, range(len(prompt), first.end))
        under = forward(t.token_ids, (w1, None))
        assert_rows(t.routed_experts[rows : len(t) - 1], under, rows)
        assert_logprobs(t, under, range(first.end, len(t)))
    assert waiting > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_rollout_keeps_what_came(stream, store, run, server, trajectory, prompt):
    async def scenario() -> None:
        async with server.recorder(stream=stream) as recorder:
            generating = asyncio.create_task(recorder.generate(trajectory, prompt, sampling(ENDLESS)))
            await server.decodes(25, generating)
            generating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await generating
            assert recorder.in_flight == ()
            await recorder.generate(trajectory, (), sampling(5))

    run(scenario())
    t = load(store, trajectory)
    assert t.segments[0].finish_reason == "abort"
    assert t.segments[0].output >= 15
    assert_rows(t.routed_experts[:-1], forward(t.token_ids, (server.weights[0], None)))


def test_a_batch_is_a_segment_of_each_trajectory(store, server):
    trajectories = [store.create(routing=server.spec) for _ in range(3)]
    prompts = [random_prompt(f"batch {i}", 10 + 7 * i) for i in range(3)]
    segments = [one.segment(context=p, weight_version="w0") for one, p in zip(trajectories, prompts, strict=True)]
    body = {"input_ids": [p.tolist() for p in prompts], "sampling_params": sampling(10)}
    reply = server.http.post("/generate", json=body | {"return_logprob": True, "return_routed_experts": True})
    record_batch(segments, reply.content)
    store.flush()
    for one, prompt in zip(trajectories, prompts, strict=True):
        t = store.load(one.id)
        assert len(t) == len(prompt) + 10
        expected = forward(t.token_ids, (server.weights[0], None))
        assert_rows(t.routed_experts[:-1], expected)
        assert_logprobs(t, expected, range(len(prompt), len(t)))


def test_the_openai_routes_bring_the_same_rows(store, server, prompt):
    shared = {"model": "tiny", "temperature": 1.0, "max_tokens": 10, "ignore_eos": True}
    shared |= {"return_routed_experts": True, "return_token_ids": True}
    words = " ".join(f"w{token}" for token in prompt)
    replies = [
        server.http.post("/v1/completions", json=shared | {"prompt": prompt.tolist(), "logprobs": 1}),
        server.http.post(
            "/v1/chat/completions", json=shared | {"messages": [{"role": "user", "content": words}], "logprobs": True}
        ),
    ]
    for reply in replies:
        trajectory = store.create(routing=server.spec)
        with trajectory.segment(context=prompt, weight_version="w0") as segment:
            record_response(segment, reply.content)
        t = load(store, trajectory)
        assert len(t) == 60
        expected = forward(t.token_ids, (server.weights[0], None))
        assert_rows(t.routed_experts[:-1], expected)
        assert_logprobs(t, expected, range(50, 60))


def test_a_reply_without_routing_says_why(store, server, trajectory, prompt):
    body = {"input_ids": prompt.tolist(), "sampling_params": sampling(5), "return_logprob": True}
    with trajectory.segment(context=prompt) as segment:
        record_response(segment, server.http.post("/generate", json=body).content)
    t = load(store, trajectory)
    assert len(t) == 55
    assert not t.routing_mask.any()
    assert len(t.segments[0].absent) == 1


def test_an_error_of_the_server_is_refused_with_what_it_said(store, server, trajectory, prompt):
    body = {"input_ids": prompt.tolist(), "sampling_params": sampling(5), "return_routed_experts": True}
    reply = server.http.post("/generate", json=body | {"routed_experts_start_len": 99})
    with trajectory.segment(context=prompt) as segment, pytest.raises(trajstore.SchemaError, match="99"):
        record_response(segment, reply.content)
    t = load(store, trajectory)
    assert len(t) == 50
    assert "refused" in t.segments[0].absent[0]
