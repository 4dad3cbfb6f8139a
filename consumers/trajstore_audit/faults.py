"""What is wrong with recorded rows, as opposed to drifted: dead layers, stale rows, rows of another place. Pure.

Drift changes some layers of some rows. A capture that breaks gives rows that look like no drift: one row again and
again (`trajstore.archive.verify.soundness`), rows that are those of a neighbouring position, or rows that agree with
the other recording no better than rows of any other token do.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.routing import RoutingArray, RoutingSpec
from trajstore_audit.compare import as_words, shared_experts

__all__ = [
    "CLOSE",
    "FARTHER",
    "OFFSETS",
    "Agreement",
    "Near",
    "Screened",
    "agreement",
    "common_share",
    "enough_rows",
    "longest_run",
    "matches",
    "near_matches",
    "runs_of",
    "screen",
]

OFFSETS = (-4, -3, -2, -1, 1, 2, 3, 4)
"""How far rows are looked for from where they should be."""

CLOSE = 0.6
"""Rows that are those of another place have more than this share in common with it,"""

FARTHER = 0.3
"""and so much less with their own."""

_STALE = 4
"""Equal rows in a row that are worth a closer look."""

_ROWS = 256
"""Rows on which an agreement is measured."""

_BITS = 60
_SHARE = 0.15
"""A row that differs from its own position in most layers and equals another one's in all says much: of its bits under
uniform routing this share is counted, and `_BITS` are asked for. Real routing of 8 layers, top 8 of 128, has 445 bits a
row; neighbours are equal with probability 2^-14 (`tests/data/routing`), nearly always where they equal their own
position, too."""


class Screened(NamedTuple):
    """What a first look at some rows of a recording found.

    Attributes:
        zero: rows with a layer of zeros only.
        zero_row, zero_layer: the first, -1 for none; the layer as an index.
        beyond: rows with an expert that the model does not have.
        beyond_row, beyond_layer: the first, -1 for none; the layer as an index.
        repeated: rows equal to the one before.
        doubtful: runs `[first, stop)` of rows that are worth a closer look, as indices.
    """

    zero: int
    zero_row: int
    zero_layer: int
    beyond: int
    beyond_row: int
    beyond_layer: int
    repeated: int
    doubtful: list[tuple[int, int]]


def screen(rows: RoutingArray, starts: Sequence[int], *, num_experts: int) -> Screened:
    """Look for layers of zeros, experts that cannot be, repeated rows, and layers that never change.

    Args:
        rows: `[rows, L, K]`, one run of neighbouring positions after the other.
        starts: indices at which runs begin, 0 first.
        num_experts: ids lie in `[0, num_experts)`.
    """
    count, layers, top_k = rows.shape
    words = as_words(np.ascontiguousarray(rows).reshape(count * layers, top_k)).reshape(count, layers, -1)
    zero, zero_row, zero_layer = 0, -1, -1
    if top_k > 1:  # a single 0 is an expert like any other
        dead = (words == 0).all(axis=2) if words.shape[2] > 1 else words[:, :, 0] == 0
        if dead.any():
            hit = dead.any(axis=1)
            zero, zero_row = int(np.count_nonzero(hit)), int(hit.argmax())
            zero_layer = int(dead[zero_row].argmax())
    beyond, beyond_row, beyond_layer = 0, -1, -1
    if count and rows.max() >= num_experts:
        cells = rows.max(axis=2) >= num_experts
        wrong = cells.any(axis=1)
        beyond, beyond_row = int(np.count_nonzero(wrong)), int(wrong.argmax())
        beyond_layer = int(cells[beyond_row].argmax())
    same = words[1:] == words[:-1]
    unchanged = same.all(axis=2) if words.shape[2] > 1 else same[:, :, 0]
    edges = [*starts, count]
    repeated, doubtful = 0, []
    equal = unchanged.all(axis=1)
    for first, stop in pairwise(edges):
        if stop - first < 2:
            continue
        steps = equal[first : stop - 1]
        number = int(np.count_nonzero(steps))
        repeated += number
        constant = stop - first > _STALE and unchanged[first : stop - 1].all(axis=0).any()
        if constant or (number >= _STALE - 1 and _longest(steps) >= _STALE - 1):
            doubtful.append((first, stop))
    return Screened(zero, zero_row, zero_layer, beyond, beyond_row, beyond_layer, repeated, doubtful)


def enough_rows(spec: RoutingSpec, rows: int) -> bool:
    """Whether so many rows that equal another position's in all layers cannot do so by chance."""
    return _enough_cells(spec, rows * spec.num_layers)


def _enough_cells(spec: RoutingSpec, cells: int) -> bool:
    choices = math.perm if spec.order == "engine" else math.comb
    return cells * _SHARE * math.log2(max(2, choices(spec.num_experts, spec.top_k))) >= _BITS


def matches(
    first: RoutingArray, second: RoutingArray, wanted: npt.NDArray[np.int64], *, ahead: int
) -> dict[int, npt.NDArray[np.int64]]:
    """Which rows of the second recording are exactly the first one's at another offset.

    Args:
        first: `[rows, L, K]`; row `ahead` of it stands at the position of row 0 of `second`.
        second: `[rows, L, K]`.
        wanted: indices of rows in `second`.

    Returns:
        offset → indices of rows in `second`, for offsets with any.
    """
    found = {}
    for offset in OFFSETS:
        at = wanted + ahead + offset
        there = wanted[(at >= 0) & (at < len(first))]
        # One layer rules out nearly all; the last one depends most on what came before the token.
        likely = there[(second[there, -1] == first[there + ahead + offset, -1]).all(axis=1)]
        equal = (second[likely] == first[likely + ahead + offset]).all(axis=(1, 2))
        if equal.any():
            found[offset] = likely[equal]
    return found


