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

__all__ = ["Summary", "advance", "decode_summary", "encode_summary", "summarize"]


class Summary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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
    now = summary or Summary(id=id, created=time)
    if isinstance(header, TrajectoryDeleted):
        return Summary(
            id=id,
            group=header.group,
            group_size=header.group_size,
            status="deleted",
            created=now.created,
            updated=time,
            last=str(at),
        )
    payload = payload_of(header)
    nbytes = now.nbytes + (payload.nbytes if payload else 0)
    changes: dict[str, object] = {"updated": time, "last": str(at), "nbytes": nbytes}
    if now.has_open_segment and at.seq == 0:
        changes["finish_reason"] = "lost"
    match header:
        case TrajectoryOpened():
            changes |= {"group": header.group, "group_size": header.group_size}
        case SegmentOpened():
            changes |= {
                "status": "open",
                "segments": now.segments + 1,
                "tokens": header.base + header.context,
                "finish_reason": "",
                "weight_version": header.weight_version,
            }
        case Tokens():
            changes |= {"tokens": now.tokens + header.count, "nonfinite": now.nonfinite + header.nonfinite}
        case Routing():
            changes["rows"] = now.rows + header.rows
        case SegmentClosed():
            changes["finish_reason"] = header.finish_reason
            changes["mixed"] = now.mixed + _mixes(now.weight_version, header.weight_versions)
            if header.weight_versions and not now.weight_version:  # told with the output only
                changes["weight_version"] = header.weight_versions[-1].version
        case Rewarded():
            changes["reward"] = header.reward
        case TrajectoryClosed():
            changes |= {"status": header.status, "version": now.version + 1}
    return msgspec.structs.replace(now, **changes)


def _mixes(label: str, spans: Sequence[WeightVersionSpan]) -> bool:
    """More than one version sampled a segment's output: that of its label where no span says otherwise."""
    versions = {span.version for span in spans}
    if spans and spans[0].start > 0:
        versions.add(label)
    return len(versions) > 1


def summarize(id: str, events: list[Event]) -> Summary | None:
    """The summary of a whole log; None if there is nothing to summarize. Unknown events change nothing."""
    summary: Summary | None = None
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


encode_summary = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Summary).decode
