"""The checks that data passes once, on its way in; behind them it is trusted. Routing has its own in `routing.py`.

They return plain `str`, `int` and `float`: msgspec refuses subclasses and NumPy's scalars, and the background writer,
which encodes, is no place to find that out.
"""

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError
from trajstore.events import WeightVersionSpan
from trajstore.limits import GROUP_LENGTH, ID_LENGTH, JSON_BYTES, JSON_NESTING, LABEL_LENGTH, SPANS

__all__ = [
    "check_choice",
    "check_count",
    "check_finite",
    "check_group",
    "check_id",
    "check_json",
    "check_label",
    "check_spans",
    "logprob_array",
    "require_id",
    "token_array",
]

_Choice = TypeVar("_Choice", bound=str)

_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:@+=~-]{{0,{ID_LENGTH - 1}}}")


def check_id(text: str) -> str:
    """A trajectory or run id that is safe in keys, paths and terminals.

    Raises:
        SchemaError: other characters, empty, or longer than 200.
    """
    if not isinstance(text, str) or _ID.fullmatch(text) is None:
        raise SchemaError(
            f"{text!r} cannot be an id: use 1 to 200 letters, digits or ._:@+=~- and begin with a letter or digit"
        )
    return str.__str__(text)


def require_id(id: object) -> None:
    """Whoever asks for a trajectory names it by a string.

    Raises:
        SchemaError: something else.
    """
    if not isinstance(id, str):
        raise SchemaError(f"a trajectory is named by its id, a string, not by {type(id).__name__} {id!r:.80}")


def check_group(text: str | None) -> str | None:
    """A group's name: 1 to 200 printable characters.

    Raises:
        SchemaError: anything else.
    """
    if text is not None and not (isinstance(text, str) and 0 < len(text) <= GROUP_LENGTH and text.isprintable()):
        raise SchemaError(f"{text!r} cannot name a group: use 1 to 200 printable characters")
    return None if text is None else str.__str__(text)


def check_label(text: str, *, name: str) -> str:
    """A short label (engine, weight version, reason, source): up to 1000 characters of valid Unicode.

    Raises:
        SchemaError: no string, longer, or with lone surrogates.
    """
    if not isinstance(text, str) or len(text) > LABEL_LENGTH or not (text.isascii() or _is_unicode(text)):
        shown = ascii(text)[:80]
        raise SchemaError(f"{name} must be a string of at most 1000 characters of valid Unicode, not {shown}")
    return str.__str__(text)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_choice(value: str, choices: Sequence[_Choice], *, name: str) -> _Choice:
    """The one of `choices` that this is.

    Raises:
        SchemaError: none of them.
    """
    found = next((choice for choice in choices if choice == value), None)
    if found is None:
        raise SchemaError(f"{value!r} is no {name}; use one of {', '.join(choices)}")
    return found


def check_count(value: int, *, name: str) -> int:
    """A non-negative integer that fits 63 bits, NumPy's integers included, as a plain int.

    Raises:
        SchemaError: anything else.
    """
    try:
        number = -1 if isinstance(value, bool | np.bool_) else int(operator.index(value))
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 63:
        raise SchemaError(f"{name} must be a non-negative integer, not {value!r}")
    return number


