"""Arrays read through zarr-python: what another writer laid out, and all where another codec pipeline is chosen."""

import math
import os
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from trajstore.archive.storage.local import LocalStorage
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import Conflict, Corrupt
from trajstore.limits import CHUNK_BYTES

__all__ = ["ForeignArray", "other_pipeline"]

_DAMAGE = (OSError, KeyError, ValueError, RuntimeError, TypeError)
"""What zarr-python and its pipelines raise for files that they cannot make sense of."""

_IMPORTED_BY = os.getpid()


def other_pipeline() -> str | None:
    """The codec pipeline that the user has put in the place of zarr-python's own, if any."""
    path: str = zarr.config.get("codec_pipeline.path")
    return None if path.startswith("zarr.") else path


class ForeignArray:
    """An array of any layout that zarr-python knows. It must be there as a whole.

    Attributes:
        shape, dtype, chunk_shape: of the array.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        """Open it; in an object store that fetches the whole array.

        Raises:
            Corrupt: zarr-python cannot open it, or files of it are missing.
            Conflict: as `read`.
        """
        self._where = f"array {path} in {storage.location}"
        self._pipeline = other_pipeline()
        self._refuse_after_fork()
        try:
            if isinstance(storage, LocalStorage):
                array = zarr.open_array(f"{storage.location}/{path}", mode="r", zarr_format=3)
            else:
                array = zarr.open_array(_fetched(storage, path), mode="r", zarr_format=3)
            missing = _missing_files(array)
        except _DAMAGE as error:
            raise Corrupt(f"{self._where} is damaged: it cannot be opened: {error}; restore it from a copy") from error
        if missing:
            raise Corrupt(f"{self._where} is damaged: {missing} of its files are missing; restore it from a copy")
        if array.dtype.kind not in "biuf" or math.prod(array.chunks) * array.dtype.itemsize > CHUNK_BYTES:
            raise Corrupt(
                f"{self._where} has chunks {array.chunks} of {array.dtype}: no numbers, or more than {CHUNK_BYTES} "
                "bytes in a chunk. It is not trajstore's"
            )
        self._array: zarr.Array[Any] = array
        self.shape = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.chunk_shape = array.chunks

    def read(self, start: int, stop: int, first: int, last: int) -> np.ndarray[Any, Any]:
        """Rows `[start, stop)` and, where there are layers, layers `[first, last)`.

        Raises:
            Corrupt: zarr-python cannot read them.
            Conflict: in a forked process, through another pipeline.
        """
        self._refuse_after_fork()
        layers = (slice(first, last),) if len(self.shape) > 1 else ()
        try:
            return np.array(self._array[(slice(start, stop), *layers)])
        except _DAMAGE as error:
            raise Corrupt(
                f"{self._where} is damaged: rows {start} to {stop} cannot be read: {error}; restore it from a copy"
            ) from error

    def _refuse_after_fork(self) -> None:
        """The threads of zarrs, say, exist in the parent only: a read would wait for them for ever."""
        if self._pipeline is not None and os.getpid() != _IMPORTED_BY:
            raise Conflict(
                f"{self._where} cannot be read through {self._pipeline} in a forked process. Start workers with the "
                "method 'spawn', or leave zarr's codec_pipeline.path as it is"
            )


def _missing_files(array: "zarr.Array[Any]") -> int:
    per_file = array.shards or array.chunks
    wanted = math.prod(-(-size // step) for size, step in zip(array.shape, per_file, strict=True))
    chunks_per_file = math.prod(step // chunk for step, chunk in zip(per_file, array.chunks, strict=True))
    return wanted - array.nchunks_initialized // chunks_per_file


def _fetched(storage: Storage, path: str) -> MemoryStore:
    files = {file.path.removeprefix(f"{path}/"): storage.read(file.path) for file in storage.list(path)}
    return MemoryStore({name: cpu.Buffer.from_bytes(data) for name, data in files.items()})
