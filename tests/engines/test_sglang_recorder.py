"""The client that generates and records, over real sockets, against recorded answers: aborts, drops, slow servers."""

import asyncio
import json
import logging
import math
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from aiohttp import web

import trajstore
from tests.engines.sglang_cases import SPEC, answer, request_of, rows_of
from tests.engines.sglang_server import ReplayServer, broken_off, never, replay, streamed, until_aborted
from tests.waiting import eventually, one_round
from trajstore_sglang import SGLangClient, SGLangRecorder, capabilities

GIVEN_UP = "given up without answer"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with trajstore.open(tmp_path_factory.mktemp("recorder") / "store", partitions=2) as store:
        yield store


def play(scenario, plan=None, **options):
    """Run `scenario(server, recorder)` on a loop of its own."""

    async def run():
        async with asyncio.timeout(60), ReplayServer(plan) as server:
            server.info |= options.pop("info", {})
            async with SGLangRecorder(server.url, **options) as recorder:
                return await scenario(server, recorder)

    return asyncio.run(run())


def prompt_of(case):
    return request_of(case)["input_ids"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_becomes_a_closed_segment(store, stream):
    trajectory = store.create(routing=SPEC)
    params = request_of("12a")["sampling_params"]
    case = "12a" if stream else "01"

    async def scenario(server, recorder):
        return await recorder.generate(trajectory, prompt_of(case), params, "a", stream=stream), server.asked

    reply, asked = play(scenario, {"a": (streamed if stream else replay)(case)})
    assert asked == [
        {
            "rid": "a$",
            "input_ids": prompt_of(case),
            "sampling_params": params,
            "return_logprob": True,
            "stream": stream,
            "return_prompt_token_ids": not stream,
            "return_routed_experts": True,
            "routed_experts_start_len": 0,
        }
    ]
    folded = store.load(trajectory.id)
    (segment,) = folded.segments
    assert (reply.finish_reason, segment.finish_reason) == ("length", "length")
    assert (segment.engine, segment.weight_version, segment.sampling) == ("sglang/0.5.23", "v1", params)
    assert folded.routing_mask.sum() == len(folded) - 1 == (13 if stream else 19)


def test_a_trajectory_without_a_spec_asks_for_no_routing(store):
    trajectory = store.create()

    async def scenario(server, recorder):
        await recorder.generate(trajectory, prompt_of("13"), {}, "a")
        assert server.asked[0].keys().isdisjoint({"return_routed_experts", "routed_experts_start_len"})

    play(scenario, {"a": replay("13")}, info={"enable_return_routed_experts": False})
    assert len(store.load(trajectory.id)) == 10


@pytest.mark.parametrize(("rerecord", "case", "start"), [("rows", "08", 66), ("prefix", "07", 0)])
def test_a_resumed_request_asks_for_the_rows_that_are_missing_or_for_all(store, rerecord, case, start):
    """vLLM's stitch, the same here: rows held are P + O - 1, and one more would lose a row."""
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        running = asyncio.create_task(recorder.generate(trajectory, prompt_of("05"), {}, "a"))
        await server.arrived["a"].wait()
        await recorder.abort("a")
        assert (await running).finish_reason == "abort"
        again = store.get(trajectory.id)
        await recorder.generate(again, request_id="b", rerecord=rerecord)
        return server.asked[1]

    asked = play(scenario, {"a": until_aborted("05"), "b": replay(case)})
    assert asked["input_ids"] == prompt_of("07")
    assert asked["routed_experts_start_len"] == start
    folded = store.load(trajectory.id)
    assert folded.routing_mask.tolist() == [True] * 72 + [False]
    np.testing.assert_array_equal(folded.routed_experts[66:72], rows_of(json.loads(answer(case)))[-6:])


def test_an_abort_reaches_its_request_and_none_that_begins_like_it(store):
    """SGLang aborts by prefix: `q-1` would take `q-10` with it."""
    trajectories = [store.create(routing=SPEC) for _ in range(2)]

    async def scenario(server, recorder):
        one, ten = (
            asyncio.create_task(recorder.generate(trajectory, prompt_of("05"), {}, name))
            for trajectory, name in zip(trajectories, ["q-1", "q-10"], strict=True)
        )
        for event in server.arrived.values():
            await event.wait()
        assert sorted(recorder.in_flight) == ["q-1", "q-10"]
        await recorder.abort("q-1")
        assert (await one).finish_reason == "abort"
        assert recorder.in_flight == ("q-10",)
        assert not ten.done()
        await recorder.abort()
        await ten
        assert recorder.in_flight == ()

    play(scenario, {"q-1": until_aborted("05"), "q-10": until_aborted("05")})
    assert [len(store.load(trajectory.id)) for trajectory in trajectories] == [67, 67]


@pytest.mark.parametrize(
    ("plan", "case", "tokens", "rows"),
    [
        (until_aborted("05"), "05", 67, 66),
        (until_aborted("06"), "06", 10, 0),
        (until_aborted("19"), "19", 62, 0),
        (streamed("12b", hold=5), "12b", 19, 18),
        (streamed("22a", hold=5), "22a", 25, 0),
    ],
    ids=["running", "queued", "retracted", "streamed", "streamed, retracted"],
)
def test_cancelling_the_awaiting_task_aborts_and_keeps_what_came(store, plan, case, tokens, rows):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        awaiting = asyncio.create_task(
            recorder.generate(trajectory, prompt_of(case), {}, "a", stream="stream" in request_of(case))
        )
        await server.arrived["a"].wait()
        awaiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaiting
        assert server.aborted == ["a$"]

    play(scenario, {"a": plan})
    folded = store.load(trajectory.id)
    assert (len(folded), int(folded.routing_mask.sum()), folded.finish_reason) == (tokens, rows, "abort")


def test_a_task_cancelled_before_anything_was_sent_leaves_an_empty_segment(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        awaiting = asyncio.create_task(recorder.generate(trajectory, [4, 5], {}, "a"))
        await one_round(awaiting)
        assert recorder.in_flight == ("a",)
        awaiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaiting
        assert server.asked == []

    play(scenario, {"a": never})
    (segment,) = store.load(trajectory.id).segments
    assert (segment.finish_reason, segment.output) == ("abort", 0)
    assert segment.absent == ("aborted before it was sent",)


def test_a_request_past_its_deadline_is_aborted_and_kept(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        return await recorder.generate(trajectory, prompt_of("05"), {}, "a")

    reply = play(scenario, {"a": until_aborted("05")}, timeout=2.0)
    assert reply.finish_reason == "abort"
    assert store.load(trajectory.id).routing_mask.sum() == 66


def test_a_server_that_answers_nothing_more_is_given_up_with_what_came(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        server.deaf = math.inf
        awaiting = asyncio.create_task(recorder.generate(trajectory, prompt_of("12b"), {}, "a"))
        await eventually(lambda: len(trajectory) >= 13)
        await recorder.abort("a")
        with pytest.raises(trajstore.Unavailable, match=r"did not answer request a, nor its abort within 0\.2 s"):
            await awaiting

    play(scenario, {"a": streamed("12b", hold=5)}, stream=True, abort_timeout=0.2)
    (segment,) = store.load(trajectory.id).segments
    assert (segment.output, segment.finish_reason, segment.absent) == (5, "abort", (GIVEN_UP,))


def test_a_second_cancellation_does_not_leave_the_segment_open(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        server.deaf = math.inf
        awaiting = asyncio.create_task(recorder.generate(trajectory, [4, 5], {}, "a"))
        await server.arrived["a"].wait()
        awaiting.cancel()
        await server.abort_came.wait()
        awaiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaiting

    play(scenario, {"a": never})
    assert store.load(trajectory.id).segments[0].finish_reason == "abort"
    trajectory.close("aborted")


def test_a_stream_that_is_refused_is_hung_up_on(store):
    """SGLang aborts a request whose connection is gone; until then it would generate for nobody."""
    trajectory = store.create(routing=SPEC)

    async def handle(request, aborted):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"output_ids": [-1], "meta_info": {}}\n\n')
        await aborted.wait()

    async def scenario(server, recorder):
        with pytest.raises(trajstore.SchemaError, match="outside"):
            await recorder.generate(trajectory, [4], {}, "a", stream=True)
        await server.hung_up.wait()

    play(scenario, {"a": handle})
    assert store.load(trajectory.id).finish_reason == "error"


def test_a_stream_may_end_without_a_line_end(store):
    trajectory = store.create(routing=SPEC)

    async def handle(request, aborted):
        body = answer("12a").removesuffix(b"\n\ndata: [DONE]\n\n")
        assert body.endswith(b"}")
        return web.Response(body=body, content_type="text/event-stream")

    async def scenario(server, recorder):
        return await recorder.generate(trajectory, prompt_of("12a"), {}, "a", stream=True)

    assert play(scenario, {"a": handle}).finish_reason == "length"
    assert store.load(trajectory.id).routing_mask.sum() == 13


def test_an_abort_that_came_before_its_request_is_sent_again(store):
    """To SGLang an id that it does not know yet is nothing to abort."""
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        server.deaf = 1
        awaiting = asyncio.create_task(recorder.generate(trajectory, prompt_of("05"), {}, "a"))
        await server.arrived["a"].wait()
        await recorder.abort("a")
        assert (await awaiting).finish_reason == "abort"
        assert server.aborted == ["a$", "a$"]

    play(scenario, {"a": until_aborted("05")})
    assert len(store.load(trajectory.id)) == 67


@pytest.mark.parametrize(
    ("plan", "stream", "tokens"),
    [
        (broken_off("05", 3000), False, 20),
        (broken_off("12b", 3000, stream=True), True, 14),
        (broken_off("05", 0), False, 20),
    ],
)
def test_a_connection_that_drops_is_an_abort_with_what_came(store, plan, stream, tokens):
    trajectory = store.create(routing=SPEC)
    case = "12b" if stream else "05"

    async def scenario(server, recorder):
        with pytest.raises(trajstore.Unavailable, match="broke off"):
            await recorder.generate(trajectory, prompt_of(case), {}, "a", stream=stream)

    play(scenario, {"a": plan})
    folded = store.load(trajectory.id)
    assert (len(folded), folded.finish_reason) == (tokens, "abort")
    assert folded.segments[0].absent[0].startswith("no answer: http://127.0.0.1")
    assert store.get(trajectory.id).segment() is not None  # and can be resumed


def test_a_server_that_is_gone_is_an_abort_without_tokens(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        await server.stop()
        with pytest.raises(trajstore.Unavailable, match="cannot be reached"):
            await recorder.generate(trajectory, [4, 5], {}, "a")

    play(scenario)
    assert store.load(trajectory.id).finish_reason == "abort"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_is_unavailable(store, status):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        for name, stream in (("a", False), ("b", True)):
            with pytest.raises(trajstore.Unavailable, match=f"answers {status}"):
                await recorder.generate(trajectory, [4], {}, name, stream=stream)

    play(scenario, {"a": replay("17a", status=status), "b": replay("17a", status=status)})
    assert [segment.finish_reason for segment in store.load(trajectory.id).segments] == ["abort", "abort"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_sglang_refuses_is_an_error_with_its_message(store, stream):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        with pytest.raises(trajstore.SchemaError, match="higher than the number of input tokens"):
            await recorder.generate(trajectory, prompt_of("17a"), {}, "a", stream=stream)

    play(scenario, {"a": replay("17a", status=400)})
    folded = store.load(trajectory.id)
    assert folded.finish_reason == "error"
    assert "higher than the number of input tokens" in folded.segments[0].absent[0]


def test_an_answer_to_another_request_is_refused(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        with pytest.raises(trajstore.Conflict, match="given 12 prompt tokens"):
            await recorder.generate(trajectory, [4, 5], {}, "a")

    play(scenario, {"a": replay("01")})
    assert store.load(trajectory.id).finish_reason == "error"


def test_an_answer_to_another_prompt_of_the_same_length_is_refused(store):
    """The server is asked to echo what it was given; a proxy, say, may have mixed two requests up."""
    echoed = []

    async def handle(request, aborted):
        body = json.loads(answer("01"))
        if (await request.json()).get("return_prompt_token_ids"):
            body["prompt_token_ids"] = echoed[0]
        return web.json_response(body)

    right = prompt_of("01")
    trajectories = [store.create(routing=SPEC) for _ in range(2)]

    async def scenario(server, recorder):
        echoed[:] = [right]
        await recorder.generate(trajectories[0], right, {}, "a")
        echoed[:] = [[*right[:-1], 99]]
        with pytest.raises(trajstore.Conflict, match=r"was given another input \(12 tokens\)"):
            await recorder.generate(trajectories[1], right, {}, "b")

    play(scenario, {"a": handle, "b": handle})
    assert [(len(t), t.finish_reason) for t in map(store.load, (one.id for one in trajectories))] == [
        (20, "length"),
        (12, "error"),
    ]


def test_of_two_calls_on_one_resumed_handle_one_is_refused_and_nothing_is_lost(store):
    """Both would read the trajectory's tokens first; the second must not slip in meanwhile."""
    first = store.create(routing=SPEC)
    with first.segment(context=prompt_of("05")) as segment:
        segment.tokens(json.loads(answer("05"))["output_ids"])
        segment.close("abort")
    store.flush()
    trajectory = store.get(first.id)
    load, refused = trajectory._load_tokens, threading.Event()

    def slow_load(*args):
        assert refused.wait(30)
        return load(*args)

    trajectory._load_tokens = slow_load

    async def scenario(server, recorder):
        calls = [asyncio.create_task(recorder.generate(trajectory, (), {}, name)) for name in ("a", "b")]
        (lost,), (won,) = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        refused.set()
        with pytest.raises(trajstore.Conflict, match="another call of this handle is about to open a segment"):
            lost.result()
        assert (await won).finish_reason == "length"
        assert len(server.asked) == 1
        assert recorder.in_flight == ()

    play(scenario, {"a": replay("07"), "b": replay("07")})
    store.flush(trajectory.id)
    folded = store.load(trajectory.id)
    assert [one.finish_reason for one in folded.segments] == ["abort", "length"]
    assert folded.token_ids.tolist() == prompt_of("07") + json.loads(answer("07"))["output_ids"]
    assert folded.routing_mask.sum() == 72


def test_a_fenced_request_is_told_once_and_its_store_closes_in_peace(tmp_path):
    taken_over, noticed = asyncio.Event(), asyncio.Event()

    async def handle(request, aborted):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, event in enumerate(answer("12b").split(b"\n\n")):
            if number == 5:
                await taken_over.wait()
            if number == 6:
                await noticed.wait()
            await response.write(event + b"\n\n")
        return response

    async def scenario(server, recorder):
        running = asyncio.create_task(recorder.generate(trajectory, prompt_of("12b"), {}, "a", stream=True))
        await eventually(lambda: len(trajectory) >= 13)
        await store.aflush()
        other.get(trajectory.id).segment().close("stop")
        other.flush()
        taken_over.set()
        await eventually(lambda: len(trajectory) >= 14)
        await asyncio.to_thread(store._flusher.drain, trajectory.id)
        noticed.set()
        with pytest.raises(trajstore.Fenced):
            await running

    with trajstore.open(tmp_path / "store", partitions=2) as store, trajstore.open(tmp_path / "store") as other:
        trajectory = store.create(routing=SPEC)
        play(scenario, {"a": handle})


def test_a_server_without_routing_is_told_before_anything_is_sampled(store):
    """With its flag off SGLang answers 200, and the key is silently absent."""
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        with pytest.raises(trajstore.Conflict, match="--enable-return-routed-experts"):
            await recorder.generate(trajectory, [4], {}, "a")
        assert server.asked == []

    play(scenario, info={"enable_return_routed_experts": False})
    assert len(trajectory) == 0


def test_what_cannot_be_asked_for_is_refused_before_a_segment_opens(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        with pytest.raises(trajstore.SchemaError, match="n = 1"):
            await recorder.generate(trajectory, [4], {"n": 2})
        with pytest.raises(trajstore.SchemaError, match="cannot be an id"):
            await recorder.generate(trajectory, [4], {}, "a$b")
        with pytest.raises(trajstore.SchemaError, match="no rerecord"):
            await recorder.generate(trajectory, [4], {}, rerecord="none")
        with pytest.raises(trajstore.SchemaError, match="JSON"):
            await recorder.generate(trajectory, [4], {"max_new_tokens": object()})
        running = asyncio.create_task(recorder.generate(trajectory, prompt_of("05"), {}, "a"))
        await server.arrived["a"].wait()
        with pytest.raises(trajstore.Conflict, match="is in flight"):
            await recorder.generate(store.create(), [4], {}, "a")
        with pytest.raises(trajstore.Conflict, match="still open"):
            await recorder.generate(trajectory, [4], {}, "b")
        await recorder.abort()
        await running

    play(scenario, {"a": until_aborted("05")})
    assert len(store.load(trajectory.id).segments) == 1


def test_many_requests_run_at_once_and_leave_the_loop_free(store):
    """32 at once; parsing and writing happen on other threads than the loop's."""
    cases = ["01", "02", "09_chain_a", "21b"] * 8
    trajectories = [store.create(routing=SPEC) for _ in cases]
    threads = set()

    class Watching:
        """Notes which threads append."""

        def __init__(self, flusher):
            self._flusher = flusher

        def append(self, *args):
            threads.add(threading.current_thread())
            return self._flusher.append(*args)

        def __getattr__(self, name):
            return getattr(self._flusher, name)

    for trajectory in trajectories:
        trajectory._flusher = Watching(trajectory._flusher)

    async def scenario(server, recorder):
        calls = [
            recorder.generate(trajectory, prompt_of(case), {}, f"r{i}")
            for i, (trajectory, case) in enumerate(zip(trajectories, cases, strict=True))
        ]
        await asyncio.gather(*calls)

    play(scenario, {f"r{i}": replay(case) for i, case in enumerate(cases)})
    assert [len(store.load(trajectory.id)) for trajectory in trajectories] == [20, 27, 64, 74] * 8
    assert threads
    assert threading.main_thread() not in threads


def test_leaving_the_recorder_aborts_and_records_what_is_in_flight(store):
    trajectory = store.create(routing=SPEC)

    async def scenario():
        async with asyncio.timeout(60), ReplayServer({"a": until_aborted("05")}) as server:
            async with SGLangRecorder(server.url) as recorder:
                running = asyncio.create_task(recorder.generate(trajectory, prompt_of("05"), {}, "a"))
                await server.arrived["a"].wait()
            return await running

    assert asyncio.run(scenario()).finish_reason == "abort"
    assert len(store.load(trajectory.id)) == 67


def test_a_weight_update_is_heard_of_and_labels_the_next_segment(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        assert recorder.weight_version == "v1"
        await recorder.client.pause_generation("retract")
        await recorder.update_weights_from_disk("models/b", weight_version="v2")
        await recorder.client.flush_cache()
        await recorder.client.continue_generation()
        assert recorder.weight_version == "v2"
        await recorder.update_weight_version("v3")
        assert recorder.weight_version == "v3"
        await recorder.generate(trajectory, prompt_of("06"), {}, "a")
        return server.calls

    assert play(scenario, {"a": replay("06")}) == [
        ("/pause_generation", {"mode": "retract"}),
        ("/update_weights_from_disk", {"model_path": "models/b", "weight_version": "v2", "flush_cache": True}),
        ("/flush_cache", None),
        ("/continue_generation", {}),
        ("/update_weight_version", {"new_version": "v3", "abort_all_requests": False}),
    ]
    assert store.load(trajectory.id).segments[0].weight_version == "v3"


@pytest.mark.parametrize(
    ("reply", "version"), [(answer("21a").decode(), "v2"), ('{"success":false,"message":"no such path"}', "v1")]
)
def test_a_refused_flush_has_changed_the_weights_all_the_same(store, monkeypatch, reply, version):
    monkeypatch.setattr("trajstore_sglang.recorder._FLUSH", 0.2)

    async def scenario(server, recorder):
        server.replies["/update_weights_from_disk"] = (400, reply)
        server.replies["/flush_cache"] = (400, "requests are running")
        with pytest.raises(trajstore.Conflict, match=r"cache was not flushed|no such path"):
            await recorder.update_weights_from_disk("models/model2", weight_version="v2")
        return recorder.weight_version

    assert play(scenario) == version


def test_a_flush_that_is_refused_only_for_a_moment_is_asked_for_again(store):
    async def scenario(server, recorder):
        server.replies["/update_weights_from_disk"] = (400, answer("21a").decode())
        server.replies["/flush_cache"] = (400, "requests are running")
        update = asyncio.create_task(recorder.update_weights_from_disk("models/model2", weight_version="v2"))
        await eventually(lambda: ("/flush_cache", None) in server.calls)
        del server.replies["/flush_cache"]
        await update
        return recorder.weight_version

    assert play(scenario) == "v2"


def test_an_answer_under_new_weights_is_heard_of(store):
    """A trainer updates the server by its own way; the answers tell."""
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        await recorder.generate(trajectory, prompt_of("10"), {}, "a")
        return recorder.weight_version

    assert play(scenario, {"a": replay("10")}) == "v2"
    assert store.load(trajectory.id).weight_versions == ("v1", "v2")


def test_a_version_that_loses_routing_is_warned_of(store, caplog):
    async def scenario(server, recorder):
        return recorder.capabilities

    with caplog.at_level(logging.WARNING):
        found = play(scenario, info={"version": "0.5.11"})
    assert found == capabilities("0.5.11")
    assert "misaligned" in caplog.text


def test_a_server_that_tells_nothing_of_itself_can_be_used(store):
    trajectory = store.create(routing=SPEC)

    async def scenario(server, recorder):
        await recorder.generate(trajectory, prompt_of("01"), {}, "a")
        assert recorder.capabilities.label == "sglang"

    async def run():
        async with asyncio.timeout(60), ReplayServer({"a": replay("01")}) as server:
            server.info, server.weight_version = {}, None
            async with SGLangRecorder(server.url) as recorder:
                await scenario(server, recorder)

    asyncio.run(run())
    assert store.load(trajectory.id).weight_versions == ("v1",)


def test_nothing_listens_at_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def run():
        async with SGLangRecorder(url):
            raise AssertionError("it cannot open")

    with pytest.raises(trajstore.Unavailable, match="cannot be reached"):
        asyncio.run(run())


def test_a_call_that_is_not_answered_ends_at_its_deadline():
    async def run():
        async with ReplayServer({"a": never}) as server, SGLangClient(server.url) as client:
            with pytest.raises(trajstore.Unavailable, match=r"did not answer within 0\.05 s"):
                await client._exchange("POST", "/generate", {"rid": "a$"}, timeout=0.05)

    asyncio.run(run())


def test_an_api_key_is_sent():
    seen = []

    async def note(request, aborted):
        seen.append(request.headers.get("Authorization"))
        return await replay("01")(request, aborted)

    async def run():
        async with ReplayServer({"a": note}) as server, SGLangClient(server.url, api_key="secret") as client:
            assert await client.generate({"rid": "a$"}) == answer("01")

    asyncio.run(run())
    assert seen == ["Bearer secret"]


def test_a_client_that_is_not_open_says_how_to_use_it():
    with pytest.raises(trajstore.Conflict, match="async with"):
        asyncio.run(SGLangClient("http://127.0.0.1:1").abort_all())


@pytest.mark.parametrize(
    ("version", "start", "spans", "losses"),
    [
        ("0.5.11", False, False, 5),
        ("0.5.12", True, False, 4),
        ("0.5.12.post1", True, False, 4),
        ("0.5.13", True, False, 3),
        ("0.5.18", True, False, 3),
        ("0.5.19", True, True, 3),
        ("0.5.23", True, True, 3),
        ("0.5.23.dev1+g1a2b3c4", True, True, 3),
        ("0.6.0rc1", True, True, 3),
        ("unknown", True, True, 3),
    ],
)
def test_versions_differ_in_what_they_can_do(version, start, spans, losses):
    found = capabilities(version)
    assert found.label == f"sglang/{version}"
    assert (found.start_offset, found.weight_spans, len(found.losses)) == (start, spans, losses)
    assert (found.routing_on_abort, found.dtype) == (True, "int32")


def test_without_sglang_installed_its_version_must_be_given():
    with pytest.raises(trajstore.NotFound, match="give the version that the server reports"):
        capabilities()


def test_without_aiohttp_answers_can_be_recorded_and_the_client_says_what_to_install():
    code = (
        "import asyncio, sys; sys.modules['aiohttp'] = None; import trajstore_sglang\n"
        "async def run():\n"
        "    async with trajstore_sglang.SGLangRecorder('http://127.0.0.1:1'): pass\n"
        "asyncio.run(run())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert shown.stderr.splitlines()[-1].endswith("pip install 'trajstore[sglang-client]'")
    assert "SchemaError" in shown.stderr
