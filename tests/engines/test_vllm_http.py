"""Recorded replies of a real vLLM server become the right events; whatever else a body holds is refused unstored."""

import base64
import io
import json
import pickle
import random

import numpy as np
import pytest

import trajstore
from tests.engines.vllm_fixtures import DATA, SPEC, closing, reasons, recordings, rows_of
from trajstore.errors import TrajstoreError
from trajstore_vllm import Known, parse_http, record_http
from trajstore_vllm.http import decode_npy

REPLIES = {
    # case: prompt, output, first row, recordings
    "14_http_completions": (40, 6, 0, [(0, 39, "unknown"), (39, 45, "computed")]),
    "14_http_generate_aborted": (42, 288, 0, [(0, 41, "unknown"), (41, 329, "computed")]),
    "14_http_generate_complete": (50, 8, 0, [(0, 49, "unknown"), (49, 57, "computed")]),
    "14_http_generate_prompt_start": (50, 8, 47, [(47, 49, "unknown"), (49, 57, "computed")]),
    "14_http_generate_stream_complete": (35, 6, 0, [(0, 34, "unknown"), (34, 40, "computed")]),
}


def request_of(name):
    """Prompt and `routed_experts_prompt_start` of a request."""
    said = json.loads((DATA / f"{name}.request.json").read_text())
    start = said.get("sampling_params", said).get("routed_experts_prompt_start")
    return said.get("token_ids", said.get("prompt")), start


def body_of(name):
    """The literal body of a reply."""
    (path,) = DATA.glob(f"{name}.response.*")
    return path.read_bytes()


def known(prompt):
    """A segment with an input of so many tokens, nothing recorded yet."""
    return Known(prompt, 0, 0.0, lambda: np.empty(0, np.int32), None, SPEC.num_hidden_layers * SPEC.top_k)


def open_segment(store, name, **options):
    trajectory = store.create(routing=SPEC)
    return trajectory, trajectory.segment(context=request_of(name)[0], engine="vllm/0.30.0", **options)


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("form", ["bytes", "text", "decoded"])
def test_a_reply_is_recorded_with_its_rows_where_they_belong(embedded, name, form):
    prompt, output, start, recorded = REPLIES[name]
    body = body_of(name)
    if form == "text":
        body = body.decode()
    elif form == "decoded" and not body.startswith(b"data:"):
        body = json.loads(body)
    trajectory, segment = open_segment(embedded, name)
    assert record_http(segment, body, prompt_start=request_of(name)[1])
    assert recordings(embedded, trajectory) == recorded
    loaded = embedded.load(trajectory.id)
    assert len(loaded) == prompt + output
    assert loaded.routing_mask.tolist() == [False] * start + [True] * (prompt + output - 1 - start) + [False]
    np.testing.assert_array_equal(loaded.routed_experts[start:-1], rows_of(name))
    assert np.isfinite(loaded.logprobs[prompt:]).all()
    assert loaded.finish_reason == ("abort" if "aborted" in name else "length")
    assert reasons(embedded, trajectory) == []


def test_logprobs_are_those_of_the_sampled_tokens(embedded):
    for name, first in (
        ("14_http_completions", -1.7512091398239136),
        ("14_http_generate_complete", -3.180043935775757),
    ):
        trajectory, segment = open_segment(embedded, name)
        record_http(segment, body_of(name))
        assert embedded.load(trajectory.id).logprobs[segment.start] == np.float32(first)


@pytest.mark.parametrize(
    ("name", "output", "finish_reason", "words"),
    [
        ("14_http_completions_stream", 5, "length", "the OpenAI routes return it to requests only that do not stream"),
        ("14_http_generate_stream_aborted", 106, "abort", "ended without a finish reason"),
    ],
)
def test_a_transcript_without_routing_gives_what_it_has_and_says_why(embedded, name, output, finish_reason, words):
    trajectory, segment = open_segment(embedded, name)
    assert record_http(segment, body_of(name))
    loaded = embedded.load(trajectory.id)
    assert len(loaded) - segment.start == output
    assert np.isfinite(loaded.logprobs[segment.start :]).all()
    assert loaded.finish_reason == finish_reason
    assert not loaded.routing_mask.any()
    (reason,) = reasons(embedded, trajectory)
    assert words in reason


