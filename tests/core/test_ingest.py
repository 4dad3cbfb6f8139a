"""The checks on the way in."""

import enum
import json

import numpy as np
import pytest

import trajstore
from trajstore.ingest import (
    check_choice,
    check_count,
    check_finite,
    check_group,
    check_id,
    check_json,
    check_label,
    logprob_array,
    token_array,
)


@pytest.mark.parametrize(
    "good", ["a", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "run/1".replace("/", "."), "a" * 200, "A-b_c:d@e+f=g~h"]
)
def test_ids_that_are_safe_in_keys_paths_and_terminals_pass(good):
    assert check_id(good) == good


@pytest.mark.parametrize("bad", ["", ".", "..", "-a", "a/b", "a b", "a\n", "é", "a" * 201, "{a}", None, 3, b"a"])
def test_other_ids_are_refused(bad):
    with pytest.raises(trajstore.SchemaError, match="cannot be an id"):
        check_id(bad)


def test_group_names_are_printable():
    assert check_group(None) is None
    assert check_group("prompt 17 / é") == "prompt 17 / é"
    for bad in ("", "a\n", "x" * 201, 7, "\ud800"):
        with pytest.raises(trajstore.SchemaError, match="cannot name a group"):
            check_group(bad)


@pytest.mark.parametrize("bad", [None, 3, b"v1", "x" * 1001, "\ud800"])
def test_labels_are_short_valid_strings_and_the_field_is_named(bad):
    with pytest.raises(trajstore.SchemaError, match="weight_version must be a string"):
        check_label(bad, name="weight_version")


def test_strings_come_out_plain():
    """msgspec encodes no subclasses of str: found out in the background, that would end the writer."""

    class Text(str):
        __slots__ = ()

    class Version(str, enum.Enum):  # noqa: UP042 - unlike StrEnum's, its str() is not its value
        ONE = "v1"

    for given in (np.str_("v1"), Text("v1"), Version.ONE):
        for plain in (check_label(given, name="n"), check_id(given), check_group(given)):
            assert type(plain) is str
            assert plain == "v1"
        assert type(check_choice(given, ("v1", "v2"), name="version")) is str


@pytest.mark.parametrize("given", [0, 5, np.int64(5), np.uint8(5), 2**63 - 1])
def test_counts_come_out_as_plain_integers(given):
    assert type(check_count(given, name="base")) is int
    assert check_count(given, name="base") == given


@pytest.mark.parametrize("bad", [-1, 1.0, "1", None, True, np.True_, np.float64(1), 2**63, [1]])
def test_other_counts_are_refused(bad):
    with pytest.raises(trajstore.SchemaError, match="base must be a non-negative integer"):
        check_count(bad, name="base")


def test_choices_are_named_when_refused():
    with pytest.raises(trajstore.SchemaError, match="'done' is no finish reason; use one of stop, length"):
        check_choice("done", ("stop", "length"), name="finish reason")


def test_json_is_a_copy_as_json_gives_it_back():
    inner = [1, 2]
    given = {"a": inner, "t": (1, 2), 3: None, "f": 1.5}
    copy = check_json(given, name="metadata")
    inner.append(3)
    assert copy == {"a": [1, 2], "t": [1, 2], "3": None, "f": 1.5}
    assert check_json(None, name="metadata") == {}


@pytest.mark.parametrize(
    "bad",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": object()},
        {"a": np.float32(1)},
        {"a": b"x"},
        {"a": {1, 2}},
        {"a": 2**64},
        {"a": -(2**63) - 1},
        {"a": "\ud800"},
        {"\ud800": 1},
        {(1, 2): 3},
        5,
        "text",
    ],
)
def test_what_json_or_msgpack_cannot_hold_is_refused(bad):
    with pytest.raises(trajstore.SchemaError, match="sampling must be plain JSON data"):
        check_json(bad, name="sampling")


def test_json_that_contains_itself_or_is_too_deep_is_refused():
    loop = {}
    loop["a"] = loop
    deep = {}
    for _ in range(5000):
        deep = {"a": deep}
    slightly = json.loads("[" * 100 + "]" * 100)
    assert check_json({"a": slightly[0]}, name="metadata") == {"a": slightly[0]}
    for bad in (loop, deep, {"a": slightly}):
        with pytest.raises(trajstore.SchemaError, match="plain JSON"):
            check_json(bad, name="metadata")


def test_json_has_a_size_limit():
    assert check_json({"a": "x" * 60_000}, name="metadata")
    with pytest.raises(trajstore.SchemaError, match="limit is 65536"):
        check_json({"a": "x" * 70_000}, name="metadata")


@pytest.mark.parametrize("given", [1, 1.5, True, np.float32(0.5), np.int64(3), np.array(2.0)])
def test_numbers_come_out_as_plain_floats(given):
    assert type(check_finite(given, name="reward")) is float


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "x", [1, 2], 10**400])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(trajstore.SchemaError, match="reward must be"):
        check_finite(bad, name="reward")


@pytest.mark.parametrize(
    "given", [[1, 2], (1, 2), np.array([1, 2], "u1"), np.array([1, 2], ">i8"), np.array([1, 9, 2])[::2]]
)
def test_tokens_come_out_as_int32_copies(given):
    made = token_array(given)
    assert made.dtype == np.int32
    assert made.tolist() == [1, 2]
    assert made.flags.owndata


def test_no_tokens_are_no_error_and_the_largest_id_fits():
    assert token_array([]).shape == (0,)
    assert token_array(np.empty(0, np.float32)).dtype == np.int32
    assert token_array([2**31 - 1]).tolist() == [2**31 - 1]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([1.0, 2.0], "must be integers"),
        ([[1, 2]], "shape"),
        (3, "shape"),
        ([True, False], "must be integers"),
        (["a"], "must be integers"),
        ([[1], [2, 3]], "must be integers"),
        ([1, -1], r"token_ids\[1\] is -1"),
        ([1, 2, 2**31], r"token_ids\[2\] is 2147483648"),
        (np.array([2**63], np.uint64), r"token_ids\[0\] is 9223372036854775808"),
        ([2**70], "must be integers"),
        (None, "shape"),
    ],
)
def test_other_tokens_are_refused(bad, match):
    with pytest.raises(trajstore.SchemaError, match=match):
        token_array(bad)


def test_logprobs_that_are_not_finite_pass_as_they_are():
    """SkyRL #1909."""
    made = logprob_array([float("nan"), float("-inf"), float("inf"), -0.5, None], count=5)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, [np.nan, -np.inf, np.inf, -0.5, np.nan])


def test_logprobs_beyond_float32_become_infinite_without_a_warning():
    np.testing.assert_array_equal(logprob_array(np.array([-1e300, 1e300]), count=2), [-np.inf, np.inf])


@pytest.mark.parametrize("bad", [[-1.0], [-1.0] * 3, [[-1.0, -2.0]], ["a", "b"], [1j, 2j], -1.0, [[1.0], [1.0, 2.0]]])
def test_other_logprobs_are_refused(bad):
    with pytest.raises(trajstore.SchemaError, match="logprobs"):
        logprob_array(bad, count=2)
