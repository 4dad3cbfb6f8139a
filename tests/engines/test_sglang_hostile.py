"""Answers that no SGLang sends: refused with the store's own errors, and nothing of them is kept but the reason."""

import base64
import contextlib
import io
import json
import random

import numpy as np
import pytest

import trajstore
from tests.engines.sglang_cases import SPEC, answer, asked, opened, request_of
from trajstore.events import Routing, Tokens
from trajstore_sglang import parse_batch, parse_response, record_response, record_stream
from trajstore_sglang.reply import fresh_tokens, routed_recordings

REFUSED = (trajstore.SchemaError, trajstore.RoutingError, trajstore.Conflict)

CASES = ("01", "02", "04", "05", "06", "08", "10", "14", "15a", "15b", "16b", "17a", "19", "21a", "22b")

HOSTILE = (
    None,
    True,
    -1,
    2**31,
    2**63,
    10**40,
    1e308,
    -0.5,
    "",
    "AAAA",
    "\ud800",
    "x" * 2000,
    [],
    [None],
    [[]],
    {},
    {"version": 1},
    [["a", "b"]],
    [-5],
    [2**40],
    [[-1.0, -7, None]],
    [{"version": "v", "start": 5, "end": 2}],
    [{"version": "v", "start": 0, "end": 10**9}],
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with trajstore.open(tmp_path_factory.mktemp("hostile") / "store", partitions=2) as store:
        yield store


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def put(value, path, new):
    """A copy of the value with something else at a path."""
    copy = json.loads(json.dumps(value))
    if not path:
        return new
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return copy


def mangled(body, dice):
    """Bytes of an answer with a few of them changed, dropped, repeated or cut off."""
    data = bytearray(body)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data)) if data else 0
        match dice.randrange(5):
            case 0:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[at : at + dice.randint(1, 40)]
            case 2:
                data[at:at] = data[at : at + dice.randint(1, 40)]
            case 3:
                data[at : at + 1] = dice.choice([b"9" * 30, b"-", b'"', b"[", b"{", b"null", b"\\u0000", b"="])
            case 4:
                del data[at:]
    return bytes(data)


def understand(body):
    """The pure part of recording: what it refuses, or None."""
    try:
        reply = parse_response(body)
        fresh_tokens(reply, np.empty(0, np.int32))
        fresh_tokens(reply, np.array([106, 243], np.int32))
        if reply.routed_experts is not None:
            routed_recordings(reply, SPEC, prompt=reply.prompt_tokens or 0, output=reply.total)
    except REFUSED as error:
        return error
    return None


def test_mangled_bytes_are_understood_or_refused():
    dice = random.Random(1)
    outcomes = [understand(mangled(answer(dice.choice(CASES)), dice)) for _ in range(4000)]
    assert 1500 < sum(outcome is not None for outcome in outcomes) < 4000


@pytest.mark.parametrize("case", ["01", "06", "15a", "19"])
def test_any_value_in_any_place_is_understood_or_refused(case):
    body = json.loads(answer(case))
    for path in places(body):
        if len(path) <= 4:
            for value in HOSTILE:
                made = put(body, path, value)
                understand(made)
                understand(json.dumps(made))


def test_any_value_in_any_place_of_a_batch_is_understood_or_refused():
    body = json.loads(answer("03"))
    for path in places(body):
        if len(path) <= 2:
            for value in HOSTILE:
                made = put(body, path, value)
                for form in (made, json.dumps(made).encode()):
                    with contextlib.suppress(*REFUSED):
                        assert len(parse_batch(form)) in (0, 3)


def test_what_is_refused_leaves_the_reason_and_nothing_else(store):
    """All or nothing, through a store: an accepted answer is closed with its rows, a refused one has no event."""
    dice, kept, refused = random.Random(2), 0, 0
    for _ in range(300):
        case = dice.choice(["01", "05", "10", "19"])
        body = answer(case)
        if dice.random() < 0.5:
            paths = [path for path in places(json.loads(body)) if 0 < len(path) <= 3]
            made = json.dumps(put(json.loads(body), dice.choice(paths), dice.choice(HOSTILE))).encode()
        else:
            made = mangled(body, dice)
        trajectory, segment = opened(store, request_of(case)["input_ids"])
        why = None
        try:
            record_response(segment, made, start_len=asked(case))
        except REFUSED as error:
            why = str(error)
        assert segment.closed == (why is None)
        if why is None:
            store.load(trajectory.id)
            kept += 1
            continue
        refused += 1
        segment.close("error")
        headers = [event.header for event in store.events(trajectory.id)]
        assert not any(isinstance(header, Tokens | Routing) for header in headers)
        assert store.load(trajectory.id).segments[0].absent == (f"refused: {why}"[:500],)
    assert kept > 20
    assert refused > 100


def test_mangled_streams_keep_only_what_was_sound(store):
    dice = random.Random(3)
    sound = [58, 52, 78, 184, 177, 132]
    for _ in range(100):
        lines = answer("12a").splitlines()
        at = dice.randrange(0, len(lines), 2)
        lines[at] = b"data: " + mangled(lines[at][6:], dice)
        trajectory, segment = opened(store, request_of("12a")["input_ids"])
        with segment:
            try:
                record_stream(segment, lines, start_len=0)
            except REFUSED:
                assert not segment.closed
        got = store.load(trajectory.id).token_ids[8:].tolist()
        assert len(got) <= len(sound)


