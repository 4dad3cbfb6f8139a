"""One pair of recordings, compared: rows that are stored once are equal, the rest is read and compared in blocks.

Memory is bounded by `BLOCK_BYTES`, however long the recordings are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.recorded import RecordedRows
from trajstore.routing import RoutingArray
from trajstore_audit.compare import compare, have_repeats
from trajstore_audit.pairs import Pair
from trajstore_audit.result import bucket_bounds
from trajstore_audit.tally import REACH

__all__ = ["BLOCK_BYTES", "Block", "Change", "PairOutcome", "buckets_of", "compare_pair", "rows_in_buckets"]

BLOCK_BYTES = 8 << 20
"""Rows of each recording that are held at a time."""

_CHANGES = 32
"""Differing cells that are kept as examples."""

_SUSPICIOUS = 1 << 16


class Block(NamedTuple):
    """Some rows of both recordings.

    Attributes:
        positions: int64 `[rows]`, ascending.
        starts: indices at which runs of neighbouring positions begin.
        first, second: `[rows, L, K]`.
        repeats: rows of the second one with a layer that names an expert twice, as far as they differ.
    """

    positions: npt.NDArray[np.int64]
    starts: list[int]
    first: RoutingArray
    second: RoutingArray
    repeats: int


class Change(NamedTuple):
    """A differing cell: position, index of the layer, experts before and after."""

    row: int
    layer: int
    before: tuple[int, ...]
    after: tuple[int, ...]


class PairOutcome(NamedTuple):
    """Counts of one pair, and what may be a fault in it.

    Attributes:
        tokens, tokens_differing, cells, differing, order_changes, referenced: see `trajstore_audit.result.Counts`.
        rows_by_bucket: rows by bucket of position, int64 `[2 * REACH + 1]`.
        by_bucket: differing cells, int64 `[L, 2 * REACH + 1]`.
        reordered: int64 `[L]`.
        shared: differing cells by common experts, int64 `[L, K]`.
        row, layer: the first differing cell, -1 for none; the layer as an index.
        changes: the first differing cells.
        suspicious: positions that differ in more than half of the layers, int64, the first `_SUSPICIOUS`.
        suspicious_cells: differing cells of each.
        drift: positions that differ and in how many layers each; empty unless asked for.
    """

    tokens: int
    tokens_differing: int
    cells: int
    differing: int
    order_changes: int
    referenced: int
    rows_by_bucket: npt.NDArray[np.int64]
    by_bucket: npt.NDArray[np.int64]
    reordered: npt.NDArray[np.int64]
    shared: npt.NDArray[np.int64]
    row: int
    layer: int
    changes: list[Change]
    suspicious: npt.NDArray[np.int64]
    suspicious_cells: npt.NDArray[np.int64]
    drift: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def compare_pair(
    recorded: RecordedRows, pair: Pair, *, look: Callable[[Block], object], keep_drift: bool = False
) -> PairOutcome:
    """Compare all rows of a pair.

    Args:
        look: is shown each block of rows that is read.
        keep_drift: keep how many layers differ by position.

    Raises:
        Corrupt: stored bytes are damaged or gone.
    """
    spec = recorded.spec
    layers, top_k, buckets = spec.num_layers, spec.top_k, 2 * REACH + 1
    equal = recorded.shared(pair.first, pair.second, pair.start, pair.stop)
    by_bucket = np.zeros((layers, buckets), np.int64)
    reordered = np.zeros(layers, np.int64)
    shared = np.zeros((layers, top_k), np.int64)
    tokens_differing, row, layer = 0, -1, -1
    changes: list[Change] = []
    suspicious: list[npt.NDArray[np.int64]] = []
    suspicious_cells: list[npt.NDArray[np.int64]] = []
    drift: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    held = 0
    for runs in _blocks(equal, pair.start, pair.stop, max(1, BLOCK_BYTES // spec.row_bytes)):
        first, second = recorded.rows(pair.first, runs), recorded.rows(pair.second, runs)
        cells = compare(first, second)
        positions = np.concatenate([np.arange(low, high) for low, high in runs])
        starts = np.cumsum([0, *(high - low for low, high in runs[:-1])]).tolist()
        repeats = _repeats(second, cells.at)
        look(Block(positions, starts, first, second, repeats))
        differs = cells.shared < top_k
        index, common = cells.at[differs], cells.shared[differs]
        if len(index) < len(cells.at):
            reordered += np.bincount(cells.at[~differs] % layers, minlength=layers)
        if not len(index):
            continue
        rows, columns = np.divmod(index, layers)
        at = positions[rows]
        by_bucket += np.bincount(columns * buckets + buckets_of(at - pair.base), minlength=layers * buckets).reshape(
            layers, buckets
        )
        shared += np.bincount(columns * top_k + common, minlength=layers * top_k).reshape(layers, top_k)
        places, number = _by_row(at)
        tokens_differing += len(places)
        if row < 0:
            row, layer = int(at[0]), int(columns[0])
        for one in range(min(len(index), _CHANGES - len(changes))):
            r, c = int(rows[one]), int(columns[one])
            changes.append(Change(int(at[one]), c, tuple(first[r, c].tolist()), tuple(second[r, c].tolist())))
        most = number * 2 > layers
        if held < _SUSPICIOUS and most.any():
            suspicious.append(places[most])
            suspicious_cells.append(number[most])
            held += len(suspicious[-1])
        if keep_drift:
            drift.append((places, number))
    tokens = pair.stop - pair.start
    return PairOutcome(
        tokens=tokens,
        tokens_differing=tokens_differing,
        cells=tokens * layers,
        differing=int(by_bucket.sum()),
        order_changes=int(reordered.sum()),
        referenced=sum(high - low for low, high in equal),
        rows_by_bucket=rows_in_buckets(pair.start - pair.base, pair.stop - pair.base),
        by_bucket=by_bucket,
        reordered=reordered,
        shared=shared,
        row=row,
        layer=layer,
        changes=changes,
        suspicious=np.concatenate([np.empty(0, np.int64), *suspicious]),
        suspicious_cells=np.concatenate([np.empty(0, np.int64), *suspicious_cells]),
        drift=drift,
    )


def buckets_of(distances: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Index of each distance p - base in the buckets, see `PositionDrift`; int64, 0 to 2 * REACH."""
    lengths = np.frexp(np.abs(distances).astype(np.float64))[1]  # exact: the bit length of an integer below 2^53
    found: npt.NDArray[np.int64] = np.sign(distances) * np.minimum(lengths, REACH) + REACH
    return found


