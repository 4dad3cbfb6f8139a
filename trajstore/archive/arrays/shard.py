"""Reading an array that is one Zarr v3 shard file, decoded directly; `builder.py` writes it.

zarr-python reads the same files, but at a fraction of the speed (`benchmarks/codecs.py`). What it wrote in another
layout is read through it, and so is everything local where the user has chosen another codec pipeline:

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import msgspec
import numpy as np

from trajstore.archive.arrays.chunk_cache import ChunkCache
from trajstore.archive.arrays.codecs import crc32c, decode, decode_into
from trajstore.archive.arrays.foreign import ForeignArray, other_pipeline
from trajstore.archive.arrays.layout import Layout, Piece, checksums_of, is_intact, recognize
from trajstore.archive.arrays.threads import run_all
from trajstore.archive.storage.local import LocalStorage
from trajstore.archive.storage.protocol import Range, Storage
from trajstore.errors import UNREADABLE, Corrupt, SchemaError
from trajstore.limits import CHUNK_BYTES

__all__ = ["Begun", "Job", "ShardReader", "decode_all"]

_WORTH_THREADS = 512 << 10
"""Bytes up to which handing chunks to threads costs more than it saves."""

_MISSING = np.uint64(2**64 - 1)
"""What the index says of a chunk that was never written."""

Array = np.ndarray[Any, Any]


class Job(NamedTuple):
    """A chunk to decode, its bytes, and the call that does it."""

    nbytes: int
    run: Callable[[], None]


class Begun(NamedTuple):
    """Rows that are there once all jobs were run."""

    rows: Array
    jobs: list[Job]


def decode_all(jobs: Sequence[Job], threads: Executor | None = None) -> None:
    """Run the jobs of one read, or of several: side by side where that pays.

    Raises:
        Corrupt: a chunk is damaged.
    """
    if len(jobs) > 1 and sum(job.nbytes for job in jobs) > _WORTH_THREADS:
        run_all([job.run for job in sorted(jobs, key=lambda job: -job.nbytes)], threads)
    else:
        for job in jobs:
            job.run()


class ShardReader:
    """Rows of an array, by rows and layers. Thread-safe; usable after a fork unless another pipeline is chosen.

    Every chunk must be there and match its checksum. Arrays that are not laid out as ours are read by zarr-python:
    a chunk missing from *their* shards reads as the fill value, a missing shard is found.

    Attributes:
        shape, dtype, chunk_shape: of the array.
        bytes_read: compressed bytes fetched so far; those that zarr-python fetches are not counted.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        *,
        shard_size: int | None = None,
        sha256: str | None = None,
        cache: ChunkCache | None = None,
        threads: Executor | None = None,
    ) -> None:
        """Open an array.

        Args:
            storage, path: the array's folder.
            shard_size: bytes of the shard file, where known: saves asking for it, and another array's shard, which
                has another size, is found out.
            sha256: of `zarr.json` (hex), where known.
            cache: where to keep chunks of which a part was read; any number of arrays may share it.
            threads: where to decompress; by default an executor that the process shares.

        Raises:
            Corrupt: `zarr.json` is missing, damaged, or another one.
            Conflict: see `read`.
        """
        self.storage = storage
        self.path = path
        self.bytes_read = 0
        self._threads = threads
        self._cache = cache
        self._shard_size = shard_size
        self._index: Array | None = None
        document = self._document(sha256)
        self._layout: Layout | None
        self._layout, self._codec = recognize(document) or (None, "")
        self._foreign: ForeignArray | None = None
        found: Layout | ForeignArray
        if self._layout is None or (other_pipeline() and isinstance(storage, LocalStorage)):
            found = self._foreign = ForeignArray(storage, path)
        else:
            found = self._layout
        self.shape = found.shape
        self.dtype = found.dtype
        self.chunk_shape = found.chunk_shape
        if self._layout is not None:  # asked for with every chunk
            self._require_readable(self._layout)
            self._checksums = self._known_checksums(self._layout, document)
            self._flat_chunk = self._layout.flat(self._layout.chunk_shape)
            self._chunk_bytes = self._layout.chunk_bytes

    def read(self, start: int, stop: int, layers: slice | None = None) -> Array:
        """Rows `[start, stop)`, of `[rows, layers, ...]` only some neighbouring layers; the result owns its memory.

        Raises:
            Corrupt: the array holds no such rows, or what is needed of it is missing or damaged.
            Conflict: another codec pipeline in a forked process.
            SchemaError: `layers` of an array without layers, or with a step.
        """
        rows, jobs = self.begin(start, stop, layers)
        decode_all(jobs, self._threads)
        return rows

    def begin(self, start: int, stop: int, layers: slice | None = None) -> Begun:
        """Fetch what `read` decodes: the rows are there once every job was run, in any order and thread.

        Raises:
            Corrupt, Conflict, SchemaError: as `read`; the jobs raise `Corrupt`, too.
        """
        first, last = self._layer_range(layers)
        if not 0 <= start <= stop <= self.shape[0]:
            raise Corrupt(f"{self._where} holds {self.shape[0]} rows; rows {start} to {stop} were asked for")
        layout = self._layout
        if self._foreign is not None:
            return Begun(self._read_foreign(self._foreign, start, stop, first, last), [])
        assert layout is not None
        if start < stop:
            self._load_index(layout)  # what has no room in the file for the index of its chunks has not so many rows
        shape = (stop - start, last - first, *self.shape[2:])[: len(self.shape)]
        try:
            out = np.empty(shape, self.dtype)
        except (MemoryError, ValueError) as error:
            raise Corrupt(f"{self._where} cannot be read: {error}; is it as large as its zarr.json says?") from error
        pieces = list(layout.pieces(start, stop, first, last)) if out.size else []
        return Begun(out, self._jobs(layout, out.reshape(layout.flat(shape)), pieces) if pieces else [])

    def _read_foreign(self, foreign: ForeignArray, start: int, stop: int, first: int, last: int) -> Array:
        if self._layout is not None and self._layout.chunks:
            self._load_index(self._layout)  # to zarr-python a missing chunk reads as zeros
        return foreign.read(start, stop, first, last)

    def _jobs(self, layout: Layout, out: Array, pieces: Sequence[Piece]) -> list[Job]:
        """What is left to do to have pieces in `out [rows, layers, rest]`."""
        cache, key = self._cache, (self.storage.location, self.path)
        chunk_shape, nbytes = self._flat_chunk, self._chunk_bytes

        def take(piece: Piece, chunk: Array) -> None:
            part = chunk[piece.rows, piece.layers]
            row, layer = piece.into
            out[row : row + part.shape[0], layer : layer + part.shape[1]] = part
            if cache is not None and part.size < chunk.size:
                rows = layout.rows_of(piece.number)
                cache.put((*key, piece.number), chunk if 2 * rows > len(chunk) else chunk[:rows].copy())

        def place(piece: Piece, data: memoryview) -> None:
            row, layer = piece.into
            wanted = out[row : row + chunk_shape[0], layer : layer + chunk_shape[1]]
            try:
                if piece.is_whole(chunk_shape) and wanted.flags.c_contiguous:
                    decode_into(self._codec, data, wanted)
                    return
                chunk = decode(self._codec, data, nbytes)
            except ValueError as error:
                raise self._damaged(layout, piece.number, str(error)) from error
            take(piece, np.frombuffer(chunk, layout.dtype).reshape(chunk_shape))

        absent = []
        for piece in pieces:
            known = None if cache is None else cache.get((*key, piece.number))
            if known is None:
                absent.append(piece)
            else:
                take(piece, known)
        if not absent:
            return []
        encoded = self._fetch(layout, [piece.number for piece in absent])
        return [Job(nbytes, functools.partial(place, piece, data)) for piece, data in zip(absent, encoded, strict=True)]

    def _fetch(self, layout: Layout, numbers: Sequence[int]) -> list[memoryview]:
        """Compressed chunks, those that lie behind each other in one read."""
        places: list[Range] = list(map(tuple, self._load_index(layout)[numbers].tolist()))
        ranges: list[Range] = []
        found: dict[Range, tuple[int, int]] = {}
        for offset, length in sorted(places):
            if ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
            else:
                ranges.append((offset, length))
            found[offset, length] = len(ranges) - 1, offset - ranges[-1][0]
        blocks = [memoryview(block) for block in self._read_shard(layout, ranges)]
        chunks = []
        for number, place in zip(numbers, places, strict=True):
            block, begin = found[place]
            chunk = blocks[block][begin : begin + place[1]]
            if len(chunk) != place[1]:
                raise self._damaged(layout, number, f"the file ends before it does, {len(chunk)} of {place[1]} bytes")
            if self._checksums is not None and chunk[-4:] != self._checksums[4 * number : 4 * number + 4]:
                raise self._damaged(layout, number, "its checksum is not the one in zarr.json; it may be another's")
            chunks.append(chunk)
        return chunks

    def _load_index(self, layout: Layout) -> Array:
        """`[chunks, 2]`: offset and length of every chunk, each within the shard. Two threads may load it twice."""
        if self._index is None:
            nbytes = 16 * layout.chunks + 4
            size = self._size_of_shard(layout)
            if size < nbytes:
                raise Corrupt(f"{self._where} is damaged: its shard of {size} bytes is cut off; restore it from a copy")
            data = self._read_shard(layout, [(size - nbytes, nbytes)])[0]
            if len(data) != nbytes or crc32c(data[:-4]) != data[-4:]:
                raise Corrupt(
                    f"{self._where} is damaged: the index at the end of its shard does not match its checksum, or the "
                    f"shard is cut off{self._other_size(layout)}; restore it from a copy"
                )
            index = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
            self._check_index(layout, index, size - nbytes)
            self._index = index
        return self._index

    def _check_index(self, layout: Layout, index: Array, size: int) -> None:
        missing = np.flatnonzero((index == _MISSING).any(axis=1))
        if missing.size:
            raise self._damaged(layout, int(missing[0]), "it is missing")
        offsets, lengths = index.T
        outside = np.flatnonzero((offsets > size) | (lengths > size) | (offsets + lengths > size))
        if outside.size:
            raise self._damaged(layout, int(outside[0]), "the index says that it lies outside of the shard")

    def _size_of_shard(self, layout: Layout) -> int:
        return self._found_size(layout) if self._shard_size is None else self._shard_size

    def _found_size(self, layout: Layout) -> int:
        try:
            return self.storage.size(self._shard_path(layout))
        except FileNotFoundError as error:
            raise self._absent(self._shard_path(layout)) from error

    def _other_size(self, layout: Layout) -> str:
        """What to add to an error where the shard has not the size that was known: it is another array's, perhaps."""
        found = self._found_size(layout)
        if self._shard_size in (None, found):
            return ""
        return f", or it is another one: it has {found} bytes, not the {self._shard_size} that were written"

    def _read_shard(self, layout: Layout, ranges: Sequence[Range]) -> list[bytes]:
        try:
            blocks = self.storage.read_ranges(self._shard_path(layout), ranges)
        except FileNotFoundError as error:
            raise self._absent(self._shard_path(layout)) from error
        self.bytes_read += sum(map(len, blocks))
        return blocks

    def _document(self, sha256: str | None) -> dict[str, Any]:
        path = f"{self.path}/zarr.json"
        try:
            data = self.storage.read(path)
        except FileNotFoundError as error:
            raise self._absent(path) from error
        try:
            document = msgspec.json.decode(data, type=dict[str, Any])
        except UNREADABLE as error:
            raise Corrupt(f"{self._where} is damaged: its zarr.json cannot be read: {error}; restore it") from error
        if not is_intact(document):
            raise Corrupt(f"{self._where} is damaged: its zarr.json is not what was written; restore it from a copy")
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise Corrupt(f"{self._where} is damaged: its zarr.json is not the one that was written; restore it")
        return document

    def _require_readable(self, layout: Layout) -> None:
        if layout.chunk_bytes > CHUNK_BYTES:
            raise Corrupt(
                f"{self._where} has chunks of {layout.chunk_bytes} bytes, the limit is {CHUNK_BYTES}; its zarr.json is "
                "damaged, or somebody else's"
            )

    def _known_checksums(self, layout: Layout, document: dict[str, Any]) -> bytes | None:
        try:
            found = checksums_of(document)
        except ValueError:
            found = b""
        if found is not None and len(found) != 4 * layout.chunks:
            raise Corrupt(
                f"{self._where} is damaged: its zarr.json does not tell the checksums of its chunks; restore it"
            )
        return found

    def _layer_range(self, layers: slice | None) -> tuple[int, int]:
        count = self.shape[1] if len(self.shape) > 1 else 1
        if layers is None:
            return 0, count
        first, last, step = layers.indices(count)
        if step != 1 or len(self.shape) < 2:
            raise SchemaError(f"{self._where} has shape {self.shape}; layers {layers} cannot be read of it, give a run")
        return first, max(first, last)

    def _shard_path(self, layout: Layout) -> str:
        return f"{self.path}/{layout.shard_name}"

    @property
    def _where(self) -> str:
        return f"array {self.path} in {self.storage.location}"

    def _absent(self, path: str) -> Corrupt:
        return Corrupt(f"{self._where} is damaged: file {path} is missing; restore it from a copy")

    def _damaged(self, layout: Layout, number: int, why: str) -> Corrupt:
        rows = layout.chunk_shape[0]
        first = number // layout.grid[1] * rows
        last = min(first + rows, layout.shape[0])
        return Corrupt(
            f"{self._where} is damaged: chunk {number} of {self._shard_path(layout)} (rows {first} to {last}): {why}; "
            "restore it from a copy"
        )
