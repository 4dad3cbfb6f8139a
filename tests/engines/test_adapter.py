"""The shared core of adapters: where rows lie, what they are, and that a refused delivery leaves its reason alone."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, rows
from tests.engines.vllm_fixtures import events_of, reasons
from trajstore.adapter import (
    EngineCapabilities,
    decode_base64,
    place_rows,
    refusing,
    require_input,
    split_by_origin,
    weight_spans,
)
from trajstore.events import Routing, Tokens, WeightVersionSpan


@pytest.mark.parametrize(
    ("count", "length", "asked", "start"),
    [
        (63, 64, None, 0),  # P + O - 1
        (12, 82, None, 69),  # from row 69 on
        (64, 64, None, 0),  # one surplus row
        (63, 64, 0, 0),
        (64, 64, 0, 0),
        (12, 82, 69, 69),
        (0, 41, 40, 40),
        (0, 1, None, 0),
        (0, 0, None, 0),
    ],
)
def test_rows_are_placed_by_count_and_checked_against_what_was_asked(count, length, asked, start):
    assert place_rows(count, length=length, asked=asked) == start


@pytest.mark.parametrize(("count", "length", "asked"), [(62, 64, 0), (65, 64, None), (65, 64, 0), (12, 82, 68)])
def test_a_count_that_no_start_explains_is_refused(count, length, asked):
    with pytest.raises(trajstore.RoutingError, match=f"{count} routed rows for a request of {length} tokens"):
        place_rows(count, length=length, asked=asked)


def test_an_engine_that_ignores_the_start_returns_all_rows():
    assert place_rows(81, length=82, asked=69, honours_start=False) == 0
    with pytest.raises(trajstore.RoutingError):
        place_rows(81, length=82, asked=69)


@pytest.mark.parametrize(
    ("count", "asked", "start"),
    [
        (12, 69, 69),  # 69 .. 80: all but the last token's
        (0, 81, 81),
        (81, 0, 0),
        (82, 0, 0),  # one too many from the beginning on is the last token's, wherever it comes from
        (82, None, 0),
        (81, 1, None),
        (13, 69, None),  # 68 .. 80, or 69 .. 81: from an engine that gives no last row it is the former
    ],
)
def test_a_row_too_many_begins_one_too_early_where_the_engine_gives_none_for_the_last_token(count, asked, start):
    """verl's tail slice: a count that is off by one shifted every row."""
    if start is None:
        with pytest.raises(trajstore.RoutingError, match=f"begin at row {asked - 1}, which was not asked for"):
            place_rows(count, length=82, asked=asked, surplus=False)
        assert place_rows(count, length=82, asked=asked) == asked, "of another engine it is legal"
    else:
        assert place_rows(count, length=82, asked=asked, surplus=False) == start


@pytest.mark.parametrize(("count", "asked"), [(11, None), (0, None), (11, 70)])
def test_rows_cannot_begin_behind_the_prompt_where_an_engine_leaves_out_prompt_rows_only(count, asked):
    assert place_rows(12, length=82, asked=None if asked is None else 69, prompt=69) == 69
    assert place_rows(count, length=82, asked=asked) == 81 - count
    with pytest.raises(trajstore.RoutingError, match="leaves out rows of the 69 prompt tokens at most"):
        place_rows(count, length=82, asked=asked, prompt=69)


@pytest.mark.parametrize(
    ("start", "options", "parts"),
    [
        (0, {}, [(0, 10, "computed")]),
        (0, {"cached": 4}, [(0, 4, "cached"), (4, 10, "computed")]),
        (3, {"cached": 4}, [(3, 4, "cached"), (4, 13, "computed")]),
        (5, {"cached": 4}, [(5, 15, "computed")]),
        (0, {"cached": 12}, [(0, 10, "cached")]),
        (0, {"cached": None, "prompt": 6}, [(0, 5, "unknown"), (5, 10, "computed")]),
        (5, {"cached": None, "prompt": 6}, [(5, 15, "computed")]),
        (0, {"cached": 4, "recomputed": True}, [(0, 10, "recomputed")]),
    ],
)
def test_rows_of_the_cached_prefix_are_a_recording_of_their_own(start, options, parts):
    made = rows(10)
    split = split_by_origin(made, start, **options)
    assert [(at, at + len(part), origin) for part, at, origin in split] == parts
    np.testing.assert_array_equal(np.concatenate([part for part, _, _ in split]), made)


def test_no_rows_are_no_recording():
    assert split_by_origin(rows(0), 5, cached=9) == split_by_origin(rows(0), 5, recomputed=True) == []


def test_the_echoed_input_must_be_the_segments(embedded):
    trajectory = embedded.create()
    segment = trajectory.segment(context=[1, 2, 3])
    require_input(segment, [1, 2, 3])
    for other in ([1, 2, 4], [1, 2], [1, 2, 3, 4]):
        with pytest.raises(trajstore.Conflict, match="another input"):
            require_input(segment, other)
    for bad in ([1, 2, -3], ["1"], [[1]], None):
        with pytest.raises(trajstore.SchemaError, match="the engine's prompt"):
            require_input(segment, bad)


