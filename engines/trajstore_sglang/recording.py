"""From SGLang's answers into the store: tokens, logprobs, routing and weight versions become events of a segment."""

from collections.abc import Iterable, Sequence
from typing import Any

from trajstore import Conflict, RoutingError, SchemaError, SegmentWriter
from trajstore.adapter import refusing, require_input
from trajstore_sglang.parsing import Answer, parse_batch, parse_response
from trajstore_sglang.reply import Reply, absence, fresh_tokens, routed_recordings

__all__ = ["StreamRecording", "record_batch", "record_response", "record_stream"]

CUT_OFF = "the stream ended before its last chunk, which is the one that brings the routing"


def record_response(segment: SegmentWriter, response: Answer, *, start_len: int | None = None) -> Reply:
    """Write one answer to the segment whose input was the request's, and close the segment. All of it, or nothing.

    What a request was retracted and computed again for is recorded as `recomputed`, the rows of its cached prefix as
    `cached`, and those of the OpenAI routes, which tell neither, as `unknown`.

    Args:
        response: the body of `/generate`, `/v1/completions` or `/v1/chat/completions`, or the object that it holds.
        start_len: `routed_experts_start_len` of the request, to check the rows against; None to infer where they begin
            from their number.

    Returns:
        What the answer says, `finish_reason` and `message` among it; without `routed_experts`, which the store has now.

    Raises:
        SchemaError: an error of SGLang's, a chunk of a stream, no such answer, or values that cannot be.
        RoutingError: rows that do not fit the request or the trajectory's routing spec.
        Conflict: the request had another input than the segment, or the segment has output already.
            After any of these the segment is open, and says why it was refused.
    """
    with refusing(segment):
        reply = parse_response(response)
        _record_whole(segment, reply, start_len)
    return reply._replace(routed_experts=None)


def record_batch(
    segments: Sequence[SegmentWriter], response: Answer | list[Any], *, start_len: int | None = None
) -> list[Reply]:
    """Write the answer to a batch, or to n > 1, a JSON list: its i-th output to the i-th segment, each as a whole.

    Raises:
        SchemaError: as in `record_response`, of the whole list: then nothing of it is recorded.
        Conflict: another number of outputs than segments.
        ExceptionGroup: outputs that were refused; all others are recorded.
    """
    try:
        replies = parse_batch(response)
        if len(replies) != len(segments):
            raise Conflict(f"SGLang returned {len(replies)} outputs for {len(segments)} segments")
    except (SchemaError, Conflict) as error:
        for segment in segments:
            _refuse(segment, error)
        raise
    refused: list[Exception] = []
    for segment, reply in zip(segments, replies, strict=True):
        try:
            with refusing(segment):
                _record_whole(segment, reply, start_len)
        except (SchemaError, RoutingError, Conflict) as error:
            refused.append(error)
    if refused:
        raise ExceptionGroup(f"{len(refused)} of {len(replies)} outputs were refused", refused)
    return [reply._replace(routed_experts=None) for reply in replies]


def record_stream(segment: SegmentWriter, lines: Iterable[bytes | str], *, start_len: int | None = None) -> Reply:
    """Write a streamed answer of `/generate` to a segment, chunk by chunk, and close the segment.

    Both forms of streaming are understood. A stream that ends before its last chunk closes the segment as `abort`; an
    exception of `lines` goes to the caller, and what came before it is recorded.

    Args:
        lines: of the server-sent events.
        start_len: as in `record_response`.

    Returns:
        The last chunk, with a finish reason and without `routed_experts`.

    Raises:
        SchemaError, RoutingError, Conflict: as in `record_response`, of one chunk. Those before it are recorded.
    """
    recording = StreamRecording(segment, start_len=start_len)
    for line in lines:
        recording.add(line)
    return recording.end()


