"""From counts to tables: the merged part of an audit put in order. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from trajstore_audit.result import (
    OTHERS,
    Audit,
    Counts,
    Drift,
    EnginePair,
    LayerDrift,
    Load,
    OriginPair,
    Parameters,
    PositionDrift,
    SegmentPair,
    SourceDrift,
    Spread,
    Totals,
    VersionGap,
)
from trajstore_audit.tally import REACH, DriftTally, Grid, Part, add_counts

__all__ = ["finish", "layer_table"]

_LABELS = 32
"""Rows of a table whose key is a text that anybody may give; the rest is one row, so that no report is mostly those."""

_Key = TypeVar("_Key", str, tuple[str, str])


def finish(part: Part, parameters: Parameters, *, population: int, seconds: float) -> Audit:
    """The outcome of an audit from all of its parts, merged."""
    against = parameters.against
    return Audit(
        parameters=parameters,
        totals=Totals(
            population=population,
            trajectories=part.trajectories,
            with_routing=part.with_routing,
            skipped=dict(sorted(part.skipped.items())),
            recordings=part.recordings,
            bytes_read=part.bytes_read,
            seconds=seconds,
        ),
        rows=part.rows,
        segments=_drift(part.segments) if against != "observations" else None,
        observations=_drift(part.observations) if against != "segments" else None,
        logprobs=part.logprobs if parameters.logprobs else None,
        findings=part.findings,
        findings_by_kind=dict(sorted(part.findings_by_kind.items())),
    )


def layer_table(grids: Sequence[Grid]) -> list[LayerDrift]:
    """Drift by global layer id."""
    found: dict[int, Counts] = {}
    for grid in grids:
        rows = int(grid.cells.sum())
        if not rows:
            continue
        for i, layer in enumerate(grid.layer_ids):
            differing = int(grid.differing[i].sum())
            spread = None
            if grid.cc is not None and grid.cd is not None and grid.dd is not None:
                cc, cd, dd = float(grid.cc[i]), float(grid.cd[i]), float(grid.dd[i])
                spread = Spread(cc=cc, cd=cd, dd=dd, tt=cc, tu=cd, uu=dd)
            counts = Counts(
                trajectories=grid.trajectories,
                pairs=grid.pairs,
                tokens=rows,
                tokens_differing=differing,
                cells=rows,
                differing=differing,
                order_changes=int(grid.order_changes[i]),
                shared={grid.top_k: grid.shared[i].tolist()} if differing else {},
                referenced=grid.referenced,
                spread=spread,
            )
            add_counts(found.setdefault(layer, Counts()), counts)
    return [LayerDrift(layer=layer, counts=found[layer]) for layer in sorted(found)]


def _drift(tally: DriftTally) -> Drift:
    gaps = sorted(tally.version_gaps.items(), key=lambda one: (one[0] is None, one[0] or 0))
    return Drift(
        total=tally.total,
        layers=layer_table(tally.grids),
        segment_pairs=[
            SegmentPair(first=a, second=b, counts=one) for (a, b), one in sorted(tally.segment_pairs.items())
        ],
        version_gaps=[VersionGap(gap=gap, counts=one) for gap, one in gaps],
        engines=[
            EnginePair(first=a, second=b, counts=one) for (a, b), one in _largest(tally.engines, (OTHERS, OTHERS))
        ],
        origins=[OriginPair(first=a, second=b, counts=one) for (a, b), one in sorted(tally.origins.items())],
        sources=[SourceDrift(source=source, counts=one) for source, one in _largest(tally.sources, OTHERS)],
        positions=_positions(tally.grids),
        load=_load(tally.grids, tally.total.tokens),
        worst=tally.worst,
    )


def _largest(table: Mapping[_Key, Counts], others: _Key) -> Iterator[tuple[_Key, Counts]]:
    """The rows with most cells, by key, and the rest as one: without spread, for a trajectory may be in several."""
    keys = sorted(table, key=lambda key: (-table[key].cells, key))
    yield from ((key, table[key]) for key in sorted(keys[:_LABELS]))
    if len(keys) > _LABELS:
        rest = Counts()
        for key in keys[_LABELS:]:
            add_counts(rest, table[key])
        rest.spread = None
        yield others, rest


def _positions(grids: Sequence[Grid]) -> PositionDrift:
    layers = _layers(grids)
    cells = np.zeros((len(layers), 2 * REACH + 1), np.int64)
    differing = np.zeros_like(cells)
    for grid in grids:
        at = np.searchsorted(layers, grid.layer_ids)
        cells[at] += grid.cells
        differing[at] += grid.differing
    there = np.flatnonzero(cells.any(axis=0))
    return PositionDrift(
        layers=layers,
        buckets=(there - REACH).tolist(),
        cells=cells[:, there],
        differing=differing[:, there],
    )


def _load(grids: Sequence[Grid], rows: int) -> Load:
    counted = [grid for grid in grids if grid.load is not None]
    layers = _layers(counted)
    num_experts = np.zeros(len(layers), np.int64)
    load = np.zeros((2, len(layers), max((grid.num_experts for grid in counted), default=0)), np.int64)
    for grid in counted:
        assert grid.load is not None
        at = np.searchsorted(layers, grid.layer_ids)
        load[:, at, : grid.num_experts] += grid.load
        num_experts[at] = np.maximum(num_experts[at], grid.num_experts)
    return Load(
        layers=layers,
        num_experts=num_experts.tolist(),
        first=load[0],
        second=load[1],
        rows=sum(grid.load_rows for grid in counted),
        of=rows,
    )


def _layers(grids: Sequence[Grid]) -> list[int]:
    return sorted({layer for grid in grids for layer in grid.layer_ids})