def rows_in_buckets(start: int, stop: int) -> npt.NDArray[np.int64]:
    """How many of the distances `[start, stop)` lie in each bucket, int64 `[2 * REACH + 1]`."""
    inside = np.minimum(_HIGH + 1, stop) - np.maximum(_LOW, start)
    found: npt.NDArray[np.int64] = np.maximum(inside, 0)
    return found


def _bounds() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    low, high = np.array([bucket_bounds(bucket) for bucket in range(-REACH, REACH + 1)], np.int64).T
    low[0], high[-1] = -(1 << 62), 1 << 62
    return low, high


_LOW, _HIGH = _bounds()


def _blocks(equal: Sequence[tuple[int, int]], start: int, stop: int, rows: int) -> Iterator[list[tuple[int, int]]]:
    """What lies between equal runs, in lists of runs that span no more than so many rows: gaps may be read over."""
    block: list[tuple[int, int]] = []
    at = start
    for low, high in [*equal, (stop, stop)]:
        while at < low:
            if block and at - block[0][0] >= rows:
                yield block
                block = []
            end = min(low, (block[0][0] if block else at) + rows)
            block.append((at, end))
            at = end
        at = high
    if block:
        yield block


def _by_row(at: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions, each once, and how often each stands in an ascending array."""
    begins = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]]))
    return at[begins], np.diff(np.concatenate([begins, [len(at)]]))


def _repeats(rows: RoutingArray, index: npt.NDArray[np.int64]) -> int:
    layers, top_k = rows.shape[1:]
    bad = have_repeats(rows.reshape(-1, top_k)[index])
    return len(np.unique(index[bad] // layers)) if bad.any() else 0
