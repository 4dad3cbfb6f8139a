"""Counts of many trajectories, made so that parts add up: integers and sums in any order, lists cut by a total order.

`merge` takes one part into another. It is associative and commutative, up to the last digits of sums over logprobs and
of squares, so that an audit gives the same numbers however it was divided. How a part becomes bytes stands below.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_origin

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import SchemaError
from trajstore.routing import RoutingSpec
from trajstore_audit.result import (
    Counts,
    Finding,
    LogprobDrift,
    PairDrift,
    Rows,
    Spread,
    WorstTrajectory,
)

__all__ = [
    "FORMAT",
    "REACH",
    "SUSPECTS",
    "DriftTally",
    "Grid",
    "Part",
    "Suspect",
    "add_counts",
    "add_to",
    "count_in",
    "decode_part",
    "encode_part",
    "merge",
    "worst_of",
]

FORMAT = 2
"""Of the bytes of a part. A part of another format is counted anew."""

SUSPECTS = 64
"""That are kept: where their rows come from is asked of the first ones, however many findings are shown."""

REACH = 24
"""Buckets on each side of the resume point; what lies 2^23 positions away or more is in the last one."""

_Key = TypeVar("_Key")


class Grid(msgspec.Struct, kw_only=True):
    """Counts by layer, and by layer and position, of trajectories with one and the same routing spec.

    Attributes:
        layer_ids, top_k, num_experts: of that spec.
        trajectories, pairs: with any row compared.
        cells: rows compared by bucket of position, int64 `[2 * REACH + 1]`; the same for each layer.
        differing: int64 `[L, 2 * REACH + 1]`.
        order_changes: int64 `[L]`.
        shared: differing cells by how many experts are common, int64 `[L, K]`.
        referenced: rows not read.
        load: int64 `[2, L, E]`, first and second recordings; None until counted.
        load_rows: rows counted in it.
        cc, cd, dd: see `Spread`, float64 `[L]`; None unless trajectories are sampled.
    """

    layer_ids: tuple[int, ...]
    top_k: int
    num_experts: int
    trajectories: int = 0
    pairs: int = 0
    cells: npt.NDArray[np.int64]
    differing: npt.NDArray[np.int64]
    order_changes: npt.NDArray[np.int64]
    shared: npt.NDArray[np.int64]
    referenced: int = 0
    load: npt.NDArray[np.int64] | None = None
    load_rows: int = 0
    cc: npt.NDArray[np.float64] | None = None
    cd: npt.NDArray[np.float64] | None = None
    dd: npt.NDArray[np.float64] | None = None

    @classmethod
    def of(cls, spec: RoutingSpec) -> "Grid":
        """An empty one."""
        layers, buckets = spec.num_layers, 2 * REACH + 1
        return cls(
            layer_ids=spec.layer_ids,
            top_k=spec.top_k,
            num_experts=spec.num_experts,
            cells=np.zeros(buckets, np.int64),
            differing=np.zeros((layers, buckets), np.int64),
            order_changes=np.zeros(layers, np.int64),
            shared=np.zeros((layers, spec.top_k), np.int64),
        )

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """By this, grids are told apart."""
        return self.layer_ids, self.top_k, self.num_experts


class DriftTally(msgspec.Struct, kw_only=True):
    """The tables of one kind of comparison, before they are put in order: see `trajstore_audit.result.Drift`."""

    total: Counts = msgspec.field(default_factory=Counts)
    grids: list[Grid] = []
    segment_pairs: dict[tuple[int, int], Counts] = {}
    version_gaps: dict[int | None, Counts] = {}
    engines: dict[tuple[str, str], Counts] = {}
    origins: dict[tuple[str, str], Counts] = {}
    sources: dict[str, Counts] = {}
    worst: list[WorstTrajectory] = []

    def grid(self, spec: RoutingSpec) -> Grid:
        """The one of a spec; made if there is none."""
        shape = (spec.layer_ids, spec.top_k, spec.num_experts)
        found = next((grid for grid in self.grids if grid.shape == shape), None)
        if found is None:
            found = Grid.of(spec)
            self.grids.append(found)
        return found

    def tables(self) -> tuple[dict[Any, Counts], ...]:
        """All that divide the total by a key."""
        return self.segment_pairs, self.version_gaps, self.engines, self.origins, self.sources


class Suspect(msgspec.Struct, kw_only=True, frozen=True):
    """Two recordings of rows `[start, stop)` that agree no better than chance: whose rows they are is asked later.

    `event` is the one that a third recording contradicts, "" where none does.
    """

    id: str
    group: str | None
    first_event: str
    second_event: str
    event: str = ""
    start: int
    stop: int
    what: str


class Part(msgspec.Struct, kw_only=True):
    """What the audit of some trajectories gave.

    Attributes:
        format: see `FORMAT`.
        trajectories, with_routing, recordings, bytes_read, skipped: see `trajstore_audit.result.Totals`.
        rows, logprobs: see there.
        segments, observations: by kind of comparison.
        findings, suspects: the first of them in a total order; of suspects `SUSPECTS`.
        findings_by_kind: all of them, suspects too.
        pairs: one line for each pair; goes to whoever wants it, and is not merged.
    """

    format: int = FORMAT
    trajectories: int = 0
    with_routing: int = 0
    recordings: int = 0
    bytes_read: int = 0
    skipped: dict[str, int] = {}
    rows: Rows = msgspec.field(default_factory=Rows)
    logprobs: LogprobDrift = msgspec.field(default_factory=LogprobDrift)
    segments: DriftTally = msgspec.field(default_factory=DriftTally)
    observations: DriftTally = msgspec.field(default_factory=DriftTally)
    findings: list[Finding] = []
    suspects: list[Suspect] = []
    findings_by_kind: dict[str, int] = {}
    pairs: list[PairDrift] = []

    def drift(self, against: Literal["segments", "observations"]) -> DriftTally:
        """The tables of one kind of comparison."""
        return self.segments if against == "segments" else self.observations


def merge(into: Part, part: Part, *, top: int) -> None:
    """Add a part to another.

    Args:
        into: is changed; its `pairs` are not.
        top: how many worst trajectories and findings are kept.
    """
    for name in ("trajectories", "with_routing", "recordings", "bytes_read"):
        setattr(into, name, getattr(into, name) + getattr(part, name))
    add_to(into.skipped, part.skipped)
    add_to(into.findings_by_kind, part.findings_by_kind)
    for name in ("total", "read", "zero", "duplicates", "repeated"):
        setattr(into.rows, name, getattr(into.rows, name) + getattr(part.rows, name))
    add_to(into.rows.missing, part.rows.missing)
    add_to(into.rows.left_out, part.rows.left_out)
    _add_logprobs(into.logprobs, part.logprobs)
    _add_drift(into.segments, part.segments, top)
    _add_drift(into.observations, part.observations, top)
    into.findings = sorted([*into.findings, *part.findings], key=_order)[:top]
    suspects = sorted([*into.suspects, *part.suspects], key=lambda one: (one.id, one.second_event, one.start))
    into.suspects = suspects[:SUSPECTS]


def add_counts(into: Counts, counts: Counts) -> None:
    """Add counts to others."""
    for name in _SUMS:
        setattr(into, name, getattr(into, name) + getattr(counts, name))
    for top_k, some in counts.shared.items():
        known = into.shared.setdefault(top_k, [0] * top_k)
        for common, count in enumerate(some):
            known[common] += count
    if counts.spread is not None:
        into.spread = into.spread or Spread()
        for name in Spread.__struct_fields__:
            setattr(into.spread, name, getattr(into.spread, name) + getattr(counts.spread, name))


def add_to(into: dict[_Key, int], counts: dict[_Key, int]) -> None:
    """Add counts by key."""
    for key, count in counts.items():
        into[key] = into.get(key, 0) + count


def count_in(table: dict[_Key, Counts], key: _Key, counts: Counts) -> None:
    """Add counts to the row of a table."""
    add_counts(table.setdefault(key, Counts()), counts)


def encode_part(part: Part) -> bytes:
    """Msgpack; arrays as (dtype, shape, little-endian bytes)."""
    return msgspec.msgpack.encode(part, enc_hook=_encode_array)


def decode_part(data: bytes) -> Part:
    """A part from its bytes.

    Raises:
        SchemaError: they are no part, or one of another format.
    """
    try:
        part = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise SchemaError(f"a part of an audit cannot be read: {error}") from error
    if part.format != FORMAT:
        raise SchemaError(f"a part of an audit has format {part.format}, this trajstore reads {FORMAT}")
    return part


_SUMS = ("trajectories", "pairs", "tokens", "tokens_differing", "cells", "differing", "order_changes", "referenced")


def _order(finding: Finding) -> tuple[str, str, str, int, int, str]:
    row, layer = (-1 if at is None else at for at in (finding.row, finding.layer))
    return finding.id, finding.event, finding.kind, row, layer, finding.what


def _add_drift(into: DriftTally, drift: DriftTally, top: int) -> None:
    add_counts(into.total, drift.total)
    for known, table in zip(into.tables(), drift.tables(), strict=True):
        for key, counts in table.items():
            count_in(known, key, counts)
    for grid in drift.grids:
        own = next((one for one in into.grids if one.shape == grid.shape), None)
        if own is None:
            into.grids.append(_copy(grid))
        else:
            _add_grid(own, grid)
    into.grids.sort(key=lambda one: one.shape)
    into.worst = worst_of([*into.worst, *drift.worst], top)


def worst_of(trajectories: Iterable[WorstTrajectory], top: int) -> list[WorstTrajectory]:
    """Those with the highest share of differing cells; of equal ones the larger, then by id."""
    return sorted(trajectories, key=lambda one: (-one.share, -one.differing, one.id))[:top]


def _add_grid(into: Grid, grid: Grid) -> None:
    for name in Grid.__struct_fields__[3:]:
        own, other = getattr(into, name), getattr(grid, name)
        if own is None:
            setattr(into, name, None if other is None else other.copy())
        elif other is not None:
            setattr(into, name, own + other)


def _copy(grid: Grid) -> Grid:
    made = Grid(**{name: getattr(grid, name) for name in Grid.__struct_fields__})
    for name in Grid.__struct_fields__:
        value = getattr(made, name)
        if isinstance(value, np.ndarray):
            setattr(made, name, value.copy())
    return made


def _add_logprobs(into: LogprobDrift, drift: LogprobDrift) -> None:
    for name in LogprobDrift.__struct_fields__:
        own, other = getattr(into, name), getattr(drift, name)
        setattr(into, name, [a + b for a, b in zip(own, other, strict=True)] if name == "extreme" else own + other)


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return data.dtype.str, data.shape, data.tobytes()
    raise NotImplementedError(f"{type(value)} has no place in a part of an audit")


def _decode_array(kind: type, value: Any) -> Any:
    if (get_origin(kind) or kind) is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, dtype).reshape(shape).copy()
    raise NotImplementedError(f"{kind} has no place in a part of an audit")


_decoder = msgspec.msgpack.Decoder(Part, dec_hook=_decode_array)
