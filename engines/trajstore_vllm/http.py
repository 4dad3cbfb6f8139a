"""Recording what vLLM's HTTP server replied: `/inference/v1/generate`, `/v1/completions` and `/v1/chat/completions`.

A reply comes from a network: it is decoded into the structs below and nothing else, never unpickled, and no size that
it claims is believed before its bytes are there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore import Conflict, RoutingError, SchemaError, SegmentWriter
from trajstore.adapter import decode_base64, refusing, weight_spans
from trajstore.ingest import check_count, logprob_array, token_array
from trajstore_vllm.delivery import Delivery, Known, Rows, known_of, read_finish_reason, record_delivery

__all__ = ["decode_npy", "parse_http", "record_http"]

_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[iu][1248])', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,12}), (\d{1,12}), (\d{1,12})\), \}\s*"
)
"""What `numpy.save` writes before an integer array of three axes. Read like this, no header is evaluated."""

_HEADER_BYTES = 1 << 12
"""More than any such header takes."""


class _CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _TokenLogprob(msgspec.Struct):
    logprob: float | None = None


class _Logprobs(msgspec.Struct):
    """`content` on the generate and chat routes, `token_logprobs` on the completions route."""

    content: list[_TokenLogprob] | None = None
    token_logprobs: list[float | None] | None = None

    def values(self) -> list[float | None] | None:
        return self.token_logprobs if self.content is None else [one.logprob for one in self.content]


class _Span(msgspec.Struct):
    version: str | int
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int = 0
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    routed_experts: str | None = None
    prompt_token_ids: list[int] | None = None
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    """A whole reply, or one event of a streamed one."""

    choices: list[_Choice] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_routed_experts: str | None = None
    usage: _Usage | None = None
    error: Any = None
    message: str | None = None


class _Gathered(NamedTuple):
    """One choice, put together."""

    choice: _Choice
    token_ids: list[int]
    logprobs: list[float | None] | None
    prompt: list[int] | None
    prompt_routed: str | None
    usage: _Usage | None
    alone: bool
    failure: str


def record_http(
    segment: SegmentWriter,
    body: bytes | bytearray | memoryview | str | Mapping[str, Any],
    *,
    index: int = 0,
    prompt_start: int | None = None,
) -> bool:
    """Write a reply, of one choice, to the segment whose input was the request's prompt, and close the segment.

    The OpenAI routes return token ids only where the request says `"return_token_ids": true`, logprobs where it says
    `"logprobs"`, and routed experts only where it does not stream.

    Args:
        body: the reply's body, or as JSON decoded it; of a streamed reply the whole transcript.
        index: which choice.
        prompt_start: `routed_experts_prompt_start` of the request. None: what the segment's sampling parameters say,
            else inferred from the number of rows.

    Returns:
        True: the segment is closed. A transcript without a finish reason, as an abort leaves it, closes it as `abort`.

    Raises:
        Conflict: the request had another prompt than the segment's input.
        RoutingError, SchemaError: the body is malformed, reports an error, or cannot be what the request brought;
            nothing of it was written, and the segment says why.
        TrajstoreError: what the segment's methods raise.
    """
    with refusing(segment):
        known = known_of(segment, prompt_start)
        return record_delivery(segment, parse_http(body, known, index=index), known)


def parse_http(
    body: bytes | bytearray | memoryview | str | Mapping[str, Any], known: Known, *, index: int = 0
) -> Delivery:
    """What a reply brings to a segment without output.

    Args:
        body, index: as in `record_http`.
        known: what the segment knows.

    Raises:
        Conflict: the server counted another number of prompt tokens.
        RoutingError, SchemaError: the body is malformed or reports an error.
    """
    if known.output:
        raise SchemaError(f"the segment has {known.output} output tokens already; a reply is recorded whole")
    if isinstance(body, memoryview) and not (body.contiguous and body.ndim == body.itemsize == 1):
        raise SchemaError(f"a body's memoryview must be of contiguous bytes, not {body.format} of shape {body.shape}")
    streamed = _is_transcript(body)
    if isinstance(body, bytes | bytearray | memoryview | str) and streamed:
        got = _gather_stream(body, index)
    else:
        got = _gather(_reply(body), index)
    choice, count = got.choice, len(got.token_ids)
    if got.usage is not None:
        _check_usage(got.usage, known, count if got.alone else None)
    if got.logprobs is not None and len(got.logprobs) != count:
        raise SchemaError(f"{len(got.logprobs)} logprobs for {count} output tokens")
    finish_reason = read_finish_reason("error" if got.failure else choice.finish_reason)
    absent = got.failure or _why_absent(finish_reason, count, streamed=streamed)
    limit = (known.prompt + count) * known.cells * 8 + _HEADER_BYTES
    return Delivery(
        prompt=None if got.prompt is None else token_array(got.prompt, name="prompt_token_ids"),
        token_ids=token_array(got.token_ids),
        logprobs=None if got.logprobs is None else _logprob_array(got.logprobs),
        finish_reason=finish_reason or "abort",
        routed_experts=_rows(choice.routed_experts, limit, known),
        prompt_routed_experts=_rows(got.prompt_routed, limit, known),
        cached_tokens=_cached_tokens(got.usage, known),
        weight_versions=weight_spans(choice.weight_versions, output=count),
        absent=absent,
    )


def decode_npy(text: object, *, limit: int) -> Rows:
    """The integer array `[rows, H, K]` in base64 of a `.npy` file, over the decoded bytes without a copy.

    Args:
        limit: bytes of the file at most.

    Raises:
        RoutingError: anything else, a pickled array among it.
    """
    data = decode_base64(text, what="routed_experts", limit=limit)
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise RoutingError("routed_experts is not a .npy file of a known version")
    at = 10 if data[6] == 1 else 12
    begin = at + int.from_bytes(data[8:at], "little")
    match = _HEADER.fullmatch(data[at:begin]) if begin <= min(len(data), _HEADER_BYTES) else None
    if match is None:
        shown = data[at : min(begin, at + 80)]
        raise RoutingError(f"routed_experts is no integer array of three axes; its .npy header begins {shown!r}")
    dtype = np.dtype(match[1].decode())
    shape = (int(match[3]), int(match[4]), int(match[5]))
    if math.prod(shape) * dtype.itemsize != len(data) - begin:
        raise RoutingError(
            f"routed_experts claims {dtype} of shape {list(shape)} and has {len(data) - begin} bytes; it was cut"
        )
    order: Any = "F" if match[2] == b"True" else "C"
    rows: Rows = np.frombuffer(data, dtype, offset=begin).reshape(shape, order=order)
    return rows


def _reply(body: object) -> _Reply:
    try:
        if isinstance(body, Mapping):
            return msgspec.convert(dict(body), _Reply)
        if isinstance(body, bytes | bytearray | memoryview | str):
            return msgspec.json.decode(body, type=_Reply)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SchemaError(f"the body is no reply of vLLM: {error}") from error
    raise SchemaError(f"a reply's body is bytes, text or a mapping, not {type(body).__name__}")


def _is_transcript(body: object) -> bool:
    head = body[:64] if isinstance(body, str | bytes | bytearray | memoryview) else b""
    start = head.encode(errors="replace") if isinstance(head, str) else bytes(head)
    return start.lstrip().startswith((b"data:", b"event:", b": "))


def _events(body: bytes | bytearray | memoryview | str) -> Iterator[_Reply]:
    """The replies of a server-sent event stream, one line of data each, up to `[DONE]` or to where it was cut."""
    try:
        lines = (body.encode() if isinstance(body, str) else bytes(body)).splitlines()
    except UnicodeError as error:
        raise SchemaError(f"the transcript is not valid Unicode: {error}") from error
    for line in lines:
        name, _, value = line.partition(b":")
        if name != b"data":
            if name not in (b"", b"event", b"id", b"retry"):
                raise SchemaError(f"the transcript has a line that is no server-sent event: {bytes(line[:80])!r}")
            continue
        if value.strip() == b"[DONE]":
            return
        yield _reply(value)


def _gather(reply: _Reply, index: int) -> _Gathered:
    if reply.choices is None:
        raise SchemaError(f"the server did not answer with an output: {_failure(reply) or 'the reply has no choices'}")
    choice = _choice(reply, index)
    if choice is None:
        raise SchemaError(f"the reply has no choice {index}; it has {[one.index for one in reply.choices][:8]}")
    if choice.token_ids is None:
        raise SchemaError('the reply has no output token ids; ask for them with "return_token_ids": true')
    if choice.finish_reason is None:
        raise SchemaError(f"choice {index} of the reply has no finish reason")
    prompt = choice.prompt_token_ids if reply.prompt_token_ids is None else reply.prompt_token_ids
    values = None if choice.logprobs is None else choice.logprobs.values()
    alone = len(reply.choices) == 1
    return _Gathered(choice, choice.token_ids, values, prompt, reply.prompt_routed_experts, reply.usage, alone, "")


def _gather_stream(body: bytes | bytearray | memoryview | str, index: int) -> _Gathered:
    """The deltas of one choice."""
    whole = _Choice(index=index)
    token_ids: list[int] = []
    logprobs: list[float | None] = []
    prompt: list[int] | None = None
    prompt_routed: str | None = None
    usage: _Usage | None = None
    seen: set[int] = set()
    failure, told, silent = "", False, False
    for reply in _events(body):
        failure = _failure(reply) or failure
        usage = reply.usage or usage
        prompt = prompt if reply.prompt_token_ids is None else reply.prompt_token_ids
        prompt_routed = reply.prompt_routed_experts or prompt_routed
        seen.update(choice.index for choice in reply.choices or ())
        choice = _choice(reply, index)
        if choice is None:
            continue
        if whole.finish_reason is not None:
            raise SchemaError(f"the transcript goes on with choice {index} after its finish reason")
        new = choice.token_ids or []
        told = told or choice.token_ids is not None
        values = None if choice.logprobs is None else choice.logprobs.values()
        silent = silent or (values is None and len(new) > 0)
        token_ids += new
        logprobs += values or []
        prompt = choice.prompt_token_ids or prompt
        whole = msgspec.structs.replace(
            choice,
            routed_experts=choice.routed_experts or whole.routed_experts,
            weight_versions=choice.weight_versions or whole.weight_versions,
        )
    if not told:
        raise SchemaError(
            f"the transcript has no output token ids of choice {index}"
            + (f": {failure}" if failure else '; ask for them with "return_token_ids": true')
        )
    if silent and logprobs:
        raise SchemaError("some events of the transcript have logprobs and some have none")
    values = None if silent or (token_ids and not logprobs) else logprobs
    return _Gathered(whole, token_ids, values, prompt, prompt_routed, usage, len(seen) == 1, failure)


def _choice(reply: _Reply, index: int) -> _Choice | None:
    found = [choice for choice in reply.choices or () if choice.index == index]
    if len(found) > 1:
        raise SchemaError(f"two choices of the reply have index {index}")
    return found[0] if found else None


def _failure(reply: _Reply) -> str:
    """What an error reply says; "" for others. Two shapes are in use: with `error`, and with `message` alone."""
    error = reply.error
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return f"{error or reply.message or ''!s:.300}" if error or reply.message else ""


def _check_usage(usage: _Usage, known: Known, count: int | None) -> None:
    if usage.prompt_tokens is not None and usage.prompt_tokens != known.prompt:
        raise Conflict(
            f"the server counted {usage.prompt_tokens} prompt tokens, the segment's input has {known.prompt}; send "
            "token ids, not text that the server tokenizes again"
        )
    if count is not None and usage.completion_tokens not in (None, count):
        raise SchemaError(f"the reply has {count} output token ids of {usage.completion_tokens}; it was cut")


def _cached_tokens(usage: _Usage | None, known: Known) -> int | None:
    details = None if usage is None else usage.prompt_tokens_details
    if details is None or details.cached_tokens is None:
        return None
    cached = check_count(details.cached_tokens, name="cached_tokens")
    if cached > known.prompt:
        raise SchemaError(f"{cached} cached tokens of a prompt of {known.prompt}")
    return cached


def _logprob_array(values: list[float | None]) -> npt.NDArray[np.float32]:
    return logprob_array([math.nan if value is None else value for value in values], count=len(values))


def _rows(text: str | None, limit: int, known: Known) -> Rows | None:
    return None if text is None or known.cells == 0 else decode_npy(text, limit=limit)


def _why_absent(finish_reason: str | None, count: int, *, streamed: bool) -> str:
    if finish_reason is None:
        return (
            "the stream ended without a finish reason, as that of an aborted request does: vLLM sends no routing then. "
            "Do not stream, or use the Python API"
        )
    if count == 0:
        return f"the request ended ({finish_reason}) before its first token"
    if streamed:
        return "the server streamed no routing: the OpenAI routes return it to requests only that do not stream"
    return "the server returned none: is it started with --enable-return-routed-experts?"
