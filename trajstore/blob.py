"""A folded trajectory as one contiguous blob in the safetensors format, and back.

What the materializer publishes and a trainer fetches in one round trip. Any safetensors reader opens it: the arrays
under the names of `Trajectory`, everything else as JSON under the metadata key `trajstore`.
"""

from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trajstore.errors import Corrupt
from trajstore.history import Segment
from trajstore.routing import RoutingSpec
from trajstore.trajectory import Trajectory

__all__ = ["from_blob", "to_blob"]

_ARRAYS = (
    "token_ids",
    "logprobs",
    "loss_mask",
    "segment_ids",
    "weight_version_ids",
    "routed_experts",
    "routing_mask",
    "routing_source",
)


class _Rest(msgspec.Struct, kw_only=True):
    """The fields of `Trajectory` that are no arrays."""

    id: str
    weight_versions: tuple[str, ...]
    policy: str
    at: str
    status: str
    finish_reason: str
    reward: float | None
    reward_components: dict[str, float]
    group: str | None
    group_size: int | None
    metadata: dict[str, Any]
    routing: RoutingSpec | None
    segments: tuple[Segment, ...]
    nonfinite_logprobs: int
    version: int


def to_blob(trajectory: Trajectory) -> bytes:
    """Serialize."""
    arrays = {name: getattr(trajectory, name) for name in _ARRAYS}
    rest = _Rest(**{name: getattr(trajectory, name) for name in _Rest.__struct_fields__})
    text = msgspec.json.encode(rest).decode()
    return save({name: array for name, array in arrays.items() if array is not None}, {"trajstore": text})


def from_blob(blob: bytes) -> Trajectory:
    """Deserialize; the arrays own their memory.

    Raises:
        Corrupt: not such a blob.
    """
    try:
        arrays = load(blob)
        length = int.from_bytes(blob[:8], "little")
        header = msgspec.json.decode(blob[8 : 8 + length])
        rest = msgspec.json.decode(header["__metadata__"]["trajstore"], type=_Rest)
        wanted = _ARRAYS if rest.routing is not None else [name for name in _ARRAYS if name != "routed_experts"]
        fields: dict[str, Any] = {"routed_experts": None} | {name: arrays[name].copy() for name in wanted}
        fields |= {name: getattr(rest, name) for name in _Rest.__struct_fields__}
        return Trajectory(**fields)
    except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"this is no folded trajectory: {error}") from error
