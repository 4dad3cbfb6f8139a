"""Other ways to keep rollouts, each as plain as it comes and as durable as a pack: fsynced once per batch.

All store the same three columns with zstd level 3, but for those whose format knows no compression. Each keeps in
memory where its rollouts lie, which an archive has to look up.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import zarr
from numcodecs import Zstd  # type: ignore[import-untyped]
from safetensors import safe_open
from safetensors.numpy import save_file
from zarr.codecs import ZstdCodec

from benchmarks.corpora import Rollout

__all__ = ["FRAMES", "NAIVE", "RIVALS", "Rival", "sync_tree"]

Rows = npt.NDArray[np.uint8]

FRAMES = "one file of zstd frames"
NAIVE = "zarr, naive append"

CHUNK_BYTES = 3 << 19
"""Of one Zarr chunk, before compression."""


class Rival(Protocol):
    """Rollouts in a folder; numbered from 0 in the order in which they were written."""

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """Store a batch durably."""

    def read(self, number: int) -> Rollout:
        """One rollout."""

    def routed(self, number: int) -> Rows:
        """Its routing alone."""

    def scan(self) -> Iterator[Rollout]:
        """All rollouts in order."""


class _Numbered:
    """What most have in common: a scan reads one rollout after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def read(self, number: int) -> Rollout:
        raise NotImplementedError

    def scan(self) -> Iterator[Rollout]:
        return map(self.read, range(self.count))


class Frames(_Numbered):
    """One file: for each rollout a zstd frame of its routing and one of its tokens and logprobs. And an index of it.

    Frames are compressed in as many threads as there are processors, as a pack's chunks are.
    """

    codec = Zstd(level=3, checksum=True)
    entry = struct.Struct("<QIIIHH")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index: list[tuple[int, ...]] = []
        self.path = folder / "frames"

    def write(self, rollouts: Sequence[Rollout]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads, self.path.open("ab") as file:
            for rollout, (routed, rest) in zip(rollouts, threads.map(self._encode, rollouts), strict=True):
                self.index.append((file.tell(), len(routed), len(rest), *rollout.routed.shape))
                file.write(routed)
                file.write(rest)
        with (self.folder / "index").open("ab") as index:
            index.write(b"".join(self.entry.pack(*place) for place in self.index[self.count :]))
        self.count = len(self.index)
        sync_tree(self.folder)

    def read(self, number: int) -> Rollout:
        at, routed, rest, *shape = self.index[number]
        data = self._bytes(at, routed + rest)
        columns = self.codec.decode(data[routed:])
        return Rollout(
            np.frombuffer(columns, np.int32, shape[0]),
            np.frombuffer(columns, np.float32, offset=4 * shape[0]),
            np.frombuffer(self.codec.decode(data[:routed]), np.uint8).reshape(shape),
        )

    def routed(self, number: int) -> Rows:
        at, routed, _, *shape = self.index[number]
        return np.frombuffer(self.codec.decode(self._bytes(at, routed)), np.uint8).reshape(shape)

    def _bytes(self, at: int, count: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), count, at)

    def _encode(self, rollout: Rollout) -> tuple[bytes, bytes]:
        rest = rollout.tokens.tobytes() + rollout.logprobs.tobytes()
        return self.codec.encode(rollout.routed), self.codec.encode(rest)


