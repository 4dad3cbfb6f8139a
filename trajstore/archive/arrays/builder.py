"""One array becoming one Zarr v3 shard file while its rows still arrive: encoded directly, chunk by chunk, in threads.

zarr-python writes the same files, but at a fraction of the speed (`benchmarks/codecs.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from trajstore.archive.arrays.codecs import codecs_for, crc32c, encode
from trajstore.archive.arrays.layout import Layout, describe
from trajstore.archive.arrays.threads import shared_threads
from trajstore.errors import SchemaError

__all__ = ["CHUNK_BYTES", "ArrayFiles", "EncodedArray", "ShardBuilder", "encode_array", "layer_chunks_for"]

CHUNK_BYTES = 192 << 10
"""What one chunk holds before compression, unless told. Smaller ones compress worse (`benchmarks/codecs.py`), larger
ones hold more than a short trajectory wants (`benchmarks/archive.py`)."""

_SAMPLE = 3
"""Runs of rows on which codecs are tried: the first ones."""

Array = np.ndarray[Any, Any]


class ArrayFiles(NamedTuple):
    """An array's files by their path below its folder, each in parts to be taken once and in order; and its codec."""

    files: dict[str, Iterable[bytes]]
    codec: str


class EncodedArray(NamedTuple):
    """The same with its files whole."""

    files: dict[str, bytes]
    codec: str


