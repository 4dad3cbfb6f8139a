"""A real vLLM server: replies of its three routes, aborted and resumed ones, each row against a plain forward."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="no vLLM in this environment; `make engines-live` builds one")

import httpx

import trajstore
from tests.live.model import make_model, noisy_copy, routing_spec
from tests.live.reference import assert_logprobs, assert_rows, forward
from tests.live.server import eventually, serving
from tests.live.vllm_engine import engine_options
from trajstore_vllm import record_http
from trajstore_vllm_demo.cpu import ENVIRONMENT

GENERATE = "/inference/v1/generate"
ENDLESS = 900


class Server(NamedTuple):
    """A running server, with weights to choose from."""

    http: httpx.Client
    weights: tuple[Path, Path]
    spec: trajstore.RoutingSpec

    def load(self, weights: Path) -> None:
        """Other weights, and an empty cache."""
        self.http.post("/collective_rpc", json={"method": "load_folder", "args": [str(weights)]}).raise_for_status()
        self.http.post("/reset_prefix_cache").raise_for_status()

    def sampled(self) -> int:
        """Tokens that it has sampled since its start."""
        found = re.search(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)", self.http.get("/metrics").text, re.M)
        return 0 if found is None else int(float(found[1]))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this module."""
    folder = tmp_path_factory.mktemp("models")
    w0 = make_model(folder / "w0", dense=(1,))
    w1 = noisy_copy(folder / "w1", of=w0, seed=11)
    flags = engine_options(w0) | {"enable_scale_out": True, "served_model_name": "tiny"}
    del flags["skip_tokenizer_init"]  # the OpenAI routes want one
    environment = ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with serving("vllm.entrypoints.openai.api_server", flags, environment, folder / "server.log") as http:
        yield Server(http, (w0, w1), routing_spec(w0))


@pytest.fixture
def server(started: Server) -> Server:
    """The server with its first weights and nothing cached."""
    started.load(started.weights[0])
    return started


@pytest.fixture
def trajectory(store: trajstore.Store, server: Server) -> trajstore.TrajectoryWriter:
    """A new one."""
    return store.create(routing=server.spec)


def generate_body(token_ids: Any, max_tokens: int, *, start: int = 0, request_id: str | None = None) -> dict[str, Any]:
    params = {"temperature": 1.0, "ignore_eos": True, "max_tokens": max_tokens, "logprobs": 0}
    named = {} if request_id is None else {"request_id": request_id}
    return {
        "model": "tiny",
        "token_ids": token_ids.tolist(),
        "sampling_params": params | {"routed_experts_prompt_start": start},
    } | named


def cut_off(server: Server, segment: trajstore.SegmentWriter, token_ids: Any, *, after: int = 40) -> None:
    """Generate until the server has sampled at least `after` tokens, abort, and record the reply."""
    before = server.sampled()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.http.post, GENERATE, json=generate_body(token_ids, ENDLESS, request_id="cut-off"))
        eventually(lambda: server.sampled() >= before + after or reply.done())
        aborted = server.http.post("/abort_requests", json={"request_ids": ["generate-tokens-cut-off"]}).json()
        assert aborted["aborted"] == 1
        record_http(segment, reply.result(60).content)


def load(store: trajstore.Store, trajectory: trajstore.TrajectoryWriter, **options: Any) -> trajstore.Trajectory:
    store.flush()
    return store.load(trajectory.id, **options)


def test_a_generate_reply_is_recorded_as_a_plain_forward_routes(store, server, trajectory, prompt):
    with trajectory.segment(context=prompt, engine="vllm", weight_version="w0") as segment:
        assert record_http(segment, server.http.post(GENERATE, json=generate_body(prompt, 30)).content)
    t = load(store, trajectory)
    assert len(t) == 80
    assert t.finish_reason == "length"
    assert t.routing_mask.tolist() == [True] * 79 + [False]
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 80))


def test_an_aborted_reply_is_resumed_under_new_weights_from_the_row_that_is_missing(store, server, trajectory, prompt):
    w0, w1 = server.weights
    with trajectory.segment(context=prompt, engine="vllm", weight_version="w0") as segment:
        cut_off(server, segment, trajectory.token_ids)
    server.load(w1)
    trajectory = store.get(trajectory.id)
    start = trajectory.rows_held
    with trajectory.segment(
        engine="vllm", weight_version="w1", sampling={"routed_experts_prompt_start": start}
    ) as segment:
        reply = server.http.post(GENERATE, json=generate_body(trajectory.token_ids, 20, start=start))
        record_http(segment, reply.content)
    t = load(store, trajectory)
    cut = t.segments[0].end
    assert [segment.finish_reason for segment in t.segments] == ["abort", "length"]
    assert cut >= 90
    assert start == cut - 1
    assert [(one.start, one.stop) for one in t.segments[1].recordings] == [(cut - 1, cut + 19)]
    old, new = (forward(t.token_ids, (weights, None)) for weights in (w0, w1))
    assert_rows(t.routed_experts[: cut - 1], old)
    assert_rows(t.routed_experts[cut - 1 : -1], new, cut - 1)
    assert_logprobs(t, old, range(50, cut))
    assert_logprobs(t, new, range(cut, cut + 20))


