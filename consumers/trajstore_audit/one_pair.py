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
from trajstore_audit.faults import runs_of
from trajstore_audit.pairs import Pair
from trajstore_audit.result import bucket_bounds
from trajstore_audit.tally import REACH

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "Change",
    "PairOutcome",
    "buckets_of",
    "changes_outside",
    "compare_pair",
    "rows_in_buckets",
]

BLOCK_BYTES = 8 << 20
"""Rows of each recording that are held at a time."""

_SUSPICIOUS = 1 << 16


class Block(NamedTuple):
    """Some rows of both recordings.

    Attributes:
        positions: int64 `[rows]`, ascending.
        first, second: `[rows, L, K]`.
        first_repeats, second_repeats: cells that name an expert twice, as far as they differ: row * L + layer, int64.
    """

    positions: npt.NDArray[np.int64]
    first: RoutingArray
    second: RoutingArray
    first_repeats: npt.NDArray[np.int64]
    second_repeats: npt.NDArray[np.int64]


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
        change: the first differing cell, None where there is none.
        suspicious: positions that differ in more than half of the layers, int64, the first `_SUSPICIOUS`.
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
    change: Change | None
    suspicious: npt.NDArray[np.int64]
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
    tokens_differing = 0
    change: Change | None = None
    suspicious: list[npt.NDArray[np.int64]] = []
    drift: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    held = 0
    for positions, first, second in _read(recorded, pair, equal):
        cells = compare(first, second)
        look(Block(positions, first, second, _repeats(first, cells.at), _repeats(second, cells.at)))
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
        if change is None:
            change = _change(positions, first, second, int(index[0]))
        most = number * 2 > layers
        if held < _SUSPICIOUS and most.any():
            suspicious.append(places[most])
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
        change=change,
        suspicious=np.concatenate([np.empty(0, np.int64), *suspicious]),
        drift=drift,
    )


def changes_outside(
    recorded: RecordedRows, pair: Pair, explained: npt.NDArray[np.int64], *, offsets: Sequence[int], unseen: int
) -> tuple[int, Change | None]:
    """How many cells differ in rows that nothing explains, and the first of them. Reads the pair again.

    Args:
        explained: positions.
        offsets: by which rows are shifted: those that equal the first recording's there are explained, too.
        unseen: from this position on, rows that differ in more than half of the layers are taken to be explained, too.
    """
    spec = recorded.spec
    count, found = 0, None
    equal = recorded.shared(pair.first, pair.second, pair.start, pair.stop)
    for positions, first, second in _read(recorded, pair, equal):
        cells = compare(first, second)
        index = cells.at[cells.shared < spec.top_k]
        rows = index // spec.num_layers
        number = np.bincount(rows, minlength=len(positions))
        out = np.isin(positions, explained) | ((positions >= unseen) & (number * 2 > spec.num_layers))
        for offset in offsets:
            out |= _equal_at(recorded, pair, positions, second, np.unique(rows[~out[rows]]), offset)
        left = index[~out[rows]]
        count += len(left)
        if found is None and len(left):
            found = _change(positions, first, second, int(left[0]))
    return count, found


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


def _read(
    recorded: RecordedRows, pair: Pair, equal: Sequence[tuple[int, int]]
) -> Iterator[tuple[npt.NDArray[np.int64], RoutingArray, RoutingArray]]:
    """Positions `[rows]` and both recordings' rows `[rows, L, K]`, block by block, but for equal runs."""
    for runs in _blocks(equal, pair.start, pair.stop, max(1, BLOCK_BYTES // recorded.spec.row_bytes)):
        positions = np.concatenate([np.arange(low, high) for low, high in runs])
        yield positions, recorded.rows(pair.first, runs), recorded.rows(pair.second, runs)


def _equal_at(
    recorded: RecordedRows,
    pair: Pair,
    positions: npt.NDArray[np.int64],
    second: RoutingArray,
    wanted: npt.NDArray[np.int64],
    offset: int,
) -> npt.NDArray[np.bool_]:
    """Which of the wanted rows of the second recording equal the first one's at an offset in all layers."""
    found = np.zeros(len(positions), np.bool_)
    there = positions[wanted] + offset
    inside = (there >= pair.first.start) & (there < pair.first.stop)
    if inside.any():
        rows = wanted[inside]
        first = recorded.rows(pair.first, runs_of(there[inside]))
        found[rows] = (second[rows] == first).all(axis=(1, 2))
    return found


def _change(positions: npt.NDArray[np.int64], first: RoutingArray, second: RoutingArray, cell: int) -> Change:
    row, layer = divmod(cell, first.shape[1])
    return Change(int(positions[row]), layer, tuple(first[row, layer].tolist()), tuple(second[row, layer].tolist()))


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


def _repeats(rows: RoutingArray, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of some cells, those that name an expert twice."""
    return index[have_repeats(rows.reshape(-1, rows.shape[2])[index])]
