"""What is recorded: the event types, their ids and their fields.

These headers are small and always read; payloads (tokens, logprobs, routed experts) are raw little-endian bytes beside
them. How headers travel together is in `entries.py`, what they mean together in `history.py` and `fold.py`.
"""

import re
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias, get_args

import msgspec

from trajstore.crc import crc32
from trajstore.errors import SchemaError
from trajstore.limits import (
    COMPONENTS,
    INLINE_LIMIT,
    SPANS,
    Count,
    Crc,
    Digest,
    Group,
    InlineBytes,
    Label,
    PayloadBytes,
    Position,
)
from trajstore.routing import Origin, RoutingSpec

__all__ = [
    "CLOSED_STATUSES",
    "FINAL_STATUSES",
    "FINISH_REASONS",
    "INLINE_LIMIT",
    "SCHEMA_VERSION",
    "EventId",
    "Header",
    "LateRouting",
    "Note",
    "PayloadInfo",
    "Rewarded",
    "Routing",
    "RoutingAbsent",
    "RoutingObserved",
    "SegmentClosed",
    "SegmentOpened",
    "Tokens",
    "TrajectoryClosed",
    "TrajectoryDeleted",
    "TrajectoryOpened",
    "UnknownEvent",
    "WeightVersionSpan",
    "payload_of",
]

SCHEMA_VERSION = 2
"""Version of the headers as they are written. Older ones are brought up to it when read (`upcast.py`), newer ones are
shown and not folded."""

FinishReason = Literal["stop", "length", "abort", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
Status = Literal["completed", "truncated", "failed", "aborted"]
CLOSED_STATUSES: tuple[Status, ...] = get_args(Status)
FINAL_STATUSES: tuple[str, ...] = ("completed", "truncated", "failed")


class EventId(NamedTuple):
    """`<epoch>-<seq>`: orders all events of a trajectory, and is the id of its entry in Redis."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, text: "str | bytes | EventId") -> Self:
        """Read `"3-7"`.

        Raises:
            SchemaError: not an event id.
        """
        if isinstance(text, EventId):
            return cls(*text)
        plain = text.decode("ascii", "replace") if isinstance(text, bytes) else text
        match = re.fullmatch(r"([0-9]{1,19})-([0-9]{1,19})", plain) if isinstance(plain, str) else None
        if match is None:
            raise SchemaError(f"{plain!r} is not an event id; ids look like '3-7' (epoch, then sequence number)")
        return cls(int(match[1]), int(match[2]))


class PayloadInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Where the bytes of an event are and what they must hash to.

    Attributes:
        nbytes: length in bytes.
        crc: CRC-32 (zlib) of the bytes.
        inline: the bytes themselves when they are shorter than `INLINE_LIMIT` and the entry lies in the hot log.
    """

    nbytes: PayloadBytes
    crc: Crc
    inline: InlineBytes | None = None

    @classmethod
    def of(cls, data: bytes | memoryview) -> Self:
        """Of these bytes, which it holds itself if they are short enough."""
        return cls(nbytes=len(data), crc=crc32(data), inline=bytes(data) if len(data) < INLINE_LIMIT else None)


class WeightVersionSpan(msgspec.Struct, frozen=True, gc=False):
    """Output tokens `[start, end)` of a segment, 0-based within its output, sampled under `version`."""

    version: Label
    start: Position
    end: Position


class _Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True, gc=False):
    pass


class TrajectoryOpened(_Header, frozen=True):
    """Always `1-0`."""

    group: Group | None = None
    group_size: Count | None = None
    routing: RoutingSpec | None = None
    metadata: dict[str, Any] = {}


class SegmentOpened(_Header, frozen=True):
    """One engine call begins: its input is `tokens[:base]` + `context`. Payload: context ids, int32 `[context]`.

    `input_digest` is BLAKE2b-128 (hex) over the whole input as little-endian int32.
    """

    base: Position
    context: Position
    engine: Label = ""
    weight_version: Label = ""
    sampling: dict[str, Any] = {}
    input_digest: Digest = ""
    payload: PayloadInfo | None = None


class Tokens(_Header, frozen=True):
    """Sampled tokens at positions `[start, start + count)`.

    Payload: ids int32 `[count]`, then logprobs float32 `[count]` if `logprobs`. `nonfinite` counts NaN and infinite
    ones: kept as they came, and visible.
    """

    start: Position
    count: Position
    payload: PayloadInfo
    logprobs: bool = False
    nonfinite: Position = 0


class Routing(_Header, frozen=True):
    """A recording: rows `[start, start + rows)`. Payload: `[rows, L, K]` in the trajectory's dtype."""

    start: Position
    rows: Position
    payload: PayloadInfo
    origin: Origin = "computed"


class RoutingAbsent(_Header, frozen=True):
    """This segment has no (more) routing, and why."""

    reason: Label


class SegmentClosed(_Header, frozen=True):
    """The engine call ended. `cached_tokens`: input tokens served from a prefix cache, None where not told."""

    finish_reason: FinishReason
    cached_tokens: Count | None = None
    retractions: Count = 0
    weight_versions: Annotated[tuple[WeightVersionSpan, ...], msgspec.Meta(max_length=SPANS)] = ()


class Rewarded(_Header, frozen=True):
    """A score of the trajectory as it stands. The newest counts."""

    reward: float
    components: Annotated[dict[Label, float], msgspec.Meta(max_length=COMPONENTS)] = {}


class TrajectoryClosed(_Header, frozen=True):
    """`aborted` may be resumed; the other statuses are final."""

    status: Status


class TrajectoryDeleted(_Header, frozen=True):
    """The tombstone, always the newest event: nothing of the trajectory is read any more, and its data is removed.

    It repeats the group, for it may be the only event that is left.
    """

    reason: Label = ""
    group: Group | None = None
    group_size: Count | None = None


class RoutingObserved(_Header, frozen=True):
    """Note: another party's routing of the same tokens (a trainer's). Never enters a fold.

    `epoch` is the newest one that its writer knew: later ones may have rewound what it observed. 0 where none was told.
    """

    source: Label
    start: Position
    rows: Position
    payload: PayloadInfo
    weight_version: Label = ""
    epoch: Count = 0


class LateRouting(_Header, frozen=True):
    """Note: a recording that arrived after its segment's epoch was over; folds as that segment's last one.

    `turn` is the nonce of that epoch, 16 hex digits: a server that lost its tail may hold another writer's segment in
    its place, of which the note says nothing. "" where none was told.
    """

    segment: Count
    start: Position
    rows: Position
    payload: PayloadInfo
    origin: Origin = "computed"
    turn: Digest = ""


class UnknownEvent(msgspec.Struct, frozen=True):
    """An event of a type or schema version that this trajstore does not know. Shown, kept, never folded."""

    type: str
    version: int
    fields: dict[str, Any]


Note: TypeAlias = RoutingObserved | LateRouting
Header: TypeAlias = (
    TrajectoryOpened
    | SegmentOpened
    | Tokens
    | Routing
    | RoutingAbsent
    | SegmentClosed
    | Rewarded
    | TrajectoryClosed
    | TrajectoryDeleted
    | RoutingObserved
    | LateRouting
)


def payload_of(header: Header) -> PayloadInfo | None:
    """The payload of a header, None for types and events without one."""
    return getattr(header, "payload", None)
