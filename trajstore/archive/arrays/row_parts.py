"""Rows that lie in parts, cut into the chunks of a layout."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np

from trajstore.archive.arrays.layout import Layout
from trajstore.errors import SchemaError

__all__ = ["RowParts"]

Array: TypeAlias = np.ndarray[Any, Any]


class RowParts:
    """`[rows, ...]` in parts that are never joined.

    Attributes:
        shape, dtype: of the whole.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        """At least one part.

        Raises:
            SchemaError: parts of different dtypes or rows.
        """
        first = parts[0]
        for part in parts:
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise SchemaError(
                    f"rows {part.dtype}{list(part.shape[1:])} do not fit behind rows {first.dtype}"
                    f"{list(first.shape[1:])}; one array holds rows of one dtype and shape"
                )
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))
        self.shape = (self.ends[-1], *first.shape[1:])
        self.dtype = first.dtype

    def chunk(self, layout: Layout, number: int) -> Array:
        """A chunk of the layout, C-contiguous; a view where it lies so already."""
        rows, layers = layout.chunk_shape[0], layout.chunk_shape[1:2]
        row, group = divmod(number, layout.grid[1])
        begin, end = row * rows, min((row + 1) * rows, self.shape[0])
        across = tuple(slice(group * count, (group + 1) * count) for count in layers)
        pieces = list(self._pieces(begin, end, across))
        if len(pieces) == 1 and pieces[0].shape == layout.chunk_shape and pieces[0].flags.c_contiguous:
            return pieces[0]
        chunk = np.zeros(layout.chunk_shape, self.dtype)
        at = 0
        for piece in pieces:
            chunk[(slice(at, at + len(piece)), *(slice(0, count) for count in piece.shape[1:]))] = piece
            at += len(piece)
        return chunk

    def _pieces(self, begin: int, end: int, across: tuple[slice, ...]) -> Iterator[Array]:
        for k in range(bisect_right(self.ends, begin), len(self.parts)):
            first = self.ends[k] - len(self.parts[k])
            if first >= end:
                return
            yield self.parts[k][(slice(max(begin - first, 0), end - first), *across)]
