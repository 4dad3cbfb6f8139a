"""Whether recorded rows can be what a router computed: experts in range, no stale rows, no dead layers. Pure.

A capture that breaks gives rows that pass every checksum: one stale row again and again, or a layer that never changes.
Both are told from chance by how improbable they are, see `improbable_steps`; and a step from one row to the next counts
only where the token changes, since equal tokens may route alike.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.errors import RoutingError
from trajstore.routing import RoutingArray, RoutingSpec

__all__ = ["Doubt", "check_rows", "improbable_steps"]

_SHARE = 0.03
"""Bits of surprise in a row that repeats the one before, as a share of what uniform routing would have. In
`tests/data/routing` (8 layers, top-8 of 128) neighbours are equal in all layers with probability 4.6e-5, that is 14.4
of 445 bits; in one layer with 4.5e-3, 7.8 of 56 bits."""

_BITS = 60
"""A false alarm once in 2^60 rows: one in a million archives of 10^12 rows."""

_FEWEST = 4


class Doubt(NamedTuple):
    """What is doubtful about a recording: `kind` as in a finding, and a sentence."""

    kind: str
    what: str


def improbable_steps(spec: RoutingSpec, layers: int) -> int:
    """How many steps in a row may find `layers` layers unchanged before chance is out of the question.

    Under uniform routing a step leaves a layer as it was with probability 1 / A, where A is the number of ordered
    choices of K of E experts (of unordered ones where ids are stored sorted). Real routing is far from uniform, so a
    step counts as only `_SHARE` of its `layers * log2(A)` bits, and `_BITS` bits are asked for.
    """
    choices = math.perm if spec.order == "engine" else math.comb
    bits = _SHARE * layers * math.log2(max(2, choices(spec.num_experts, spec.top_k)))
    return max(_FEWEST, math.ceil(_BITS / bits))


def check_rows(
    spec: RoutingSpec, rows: RoutingArray, tokens: npt.NDArray[np.int32] | None, *, start: int
) -> Iterator[Doubt]:
    """What is doubtful about one recording.

    Args:
        rows: `[rows, L, K]` as stored.
        tokens: ids at positions `[start, start + rows)`, fewer where the last ones are not known; None for none.
        start: position of the first row.
    """
    try:
        unchanged = np.array_equal(spec.narrow(rows, start=start), rows)
    except RoutingError as error:
        yield Doubt("experts", str(error))
        return
    if not unchanged:
        yield Doubt("experts", f"rows from {start} on are not in ascending order, as the routing spec says")
    if tokens is None or len(rows) < 2:
        return
    turns = np.zeros(len(rows) - 1, np.bool_)  # steps at which the token changes
    turns[: max(len(tokens) - 1, 0)] = tokens[1:] != tokens[:-1]
    same = np.empty((len(rows) - 1, spec.num_layers), np.bool_)
    for layer in range(spec.num_layers):
        np.all(rows[1:, layer] == rows[:-1, layer], axis=1, out=same[:, layer])
    yield from _stale_rows(spec, np.logical_and.reduce(same, axis=1), turns, start)
    yield from _dead_layers(spec, same, turns, rows)


def _stale_rows(
    spec: RoutingSpec, same: npt.NDArray[np.bool_], turns: npt.NDArray[np.bool_], start: int
) -> Iterator[Doubt]:
    """The longest run of one row, if it is too long."""
    counted = np.concatenate([[0], np.cumsum(turns)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
    begins, ends = edges[::2], edges[1::2]
    if not len(begins):
        return
    steps = counted[ends] - counted[begins]
    worst = int(steps.argmax())
    limit = improbable_steps(spec, spec.num_layers)
    if steps[worst] >= limit:
        first, last = start + int(begins[worst]), start + int(ends[worst])
        yield Doubt(
            "repeated-rows",
            f"rows {first} to {last} are one row {last - first + 1} times over, in all {spec.num_layers} layers, "
            f"though the token changes {int(steps[worst])} times (by chance fewer than {limit}): a stale row",
        )


def _dead_layers(
    spec: RoutingSpec, same: npt.NDArray[np.bool_], turns: npt.NDArray[np.bool_], rows: RoutingArray
) -> Iterator[Doubt]:
    """Layers that never change while others do; where all rows are one, that has been told."""
    limit = improbable_steps(spec, 1)
    constant: npt.NDArray[Any] = np.flatnonzero(same.all(axis=0))
    if int(turns.sum()) < limit or not len(constant) or len(constant) == spec.num_layers:
        return
    layers = ", ".join(f"{spec.layer_ids[layer]} {rows[0, layer].tolist()}" for layer in constant[:4])
    more = f" and {len(constant) - 4} more" if len(constant) > 4 else ""
    yield Doubt(
        "constant-layer",
        f"layers {layers}{more} have the same experts in all {len(rows)} rows, though the token changes "
        f"{int(turns.sum())} times (by chance fewer than {limit}): they were not captured",
    )
