"""What an adapter of an engine needs: what an engine can do, where its rows lie, and a refusal that leaves a trace.

For the packages under `engines/` and for those of others. An adapter turns one delivery of an engine, an object or a
body, into one `SegmentWriter.record` inside `refusing`: it is taken whole, or not at all and the segment says why.
"""

import binascii
import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import Conflict, RoutingError, SchemaError
from trajstore.events import WeightVersionSpan
from trajstore.fold import input_digest
from trajstore.ingest import check_spans, token_array
from trajstore.routing import Origin
from trajstore.segment_writer import SegmentWriter

__all__ = [
    "EngineCapabilities",
    "as_reason",
    "decode_base64",
    "place_rows",
    "refusing",
    "require_input",
    "split_by_origin",
    "weight_spans",
]

log = logging.getLogger(__name__)

_REASON = 500
"""Characters of a reason that the log keeps."""

_SPAN = ("version", "start", "end")


class EngineCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What one version of an engine does with routed experts.

    Attributes:
        engine, version: as "vllm" and "0.30.0".
        routing_on_abort: an aborted request delivers the rows of the tokens that it delivers.
        start_offset: a request can ask for rows from a position on, and gets those.
        dtype: of the rows on the wire or in the output: "uint8/uint16" by the number of experts, or "int32".
        weight_spans: an output says which of its tokens were sampled under which weight version.
        losses: known ways in which this version loses or misaligns routing, one sentence each.
    """

    engine: str
    version: str
    routing_on_abort: bool
    start_offset: bool
    dtype: str
    weight_spans: bool
    losses: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As a segment's `engine`: "vllm/0.30.0"."""
        return f"{self.engine}/{self.version}" if self.version else self.engine

    def warn(self) -> None:
        """Log what this version is known to lose."""
        for loss in self.losses:
            log.warning("%s: %s", self.label, loss)


def place_rows(
    count: int,
    *,
    length: int,
    asked: int | None = None,
    honours_start: bool = True,
    surplus: bool = True,
    prompt: int | None = None,
) -> int:
    """The position of the first of `count` rows that an engine returned for a request of `length` tokens.

    A request of P prompt and O output tokens has rows for `[start, P + O - 1)`. Some engines give one row more, that of
    the last token. Where both readings fit, the one without a surplus row is meant.

    Args:
        count: rows returned.
        length: P + O.
        asked: the start that was asked for; None where that is not known.
        honours_start: False for an engine that takes such a wish and returns all rows all the same.
        surplus: the last token's row may come whatever the start. False for an engine that is not known to give it:
            one row too many after the asked start then says that the rows begin one row early, and they are refused.
            From row 0 on none can lie before them, so there it is the last token's.
        prompt: P, for an engine that leaves out rows of the input only: rows cannot begin behind it. None: they may.

    Raises:
        RoutingError: no start explains so many rows, or none that the engine can have begun at.
    """
    starts: tuple[int, ...]
    if asked is None:
        starts = (length - 1 - count,) if count < length else (length - count,)
    elif honours_start:
        starts = (asked,)
    else:
        starts = (0, asked)
    for start in starts:
        due = length - 1 - start
        fits = count == due or count == 0 >= due or (count == due + 1 and (surplus or start == 0))
        if start < 0 or not fits:
            continue
        if prompt is not None and start > prompt:
            raise RoutingError(
                f"{count} routed rows for a request of {length} tokens would begin at row {start}, but the engine "
                f"leaves out rows of the {prompt} prompt tokens at most. The output was cut, or belongs to another "
                "request"
            )
        return start
    if asked is not None and 0 < asked == length - count:
        raise RoutingError(
            f"{count} routed rows for a request of {length} tokens from row {asked} on: the engine gives none for the "
            f"last token, so these begin at row {asked - 1}, which was not asked for"
        )
    wish = "" if asked is None else f" from row {asked} on"
    raise RoutingError(
        f"{count} routed rows for a request of {length} tokens{wish}; there should be "
        f"{max(0, length - 1 - (asked or 0))}, one for each token but the last. The output was cut, or belongs to "
        "another request"
    )


