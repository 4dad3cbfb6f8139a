"""Batches and trajectories as files that need no store: safetensors for a batch, MessagePack for trajectories.

Any reader of the two formats opens them; what holds which field is said in `write_batch` and `write_trajectories`.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trajstore.errors import UNREADABLE, Corrupt, SchemaError
from trajstore.trajectory import Trajectory
from trajstore_trainer.batch import PaddedBatch
from trajstore_trainer.packed import PackedBatch

__all__ = ["read_batch", "read_trajectories", "write_batch", "write_trajectories"]

_BATCHES: dict[str, type[PaddedBatch] | type[PackedBatch]] = {"padded": PaddedBatch, "packed": PackedBatch}
_VERSION = 1
_FORMAT = "trajstore.trajectories"


class _BatchHeader(msgspec.Struct, kw_only=True):
    """What safetensors has no tensor for: the kind of batch, and the fields of it that are no tensors."""

    version: int
    kind: str
    fields: dict[str, Any]


class _FileHeader(msgspec.Struct, kw_only=True):
    """The first record of a file of trajectories."""

    format: str
    version: int


class _Array(msgspec.Struct, array_like=True):
    """An array as `[data, shape, dtype]`, little-endian C order: prime-rl's `RoutedExperts`."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str


def write_batch(path: str | os.PathLike[str], batch: PaddedBatch | PackedBatch) -> None:
    """Write a batch as one safetensors file: its tensors by name, all else as JSON under the metadata key `trajstore`.

    A file of that name is replaced at once or not at all.
    """
    kind = next(kind for kind, type_ in _BATCHES.items() if isinstance(batch, type_))
    tensors = {name: tensor.contiguous() for name, tensor in batch.to("cpu").tensors().items()}
    rest = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in tensors}
    header = msgspec.json.encode(_BatchHeader(version=_VERSION, kind=kind, fields=rest)).decode()
    with _replacing(path) as temporary:
        save_file(tensors, temporary, {"trajstore": header})


def read_batch(path: str | os.PathLike[str]) -> PaddedBatch | PackedBatch:
    """Read what `write_batch` wrote; the tensors own their memory.

    Raises:
        Corrupt: not such a file.
        SchemaError: written by a newer trajstore.
    """
    try:
        with safe_open(path, "pt") as file:
            header = msgspec.json.decode(file.metadata()["trajstore"], type=_BatchHeader)
            _require_version(path, header.version)
            kind = _BATCHES[header.kind]
            hints = get_type_hints(kind)
            found: dict[str, Any] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found |= {name: msgspec.convert(value, hints[name]) for name, value in header.fields.items()}
        return kind(**found)
    except (SafetensorError, *UNREADABLE, KeyError, TypeError) as error:
        raise Corrupt(f"{os.fspath(path)} is no file of a batch: {error}") from error


def write_trajectories(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> int:
    """Write trajectories as one file, one at a time, and return how many.

    The file is a sequence of records, each a MessagePack map behind its length (8 bytes, little-endian). The first is
    `{"format": "trajstore.trajectories", "version": 1}`, each other one a trajectory by the names of its fields, an
    array as `[data, shape, dtype]`. A file of that name is replaced at once or not at all.
    """
    encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
    count = 0
    with _replacing(path) as temporary, temporary.open("wb") as file:
        for record in _records(trajectories):
            data = encoder.encode(record)
            file.write(len(data).to_bytes(8, "little"))
            file.write(data)
            count += isinstance(record, Trajectory)
    return count


def read_trajectories(path: str | os.PathLike[str]) -> Iterator[Trajectory]:
    """Read what `write_trajectories` wrote, one at a time; the arrays own their memory.

    Raises:
        Corrupt: not such a file, or it ends within a record.
        SchemaError: written by a newer trajstore.
    """
    decoder = msgspec.msgpack.Decoder(Trajectory, dec_hook=_decode_array)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        number = 0
        while length := file.read(8):
            expected = int.from_bytes(length, "little")
            if len(length) < 8 or expected > size - file.tell():
                raise Corrupt(f"{os.fspath(path)} ends within record {number}; it was copied only in part")
            data = file.read(expected)
            try:
                if number:
                    yield decoder.decode(data)
                else:
                    header = msgspec.msgpack.decode(data, type=_FileHeader)
                    if header.format != _FORMAT:
                        raise ValueError(f"the format of its file is {header.format!r}")
                    _require_version(path, header.version)
            except (*UNREADABLE, ValueError, TypeError) as error:
                if isinstance(error, SchemaError):
                    raise
                raise Corrupt(f"{os.fspath(path)}: record {number} is no trajectory: {error}") from error
            number += 1
    if not number:
        raise Corrupt(f"{os.fspath(path)} is empty, and no file of trajectories")


def _records(trajectories: Iterable[Trajectory]) -> Iterator[_FileHeader | Trajectory]:
    yield _FileHeader(format=_FORMAT, version=_VERSION)
    yield from trajectories


def _encode_array(value: Any) -> _Array:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"a trajectory holds no {type(value).__name__}")
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return _Array(little.tobytes(), value.shape, value.dtype.name)


def _decode_array(_: type, value: Any) -> npt.NDArray[Any]:
    array = msgspec.convert(value, _Array)
    if np.dtype(array.dtype).kind not in "biuf":
        raise ValueError(f"an array of {array.dtype:.40} is no number's")
    return np.frombuffer(array.data, np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape).copy()


def _require_version(path: str | os.PathLike[str], version: int) -> None:
    if version > _VERSION:
        raise SchemaError(
            f"{os.fspath(path)} has version {version} of its format, and this trajstore knows {_VERSION}: update it"
        )


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when it is whole."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