def test_a_transcript_that_breaks_off_keeps_its_whole_events(embedded):
    body = body_of("14_http_generate_stream_complete")
    events = body.split(b"\n\n")
    trajectory, segment = open_segment(embedded, "14_http_generate_stream_complete")
    assert record_http(segment, b"\n\n".join(events[:3]))
    assert closing(embedded, trajectory).finish_reason == "abort"
    assert segment.end == 38
    _, segment = open_segment(embedded, "14_http_generate_stream_complete")
    with pytest.raises(trajstore.SchemaError, match="no reply of vLLM"):
        record_http(segment, body[:600])  # in the middle of an event
    assert segment.end == 35


def test_an_error_in_mid_stream_closes_as_error(embedded):
    events = body_of("14_http_generate_stream_complete").split(b"\n\n")
    broken = [*events[:2], b'data: {"error": {"message": "EngineCore died", "code": 500}}', b"data: [DONE]", b""]
    trajectory, segment = open_segment(embedded, "14_http_generate_stream_complete")
    assert record_http(segment, b"\n\n".join(broken))
    assert embedded.load(trajectory.id).finish_reason == "error"
    assert reasons(embedded, trajectory) == ["EngineCore died"]
    assert segment.end == 37


def test_a_transcript_that_contradicts_itself_is_refused(embedded):
    events = body_of("14_http_generate_stream_complete").split(b"\n\n")
    silent = json.loads(events[1][6:])
    silent["choices"][0]["logprobs"] = None
    goes_on = [*events[:6], events[2], *events[6:]]
    half_silent = [events[0], b"data: " + json.dumps(silent).encode(), *events[2:]]
    for broken, words in ((goes_on, "goes on with choice 0"), (half_silent, "some events of the transcript")):
        _, segment = open_segment(embedded, "14_http_generate_stream_complete")
        with pytest.raises(trajstore.SchemaError, match=words):
            record_http(segment, b"\n\n".join(broken))
        assert segment.end == 35


def test_a_chat_reply_is_recorded_as_the_others(embedded):
    said = json.loads(body_of("14_http_completions"))
    choice = said["choices"][0]
    chat = {
        "object": "chat.completion",
        "prompt_token_ids": choice["prompt_token_ids"],
        "usage": said["usage"] | {"prompt_tokens_details": {"cached_tokens": 32}},
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "", "tool_calls": [{"id": "call-1"}]},
                "logprobs": {"content": [{"token": "a", "logprob": p} for p in choice["logprobs"]["token_logprobs"]]},
                "finish_reason": "tool_calls",
                "token_ids": choice["token_ids"],
                "routed_experts": choice["routed_experts"],
                "weight_versions": [{"version": "v1", "start": 0, "end": 2}, {"version": 2, "start": 2, "end": 6}],
            }
        ],
    }
    trajectory, segment = open_segment(embedded, "14_http_completions")
    assert record_http(segment, json.dumps(chat))
    assert recordings(embedded, trajectory) == [(0, 32, "cached"), (32, 45, "computed")]
    loaded = embedded.load(trajectory.id)
    assert loaded.finish_reason == "stop"
    assert loaded.weight_versions == ("v1", "2")
    assert loaded.weight_version_ids[40:].tolist() == [0, 0, 1, 1, 1, 1]


def npy(array, **options):
    """Base64 of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", ">i4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_decoded_as_numpy_does(dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 4, 3), dtype, order=order)
    decoded = decode_npy(npy(array), limit=4096)
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


def header(text):
    """A version 1 file with this header and 8 bytes of data."""
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)).decode()


def test_no_more_is_decoded_than_the_request_can_have():
    long = changed(routed_experts=npy(np.zeros((5000, 4, 2), np.uint8)))
    with pytest.raises(trajstore.RoutingError, match=r"characters of base64; \d+ bytes were expected at most"):
        parse_http(long, known(50))


NO_ARRAYS = {
    "no base64": "k05VTVBZ****",
    "cut base64": "k05VTVBZAQ",
    "not ASCII": "\u00e9" * 8,
    "empty": "",
    "no file": base64.b64encode(b"hello world, hello world").decode(),
    "a pickle": base64.b64encode(pickle.dumps({"a": 1})).decode(),
    "pickled objects": npy(np.array([[[None]]], object), allow_pickle=True),
    "floats": npy(np.zeros((1, 4, 2), np.float32)),
    "text": npy(np.array([[["a"]]])),
    "two axes": npy(np.zeros((4, 2), np.uint8)),
    "records": npy(np.zeros((1, 4, 2), [("a", "u1")])),
    "two gigabytes": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (33554432, 8, 8), }"),
    "more than memory": header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999, 4, 2), }"),
    "a negative shape": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4, 2), }"),
    "code": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (__import__('os').getpid(), 4, 2), }"),
    "deep": header(b"(" * 3000),
    "a header past the end": base64.b64encode(b"\x93NUMPY\x01\x00\xff\xff{}").decode(),
    "a header of 4 GB": base64.b64encode(b"\x93NUMPY\x03\x00\xff\xff\xff\xff{}").decode(),
    "version 9": base64.b64encode(b"\x93NUMPY\x09\x00\x00\x00{}....").decode(),
    "cut data": base64.b64encode(base64.b64decode(npy(np.zeros((4, 4, 2), np.uint8)))[:-1]).decode(),
    "more data": base64.b64encode(base64.b64decode(npy(np.zeros((4, 4, 2), np.uint8))) + b"\0").decode(),
    "too long": npy(np.zeros((1000, 4, 2), np.uint8)),
}


@pytest.mark.parametrize("what", NO_ARRAYS)
def test_what_is_no_array_of_integers_is_refused(what):
    with pytest.raises(trajstore.RoutingError):
        decode_npy(NO_ARRAYS[what], limit=4096)


def changed(**fields):
    """The generate route's reply with fields of its choice or of its own changed."""
    said = json.loads(body_of("14_http_generate_complete"))
    for name, value in fields.items():
        (said if name in said else said["choices"][0])[name] = value
    return said