@pytest.mark.parametrize("form", [str, bytes, bytearray, memoryview])
def test_base64_is_decoded_from_text_and_bytes(form):
    text = base64.b64encode(b"routing")
    assert decode_base64(text.decode() if form is str else form(text), what="x", limit=9) == b"routing"


@pytest.mark.parametrize(
    "text", ["cm91dGluZw", "cm91dGluZw=", "cm91 dGluZw==", "cm91dGluZw==AA", "\u00e9\u00e9\u00e9\u00e9", 5, None]
)
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(trajstore.RoutingError, match="the rows"):
        decode_base64(text, what="the rows", limit=100)


def test_base64_beyond_the_limit_is_not_decoded():
    text = base64.b64encode(bytes(30))
    assert len(decode_base64(text, what="x", limit=30)) == 30
    with pytest.raises(trajstore.RoutingError, match="40 characters of base64; 27 bytes"):
        decode_base64(text, what="x", limit=27)


@pytest.mark.parametrize(
    "given",
    [
        [SimpleNamespace(version="a", start=0, end=2), SimpleNamespace(version="b", start=2, end=5)],
        [{"version": "a", "start": 0, "end": 2}, {"version": "b", "start": 2, "end": 5, "more": 1}],
        [["a", 0, 2], ("b", 2, 5)],
    ],
)
def test_weight_versions_are_read_in_all_forms(given):
    assert weight_spans(given, output=5) == (WeightVersionSpan("a", 0, 2), WeightVersionSpan("b", 2, 5))


def test_numbered_weight_versions_are_labels():
    assert weight_spans([(3, 0, 1)], output=1) == (WeightVersionSpan("3", 0, 1),)
    assert weight_spans(None, output=1) == ()


@pytest.mark.parametrize(
    "given",
    [
        5,
        "ab",
        {},
        [()],
        [None],
        [{}],
        [("a", 0)],
        [("a", 0, 6)],
        [("a", 2, 1)],
        [("a", -1, 1)],
        [("a", 0, 2), ("b", 1, 3)],
        [("a", "0", "1")],
        [(None, 0, 1)],
        [(True, 0, 1)],
    ],
)
def test_weight_versions_that_do_not_fit_the_output_are_refused(given):
    with pytest.raises(trajstore.SchemaError):
        weight_spans(given, output=5)


def test_a_delivery_is_recorded_whole_or_not_at_all(embedded):
    trajectory = embedded.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    bad = rows(3)
    bad[2] = 0
    with pytest.raises(trajstore.RoutingError), refusing(segment):
        segment.record([5, 6], [-1.0, -1.0], routing=[(rows(3), 0, "computed"), (bad, 0, "computed")])
    with pytest.raises(trajstore.SchemaError), refusing(segment):
        segment.record([5, 6], [-1.0], routing=[(rows(3), 0, "computed")])
    with pytest.raises(trajstore.RoutingError), refusing(segment):
        segment.record([5, 6], [-1.0, -1.0], routing=[(rows(5), 0, "computed")])
    assert segment.end == 2
    assert trajectory.rows_held == 0
    segment.close("abort")
    assert events_of(embedded, trajectory, Tokens) == events_of(embedded, trajectory, Routing) == []
    assert [reason[:9] for reason in reasons(embedded, trajectory)] == ["refused: "] * 3


def test_a_refusal_on_a_closed_segment_is_raised_all_the_same(embedded):
    trajectory = embedded.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    segment.close("abort")
    with pytest.raises(trajstore.Conflict, match="is closed"), refusing(segment):
        segment.tokens([1])
    with pytest.raises(ZeroDivisionError), refusing(trajectory.segment()):
        raise ZeroDivisionError
    assert reasons(embedded, trajectory) == ["not recorded"]


def test_a_refusal_is_shortened_and_any_text_can_be_kept(embedded):
    trajectory = embedded.create(routing=SPEC)
    with trajectory.segment(context=[1]) as segment, pytest.raises(trajstore.RoutingError), refusing(segment):
        raise trajstore.RoutingError("x" * 10_000)
    with trajectory.segment() as segment, pytest.raises(trajstore.SchemaError), refusing(segment):
        raise trajstore.SchemaError("half of a pair: \ud800 " * 100)
    shortened, cleaned = reasons(embedded, trajectory)
    assert shortened == ("refused: " + "x" * 10_000)[:500]
    assert cleaned == ("refused: " + "half of a pair: ? " * 100)[:500]


def test_what_a_version_loses_is_logged(caplog):
    known = EngineCapabilities(
        engine="vllm",
        version="0.1",
        routing_on_abort=False,
        start_offset=False,
        dtype="int32",
        weight_spans=False,
        losses=("it loses rows", "and tokens"),
    )
    known.warn()
    assert [record.getMessage() for record in caplog.records] == ["vllm/0.1: it loses rows", "vllm/0.1: and tokens"]
    assert known.label == "vllm/0.1"