def split_by_origin(
    rows: npt.NDArray[np.integer], start: int, *, cached: int | None = 0, prompt: int = 0, recomputed: bool = False
) -> list[tuple[npt.NDArray[np.integer], int, Origin]]:
    """Rows as the recordings that they are: those of the cached prefix apart.

    Args:
        rows: `[n, ...]`, the first of position `start`.
        cached: tokens of the request's input that came from a prefix cache: their rows are of an older computation.
            None: the engine did not tell, so the rows of the input are of unknown origin, but for that of its last
            token, which is always computed: the first output token is sampled from it.
        prompt: tokens of the request's input; matters where `cached` is None.
        recomputed: the engine dropped the request's state and ran it again: no row is certain to be what sampled.
    """
    if recomputed:
        return [(rows, start, "recomputed")] if len(rows) else []
    first: Origin = "unknown" if cached is None else "cached"
    before = prompt - 1 if cached is None else cached
    cut = min(max(before - start, 0), len(rows))
    parts: list[tuple[npt.NDArray[np.integer], int, Origin]] = [
        (rows[:cut], start, first),
        (rows[cut:], start + cut, "computed"),
    ]
    return [part for part in parts if len(part[0])]


def require_input(segment: SegmentWriter, token_ids: npt.ArrayLike) -> None:
    """The input that an engine says it was given must be the segment's.

    Args:
        token_ids: as the engine echoes them, int `[P]`.

    Raises:
        Conflict: it is another; whatever the engine returned belongs elsewhere.
        SchemaError: these are no token ids.
    """
    echoed = token_array(token_ids, name="the engine's prompt")
    if len(echoed) != segment.start or input_digest(echoed) != segment.input_digest:
        raise Conflict(
            f"the engine was given another input ({len(echoed)} tokens) than segment {segment.index} has "
            f"({segment.start} tokens); send exactly the trajectory's tokens so far and the new context, and do not "
            "tokenize text again on the way"
        )


def decode_base64(text: object, *, what: str, limit: int) -> bytes:
    """Bytes of base64 text that may be at most `limit` long, before anything of that size is allocated.

    Raises:
        RoutingError: no text, too long, or not base64.
    """
    if not isinstance(text, str | bytes | bytearray | memoryview):
        raise RoutingError(f"{what} must be base64 text, not {type(text).__name__}")
    if len(text) > -(-limit // 3) * 4:
        raise RoutingError(f"{what} holds {len(text)} characters of base64; {limit} bytes were expected at most")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise RoutingError(f"{what} is not base64: {error}") from error


def weight_spans(given: object, *, output: int) -> tuple[WeightVersionSpan, ...]:
    """What an engine says of the weights that sampled `output` tokens, in any of the forms that engines use.

    Args:
        given: None, or a list of spans: objects or mappings with `version`, `start` and `end`, or triples of them.

    Raises:
        SchemaError: anything else, or spans that do not ascend within the output.
    """
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise SchemaError(f"weight versions must be a list of spans, not {type(given).__name__}")
    spans: list[Any] = []
    for span in given:
        parts: Any = span
        if isinstance(span, Mapping):
            parts = tuple(span.get(name) for name in _SPAN)
        elif not isinstance(span, list | tuple):
            parts = tuple(getattr(span, name, None) for name in _SPAN)
        numbered = len(parts) == 3 and isinstance(parts[0], int) and not isinstance(parts[0], bool)
        spans.append((str(parts[0]), *parts[1:]) if numbered else parts)
    return check_spans(spans, output)


@contextlib.contextmanager
def refusing(segment: SegmentWriter) -> Iterator[None]:
    """Where a delivery is refused inside, the segment says so: `RoutingAbsent` with the reason. Nothing else is stored.

    Raises:
        RoutingError, SchemaError, Conflict: as raised inside.
    """
    try:
        yield
    except (RoutingError, SchemaError, Conflict) as error:
        if not segment.closed:
            segment.no_routing(as_reason(f"refused: {error}"))
        raise


def as_reason(text: str) -> str:
    """Text of an engine's or an error's as a reason that the log takes: shortened, and `?` for what is no Unicode."""
    return text[:_REASON].encode("utf-8", "replace").decode()
