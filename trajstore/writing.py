"""What a producer holds: a trajectory to write to; the segment that is open on it is in `segment_writer.py`.

Handles check input and state at the call, in memory; the flusher writes in the background. A handle is a snapshot: once
another writer has taken a newer epoch, its next write is `Fenced`, and `store.get` gives a handle on the new state. One
handle belongs to one task at a time.
"""

import contextlib
import copy
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trajstore.entries import Buffer
from trajstore.errors import Conflict, RoutingError, SchemaError, SequenceGap, TrajstoreError
from trajstore.events import (
    CLOSED_STATUSES,
    FINAL_STATUSES,
    EventId,
    Header,
    LateRouting,
    Rewarded,
    RoutingObserved,
    SegmentOpened,
    Status,
    TrajectoryClosed,
    TrajectoryOpened,
)
from trajstore.fold import input_digest
from trajstore.history import leading_rows, merge_spans, read_history
from trajstore.ingest import (
    check_choice,
    check_count,
    check_finite,
    check_json,
    check_label,
    token_array,
)
from trajstore.limits import COMPONENTS, EVENT_BYTES, SEGMENTS, TOKENS
from trajstore.log.batch import Turn
from trajstore.log.flusher import Flusher
from trajstore.log.lane import Lane
from trajstore.routing import Origin, RoutingSpec
from trajstore.segment_writer import SegmentWriter, check_origin, with_payload
from trajstore.summary import summarize
from trajstore.view import TrajectoryLog

__all__ = ["TrajectoryWriter"]

TokenLoader = Callable[[str, EventId], npt.NDArray[np.int32]]


