"""Comparing two routings of the same rows, cell by cell. Pure; this is where an audit spends its time.

A cell is one layer of one row: K expert ids. Most cells are equal as they stand, which a comparison of whole words
tells; of the others, the experts that both sides have in common are counted by K comparisons, each of one side with the
other one turned by one place, a whole block of cells at a time. Nothing is sorted: `benchmarks/audit.py`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.routing import RoutingArray

__all__ = ["Cells", "as_words", "compare", "differing_sets", "have_repeats", "order_changes", "shared_experts"]

_BLOCK = 1 << 15
"""Cells that are compared at a time: some hundred KiB, which stay in the core's cache."""

_BYTES = 1 << 15
"""Of one side of a block of cells that are not equal as they stand."""


class Cells(NamedTuple):
    """The cells that are not equal as they stand.

    Attributes:
        at: int64 `[n]`, row * L + layer, ascending.
        shared: experts that both sides have in common, uint8 or uint16 `[n]`; K where only the order differs.
    """

    at: npt.NDArray[np.int64]
    shared: npt.NDArray[np.unsignedinteger[Any]]


def compare(first: RoutingArray, second: RoutingArray) -> Cells:
    """Compare two routings of the same rows.

    A broken cell, which names an expert twice, is the set of those that it names.

    Args:
        first, second: `[rows, L, K]`.

    Raises:
        ValueError: the shapes or dtypes differ.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"routings to compare must both be [rows, L, K], not {first.shape} and {second.shape}")
    if first.dtype != second.dtype:
        raise ValueError(f"routings to compare must be of one dtype, not {first.dtype} and {second.dtype}")
    rows, layers, top_k = first.shape
    one, other = (np.ascontiguousarray(side).reshape(rows * layers, top_k) for side in (first, second))
    a, b = as_words(one), as_words(other)
    found = []
    for at in range(0, len(a), _BLOCK):
        unequal = a[at : at + _BLOCK, 0] != b[at : at + _BLOCK, 0]
        for word in range(1, a.shape[1]):
            unequal |= a[at : at + _BLOCK, word] != b[at : at + _BLOCK, word]
        index = np.flatnonzero(unequal)
        index += at
        found.append(index)
    index = np.concatenate(found) if found else np.empty(0, np.int64)
    shared = shared_experts(one, other, index)
    within = np.flatnonzero(shared == top_k)  # all experts of the first one are in the second one
    within = within[have_repeats(one[index[within]])]
    if len(within):  # and yet there may be more in the second one
        shared[within] = shared_experts(other, one, index[within])
    return Cells(index, shared)


def differing_sets(first: RoutingArray, second: RoutingArray) -> npt.NDArray[np.bool_]:
    """Where two routings of the same rows use different experts, whatever their order, bool `[rows, L]`.

    Args, Raises: as `compare`.
    """
    return _mask(first, second, order=False)


def order_changes(first: RoutingArray, second: RoutingArray) -> npt.NDArray[np.bool_]:
    """Where two routings of the same rows use the same experts in another order. As `differing_sets`."""
    return _mask(first, second, order=True)


def as_words(cells: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Cells `[n, K]`, contiguous, as the fewest words each: unsigned `[n, words]`, without a copy."""
    nbytes = cells.shape[1] * cells.itemsize
    size = next(size for size in (8, 4, 2, 1) if nbytes % size == 0)
    return cells.view(f"u{size}")


def shared_experts(
    one: npt.NDArray[Any], other: npt.NDArray[Any], index: npt.NDArray[np.int64]
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """How many experts both sides have in common, in some cells: of one side, those that are in the other.

    Args:
        one, other: cells `[cells, K]`.
        index: which cells, `[n]`.

    Returns:
        uint8 (uint16 above 255 experts a token) `[n]`.
    """
    top_k = one.shape[1]
    shared: npt.NDArray[np.unsignedinteger[Any]] = np.empty(len(index), np.uint8 if top_k < 256 else np.uint16)
    block = max(64, _BYTES // (top_k * one.itemsize))
    for at in range(0, len(index), block):
        chosen = index[at : at + block]
        a = np.ascontiguousarray(one[chosen].T)  # [K, n]: each comparison below runs along the cells
        b = np.empty((2 * top_k, len(chosen)), other.dtype)
        b[:top_k] = other[chosen].T
        b[top_k:] = b[:top_k]
        hit = a == b[:top_k]
        equal = np.empty_like(hit)
        for turn in range(1, top_k):
            np.equal(a, b[turn : turn + top_k], out=equal)
            hit |= equal
        np.sum(hit, axis=0, dtype=shared.dtype, out=shared[at : at + block])
    return shared


def have_repeats(cells: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which cells `[n, K]` name an expert twice, bool `[n]`: no router does."""
    turned = np.ascontiguousarray(cells.T)
    found = np.zeros(len(cells), np.bool_)
    for step in range(1, len(turned)):
        found |= (turned[step:] == turned[:-step]).any(axis=0)
    return found


def _mask(first: RoutingArray, second: RoutingArray, *, order: bool) -> npt.NDArray[np.bool_]:
    cells = compare(first, second)
    mask = np.zeros(first.shape[:2], np.bool_)
    mask.reshape(-1)[cells.at] = (cells.shared == first.shape[2]) == order
    return mask