class Near(NamedTuple):
    """Rows that are another place's in most layers: ascending indices, and how many layers each, int64 `[n]` both."""

    rows: npt.NDArray[np.int64]
    layers: npt.NDArray[np.int64]


def near_matches(
    spec: RoutingSpec, first: RoutingArray, second: RoutingArray, wanted: npt.NDArray[np.int64], *, ahead: int
) -> dict[int, Near]:
    """Which rows of the second recording are the first one's at another offset in most layers, and cannot be by chance.

    Such a row equals the other one in more than `CLOSE` of its layers, and its own in `FARTHER` less. The layers of a
    run of such rows must say as much as rows that are equal in all, see `enough_rows`.

    Args:
        first: `[rows, L, K]`; row `ahead` of it stands at the position of row 0 of `second`.
        second: `[rows, L, K]`.
        wanted: indices of rows in `second`.

    Returns:
        offset → rows in `second`, each at the offset that fits best.
    """
    one, other = (as_words(side.reshape(-1, side.shape[2])).reshape(*side.shape[:2], -1) for side in (first, second))
    layers = spec.num_layers

    def equal_layers(offset: int) -> npt.NDArray[np.int64]:
        at = wanted + ahead + offset
        inside = np.flatnonzero((at >= 0) & (at < len(first)))
        # A few layers rule out nearly all.
        probe = slice(None, None, max(1, layers // 8))
        likely = (other[wanted[inside], probe] == one[at[inside], probe]).all(axis=2).mean(axis=1) >= CLOSE / 2
        inside = inside[likely]
        found = np.zeros(len(wanted), np.int64)
        found[inside] = (other[wanted[inside]] == one[at[inside]]).all(axis=2).sum(axis=1)
        return found

    counts = np.stack([equal_layers(offset) for offset in OFFSETS])
    best, most = counts.argmax(axis=0), counts.max(axis=0)
    close = np.flatnonzero(most > CLOSE * layers)
    if not len(close):
        return {}
    own = (other[wanted[close]] == one[wanted[close] + ahead]).all(axis=2).sum(axis=1)
    close = close[most[close] - own > FARTHER * layers]
    found = {}
    for index, offset in enumerate(OFFSETS):
        hit = close[best[close] == index]
        runs = np.split(hit, np.flatnonzero(np.diff(wanted[hit]) > 3) + 1)
        kept = [run for run in runs if _enough_cells(spec, int(most[run].sum()))]
        if kept:
            all_kept = np.concatenate(kept)
            found[offset] = Near(wanted[all_kept], most[all_kept])
    return found


class Agreement(NamedTuple):
    """How well rows of both recordings agree: mean share of common experts in a cell, 0 to 1.

    Attributes:
        own: at the same positions.
        chance: between rows of positions far apart.
        offset, best: the offset at which they agree best, and how well; 0 and 0.0 where there is none.
    """

    own: float
    chance: float
    offset: int
    best: float

    @property
    def is_shifted(self) -> bool:
        """They agree well, and much better than where they should."""
        return self.best > CLOSE and self.best - self.own > FARTHER

    @property
    def is_other(self) -> bool:
        """They agree hardly better than rows of any two tokens do.

        In `tests/data/routing` rows of two sequences have 18 to 38 % of experts in common, up to 30 % of them by
        chance; a row of which half the experts of every layer were replaced has more than 50 %.
        """
        return self.own <= self.chance + 0.25 * (1 - self.chance)


def agreement(first: RoutingArray, second: RoutingArray, *, ahead: int) -> Agreement:
    """Measure it on the first `_ROWS` rows of `second`.

    Args:
        first: `[rows, L, K]`; row `ahead` of it stands at the position of row 0 of `second`.
        second: `[rows, L, K]`, at least 2 rows.
    """
    count = min(len(second), _ROWS, len(first) - ahead)
    own = common_share(first[ahead : ahead + count], second[:count])
    half = count // 2
    turned = np.concatenate([first[ahead + half : ahead + count], first[ahead : ahead + half]])
    chance = common_share(turned, second[:count])
    offset, best = 0, 0.0
    for step in OFFSETS:
        low, high = max(0, -ahead - step), min(count, len(first) - ahead - step)
        if high - low < count // 2 or high <= low:
            continue
        common = common_share(first[ahead + step + low : ahead + step + high], second[low:high])
        if common > best:
            offset, best = step, common
    return Agreement(own, chance, offset, best)


def runs_of(positions: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending positions, at least one, as runs `[start, stop)` of neighbouring ones."""
    breaks = np.flatnonzero(np.diff(positions) != 1)
    firsts = positions[np.concatenate([[0], breaks + 1])]
    lasts = positions[np.concatenate([breaks, [len(positions) - 1]])]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


def longest_run(positions: npt.NDArray[np.int64], *, gap: int = 2) -> tuple[int, int]:
    """The longest run `[start, stop)` of ascending positions that leaves out no more than `gap` in a row."""
    breaks = np.flatnonzero(np.diff(positions) > gap + 1)
    begins = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(positions) - 1]])
    longest = int((positions[ends] - positions[begins]).argmax())
    return int(positions[begins[longest]]), int(positions[ends[longest]]) + 1


def common_share(first: RoutingArray, second: RoutingArray) -> float:
    """Mean share of experts that both have in common in a cell, of rows `[rows, L, K]`; 0.0 for no rows."""
    top_k = first.shape[2]
    one, other = (np.ascontiguousarray(side).reshape(-1, top_k) for side in (first, second))
    if not len(one):
        return 0.0
    shared = int(shared_experts(one, other, np.arange(len(one))).sum(dtype=np.int64))
    return float(shared / (len(one) * top_k))


def _longest(steps: npt.NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], steps, [False]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))
