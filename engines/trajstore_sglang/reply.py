"""What a reply of SGLang says, as plain data, and what follows for a recording. Pure: no JSON and no store here."""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore import RoutingError, SchemaError
from trajstore.adapter import decode_base64, place_rows, split_by_origin
from trajstore.events import FinishReason, WeightVersionSpan
from trajstore.routing import Origin, RoutingSpec

__all__ = ["Reply", "absence", "fresh_tokens", "routed_recordings"]


class Reply(NamedTuple):
    """What a reply says of one request: P prompt tokens, O output tokens. A chunk of a stream may hold a part of them.

    Attributes:
        finish_reason: stop, length, abort or error; None in a chunk that is not the last.
        message: what SGLang says about an abort.
        token_ids: int32 `[n]`, n = O, or the new ones of a chunk.
        logprobs: float32 `[m]`, NaN where SGLang has null; None where it gives none.
        logprob_ids: int32 `[m]`, the tokens of `logprobs`; None where it does not name them.
        total: O so far, by the engine's own count.
        prompt_tokens: P, None where not told.
        prompt_token_ids: int32 `[P]`, the input as the engine echoes it; None where it does not.
        routed_experts: base64 of int32 `[rows, H, K]` over all H hidden layers; None where the key is missing.
        cached_tokens: input tokens from the prefix cache, None where not told.
        retractions: how often the request's state was dropped and computed again, None where not told.
        weight_version: label of the weights when the reply was made; "" where not told.
        weight_versions: which weights sampled which output tokens, empty where not told.
        route: "generate", or "openai" where it does not hold what `/generate` tells in `meta_info`.
    """

    finish_reason: FinishReason | None
    message: str
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32] | None
    logprob_ids: npt.NDArray[np.int32] | None
    total: int
    prompt_tokens: int | None
    prompt_token_ids: npt.NDArray[np.int32] | None
    routed_experts: str | None
    cached_tokens: int | None
    retractions: int | None
    weight_version: str
    weight_versions: tuple[WeightVersionSpan, ...]
    route: Literal["generate", "openai"]


def fresh_tokens(
    reply: Reply, held: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
    """The tokens of a reply that are new, with their logprobs.

    A chunk of a stream holds all tokens so far, or with `--incremental-streaming-output` those since the chunk before
    it. Of a request that was aborted in the queue, the incremental form repeats the last token and all logprobs.

    Args:
        held: int32 `[h]`, output tokens of the chunks before it.

    Returns:
        int32 `[n]` and float32 `[n]` or None; empty where the reply has fewer tokens than there were before.

    Raises:
        SchemaError: tokens are missing, or tokens and logprobs do not belong together.
    """
    count = reply.total - len(held)
    if count <= 0:
        return np.empty(0, np.int32), None
    found = _behind(reply.token_ids, held, reply.total)
    if found is None and reply.logprob_ids is not None:  # an abort in the queue, after chunks that were never sent
        found = _behind(reply.logprob_ids, held, reply.total)
    if found is None:
        raise SchemaError(
            f"{len(reply.token_ids)} token ids for an output of {reply.total} tokens, {len(held)} of which came "
            "before: a part of the output is missing"
        )
    if reply.logprobs is None:
        return found, None
    for probs, ids in (
        (reply.logprobs[part], None if reply.logprob_ids is None else reply.logprob_ids[part])
        for part in (slice(len(held), reply.total), slice(0, count))  # a token may come again: the whole list first
    ):
        if len(probs) == count and (ids is None or np.array_equal(ids, found)):
            return found, probs
    raise SchemaError(
        f"{len(reply.logprobs)} logprobs do not belong to the {count} new of {reply.total} output tokens: another "
        "number, or of other token ids"
    )


def routed_recordings(
    reply: Reply, spec: RoutingSpec, *, prompt: int, output: int, start_len: int | None = None
) -> list[tuple[npt.NDArray[np.integer], int, Origin]]:
    """The routing of a reply as recordings `(rows, start, origin)`, `rows` int32 `[n, H, K]` over the decoded bytes.

    Args:
        prompt, output: tokens P and O.
        start_len: `routed_experts_start_len` of the request, to check the rows against; None to infer it from their
            number. Up to 0.5.11 SGLang takes it and returns all rows all the same.

    Raises:
        RoutingError: not base64, not whole rows, or not as many as there must be: SGLang leaves out rows of the prompt
            only, and gives none for the last token.
    """
    row = spec.num_hidden_layers * spec.top_k * 4
    data = decode_base64(reply.routed_experts, what="SGLang's routed_experts", limit=(prompt + output) * row)
    if len(data) % row:
        raise RoutingError(
            f"SGLang's routed_experts has {len(data)} bytes, not a whole number of rows of {row} "
            f"({spec.num_hidden_layers} layers x {spec.top_k} int32): it was cut, or the spec is another model's"
        )
    rows = np.frombuffer(data, "<i4").reshape(-1, spec.num_hidden_layers, spec.top_k)
    start = place_rows(
        len(rows), length=prompt + output, asked=start_len, honours_start=False, surplus=False, prompt=prompt
    )
    if reply.retractions is None:  # nobody says that it was not retracted
        parts = split_by_origin(rows, start, cached=reply.cached_tokens or 0)
        return [(part, at, "unknown" if origin == "computed" else origin) for part, at, origin in parts]
    return split_by_origin(rows, start, cached=reply.cached_tokens, prompt=prompt, recomputed=reply.retractions > 0)


def absence(reply: Reply) -> str:
    """Why a reply most likely has no routing."""
    if reply.finish_reason == "error":
        return f"SGLang failed: {reply.message}"
    if reply.finish_reason == "abort" and reply.route == "generate" and reply.prompt_tokens is None:
        if reply.total == 0:
            return "aborted in the queue: it never ran, or was retracted and lost what it had"
        return "retracted, then aborted in the queue: its rows are gone, and its output may be cut to a multiple of 50"
    return (
        "SGLang returned none: its server runs without --enable-return-routed-experts, or the request did not ask "
        "with return_routed_experts"
    )


def _behind(ids: npt.NDArray[np.int32], held: npt.NDArray[np.int32], total: int) -> npt.NDArray[np.int32] | None:
    """Tokens `[len(held), total)`, of ids from the beginning on or of just these; None if they are not there."""
    if len(ids) >= total and np.array_equal(ids[: len(held)], held):
        return ids[len(held) : total]
    count = total - len(held)
    return ids[:count] if len(ids) >= count else None
