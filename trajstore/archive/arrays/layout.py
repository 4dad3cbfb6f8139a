"""How an array is cut into the chunks of one shard, and the `zarr.json` that says so.

The first axis (rows) is cut, and the second one (layers) where asked; all further axes stay whole. Chunks lie in the
shard in C order: all layers of a run of rows beside each other, so that whole rows are one read.
Source of the format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from trajstore.archive.arrays.codecs import chain_of, is_checked
from trajstore.errors import SchemaError

__all__ = ["Layout", "Piece", "checksums_of", "describe", "is_intact", "recognize"]

_DTYPES = frozenset(
    f"{kind}{bits}"
    for kind, sizes in (("int", (8, 16, 32, 64)), ("uint", (8, 16, 32, 64)), ("float", (32, 64)))
    for bits in sizes
)
"""Zarr v3 and numpy name these alike."""

_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_KEY_ENCODING = {"name": "default", "configuration": {"separator": "/"}}


class Piece(NamedTuple):
    """What a read takes from one chunk.

    Attributes:
        number: of the chunk in the shard's index.
        rows, layers: what to take, within the chunk.
        into: the first row and layer of it in the result.
    """

    number: int
    rows: slice
    layers: slice
    into: tuple[int, int]

    def is_whole(self, chunk_shape: tuple[int, int, int]) -> bool:
        """Whether it takes all of a chunk."""
        return (self.rows, self.layers) == (slice(0, chunk_shape[0]), slice(0, chunk_shape[1]))


class Layout(NamedTuple):
    """An array of one shard.

    Attributes:
        shape: of the array, `[rows]`, `[rows, layers]` or `[rows, layers, ...]`.
        dtype: little-endian.
        chunk_shape: `[rows, layers, ...]` of every chunk; those at the edges are padded to it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]

    @classmethod
    def fit(cls, row_shape: Sequence[int], dtype: np.dtype[Any], *, chunk_bytes: int, layer_chunks: int) -> "Layout":
        """Of an array that has no rows yet, in chunks of at most about `chunk_bytes`.

        Args:
            row_shape: () or `(layers, ...)`.

        Raises:
            SchemaError: a dtype that a pack does not hold.
        """
        if dtype.name not in _DTYPES or not dtype.isnative:
            raise SchemaError(f"arrays of dtype {dtype.str} are not archived; convert to one of {sorted(_DTYPES)}")
        across = tuple(row_shape)
        if across:  # as equal as can be, for the last ones are padded
            across = (-(-across[0] // min(layer_chunks, across[0])), *across[1:])
        rows = max(1, chunk_bytes // (dtype.itemsize * math.prod(across)))
        return cls((0, *row_shape), dtype, (rows, *across))

    @property
    def grid(self) -> tuple[int, int]:
        """Number of chunks along rows and layers."""
        layers = -(-self.shape[1] // self.chunk_shape[1]) if len(self.shape) > 1 else 1
        return -(-self.shape[0] // self.chunk_shape[0]), layers

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return math.prod(self.grid)

    @property
    def chunk_bytes(self) -> int:
        """Of every chunk, before compression."""
        return self.dtype.itemsize * math.prod(self.chunk_shape)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Whole chunks that cover the array."""
        rows, layers = (max(1, count) for count in self.grid)
        counts = (rows, layers, *(1 for _ in self.shape[2:]))[: len(self.shape)]
        return tuple(count * size for count, size in zip(counts, self.chunk_shape, strict=True))

    @property
    def shard_name(self) -> str:
        """The one file that holds data; an array of no rows has none."""
        return "/".join(["c", *("0" for _ in self.shape)])

    def flat(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """A shape as `[rows, layers, all the rest]`."""
        return shape[0], shape[1] if len(shape) > 1 else 1, math.prod(shape[2:])

    def rows_of(self, number: int) -> int:
        """Rows of a chunk that are not padding."""
        rows = self.chunk_shape[0]
        return min(rows, self.shape[0] - number // self.grid[1] * rows)

    def pieces(self, start: int, stop: int, first: int, last: int) -> Iterator[Piece]:
        """What rows `[start, stop)` and layers `[first, last)` take from which chunk, by number."""
        rows, layers, _ = self.flat(self.chunk_shape)
        across = self.grid[1]
        for r in range(start // rows, -(-stop // rows)):
            for g in range(first // layers, -(-last // layers)):
                top, left = max(start, r * rows), max(first, g * layers)
                yield Piece(
                    number=r * across + g,
                    rows=slice(top - r * rows, min(stop - r * rows, rows)),
                    layers=slice(left - g * layers, min(last - g * layers, layers)),
                    into=(top - start, left - first),
                )


def describe(layout: Layout, codec: str, checksums: bytes) -> bytes:
    """The array's `zarr.json`. Its attribute `crc32` covers all but the attributes, see `is_intact`.

    Args:
        checksums: the last four bytes of every chunk, see `checksums_of`.
    """
    name = layout.dtype.name
    little = {} if layout.dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": layout.chunk_shape,
        "codecs": [{"name": "bytes", **little}, *chain_of(codec, layout.dtype)],
        "index_codecs": _INDEX_CODECS,
        "index_location": "end",
    }
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": layout.shape,
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.shard_shape}},
        "chunk_key_encoding": _KEY_ENCODING,
        "fill_value": 0.0 if name.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }
    attributes = {"crc32": _checksum(document), "chunk_checksums": checksums.hex()}
    return msgspec.json.format(msgspec.json.encode({**document, "attributes": attributes}))


def is_intact(document: dict[str, Any]) -> bool:
    """Whether a `zarr.json` is as it was written. One from another writer has no `crc32` and counts as intact.

    A flipped digit of the shape would else pass: the last chunk is padded, and padding would read as rows.
    """
    match document:
        case {"attributes": {"crc32": crc32}}:
            return bool(_checksum({key: value for key, value in document.items() if key != "attributes"}) == crc32)
    return True


def checksums_of(document: dict[str, Any]) -> bytes | None:
    """The checksum in which each chunk ends, four bytes for each in the order of the shard's index.

    They tie the shard to this document, and so to whatever knows its digest: another array's chunks are as sound as its
    own. None in a document from another writer, or of a version that did not write them yet.

    Raises:
        ValueError: they cannot be read.
    """
    match document:
        case {"attributes": {"crc32": _, "chunk_checksums": str(text)}}:
            return bytes.fromhex(text)
    return None


def recognize(document: dict[str, Any]) -> tuple[Layout, str] | None:
    """Layout and codec ("zstd" or "blosc") of an array that is laid out as ours, whoever wrote it; else None."""
    match document:
        case {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [int(), *_] as shape,
            "data_type": str(data_type),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        } if data_type in _DTYPES and document.get("chunk_key_encoding") == _KEY_ENCODING:
            pass
        case _:
            return None
    match sharding:
        case {"chunk_shape": [int(), *_] as chunk_shape, "codecs": [{"name": "bytes"} as order, *chain]}:
            pass
        case _:
            return None
    dtype = np.dtype(data_type)
    layout = Layout(tuple(shape), dtype, tuple(chunk_shape))
    if (
        len(shape) != len(chunk_shape)
        or not all(isinstance(size, int) and size > 0 for size in [*shape[1:], *chunk_shape])
        or shape[0] < 0
        or shape[2:] != chunk_shape[2:]
        or list(layout.shard_shape) != shard_shape
        or (dtype.itemsize > 1 and order.get("configuration") != {"endian": "little"})
        or not is_checked(chain)
        or sharding.get("index_codecs") != _INDEX_CODECS
        or sharding.get("index_location", "end") != "end"
        or document.get("storage_transformers")
    ):
        return None
    return layout, chain[0]["name"]


def _checksum(document: dict[str, Any]) -> int:
    return zlib.crc32(msgspec.json.encode(document, order="sorted"))