def layer_chunks_for(layers: int) -> int:
    """Into how many chunks to cut the layer axis, so that a pipeline stage reads little more than its layers.

    At most 4, of at least 8 layers each.
    """
    return min(4, max(1, layers // 8))


class ShardBuilder:
    """Takes rows, compresses each chunk as soon as it is full, and lets go of what is compressed."""

    def __init__(
        self,
        row_shape: Sequence[int],
        dtype: np.dtype[Any],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        layer_chunks: int = 1,
        codec: str | None = None,
        threads: Executor | None = None,
    ) -> None:
        """Begin an array `[rows, *row_shape]`.

        Args:
            row_shape: () or `(layers, ...)`.
            dtype: little-endian.
            chunk_bytes: what a chunk holds at most, before compression.
            layer_chunks: into how many chunks the layers are cut.
            codec: one of `codecs.CODECS`; by default what makes a sample smallest, always "zstd" for one byte.
            threads: where to compress; not the executor that runs this call. By default one that the process shares.

        Raises:
            SchemaError: a dtype that a pack does not hold.
        """
        self._layout = Layout.fit(row_shape, dtype, chunk_bytes=chunk_bytes, layer_chunks=layer_chunks)
        self._threads = threads or shared_threads()
        candidates = codecs_for(dtype)
        self._codec = codec or (candidates[0] if len(candidates) == 1 else "")
        self._rows = 0
        self._parts: list[Array] = []  # rows of the chunk that is not full yet
        self._pending = 0
        self._sample: list[Array] = []
        self._chunks: list[Future[bytes]] = []

    def append(self, rows: Array) -> None:
        """Take rows `[n, *row_shape]`, which nobody changes any more.

        Raises:
            SchemaError: of another shape or dtype.
        """
        if rows.shape[1:] != self._layout.shape[1:] or rows.dtype != self._layout.dtype:
            raise SchemaError(
                f"rows {rows.dtype}{list(rows.shape[1:])} do not fit behind rows {self._layout.dtype}"
                f"{list(self._layout.shape[1:])}; one array holds rows of one dtype and shape"
            )
        self._rows += len(rows)
        at = 0
        while at < len(rows):
            taken = rows[at : at + self._layout.chunk_shape[0] - self._pending]
            self._parts.append(taken)
            self._pending += len(taken)
            at += len(taken)
            if self._pending == self._layout.chunk_shape[0]:
                self._begin_run()

    def finish(self) -> ArrayFiles:
        """No more rows come. Threads go on compressing while the files are taken."""
        layout = self._layout._replace(shape=(self._rows, *self._layout.shape[1:]))
        if self._parts:
            if not (self._chunks or self._sample):  # the only run: nothing beside it asks for full chunks
                layout = layout._replace(chunk_shape=(self._rows, *layout.chunk_shape[1:]))
            self._layout = layout
            self._begin_run()
        if not self._codec:
            self._choose()
        files: dict[str, Iterable[bytes]] = {}
        checksums = bytearray()
        if layout.chunks:
            files[layout.shard_name] = _shard(self._chunks, checksums)
        files["zarr.json"] = _document(layout, self._codec, checksums)
        return ArrayFiles(files, self._codec)

    def _begin_run(self) -> None:
        """Compress the chunks that the parts make up: one for each run of layers."""
        parts, self._parts, self._pending = self._parts, [], 0
        for group in range(self._layout.grid[1]):
            if self._codec:
                self._chunks.append(self._threads.submit(_encode, self._codec, parts, group, self._layout.chunk_shape))
            else:
                self._sample.append(_chunk(parts, group, self._layout.chunk_shape))
        if not self._codec and len(self._sample) >= _SAMPLE:
            self._choose()

    def _choose(self) -> None:
        """The codec that makes the sample smallest, the first of equals."""
        codecs, sample = codecs_for(self._layout.dtype), self._sample
        tried = [[self._threads.submit(encode, codec, chunk) for chunk in sample] for codec in codecs]
        sizes = [sum(len(chunk.result()) for chunk in chunks) for chunks in tried]
        best = sizes.index(min(sizes))
        self._codec, self._chunks, self._sample = codecs[best], tried[best], []


def encode_array(
    data: Array | Sequence[Array],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    layer_chunks: int = 1,
    codec: str | None = None,
    threads: Executor | None = None,
) -> EncodedArray:
    """Encode an array that is there whole. Otherwise as `ShardBuilder`.

    Args:
        data: `[rows]` or `[rows, layers, ...]`; or at least one of such parts, equal but for their rows.
    """
    parts = [data] if isinstance(data, np.ndarray) else data
    first = parts[0]
    shard = ShardBuilder(
        first.shape[1:], first.dtype, chunk_bytes=chunk_bytes, layer_chunks=layer_chunks, codec=codec, threads=threads
    )
    for part in parts:
        shard.append(part)
    files, chosen = shard.finish()
    return EncodedArray({name: b"".join(content) for name, content in files.items()}, chosen)


def _encode(codec: str, parts: Sequence[Array], group: int, shape: Sequence[int]) -> bytes:
    return encode(codec, _chunk(parts, group, shape))


def _chunk(parts: Sequence[Array], group: int, shape: Sequence[int]) -> Array:
    """A chunk of this shape, C-contiguous, of some rows in parts and one run of their layers; zeros where they end."""
    across = tuple(slice(group * count, (group + 1) * count) for count in shape[1:2])
    pieces = [part[(slice(None), *across)] for part in parts]
    if len(pieces) == 1 and pieces[0].shape == tuple(shape) and pieces[0].flags.c_contiguous:
        return pieces[0]
    chunk = np.zeros(shape, parts[0].dtype)
    at = 0
    for piece in pieces:
        chunk[(slice(at, at + len(piece)), *(slice(0, count) for count in piece.shape[1:]))] = piece
        at += len(piece)
    return chunk


def _document(layout: Layout, codec: str, checksums: bytearray) -> Iterator[bytes]:
    """The `zarr.json` of a shard that was taken."""
    assert len(checksums) == 4 * layout.chunks
    yield describe(layout, codec, bytes(checksums))


def _shard(chunks: list[Future[bytes]], checksums: bytearray) -> Iterator[bytes]:
    """Chunks in order, and behind them the index that says where each lies. Each is let go once it is taken.

    Args:
        checksums: gets the last four bytes of each chunk.
    """
    lengths = []
    chunks.reverse()
    while chunks:
        chunk = chunks.pop().result()
        lengths.append(len(chunk))
        checksums += chunk[-4:]
        yield chunk
    places = np.array([(end - length, length) for end, length in zip(accumulate(lengths), lengths, strict=True)], "<u8")
    index = places.tobytes()
    yield index
    yield crc32c(index)
