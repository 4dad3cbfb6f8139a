"""One line about a trajectory, kept beside the log so that listing needs no reading. A hint: the log is the truth."""

from collections.abc import Sequence

import msgspec

from trajstore.entries import Event
from trajstore.errors import UNREADABLE, SchemaError
from trajstore.events import (
    EventId,
    Header,
    Rewarded,
    Routing,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
    TrajectoryDeleted,
    TrajectoryOpened,
    WeightVersionSpan,
    payload_of,
)
from trajstore.limits import Group, Id, Label

__all__ = ["Summary", "advance", "advance_by", "decode_summary", "encode_summary", "summarize"]


class Summary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What `store.list` returns for each trajectory.

    Attributes:
        id, group, group_size: as given at `create`.
        status: open, completed, truncated, failed, aborted or deleted; of a deleted one only its id, group, group_size,
            created, updated and last are kept.
        segments: how many were opened.
        tokens: T, context and sampled, after rewinds.
        rows: routing rows recorded, of all segments' recordings together.
        nbytes: payload bytes recorded.
        nonfinite: sampled tokens with NaN or infinite logprobs, rewound ones too.
        finish_reason: of the last segment; "lost" if it was taken over unclosed; "" while open.
        weight_version: of the last segment.
        mixed: segments whose output more than one weight version sampled, rewound ones too.
        reward: the newest.
        version: how often it was closed.
        created, updated: Unix seconds by the writers' clocks.
        last: id of the last event.
    """

    id: Id
    group: Group | None = None
    group_size: int | None = None
    status: str = "open"
    segments: int = 0
    tokens: int = 0
    rows: int = 0
    nbytes: int = 0
    nonfinite: int = 0
    finish_reason: str = ""
    weight_version: Label = ""
    mixed: int = 0
    reward: float | None = None
    version: int = 0
    created: float = 0.0
    updated: float = 0.0
    last: str = ""

    @property
    def has_open_segment(self) -> bool:
        """True while the newest epoch is a segment that has not closed."""
        return self.segments > 0 and not self.finish_reason


def advance(summary: Summary | None, id: str, at: EventId, time: float, header: Header) -> Summary:
    """The summary after one more event. Notes do not change it: their writers do not know the newest one."""
    return advance_by(summary, id, at, time, [header])


def advance_by(summary: Summary | None, id: str, first: EventId, time: float, headers: Sequence[Header]) -> Summary:
    """The summary after the events of one entry, `first`, `first + 1`, ...; there is at least one."""
    now = Summary(id=id, created=time) if summary is None else msgspec.structs.replace(summary)
    for i, header in enumerate(headers):
        if isinstance(header, TrajectoryDeleted):
            now = Summary(
                id=id, group=header.group, group_size=header.group_size, status="deleted", created=now.created
            )
        else:
            _count(now, header, opens=first.seq + i == 0)
    _set(now, "updated", time)
    _set(now, "last", f"{first.epoch}-{first.seq + len(headers) - 1}")
    return now


def _count(now: Summary, header: Header, *, opens: bool) -> None:
    """Bring a summary, which nobody else has seen yet, up to an event."""
    payload = payload_of(header)
    if payload is not None:
        _set(now, "nbytes", now.nbytes + payload.nbytes)
    if opens and now.has_open_segment:
        _set(now, "finish_reason", "lost")
    match header:
        case Tokens():
            _set(now, "tokens", now.tokens + header.count)
            _set(now, "nonfinite", now.nonfinite + header.nonfinite)
        case Routing():
            _set(now, "rows", now.rows + header.rows)
        case TrajectoryOpened():
            _set(now, "group", header.group)
            _set(now, "group_size", header.group_size)
        case SegmentOpened():
            _set(now, "status", "open")
            _set(now, "segments", now.segments + 1)
            _set(now, "tokens", header.base + header.context)
            _set(now, "finish_reason", "")
            _set(now, "weight_version", header.weight_version)
        case SegmentClosed():
            _set(now, "finish_reason", header.finish_reason)
            _set(now, "mixed", now.mixed + _mixes(now.weight_version, header.weight_versions))
            if header.weight_versions and not now.weight_version:  # told with the output only
                _set(now, "weight_version", header.weight_versions[-1].version)
        case Rewarded():
            _set(now, "reward", header.reward)
        case TrajectoryClosed():
            _set(now, "status", header.status)
            _set(now, "version", now.version + 1)


def _mixes(label: str, spans: Sequence[WeightVersionSpan]) -> bool:
    """More than one version sampled a segment's output: that of its label where no span says otherwise."""
    versions = {span.version for span in spans}
    if spans and spans[0].start > 0:
        versions.add(label)
    return len(versions) > 1


def summarize(id: str, events: Sequence[Event], *, after: Summary | None = None) -> Summary | None:
    """The summary of a whole log; None if there is nothing to summarize. Unknown events change nothing.

    Args:
        after: the summary of all that comes before these events.
    """
    summary = after
    for event in events:
        if isinstance(event.header, Header):
            summary = advance(summary, id, event.at, event.time, event.header)
    return summary


def decode_summary(data: bytes) -> Summary:
    """A summary from its msgpack bytes.

    Raises:
        SchemaError: they are none.
    """
    try:
        return _decode(data)
    except UNREADABLE as error:
        raise SchemaError(
            f"a summary cannot be read: {error}. Summaries are hints: `trajstore rebuild` writes them anew from the log"
        ) from error


_set = msgspec.structs.force_setattr
encode_summary = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Summary).decode
