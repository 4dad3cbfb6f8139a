"""A folded trajectory as one contiguous blob in the safetensors format, and back.

What the materializer publishes and a trainer fetches in one round trip. Any safetensors reader opens it: the arrays
under the names of `Trajectory`, everything else as JSON under the metadata key `trajstore`.
"""

import io
import math
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from trajstore.errors import UNREADABLE, Corrupt
from trajstore.history import Segment
from trajstore.routing import RoutingSpec
from trajstore.trajectory import Trajectory

__all__ = ["Readable", "from_blob", "read_blob", "to_blob"]

_COLUMNS = {
    "token_ids": np.dtype("<i4"),
    "logprobs": np.dtype("<f4"),
    "loss_mask": np.dtype(np.bool_),
    "segment_ids": np.dtype("<i2"),
    "weight_version_ids": np.dtype("<i4"),
    "routing_mask": np.dtype(np.bool_),
    "routing_source": np.dtype("<i2"),
}
"""The arrays `[T]` of a trajectory; `routed_experts` is as its routing spec says."""

_NAMES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "U8",
    np.dtype("<i2"): "I16",
    np.dtype("<u2"): "U16",
    np.dtype("<i4"): "I32",
    np.dtype("<f4"): "F32",
}
"""Of dtypes, in the format."""


class Readable(Protocol):
    """A file, or a value that is just arriving."""

    def read(self, count: int, /) -> bytes: ...
    def readinto(self, buffer: memoryview, /) -> int: ...


class _Tensor(msgspec.Struct):
    """One array of a safetensors header; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


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
    arrays = {name: getattr(trajectory, name) for name in (*_COLUMNS, "routed_experts")}
    rest = _Rest(**{name: getattr(trajectory, name) for name in _Rest.__struct_fields__})
    text = msgspec.json.encode(rest).decode()
    return save({name: array for name, array in arrays.items() if array is not None}, {"trajstore": text})


def from_blob(blob: bytes) -> Trajectory:
    """Deserialize; the arrays own their memory.

    Raises:
        Corrupt: not such a blob.
    """
    return read_blob(io.BytesIO(blob), len(blob))


def read_blob(file: Readable, nbytes: int) -> Trajectory:
    """Deserialize what is just arriving: each array is read into its own memory, which is the only copy.

    Args:
        nbytes: of the blob.

    Raises:
        Corrupt: not such a blob; `file` may not have been read to its end.
    """
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > nbytes - 8:
            raise ValueError("it ends within its header")
        header = msgspec.json.decode(file.read(length))
        rest = msgspec.json.decode(header.pop("__metadata__")["trajstore"], type=_Rest)
        tensors = msgspec.convert(header, dict[str, _Tensor])
        dtypes = _require_arrays(tensors, rest.routing)
        fields: dict[str, Any] = {"routed_experts": None}
        at = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
            fields[name] = _read_array(file, tensor, dtypes[name], at, room=nbytes - 8 - length - at)
            at = tensor.data_offsets[1]
        if at != nbytes - 8 - length:
            raise ValueError("it goes on behind its arrays")
        fields |= {name: getattr(rest, name) for name in _Rest.__struct_fields__}
        return Trajectory(**fields)
    except (*UNREADABLE, KeyError, TypeError, AttributeError, ValueError) as error:
        raise Corrupt(f"this is no folded trajectory: {error}") from error


def _require_arrays(tensors: Mapping[str, _Tensor], routing: RoutingSpec | None) -> dict[str, np.dtype[Any]]:
    """Dtypes of a trajectory's arrays, if these are they: all of them, each as long as `token_ids`."""
    tokens = tensors["token_ids"].shape[:1]
    wanted = {name: (dtype, tokens) for name, dtype in _COLUMNS.items()}
    if routing is not None:
        wanted["routed_experts"] = (routing.dtype, (*tokens, routing.num_layers, routing.top_k))
    if differing := tensors.keys() ^ wanted.keys():
        raise ValueError(f"it should not have, or lacks, {', '.join(sorted(differing))}")
    for name, (dtype, shape) in wanted.items():
        found = tensors[name]
        if (found.dtype, found.shape) != (_NAMES[dtype], shape):
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {_NAMES[dtype]} {list(shape)}")
    return {name: dtype for name, (dtype, _) in wanted.items()}


def _read_array(file: Readable, tensor: _Tensor, dtype: np.dtype[Any], at: int, *, room: int) -> npt.NDArray[Any]:
    """The array that begins at `at`, where the one before has ended, in at most `room` bytes."""
    start, stop = tensor.data_offsets
    if start != at or not 0 <= stop - start <= room or min(tensor.shape, default=0) < 0:
        raise ValueError(f"an array lies at {start} to {stop}, where none can lie")
    if math.prod(tensor.shape) * dtype.itemsize != stop - start:
        raise ValueError(f"an array of shape {tensor.shape} has {stop - start} bytes")
    array: npt.NDArray[Any] = np.empty(tensor.shape, dtype)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != stop - start:
        raise ValueError("it ends within an array")
    return array