class StreamRecording:
    """Writes a stream's lines to a segment as they come: `add` each, then `end`.

    Attributes:
        finished: the last chunk has come, and the segment is closed.
    """

    def __init__(self, segment: SegmentWriter, *, start_len: int | None = None) -> None:
        self.finished = False
        self._segment = segment
        self._start_len = start_len
        self._last: Reply | None = None

    def add(self, line: bytes | str) -> None:
        """Record what a line brings; lines without data, and those after the last chunk, bring nothing.

        Raises:
            SchemaError, RoutingError, Conflict: as in `record_stream`.
        """
        text = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else bytes(line)
        if self.finished or not text.startswith(b"data:") or (data := text[5:].strip()) == b"[DONE]":
            return
        with refusing(self._segment):
            reply = parse_response(data)
            if reply.route != "generate":
                raise SchemaError("streams of SGLang's OpenAI routes do not name their tokens; stream /generate")
            if reply.finish_reason is None:
                _require_request(self._segment, reply)
                self._segment.record(*fresh_tokens(reply, self._segment.token_ids))
            else:
                _record_last(self._segment, reply, self._start_len)
                self.finished = True
            self._last = reply._replace(routed_experts=None)

    def end(self, reason: str = CUT_OFF) -> Reply:
        """The stream is over: its last chunk, or the last that came, as an abort.

        Args:
            reason: why there is no routing where the last chunk has not come.
        """
        if self.finished and self._last is not None:
            return self._last
        if self._segment.spec is not None:
            self._segment.no_routing(reason)
        self._segment.close("abort")
        last = self._last or parse_response({"output_ids": [], "meta_info": {}})
        return last._replace(finish_reason="abort", message=reason)


def _record_whole(segment: SegmentWriter, reply: Reply, start_len: int | None) -> None:
    if reply.finish_reason is None:
        raise SchemaError("SGLang's answer has no finish reason: it is a chunk of a stream; use record_stream")
    if segment.end != segment.start:
        raise Conflict(f"segment {segment.index} has {segment.end - segment.start} output tokens already; open another")
    if len(reply.token_ids) != reply.total:
        raise SchemaError(f"SGLang's answer has {len(reply.token_ids)} output tokens and claims {reply.total}")
    _record_last(segment, reply, start_len)


def _record_last(segment: SegmentWriter, reply: Reply, start_len: int | None) -> None:
    """The tokens that are new, the routing, and the end. Nothing is written before all of it is checked."""
    _require_request(segment, reply)
    if not reply.retractions and (reply.cached_tokens or 0) > segment.start:
        raise SchemaError(
            f"SGLang took {reply.cached_tokens} tokens of a prompt of {segment.start} from its cache; only a request "
            "that was retracted can have found more there"
        )
    held = segment.token_ids
    ids, logprobs = fresh_tokens(reply, held)
    recordings = []
    if segment.spec is not None and reply.routed_experts is not None:
        output = len(held) + len(ids)
        recordings = routed_recordings(reply, segment.spec, prompt=segment.start, output=output, start_len=start_len)
    segment.record(ids, logprobs, routing=recordings)
    if segment.spec is not None and not recordings:
        segment.no_routing(absence(reply) if reply.routed_experts is None else "no rows were asked for")
    assert reply.finish_reason is not None, "it is the last"
    segment.close(
        reply.finish_reason,
        cached_tokens=reply.cached_tokens,
        retractions=reply.retractions or 0,
        weight_versions=reply.weight_versions,
    )


def _require_request(segment: SegmentWriter, reply: Reply) -> None:
    """The request's input must have been the segment's."""
    if reply.prompt_token_ids is not None:
        require_input(segment, reply.prompt_token_ids)
    elif reply.prompt_tokens is not None and reply.prompt_tokens != segment.start:
        raise Conflict(
            f"SGLang was given {reply.prompt_tokens} prompt tokens, segment {segment.index} has an input of "
            f"{segment.start}; send exactly the trajectory's tokens so far and the new context"
        )


def _refuse(segment: SegmentWriter, error: SchemaError | Conflict) -> None:
    try:
        with refusing(segment):
            raise error
    except (SchemaError, Conflict):
        pass
