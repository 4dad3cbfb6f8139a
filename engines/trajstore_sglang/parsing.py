"""What SGLang answers, as it lies on the wire, and the `Reply` that it means. No store here.

The shapes are those of `/generate`, one JSON object, a list of them, or a chunk of a stream, and of the OpenAI routes
with their `sglext`. Observed with 0.5.23; keys that older versions leave out are optional.
"""

import json
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore import SchemaError
from trajstore.adapter import weight_spans
from trajstore.events import FinishReason, WeightVersionSpan
from trajstore.ingest import check_count, check_label, token_array
from trajstore_sglang.reply import Reply

__all__ = ["UNLABELLED", "Answer", "parse_batch", "parse_response"]

UNLABELLED = "default"
"""What SGLang calls weights that nobody has labelled."""

Answer = str | bytes | bytearray | memoryview | dict[str, Any]

_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "abort",
    "tool_calls": "stop",
    "function_call": "stop",
    "content_filter": "stop",
}
_SHOWN = 300
"""Characters of what SGLang says that a message repeats."""


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Finish(msgspec.Struct):
    type: str
    message: str | None = None
    status_code: int | None = None


class _Logprob(msgspec.Struct, array_like=True, gc=False):
    """`[logprob, token_id, text]`; the logprob of a first input token is null."""

    logprob: float | None
    token_id: int


class _Meta(msgspec.Struct):
    finish_reason: _Finish | str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_token_logprobs: list[_Logprob] | None = None
    output_token_logprobs: list[_Logprob] | None = None
    cached_tokens: int | None = None
    num_retractions: int | None = None
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None
    routed_experts: str | None = None


class _ChatLogprob(msgspec.Struct, gc=False):
    logprob: float | None


class _Logprobs(msgspec.Struct):
    """Of a completion `token_logprobs`, of a chat `content`."""

    token_logprobs: list[float | None] | None = None
    content: list[_ChatLogprob] | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    response_token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    meta_info: _Meta | None = None


class _CachedDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedDetails | None = None


class _Metadata(msgspec.Struct):
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None


class _SglExt(msgspec.Struct):
    routed_experts: str | None = None
    input_ids: list[int] | None = None
    output_ids: list[list[int]] | None = None


class _Body(msgspec.Struct):
    """Any answer: of `/generate` (`meta_info`), of an OpenAI route (`choices`), or an error in one of its shapes."""

    output_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    meta_info: _Meta | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    metadata: _Metadata | None = None
    sglext: _SglExt | None = None
    error: Any = None
    detail: Any = None
    object: Any = None
    message: Any = None


_BODY = msgspec.json.Decoder(_Body)
_BODIES = msgspec.json.Decoder(list[_Body] | _Body)


def parse_response(response: Answer) -> Reply:
    """One answer of `/generate` or of an OpenAI route, or one chunk of a stream of `/generate`.

    Args:
        response: the body, or the object that it holds.

    Raises:
        SchemaError: an error of SGLang's, which the message repeats; several outputs; no such answer at all.
    """
    return _reply(_decode(response, _BODY, _Body))


def parse_batch(response: Answer | list[Any]) -> list[Reply]:
    """The answer of `/generate` to a batch or to n > 1, a JSON list, in its order.

    Raises:
        SchemaError: as `parse_response`, or no list.
    """
    bodies = _decode(response, _BODIES, list[_Body] | _Body)
    if isinstance(bodies, _Body):
        _require_no_error(bodies)
        raise SchemaError("SGLang's answer is one output, not a list of them; use record_response for it")
    return [_reply(body) for body in bodies]


def _decode(response: Any, decoder: "msgspec.json.Decoder[Any]", shape: Any) -> Any:
    try:
        if isinstance(response, str | bytes | bytearray | memoryview):
            try:
                return decoder.decode(response)
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                response = json.loads(response if isinstance(response, str) else bytes(response))  # NaN, Infinity
        return msgspec.convert(response, shape)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise SchemaError(f"this is no answer of SGLang: {str(error)[:_SHOWN]}") from error


def _reply(body: _Body) -> Reply:
    _require_no_error(body)
    if body.choices is not None:
        return _of_choices(body)
    if body.meta_info is None:
        raise SchemaError("this is no answer of SGLang: it has neither meta_info nor choices nor an error")
    return _of_meta(body.meta_info, body.output_ids, body.prompt_token_ids)


def _require_no_error(body: _Body) -> None:
    for found in (body.error, body.detail, body.message if body.object == "error" else None):
        if found is not None:
            said = found.get("message", found) if isinstance(found, dict) else found
            raise SchemaError(f"SGLang refused the request, or failed: {str(said)[:_SHOWN]}")