class TrajectoryWriter:
    """A handle on one trajectory, from `store.create` or `store.get`.

    Attributes:
        id, group, group_size, routing, metadata: as given at `create`.
        status: as this handle knows it.
    """

    def __init__(self, id: str, opened: TrajectoryOpened, flusher: Flusher, load_tokens: TokenLoader) -> None:
        self.id = id
        self.group = opened.group
        self.group_size = opened.group_size
        self.routing = opened.routing
        self.metadata: Mapping[str, Any] = copy.deepcopy(opened.metadata)  # the header's own is yet to be written
        self.status = "open"
        self._flusher = flusher
        self._load_tokens = load_tokens
        self._lane: Lane
        self._notes: Lane | None = None
        self._last_note: EventId | None = None
        self._epoch = 0
        self._recreates = False  # the stream was archived and removed, so the next claim may make it again
        self._snapshot: EventId | None = None  # tokens are loaded as of this event when first needed
        self._tokens: array[int] | None = array("i")
        self._length = 0
        self._held: list[tuple[int, int]] = []
        self._ends: list[int] = []
        self._turns: list[str] = []  # of the segments, as late recordings name them
        self._open: SegmentWriter | None = None
        self._foreign_open = False
        self._claiming = threading.Lock()
        self._telling = _Telling(flusher)

    @classmethod
    def create(cls, id: str, opened: TrajectoryOpened, flusher: Flusher, load_tokens: TokenLoader) -> Self:
        """A new trajectory; its `1-0` is queued."""
        self = cls(id, opened, flusher, load_tokens)
        self._lane = flusher.lane(id)
        self._claim(opened, creates=True)
        return self

    @classmethod
    def resume(cls, log: TrajectoryLog, flusher: Flusher, load_tokens: TokenLoader) -> Self:
        """A handle on what the log holds; below a hole, if it has one: the next segment goes on from there."""
        try:
            history = read_history(log.events, notes=log.notes)
        except SequenceGap as gap:
            if not gap.last_good:
                raise
            history = read_history(log.events, notes=log.notes, until=EventId.parse(gap.last_good))
        self = cls(log.id, history.opened, flusher, load_tokens)
        self.status = history.status
        self._lane = flusher.lane(
            log.id,
            acked=log.last_entry if log.in_hot else None,
            acked_nonce=log.last_nonce if log.in_hot else None,
            summary=summarize(log.id, log.events),
        )
        self._epoch = log.last_entry.epoch
        self._recreates = not log.in_hot
        self._snapshot, self._tokens = history.last, None
        self._length = history.length
        self._held = history.held
        self._ends = [segment.end for segment in history.segments]
        nonces = {event.at.epoch: event.nonce for event in log.events}
        self._turns = [f"{nonces[segment.epoch]:016x}" for segment in history.segments]
        self._foreign_open = history.has_open_segment
        self._last_note = log.notes[-1].at if log.notes else None
        return self

    def __len__(self) -> int:
        """Tokens so far."""
        return self._length

    def __repr__(self) -> str:
        return f"<TrajectoryWriter {self.id}: {self.status}, {self._length} tokens, epoch {self._epoch}>"

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """All tokens so far, int32 `[T]`, a copy: the input of a resumed segment."""
        return np.array(self._known_tokens(), np.int32)

    @property
    def rows_held(self) -> int:
        """Leading rows that the trajectory has without a hole, by what this handle knows and wrote.

        An engine need return none of them again to a resumed request. Late recordings of this handle do not add to it.
        """
        return leading_rows(self._held)

    def segment(
        self,
        *,
        context: npt.ArrayLike = (),
        base: int | None = None,
        engine: str = "",
        weight_version: str = "",
        sampling: Mapping[str, Any] | None = None,
    ) -> "SegmentWriter":
        """Open a segment: one engine call whose input is `tokens[:base]` + `context`.

        Args:
            context: new input tokens, int `[n]`: the prompt first, tool or environment tokens later, none on a resume.
            base: tokens of the trajectory that the input begins with, default all of them; fewer rewind it.
            engine: name and version, e.g. "vllm/0.30.0".
            weight_version: label of the weights that will sample.
            sampling: parameters, plain JSON data.

        Returns:
            The segment, best used as a context manager.

        Raises:
            Conflict: the trajectory is final, this handle's last segment is still open or about to open, or `base`
                exceeds its tokens.
            SchemaError: bad base, tokens or labels.
        """
        with self._telling, self._alone():
            return self._open_segment(context, base, engine, weight_version, sampling)

    def _open_segment(
        self,
        context: npt.ArrayLike,
        base: int | None,
        engine: str,
        weight_version: str,
        sampling: Mapping[str, Any] | None,
    ) -> "SegmentWriter":
        self._require_writable()
        if self._open is not None:
            raise Conflict(f"{self.id}: segment {len(self._ends) - 1} of this handle is still open; close it first")
        start = self._length if base is None else check_count(base, name="base")
        if start > self._length:
            raise Conflict(f"{self.id}: base {start} lies outside the {self._length} tokens of the trajectory")
        ids = token_array(context, name="context")
        if ids.nbytes > EVENT_BYTES:
            raise SchemaError(f"{self.id}: a context of {len(ids)} tokens; one segment takes {EVENT_BYTES // 4}")
        if len(self._ends) >= SEGMENTS:
            raise SchemaError(f"{self.id} has {SEGMENTS} segments, which is the limit; create a new trajectory")
        self._require_fits(start + len(ids))
        tokens = self._known_tokens()
        given = np.concatenate([np.frombuffer(tokens, np.int32)[:start], ids]) if start else ids
        info, payload = with_payload(ids.data.cast("B")) if len(ids) else (None, None)
        header = SegmentOpened(
            base=start,
            context=len(ids),
            engine=check_label(engine, name="engine"),
            weight_version=check_label(weight_version, name="weight_version"),
            sampling=check_json(sampling, name="sampling"),
            input_digest=input_digest(given),
            payload=info,
        )
        turn = self._claim(header, payload)
        self._lane.holds_open = True
        self.status = "open"
        del tokens[start:]
        tokens.frombytes(ids.tobytes())
        self._length = start + len(ids)
        self._held = merge_spans((first, min(stop, start)) for first, stop in self._held)
        self._ends.append(self._length)
        self._turns.append(f"{turn.nonce:016x}")
        self._open = SegmentWriter(self, turn, len(self._ends) - 1, self._length, header)
        return self._open

    def reward(self, reward: float, *, components: Mapping[str, float] | None = None, takeover: bool = False) -> None:
        """Score the trajectory as it stands; the newest reward counts.

        A segment that this handle has open is closed first, as `abort`.

        Args:
            reward: finite.
            components: its parts by name, finite.
            takeover: also while another writer's segment is open, which fences that writer.

        Raises:
            Conflict: a segment of another writer is open, or the trajectory is final.
        """
        with self._telling, self._alone():
            self._require_writable()
            if len(components or ()) > COMPONENTS:
                raise SchemaError(f"{self.id}: {len(components or ())} reward components, the limit is {COMPONENTS}")
            header = Rewarded(
                reward=check_finite(reward, name="reward"),
                components={
                    check_label(name, name="a reward component"): check_finite(value, name=f"reward component {name!r}")
                    for name, value in _items(components)
                },
            )
            self._require_no_segment("reward", takeover=takeover)
            self._claim(header)

    def close(self, status: Status = "completed", *, takeover: bool = False) -> None:
        """End the trajectory. `aborted` may be resumed; completed, truncated and failed are final.

        A segment that this handle has open is closed first, as `abort`.

        Raises:
            Conflict: a segment of another writer is open (and not `takeover`), or the trajectory is final already.
        """
        status = check_choice(status, CLOSED_STATUSES, name="status to close with")
        with self._telling, self._alone():
            self._require_writable()
            self._require_no_segment("close", takeover=takeover)
            self._claim(TrajectoryClosed(status=status))
            self.status = status

    def observe(self, rows: npt.ArrayLike, *, start: int, source: str, weight_version: str = "") -> None:
        """Record another party's routing of rows `[start, start + n)`, for audits; at any time, also after the close.

        They are rows of the tokens that this handle knows: what a later segment rewinds is not compared with them.

        Args:
            rows: `[n, L, K]` or `[n, num_hidden_layers, K]`, any integer dtype.
            source: who observed it, e.g. "trainer".

        Raises:
            RoutingError: bad rows, or past the trajectory's end.
        """
        label = check_label(source, name="source")
        version = check_label(weight_version, name="weight_version")
        epoch = self._epoch
        parts = self._split(rows, start, self._length)
        with self._telling:
            for at, part in parts:
                info, payload = with_payload(part.reshape(-1).view(np.uint8).data)
                header = RoutingObserved(
                    source=label, start=at, rows=len(part), payload=info, weight_version=version, epoch=epoch
                )
                self._note(header, payload)

    def late_routing(self, rows: npt.ArrayLike, *, segment: int, start: int, origin: Origin = "computed") -> None:
        """Record rows that arrived after their segment's epoch was over; they fold as that segment's last recording.

        Waits until what this handle has written is acknowledged: of a segment that another writer's has taken the place
        of, a note says nothing.

        Raises:
            RoutingError: bad rows, or past the segment's end.
            Conflict: there is no such segment, or it is still open.
            TrajstoreError: what stopped this handle's writing (sticky), e.g. `Fenced`.
        """
        segment = check_count(segment, name="segment")
        origin = check_origin(origin)
        if segment >= len(self._ends):
            raise Conflict(f"{self.id} has {len(self._ends)} segments; there is no segment {segment}")
        if self._open is not None and segment == len(self._ends) - 1:
            raise Conflict(f"{self.id}: segment {segment} is still open; record to it directly")
        if self._foreign_open and segment == len(self._ends) - 1:
            raise Conflict(f"{self.id}: segment {segment} is open with another writer; wait until it is over")
        parts = self._split(rows, start, self._ends[segment])
        if self._lane.busy:
            self._flusher.drain(self.id)
        with self._telling:
            self._require_unfenced()
            for at, part in parts:
                info, payload = with_payload(part.reshape(-1).view(np.uint8).data)
                header = LateRouting(
                    segment=segment, start=at, rows=len(part), payload=info, origin=origin, turn=self._turns[segment]
                )
                self._note(header, payload)

    # Shared with the archiver and the open segment

    def _is_at(self, last: str) -> bool:
        """True while the newest event that this handle knows of has this id."""
        return self._lane.summary is not None and self._lane.summary.last == last

    def _append(self, turn: Turn, header: Header, payload: Buffer | None = None) -> None:
        self._flusher.append(self._lane, turn, header, payload)

    def _require_fits(self, length: int) -> None:
        if length > TOKENS:
            raise SchemaError(f"{self.id}: {length} tokens in one trajectory, the limit is {TOKENS}; begin a new one")

    def _took(self, tokens: bytes) -> None:
        """Token ids, int32."""
        self._known_tokens().frombytes(tokens)
        self._length += len(tokens) // 4
        self._ends[-1] = self._length

    def _took_rows(self, start: int, stop: int) -> None:
        self._held = merge_spans([*self._held, (start, stop)])

    def _segment_closed(self) -> None:
        self._open = None
        self._lane.holds_open = False

    def _split(self, rows: npt.ArrayLike, start: int, end: int) -> list[tuple[int, npt.NDArray[Any]]]:
        """Checked rows in parts that fit one event, with their starts."""
        spec = self._require_spec()
        if isinstance(start, bool) or not isinstance(start, int | np.integer) or start < 0:
            raise RoutingError(f"{self.id}: start must be a position, not {start!r}")
        checked = spec.narrow(rows, start=int(start), empty=self._flusher.slabs.cut)
        if start + len(checked) > end:
            raise RoutingError(
                f"{self.id}: rows {start} to {start + len(checked) - 1} reach past the {end} tokens there are "
                "(record tokens before their routing; a row belongs to the token that was the input)",
                row=end,
            )
        step = max(1, EVENT_BYTES // spec.row_bytes)
        return [(int(start) + i, checked[i : i + step]) for i in range(0, len(checked), step)]

    def _require_spec(self) -> RoutingSpec:
        if self.routing is None:
            raise RoutingError(f"{self.id} was created without a routing spec; give routing=RoutingSpec(...) at create")
        return self.routing

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time opens an epoch: it checks the state, may read tokens from the store, and only then claims.

        Raises:
            Conflict: another one is about to.
        """
        if not self._claiming.acquire(blocking=False):
            raise Conflict(
                f"{self.id}: another call of this handle is about to open a segment, to score or to close. A handle "
                "belongs to one task at a time; let that call return first"
            )
        try:
            yield
        finally:
            self._claiming.release()

    def _claim(self, header: Header, payload: Buffer | None = None, *, creates: bool = False) -> Turn:
        """Open the next epoch with this event."""
        turn = Turn(self._epoch + 1, creates=creates or self._recreates, nonce=self._flusher.chance.word())
        self._append(turn, header, payload)
        self._epoch += 1
        self._recreates = self._foreign_open = False
        return turn

    def _note(self, header: Header, payload: Buffer | None) -> None:
        if self._notes is None:
            new = self._lane if self._snapshot is None else None
            self._notes = self._flusher.lane(self.id, note=True, after=new, acked=self._last_note)
        self._flusher.append(self._notes, Turn(0, nonce=self._flusher.chance.word()), header, payload)

    def _known_tokens(self) -> "array[int]":
        if self._tokens is None:
            tokens: array[int] = array("i")
            if self._snapshot is not None:
                tokens.frombytes(self._load_tokens(self.id, self._snapshot).tobytes())
            self._tokens = tokens
        return self._tokens

    def _require_unfenced(self) -> None:
        if self._lane.error is not None:
            raise self._lane.error.with_traceback(None)
        if self._telling.interrupted:
            raise Conflict(
                f"{self.id}: a call of this handle was interrupted (Ctrl-C, a signal), so it does not know what of it "
                f"was written; go on with store.get({self.id!r})"
            )

    def _require_writable(self) -> None:
        self._require_unfenced()
        if self.status in FINAL_STATUSES:
            raise Conflict(f"{self.id} is {self.status}, which is final; create a new trajectory")

    def _require_no_segment(self, what: str, *, takeover: bool) -> None:
        if self._open is not None:
            self._open.close("abort")
        elif self._foreign_open and not takeover:
            raise Conflict(
                f"{self.id}: another writer's segment is open. Wait for it, or {what} with takeover=True, which fences "
                "that writer"
            )


class _Telling:
    """Around the calls of a handle: what stopped its lane and is raised by one of them has been told.

    So `store.flush()` and `store.close()` need not raise it again, to somebody who may have nothing to do with it.

    Attributes:
        interrupted: a call ended by what is no error, anywhere between an event and what the handle remembers of it.
    """

    def __init__(self, flusher: Flusher) -> None:
        self.interrupted = False
        self._flusher = flusher

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TrajstoreError):
            self._flusher.told(error)
        elif error is not None and not isinstance(error, Exception):
            self.interrupted = True


def _items(components: Mapping[str, float] | None) -> Iterable[tuple[str, float]]:
    if components is not None and not isinstance(components, Mapping):
        raise SchemaError(f"components map names to numbers, not {components!r:.80}")
    return (components or {}).items()