RIGHT = body_of("14_http_generate_complete")
REFUSED = {
    "cut": (RIGHT[:-20], trajstore.SchemaError),
    "empty": (b"", trajstore.SchemaError),
    "not Unicode": (b'{"choices": "\xff"}', trajstore.SchemaError),
    "deep": (b'{"error":' + b"[" * 100_000, trajstore.SchemaError),
    "deep and unknown": (b'{"x":' + b'{"x":' * 100_000, trajstore.SchemaError),
    "a number": (b"5", trajstore.SchemaError),
    "no mapping": (5, trajstore.SchemaError),
    "every other byte": (memoryview(bytes(2 * len(RIGHT)))[::2], trajstore.SchemaError),
    "words": (memoryview(RIGHT.ljust(len(RIGHT) + -len(RIGHT) % 4)).cast("I"), trajstore.SchemaError),
    "rows of bytes": (memoryview(bytes(64)).cast("B", (8, 8)), trajstore.SchemaError),
    "an error": (b'{"error": {"message": "bad", "code": 400}}', trajstore.SchemaError),
    "another error": (b'{"object": "error", "message": "bad"}', trajstore.SchemaError),
    "HTML": (b"<html>502 Bad Gateway</html>", trajstore.SchemaError),
    "no choices": (changed(choices=[]), trajstore.SchemaError),
    "choices of text": (changed(choices="abc"), trajstore.SchemaError),
    "twice the choice": (changed(choices=json.loads(RIGHT)["choices"] * 2), trajstore.SchemaError),
    "no token ids": (changed(token_ids=None), trajstore.SchemaError),
    "negative ids": (changed(token_ids=[-1] * 8), trajstore.SchemaError),
    "huge ids": (changed(token_ids=[1 << 80] * 8), trajstore.SchemaError),
    "ids of text": (changed(token_ids=["7"] * 8), trajstore.SchemaError),
    "ids of floats": (changed(token_ids=[0.5] * 8), trajstore.SchemaError),
    "fewer ids": (changed(token_ids=[1]), trajstore.SchemaError),
    "fewer logprobs": (changed(logprobs={"content": []}), trajstore.SchemaError),
    "another reason": (changed(finish_reason="tired"), trajstore.SchemaError),
    "no reason": (changed(finish_reason=None), trajstore.SchemaError),
    "another prompt": (changed(prompt_token_ids=[7] * 50), trajstore.Conflict),
    "another count": (changed(usage={"prompt_tokens": 49}), trajstore.Conflict),
    "spans past the end": (changed(weight_versions=[{"version": "a", "start": 0, "end": 9}]), trajstore.SchemaError),
    "fewer counted": (changed(usage={"completion_tokens": 9}), trajstore.SchemaError),
    "more cached": (changed(usage={"prompt_tokens_details": {"cached_tokens": 51}}), trajstore.SchemaError),
    "routing of another": (changed(routed_experts=npy(np.zeros((3, 4, 2), np.uint8))), trajstore.RoutingError),
    "ids out of range": (changed(routed_experts=npy(np.full((57, 4, 2), 8, np.uint8))), trajstore.RoutingError),
    "pickled": (changed(routed_experts=NO_ARRAYS["pickled objects"]), trajstore.RoutingError),
    "two gigabytes": (changed(routed_experts=NO_ARRAYS["two gigabytes"]), trajstore.RoutingError),
    "routing of numbers": (changed(routed_experts=[1, 2]), trajstore.SchemaError),
    "a line that is no event": (b"data: {}\n\nhello\n\n", trajstore.SchemaError),
    "events of nothing": (b"data: [DONE]\n\n", trajstore.SchemaError),
    "an event of text": (b'data: "x"\n\n', trajstore.SchemaError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_only_the_reason_stored(embedded, what):
    body, kind = REFUSED[what]
    trajectory, segment = open_segment(
        embedded, "14_http_generate_complete", sampling={"routed_experts_prompt_start": 0}
    )
    with pytest.raises(kind):
        record_http(segment, body)
    assert not segment.closed
    (reason,) = reasons(embedded, trajectory)
    assert reason.startswith("refused: ")
    events = [event.type for event in embedded.events(trajectory.id)]
    assert events == ["TrajectoryOpened", "SegmentOpened", "RoutingAbsent"]


def test_a_reply_is_not_recorded_behind_other_tokens(embedded):
    _, segment = open_segment(embedded, "14_http_generate_complete")
    segment.tokens([1, 2])
    with pytest.raises(trajstore.SchemaError, match="has 2 output tokens already"):
        record_http(segment, RIGHT)


JUNK = [
    None,
    True,
    -1,
    1 << 62,
    1 << 70,
    1e300,
    0.5,
    "",
    "x",
    "\ud7ff",
    "2026",
    [],
    [[]],
    {},
    {"a": []},
    [None],
    ["k05V"],
]


def mutate(value, rng):
    """A copy with one node replaced, removed, doubled or cut."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        what = rng.random()
        if what < 0.15:
            return value[:at]
        if what < 0.3:
            return value[:at] + [value[at]] * 2 + value[at + 1 :]
        return [*value[:at], mutate(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", "A", "=", "\\", "\u20ac", "AAAA"]) + value[at + rng.randrange(3) :]
    return rng.choice(JUNK)


def broken_bodies(name, count, seed):
    """Bodies one mutation away from a right one: in its JSON, or in its bytes."""
    rng = random.Random(seed)
    body = body_of(name)
    said = None if body.startswith(b"data:") else json.loads(body)
    for _ in range(count):
        if said is not None and rng.random() < 0.7:
            yield json.dumps(mutate(said, rng)).encode()
            continue
        at = rng.randrange(len(body))
        yield (
            body[:at]
            + rng.choice([b"", bytes([rng.randrange(256)]), b"[[{", b'"', b"\n", b"9" * 5000])
            + body[at + rng.choice([0, 1, 1, 9, len(body)]) :]
        )


@pytest.mark.parametrize("name", [*REPLIES, "14_http_completions_stream"])
def test_thousands_of_broken_bodies_are_parsed_or_refused(name):
    """Nothing but our own errors comes out, and what is taken is of one shape with itself."""
    prompt = len(request_of(name)[0])
    refused = 0
    count = 60 if "aborted" in name else 800
    for body in broken_bodies(name, count, seed=1):
        try:
            delivery = parse_http(body, known(prompt))
        except (trajstore.SchemaError, trajstore.RoutingError, trajstore.Conflict):
            refused += 1
            continue
        assert delivery.token_ids.dtype == np.int32
        assert delivery.logprobs is None or delivery.logprobs.shape == delivery.token_ids.shape
        assert delivery.finish_reason in ("stop", "length", "abort", "error")
        assert delivery.routed_experts is None or delivery.routed_experts.ndim == 3
    assert refused > count / 4


def test_broken_bodies_leave_nothing_in_a_store_but_reasons(embedded):
    name = "14_http_generate_complete"
    prompt, _ = request_of(name)
    right = parse_http(body_of(name), known(50))
    for body in broken_bodies(name, 300, seed=2):
        trajectory, segment = open_segment(embedded, name, sampling={"routed_experts_prompt_start": 0})
        try:
            record_http(segment, body)
        except TrajstoreError:
            assert not segment.closed
            assert segment.end == segment.start == 50
            segment.close("error")
            events = [event.type for event in embedded.events(trajectory.id)]
            assert events == ["TrajectoryOpened", "SegmentOpened", "RoutingAbsent", "SegmentClosed"]
            continue
        loaded = embedded.load(trajectory.id)
        assert loaded.token_ids[:50].tolist() == prompt
        assert loaded.routing_mask.sum() in (0, 50 + len(right.token_ids) - 1)