def check_json(value: Mapping[str, Any] | None, *, name: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A copy of a mapping as JSON would give it back. The hot log keeps headers as msgpack, packs as JSON.

    Raises:
        SchemaError: not JSON (NaN and infinities are not), beyond msgpack (integers of more than 64 bits), not valid
            Unicode, or above `limit` bytes.
    """
    if value is None:
        return {}
    try:
        text = json.dumps(dict(value), allow_nan=False)
        result: dict[str, Any] = json.loads(text)
        msgspec.msgpack.encode(result)
        if _nested(result) > JSON_NESTING:
            raise ValueError(f"nested more than {JSON_NESTING} deep")  # another reader's stack may end earlier
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise SchemaError(f"{name} must be plain JSON data: {error}") from error
    if len(text) > limit:
        raise SchemaError(f"{name} takes {len(text)} bytes as JSON, the limit is {limit}; store large data elsewhere")
    return result


def _nested(value: Any) -> int:
    """Levels of lists and mappings."""
    levels, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        levels += 1
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return levels


def check_finite(value: float, *, name: str) -> float:
    """A finite number, for headers.

    Raises:
        SchemaError: NaN, infinite, or no number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise SchemaError(f"{name} must be a number, not {value!r}") from error
    if not math.isfinite(number):
        raise SchemaError(f"{name} must be finite, not {number}; leave it out where there is none")
    return number


def token_array(token_ids: npt.ArrayLike, *, name: str = "token_ids") -> npt.NDArray[np.int32]:
    """Token ids as int32 `[n]`, a copy.

    Raises:
        SchemaError: not one-dimensional, not integers, or outside `[0, 2**31)`.
    """
    try:
        given = np.asarray(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor on another device
        raise SchemaError(f"{name} must be integers of shape [n]: {error}") from error
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise SchemaError(f"{name} must be integers of shape [n], not {given.dtype} of shape {list(given.shape)}")
    # Not `given.min()`, which goes through Python.
    if given.size and (int(np.minimum.reduce(given)) < 0 or int(np.maximum.reduce(given)) >= 1 << 31):
        bad = int(np.argmax((given < 0) | (given >= 1 << 31)))
        raise SchemaError(f"{name}[{bad}] is {given[bad]}, outside [0, 2**31)")
    return np.array(given, _INT32, copy=True)


def logprob_array(logprobs: npt.ArrayLike, *, count: int) -> npt.NDArray[np.float32]:
    """Logprobs as float32 `[count]`, natural log; NaN and infinities are kept, what float32 cannot hold is infinite.

    Raises:
        SchemaError: not numbers, or not one per token.
    """
    try:
        numbers = np.asarray(logprobs)
        if numbers.dtype == _FLOAT32:
            given = np.array(numbers, copy=True)
        elif numbers.size and numbers.dtype.kind not in "fiuO":
            raise SchemaError(f"logprobs must be real numbers, not {numbers.dtype}")
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                given = np.array(numbers, _FLOAT32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that requires grad
        if isinstance(error, SchemaError):
            raise
        raise SchemaError(f"logprobs must be numbers: {error}") from error
    if given.shape != (count,):
        raise SchemaError(f"logprobs have shape {list(given.shape)}, expected [{count}], one per token")
    return given


def check_spans(
    spans: Sequence[WeightVersionSpan | tuple[str, int, int]], output: int
) -> tuple[WeightVersionSpan, ...]:
    """Spans of weight versions over `output` tokens, as a segment's close keeps them.

    Raises:
        SchemaError: no spans `(version, start, end)`, or they do not ascend within the output.
    """
    if not isinstance(spans, Sequence):
        raise SchemaError(f"weight_versions must be a sequence of spans, not {spans!r:.80}")
    if len(spans) > SPANS:
        raise SchemaError(f"{len(spans)} weight version spans in one segment, the limit is {SPANS}; join equal ones")
    result: list[WeightVersionSpan] = []
    for span in spans:
        parts = msgspec.structs.astuple(span) if isinstance(span, WeightVersionSpan) else span
        if not isinstance(parts, tuple | list) or len(parts) != 3:
            raise SchemaError(f"a weight version span is (version, start, end), not {span!r:.80}")
        version, first, stop = parts
        start, end = (check_count(at, name="an end of a weight version span") for at in (first, stop))
        earlier = result[-1].end if result else 0
        if not earlier <= start <= end <= output:
            raise SchemaError(
                f"weight version span {(version, start, end)} must ascend within the segment's {output} output tokens"
            )
        result.append(WeightVersionSpan(check_label(version, name="weight version"), start, end))
    return tuple(result)