def _of_meta(meta: _Meta, output_ids: list[int] | None, prompt_ids: list[int] | None) -> Reply:
    pairs = meta.output_token_logprobs
    probs = _logprobs([pair.logprob for pair in pairs]) if pairs is not None else None
    probed = token_array([pair.token_id for pair in pairs], name="output_token_logprobs") if pairs else None
    if output_ids is None and pairs is None:
        raise SchemaError("SGLang's answer has no output_ids; ask with return_logprob, whose entries name the tokens")
    ids = probed if output_ids is None and probed is not None else token_array(output_ids or [], name="output_ids")
    asked = meta.input_token_logprobs or []
    if prompt_ids is None and asked and len(asked) == meta.prompt_tokens:
        prompt_ids = [pair.token_id for pair in asked]
    return _made(
        meta,
        *_finish(meta.finish_reason),
        ids=ids,
        probs=probs,
        probed=probed,
        prompt_ids=prompt_ids,
        route="generate",
    )


def _of_choices(body: _Body) -> Reply:
    choices, extra, usage = body.choices or [], body.sglext or _SglExt(), body.usage or _Usage()
    if len(choices) != 1:
        raise SchemaError(
            f"{len(choices)} choices: SGLang's OpenAI routes return the routing of one; ask for n = 1, or use /generate"
        )
    choice = choices[0]
    ids = choice.token_ids if choice.token_ids is not None else choice.response_token_ids
    if ids is None and extra.output_ids is not None and len(extra.output_ids) == 1:
        ids = extra.output_ids[0]
    prompt_ids = choice.prompt_token_ids if choice.prompt_token_ids is not None else extra.input_ids
    if choice.meta_info is not None:
        return _of_meta(choice.meta_info, ids, prompt_ids)
    if ids is None:
        raise SchemaError(
            "SGLang's answer has no token ids, and text does not say them: ask a completion with return_token_ids, a "
            "chat with that and return_meta_info, or use /generate"
        )
    found = choice.logprobs or _Logprobs()
    given = found.token_logprobs
    if given is None and found.content is not None:
        given = [one.logprob for one in found.content]
    metadata, details = body.metadata or _Metadata(), usage.prompt_tokens_details or _CachedDetails()
    meta = _Meta(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=details.cached_tokens,
        weight_version=metadata.weight_version,
        weight_versions=metadata.weight_versions,
        routed_experts=extra.routed_experts,
    )
    return _made(
        meta,
        *_finish(choice.finish_reason),
        ids=token_array(ids, name="token ids"),
        probs=None if given is None else _logprobs(given),
        probed=None,
        prompt_ids=prompt_ids,
        route="openai",
    )


def _made(
    meta: _Meta,
    finish: FinishReason | None,
    message: str,
    *,
    ids: npt.NDArray[np.int32],
    probs: npt.NDArray[np.float32] | None,
    probed: npt.NDArray[np.int32] | None,
    prompt_ids: list[int] | None,
    route: Literal["generate", "openai"],
) -> Reply:
    total = (
        len(ids) if meta.completion_tokens is None else check_count(meta.completion_tokens, name="completion_tokens")
    )
    if probs is not None and len(probs) == 0 < total:
        probs = None  # an empty list is how some replies say that none were asked for
    return Reply(
        finish_reason=finish,
        message=message,
        token_ids=ids,
        logprobs=probs,
        logprob_ids=probed,
        total=total,
        prompt_tokens=_count(meta.prompt_tokens, "prompt_tokens"),
        prompt_token_ids=None if prompt_ids is None else token_array(prompt_ids, name="the echoed prompt"),
        routed_experts=meta.routed_experts,
        cached_tokens=_count(meta.cached_tokens, "cached_tokens"),
        retractions=_count(meta.num_retractions, "num_retractions"),
        weight_version=check_label(meta.weight_version or "", name="weight_version"),
        weight_versions=_spans(meta, total),
        route=route,
    )


def _finish(reason: _Finish | str | None) -> tuple[FinishReason | None, str]:
    if reason is None:
        return None, ""
    told = reason if isinstance(reason, _Finish) else _Finish(type=reason)
    found = _FINISH_REASONS.get(told.type)
    if found is None:
        raise SchemaError(f"SGLang's finish reason {told.type[:_SHOWN]!r} is none of {', '.join(_FINISH_REASONS)}")
    message = (told.message or "")[:_SHOWN].encode("utf-8", "replace").decode()
    return ("error" if found == "abort" and told.status_code is not None else found), message


def _spans(meta: _Meta, total: int) -> tuple[WeightVersionSpan, ...]:
    """Spans over the output; none where nobody labelled the weights, so that the label of the segment stands."""
    spans = weight_spans(meta.weight_versions, output=total)
    if not spans and meta.weight_version and total:
        spans = (WeightVersionSpan(meta.weight_version, 0, total),)
    return () if all(span.version == UNLABELLED for span in spans) else spans


def _logprobs(values: list[float | None]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([np.nan if value is None else value for value in values], np.float64).astype(np.float32)


def _count(value: int | None, name: str) -> int | None:
    return None if value is None else check_count(value, name=name)