def with_routing(text):
    body = json.loads(answer("01"))
    body["meta_info"]["routed_experts"] = text
    return body


def _npy(allow_pickle):
    file = io.BytesIO()
    array = np.array([{"a": 1}], object) if allow_pickle else np.zeros((19, 4, 2), np.int32)
    np.save(file, array, allow_pickle=allow_pickle)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AAAA" * 200 + "!", "not base64"),
        ("AAA", "not base64"),
        ("=", "not base64"),
        ("AAAA\n", "not base64"),
        ("é" * 8, "not base64"),
        ("\ud800", "no answer of SGLang|not base64"),
        ("AAAAAAAA", "not a whole number of rows"),
        (base64.b64encode(b"\0" * 32 * 19).decode(), "repeats an expert"),
        (base64.b64encode(np.int32([-1, 2] * 4 * 19).tobytes()).decode(), "expert id -1 .* outside"),
        (base64.b64encode(np.int32([1 << 30, 2] * 4 * 19).tobytes()).decode(), "outside"),
        (base64.b64encode(np.int32([1, 2] * 4 * 21).tobytes()).decode(), "characters of base64"),
        (_npy(allow_pickle=True), "whole number|base64|outside"),
        (_npy(allow_pickle=False), "whole number|base64|outside"),
        (7, "no answer of SGLang"),
        ([], "no answer of SGLang"),
        ({"shape": [1 << 40]}, "no answer of SGLang"),
    ],
)
def test_routing_that_cannot_be_is_refused(store, text, message):
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    with pytest.raises(REFUSED, match=message):
        record_response(segment, with_routing(text), start_len=0)
    assert len(trajectory) == 12


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("completion_tokens", 1 << 31),
        ("completion_tokens", -1),
        ("completion_tokens", 7),
        ("completion_tokens", "8"),
        ("prompt_tokens", 1 << 62),
        ("prompt_tokens", -12),
        ("cached_tokens", -1),
        ("num_retractions", -1),
        ("num_retractions", 1.5),
        ("weight_versions", [{"version": "v", "start": 0, "end": 9}]),
        ("weight_versions", [{"version": "v", "start": 4, "end": 6}, {"version": "w", "start": 0, "end": 2}]),
        ("weight_versions", [{"version": "v" * 2000, "start": 0, "end": 8}]),
        ("weight_version", "v" * 2000),
        ("finish_reason", {"type": "exploded"}),
        ("finish_reason", None),
        ("output_token_logprobs", [[-1.0, 106, None]]),
        ("output_token_logprobs", [[-1.0, 4, None]] * 8),
    ],
)
def test_values_that_contradict_the_output_are_refused(store, key, value):
    body = json.loads(answer("01"))
    body["meta_info"][key] = value
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    with pytest.raises(REFUSED):
        record_response(segment, body, start_len=0)
    assert len(trajectory) == 12


@pytest.mark.parametrize("count", [0, 7, 9])
def test_a_count_of_tokens_that_is_not_theirs_is_refused(store, count):
    body = json.loads(answer("01"))
    del body["meta_info"]["weight_versions"], body["meta_info"]["output_token_logprobs"]
    body["meta_info"]["completion_tokens"] = count
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    with pytest.raises(trajstore.SchemaError, match=f"8 output tokens and claims {count}"):
        record_response(segment, body)
    assert len(trajectory) == 12


def test_a_line_that_is_no_unicode_is_refused(store):
    _, segment = opened(store, [4])
    with pytest.raises(trajstore.SchemaError, match="no answer of SGLang"):
        record_stream(segment, ["data: \ud800"])


@pytest.mark.parametrize(
    "ids", [[-1] * 8, [1 << 31] * 8, [1 << 70] * 8, [1.5] * 8, ["106"] * 8, [None] * 8, "12345678"]
)
def test_token_ids_that_cannot_be_are_refused(store, ids):
    body = json.loads(answer("01"))
    body["output_ids"] = ids
    trajectory, segment = opened(store, request_of("01")["input_ids"])
    for form in (body, json.dumps(body)):
        with pytest.raises(trajstore.SchemaError):
            record_response(segment, form)
    assert len(trajectory) == 12


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"3",
        b'"text"',
        b"[",
        b"[" * 100_000,
        b'{"error":' * 100_000,
        b'{"meta_info":' + b"[" * 100_000,
        b'{"unknown":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xff\xfe{}",
        b'{"meta_info": {}}',
        b'{"output_ids": [' + b"1," * 10,
        b'{"output_ids": [1' + b"0" * 5000 + b"]}",
        "\ud800",
        None,
        3,
        [],
        object(),
    ],
    ids=lambda body: repr(body)[:14],
)
def test_what_is_no_answer_at_all_is_refused(store, body):
    _, segment = opened(store, [4])
    with pytest.raises(trajstore.SchemaError):
        record_response(segment, body)