class NaiveAppend(_Numbered):
    """Three Zarr arrays that grow by `zarr.Array.append`, a rollout at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.group = zarr.create_group(folder / "group", zarr_format=3)
        self.arrays: dict[str, zarr.Array[Any]] = {}
        self.ends = [0]

    def write(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            for name, column in rollout._asdict().items():
                if name not in self.arrays:
                    self.arrays[name] = _create(self.group, name, column, rows=0)
                self.arrays[name].append(column)
            self.ends.append(self.ends[-1] + len(rollout.tokens))
        self.count = len(self.ends) - 1
        sync_tree(self.folder)

    def read(self, number: int) -> Rollout:
        rows = slice(*self.ends[number : number + 2])
        return Rollout(**{name: np.asarray(array[rows]) for name, array in self.arrays.items()})

    def routed(self, number: int) -> Rows:
        return np.asarray(self.arrays["routed"][slice(*self.ends[number : number + 2])], np.uint8)


class ArrayEach(_Numbered):
    """A Zarr group of three arrays for each rollout."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.group = zarr.create_group(folder / "group", zarr_format=3)

    def write(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            group = self.group.create_group(str(self.count))
            for name, column in rollout._asdict().items():
                _create(group, name, column, rows=len(column))[...] = column
            self.count += 1
        sync_tree(self.folder)

    def read(self, number: int) -> Rollout:
        return Rollout(*(self._column(number, name) for name in Rollout._fields))

    def routed(self, number: int) -> Rows:
        return self._column(number, "routed")

    def _column(self, number: int, name: str) -> npt.NDArray[Any]:
        array: zarr.Array[Any] = zarr.open_array(self.folder / "group" / str(number) / name, mode="r", zarr_format=3)
        return np.asarray(array[...])


class NumpyFiles(_Numbered):
    """`np.save`: three files for each rollout, not compressed."""

    def write(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            for name, column in rollout._asdict().items():
                np.save(self._path(self.count, name), column)
            self.count += 1
        sync_tree(self.folder)

    def read(self, number: int) -> Rollout:
        return Rollout(*(np.load(self._path(number, name)) for name in Rollout._fields))

    def routed(self, number: int) -> Rows:
        rows: Rows = np.load(self._path(number, "routed"))
        return rows

    def _path(self, number: int, name: str) -> Path:
        return self.folder / f"{number}.{name}.npy"


class ParquetFiles(_Numbered):
    """A Parquet file for each batch, a row group for each rollout, a row for each token.

    Routing is FixedSizeBinary, without a dictionary, which would hold nearly every row.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: list[pq.ParquetFile] = []
        self.places: list[tuple[int, int, tuple[int, ...]]] = []

    def write(self, rollouts: Sequence[Rollout]) -> None:
        path = self.folder / f"{len(self.files)}.parquet"
        layers, top_k = rollouts[0].routed.shape[1:]
        kinds = {"tokens": pa.int32(), "logprobs": pa.float32(), "routed": pa.binary(layers * top_k)}
        schema = pa.schema(list(kinds.items()))
        with pq.ParquetWriter(path, schema, compression="zstd", compression_level=3, use_dictionary=False) as writer:
            for group, rollout in enumerate(rollouts):
                length = len(rollout.tokens)
                columns = [
                    pa.Array.from_buffers(kind, length, [None, pa.py_buffer(getattr(rollout, name))])
                    for name, kind in kinds.items()
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=length)
                self.places.append((len(self.files), group, rollout.routed.shape))
        self.count = len(self.places)
        sync_tree(self.folder)
        self.files.append(pq.ParquetFile(path))

    def read(self, number: int) -> Rollout:
        file, group, shape = self.places[number]
        table = self.files[file].read_row_group(group)
        tokens, logprobs = (table[name].to_numpy() for name in ("tokens", "logprobs"))
        return Rollout(tokens, logprobs, _rows(table["routed"], shape))

    def routed(self, number: int) -> Rows:
        file, group, shape = self.places[number]
        return _rows(self.files[file].read_row_group(group, columns=["routed"])["routed"], shape)


class Safetensors(_Numbered):
    """A safetensors file for each batch, three tensors for each rollout, not compressed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: list[Any] = []
        self.places: list[int] = []

    def write(self, rollouts: Sequence[Rollout]) -> None:
        path = self.folder / f"{len(self.files)}.safetensors"
        tensors: dict[str, npt.NDArray[Any]] = {}
        for number, rollout in enumerate(rollouts, self.count):
            tensors |= {f"{number}.{name}": column for name, column in rollout._asdict().items()}
            self.places.append(len(self.files))
        save_file(tensors, path)
        self.count = len(self.places)
        sync_tree(self.folder)
        self.files.append(safe_open(path, "numpy"))

    def read(self, number: int) -> Rollout:
        return Rollout(*(self._column(number, name) for name in Rollout._fields))

    def routed(self, number: int) -> Rows:
        return self._column(number, "routed")

    def _column(self, number: int, name: str) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = self.files[self.places[number]].get_tensor(f"{number}.{name}")
        return column.copy()  # it is a view of the mapped file: nothing has been read yet


RIVALS: dict[str, Callable[[Path], Rival]] = {
    FRAMES: Frames,
    NAIVE: NaiveAppend,
    "one zarr group per trajectory": ArrayEach,
    "np.save": NumpyFiles,
    "Parquet": ParquetFiles,
    "safetensors": Safetensors,
}
"""By the name that the tables give them."""


def sync_tree(folder: Path) -> None:
    """Fsync all files and folders below, and the folder itself."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _create(group: zarr.Group, name: str, column: npt.NDArray[Any], *, rows: int) -> "zarr.Array[Any]":
    """An array for columns like this one, in chunks of about `CHUNK_BYTES`."""
    most = CHUNK_BYTES // max(1, column.nbytes // len(column))
    return group.create_array(
        name,
        shape=(rows, *column.shape[1:]),
        dtype=column.dtype,
        chunks=(min(most, rows or most), *column.shape[1:]),
        compressors=ZstdCodec(level=3, checksum=True),
    )


def _rows(column: Any, shape: tuple[int, ...]) -> Rows:
    """Routing `[T, L, K]` of a column of FixedSizeBinary, without going through Python objects."""
    (chunk,) = column.chunks
    flat = np.frombuffer(chunk.buffers()[1], np.uint8, chunk.nbytes, chunk.offset * column.type.byte_width)
    return flat.reshape(shape)