@pytest.mark.parametrize("cache", ["reset", "kept"])
def test_a_whole_routing_again_under_new_weights_shows_what_the_cache_kept(cache, store, server, trajectory, prompt):
    w0, w1 = server.weights
    with trajectory.segment(context=prompt, engine="vllm", weight_version="w0") as segment:
        cut_off(server, segment, trajectory.token_ids)
    server.http.post("/collective_rpc", json={"method": "load_folder", "args": [str(w1)]}).raise_for_status()
    if cache == "reset":
        server.http.post("/reset_prefix_cache").raise_for_status()
    with trajectory.segment(engine="vllm", weight_version="w1") as segment:
        record_http(segment, server.http.post(GENERATE, json=generate_body(trajectory.token_ids, 20)).content)
    t = load(store, trajectory)
    parts = ((w1, None),) if cache == "reset" else ((w0, (t.segments[0].end - 1) // 32 * 32), (w1, None))
    expected = forward(t.token_ids, *parts)
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(t.segments[0].end, len(t)))


def test_two_turns_over_the_completions_route(store, server, trajectory, prompt):
    for context in (prompt, [7, 8, 9, 10, 11]):
        with trajectory.segment(context=context, engine="vllm", weight_version="w0") as segment:
            body = {"model": "tiny", "prompt": trajectory.token_ids.tolist(), "max_tokens": 15, "temperature": 1.0}
            body |= {"ignore_eos": True, "logprobs": 0, "return_token_ids": True}
            record_http(segment, server.http.post("/v1/completions", json=body).content)
    t = load(store, trajectory)
    assert t.loss_mask.tolist() == [False] * 50 + [True] * 15 + [False] * 5 + [True] * 15
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, [*range(50, 65), *range(70, 85)])


def test_a_chat_reply_whose_template_gave_the_segments_tokens(store, server, trajectory, prompt):
    with trajectory.segment(context=prompt, engine="vllm", weight_version="w0") as segment:
        messages = [{"role": "user", "content": " ".join(f"w{i}" for i in prompt)}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 1.0, "ignore_eos": True}
        body |= {"logprobs": True, "return_token_ids": True}
        record_http(segment, server.http.post("/v1/chat/completions", json=body).content)
    t = load(store, trajectory)
    assert len(t) == 60
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 60))


def test_a_streamed_generate_keeps_tokens_and_routing_where_it_ends_by_itself(store, server, trajectory, prompt):
    with trajectory.segment(context=prompt, engine="vllm", weight_version="w0") as segment:
        record_http(segment, server.http.post(GENERATE, json=generate_body(prompt, 12) | {"stream": True}).content)
    t = load(store, trajectory)
    assert len(t) == 62
    expected = forward(t.token_ids, (server.weights[0], None))
    assert_rows(t.routed_experts[:-1], expected)
    assert_logprobs(t, expected, range(50, 62))


def test_a_streamed_generate_that_is_aborted_keeps_its_tokens_and_says_that_routing_is_lost(
    store, server, trajectory, prompt
):
    body = generate_body(prompt, ENDLESS, request_id="streamed") | {"stream": True}
    lines = []
    with (
        trajectory.segment(context=prompt, engine="vllm", weight_version="w0") as segment,
        server.http.stream("POST", GENERATE, json=body) as reply,
    ):
        for line in reply.iter_lines():
            lines.append(line)
            if len(lines) == 40:
                server.http.post("/abort_requests", json={"request_ids": ["generate-tokens-streamed"]})
        record_http(segment, "\n".join(lines) + "\n")
    t = load(store, trajectory)
    (first,) = t.segments
    assert first.finish_reason == "abort"
    assert first.output >= 10
    assert first.recordings == ()
    assert len(first.absent) == 1
    assert_logprobs(t, forward(t.token_ids, (server.weights[0], None)), range(50, len(t)))


def test_a_reply_to_another_prompt_is_refused_and_nothing_of_it_is_stored(store, server, trajectory, prompt):
    body = {"model": "tiny", "prompt": prompt[:-1].tolist(), "max_tokens": 5, "logprobs": 0, "return_token_ids": True}
    reply = server.http.post("/v1/completions", json=body).content
    with trajectory.segment(context=prompt, engine="vllm") as segment, pytest.raises(trajstore.Conflict):
        record_http(segment, reply)
    t = load(store, trajectory)
    assert len(t) == 50
    assert not t.routing_mask.any()
    assert "refused" in t.segments[0].absent[0]


def test_an_error_reply_is_refused_with_what_the_server_said(store, server, trajectory, prompt):
    reply = server.http.post(GENERATE, json=generate_body(prompt, 5, start=99))
    assert reply.status_code == 400
    with (
        trajectory.segment(context=prompt, engine="vllm") as segment,
        pytest.raises(trajstore.TrajstoreError, match="routed_experts_prompt_start"),
    ):
        record_http(segment, reply.content)
