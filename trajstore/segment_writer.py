"""The segment that is open on a trajectory: what an engine call brought, event by event, until it closes.

It belongs to its `TrajectoryWriter`, which holds the lane that it writes to and the tokens so far.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from trajstore.entries import Buffer
from trajstore.errors import Conflict, TrajstoreError
from trajstore.events import (
    FINISH_REASONS,
    FinishReason,
    PayloadInfo,
    Routing,
    RoutingAbsent,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    WeightVersionSpan,
)
from trajstore.ingest import check_choice, check_count, check_label, check_spans, logprob_array, token_array
from trajstore.limits import EVENT_BYTES
from trajstore.log.batch import Turn
from trajstore.routing import ORIGINS, Origin

if TYPE_CHECKING:
    from trajstore.writing import TrajectoryWriter

__all__ = ["SegmentWriter", "check_origin", "with_payload"]

_NO_CARE = contextlib.nullcontext()


class SegmentWriter:
    """An open segment. Leaving its `with` block closes it: as `abort`, or as `error` on an exception.

    Attributes:
        index: 0-based number of the segment in its trajectory.
        base: tokens of the trajectory that the input began with.
        start: position of its first output token, base + context.
        input_digest: `trajstore.fold.input_digest` of its input.
        sampling: parameters, as given when it was opened.
        spec: of its trajectory's routing, None where that has none.
        logprob_sum: of its output so far, in float64; NaN once a token came without one.
    """

    def __init__(
        self, trajectory: "TrajectoryWriter", turn: Turn, index: int, start: int, opened: SegmentOpened
    ) -> None:
        self.index = index
        self.base = opened.base
        self.start = start
        self.input_digest = opened.input_digest
        self.sampling: Mapping[str, Any] = copy.deepcopy(opened.sampling)  # the header's own is yet to be written
        self.spec = trajectory.routing
        self.logprob_sum = 0.0
        self._trajectory = trajectory
        self._turn = turn
        self._closed = False
        self._told_routing = False

    @property
    def end(self) -> int:
        """Position after the last token so far."""
        return self._trajectory._ends[self.index]

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Its output so far, int32 `[end - start]`, a copy."""
        return np.array(self._trajectory._known_tokens()[self.start : self.end], np.int32)

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    def tokens(self, token_ids: npt.ArrayLike, logprobs: npt.ArrayLike | None = None) -> None:
        """Append sampled tokens.

        Args:
            token_ids: int `[n]`.
            logprobs: float `[n]`, natural log; NaN and infinities are kept and flagged. None: not known.

        Raises:
            SchemaError: bad tokens, or not one logprob per token.
            Fenced: another writer has taken the trajectory over; sticky.
        """
        self.record(token_ids, logprobs)

    def routing(self, rows: npt.ArrayLike, *, start: int, origin: Origin = "computed") -> None:
        """Record routed experts of rows `[start, start + n)`.

        Row *i* is the routing used when the token at position *i* was the input, so a complete segment has one row less
        than tokens. Rows of the prefix, and one surplus row at the end, are welcome; their absolute position says what
        they are.

        Args:
            rows: `[n, L, K]`, or `[n, num_hidden_layers, K]` of which the spec's layers are taken; any integer dtype.
            start: absolute position of the first row.
            origin: what the rows are, see `trajstore.routing.Origin`.

        Raises:
            RoutingError: wrong shape, id out of range, repeated expert, rows past the last token.
        """
        self.record(routing=[(rows, start, origin)])

    def record(
        self,
        token_ids: npt.ArrayLike = (),
        logprobs: npt.ArrayLike | None = None,
        *,
        routing: Iterable[tuple[npt.ArrayLike, int, Origin]] = (),
    ) -> None:
        """Append sampled tokens and the routing that came with them: all of it, or nothing if a part is refused.

        Args:
            token_ids, logprobs: as in `tokens`.
            routing: `(rows, start, origin)` of each recording, as in `routing`; rows may reach to the last of the new
                tokens.

        Raises:
            SchemaError, RoutingError, Fenced: as `tokens` and `routing`.
        """
        with self._trajectory._telling:
            self._require_open()
            ids = token_array(token_ids)
            probs = None if logprobs is None else logprob_array(logprobs, count=len(ids))
            recordings = [
                (self._trajectory._split(rows, start, self.end + len(ids)), check_origin(origin))
                for rows, start, origin in routing
            ]
            self._trajectory._require_fits(self.end + len(ids))
            step = EVENT_BYTES // 8
            for i in range(0, len(ids), step):
                self._append_tokens(ids[i : i + step], None if probs is None else probs[i : i + step])
            for parts, origin in recordings:
                for at, part in parts:
                    info, payload = with_payload(part.reshape(-1).view(np.uint8).data)
                    header = Routing(start=at, rows=len(part), payload=info, origin=origin)
                    self._trajectory._append(self._turn, header, payload)
                    self._trajectory._took_rows(at, at + len(part))
                    self._told_routing = True

    def no_routing(self, reason: str) -> None:
        """Say that this segment has no (more) routing, and why."""
        with self._trajectory._telling:
            self._require_open()
            self._trajectory._append(self._turn, RoutingAbsent(reason=check_label(reason, name="reason")))
            self._told_routing = True

    def close(
        self,
        finish_reason: FinishReason,
        *,
        cached_tokens: int | None = None,
        retractions: int = 0,
        weight_versions: Sequence[WeightVersionSpan | tuple[str, int, int]] = (),
    ) -> None:
        """End the segment.

        Args:
            finish_reason: stop, length, abort or error.
            cached_tokens: input tokens that came from a prefix cache.
            retractions: how often the engine dropped the request's state and computed it again.
            weight_versions: spans `(version, start, end)` over the output tokens, if the weights changed on the way.

        Raises:
            SchemaError: an unknown reason, no counts, or spans that do not fit the output.
            TrajstoreError: what stopped the writing before (sticky).
        """
        with self._trajectory._telling:
            self._end(finish_reason, cached_tokens, retractions, weight_versions)

    def _end(
        self,
        finish_reason: FinishReason,
        cached_tokens: int | None = None,
        retractions: int = 0,
        weight_versions: Sequence[WeightVersionSpan | tuple[str, int, int]] = (),
    ) -> None:
        self._require_open()
        reason = check_choice(finish_reason, FINISH_REASONS, name="finish reason")
        spans = check_spans(weight_versions, self.end - self.start)
        cached = None if cached_tokens is None else check_count(cached_tokens, name="cached_tokens")
        dropped = check_count(retractions, name="retractions")
        if not self._told_routing and self._trajectory.routing is not None:
            self._trajectory._append(self._turn, RoutingAbsent(reason="not recorded"))
        header = SegmentClosed(finish_reason=reason, cached_tokens=cached, retractions=dropped, weight_versions=spans)
        self._trajectory._append(self._turn, header)
        self._closed = True
        self._trajectory._segment_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        if error is None:
            self.close("abort")
            return
        try:
            self._end("error")
        except TrajstoreError:  # the exception on its way out tells more; of this one the store's flush does
            self._closed = True
            self._trajectory._segment_closed()

    def _append_tokens(self, ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32] | None) -> None:
        data = tokens = ids.tobytes()
        nonfinite, total = 0, math.nan
        if logprobs is not None:
            data = tokens + logprobs.tobytes()
            nonfinite = len(ids) - int(np.count_nonzero(np.isfinite(logprobs)))
            with np.errstate(invalid="ignore") if nonfinite else _NO_CARE:  # infinities of both signs
                total = float(np.add.reduce(logprobs, dtype=np.float64))
        info, payload = with_payload(data)
        header = Tokens(
            start=self.end, count=len(ids), payload=info, logprobs=logprobs is not None, nonfinite=nonfinite
        )
        self._trajectory._append(self._turn, header, payload)
        self._trajectory._took(tokens)
        self.logprob_sum += total

    def _require_open(self) -> None:
        if self._closed:
            raise Conflict(f"{self._trajectory.id}: segment {self.index} is closed; open another one")
        self._trajectory._require_unfenced()


def check_origin(origin: Origin) -> Origin:
    """An origin, if it is one."""
    return check_choice(origin, ORIGINS, name="origin of routing rows")


def with_payload(data: bytes | memoryview) -> tuple[PayloadInfo, Buffer | None]:
    """What the header says of the bytes, and the bytes that go beside it (None if they ride in it)."""
    info = PayloadInfo.of(data)
    return info, data if info.inline is None else None
