"""What `--json` prints: the documents of each reading command, as plain data for `msgspec.json`."""

from typing import Any

import msgspec
import numpy as np

from trajstore.entries import Event
from trajstore.events import UnknownEvent
from trajstore.log.feed import Hint
from trajstore.summary import Summary
from trajstore.trajectory import Trajectory

__all__ = ["event_document", "hint_document", "hint_time", "summary_document", "trajectory_document"]


def summary_document(summary: Summary) -> dict[str, Any]:
    """Every field of a summary, defaults too."""
    return msgspec.structs.asdict(summary)


def trajectory_document(trajectory: Trajectory, *, routing: bool) -> dict[str, Any]:
    """A folded trajectory; arrays are lists of T items.

    Args:
        routing: with `routed_experts`, `[T][L][K]`, 0 where `routing_mask` is false.
    """
    document = {
        "id": trajectory.id,
        "group": trajectory.group,
        "group_size": trajectory.group_size,
        "status": trajectory.status,
        "finish_reason": trajectory.finish_reason,
        "reward": trajectory.reward,
        "reward_components": trajectory.reward_components,
        "policy": trajectory.policy,
        "at": trajectory.at,
        "version": trajectory.version,
        "tokens": len(trajectory),
        "sampled_tokens": int(np.count_nonzero(trajectory.loss_mask)),
        "known_rows": int(np.count_nonzero(trajectory.routing_mask)),
        "nonfinite_logprobs": trajectory.nonfinite_logprobs,
        "token_ids": trajectory.token_ids.tolist(),
        "logprobs": trajectory.logprobs.tolist(),
        "loss_mask": trajectory.loss_mask.tolist(),
        "segment_ids": trajectory.segment_ids.tolist(),
        "weight_versions": [trajectory.weight_version(position) for position in range(len(trajectory))],
        "routing_mask": trajectory.routing_mask.tolist(),
        "routing_source": trajectory.routing_source.tolist(),
        "segments": [{**msgspec.structs.asdict(segment), "end": segment.end} for segment in trajectory.segments],
        "routing": trajectory.routing,
        "metadata": trajectory.metadata,
    }
    if routing:
        experts = trajectory.routed_experts
        document["routed_experts"] = None if experts is None else experts.tolist()
    return document


def event_document(event: Event) -> dict[str, Any]:
    """An event: its place, and every field of its header; the fields of an unknown one stand apart."""
    header, payload = event.header, event.payload
    document: dict[str, Any] = {
        "id": event.id,
        "type": event.type,
        "time": event.time,
        "nonce": f"{event.nonce:016x}",
        "stored": event.stored,
        "note": event.note,
        "payload": None if payload is None else {"nbytes": payload.nbytes, "crc": payload.crc},
    }
    if isinstance(header, UnknownEvent):
        return document | {"schema_version": header.version, "fields": header.fields}
    return document | {name: getattr(header, name) for name in header.__struct_fields__ if name != "payload"}


def hint_document(hint: Hint, summary: Summary | None) -> dict[str, Any]:
    """A feed entry, with how its trajectory stands now; nulls where no summary is left."""
    return {
        "time": hint_time(hint),
        "id": hint.id,
        "type": hint.kind,
        "event": hint.event,
        "note": hint.is_note,
        "partition": hint.partition,
        "feed": hint.at,
        "group": summary.group if summary else None,
        "status": summary.status if summary else None,
        "tokens": summary.tokens if summary else None,
        "segments": summary.segments if summary else None,
        "reward": summary.reward if summary else None,
    }


def hint_time(hint: Hint) -> float:
    """When a feed entry was written, Unix seconds by the server's clock."""
    return int(hint.at.partition("-")[0]) / 1000
