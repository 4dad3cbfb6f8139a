"""The sections of the report as the template draws them: tiles, tables and lists of one comparison. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from trajstore_audit.commands import look_at
from trajstore_audit.labels import gap_label, pair_label, segment_label, source_label
from trajstore_audit.numbers import between, decimal, index, percent, whole
from trajstore_audit.report.heatmaps import Heatmap, load_heatmap, position_heatmap
from trajstore_audit.report.plots import bar, nice_limit
from trajstore_audit.result import Audit, Counts, Drift, Load, WorstTrajectory

__all__ = ["Bars", "Comparison", "Tile", "Worst", "comparison"]

_SHIFTED = 12
"""So many layers in the table of the most shifted loads; the others are in the one that opens."""


class Tile(NamedTuple):
    """A headline number: `key` leads to its definition."""

    key: str
    term: str
    value: str
    note: str


class Bars(NamedTuple):
    """A table of which one column is drawn as bars.

    Attributes:
        heads: of the first column, the drawn one, and the others.
        rows: (text of the first, bar, texts of the others).
        folded: rows that a click shows.
    """

    title: str
    key: str
    heads: list[str]
    rows: list[tuple[str, Markup, list[str]]]
    folded: list[tuple[str, Markup, list[str]]]


class Worst(NamedTuple):
    """A trajectory among the worst: where it first differs, and commands that show it."""

    id: str
    group: str
    share: str
    bar: Markup
    cells: str
    where: str
    commands: list[str]


class Comparison(NamedTuple):
    """Everything of one comparison. Without `tiles` there was nothing to compare."""

    key: str
    title: str
    lead: str
    tiles: list[Tile]
    position: Heatmap | None
    layers: Bars | None
    gaps: Bars | None
    others: list[Bars]
    load: Heatmap | None
    shifts: Bars | None
    worst: list[Worst]


_TITLES = {
    "segments": (
        "Between segments",
        "Each recording of a row against the one before it of the same row.",
    ),
    "observations": (
        "Observations against the rollout",
        "Another party's routing of the same tokens against the recording that wins the row.",
    ),
}


def comparison(audit: Audit, against: str, drift: Drift) -> Comparison:
    """The sections of one comparison."""
    title, lead = _TITLES[against]
    made = Comparison(against, title, lead, [], None, None, None, [], None, None, [])
    if not drift.total.cells:
        return made
    tables: list[tuple[str, str, str, list[tuple[str, Counts]]]] = [
        (
            "segments",
            "By pair of segments",
            "compared",
            [(segment_label(r.first, r.second), r.counts) for r in drift.segment_pairs],
        ),
        ("engines", "By engine", "compared", [(pair_label(r.first, r.second), r.counts) for r in drift.engines]),
        (
            "origins",
            "By origin of the rows",
            "compared",
            [(pair_label(r.first, r.second), r.counts) for r in drift.origins],
        ),
        ("source", "By who recorded", "compared", [(source_label(r.source), r.counts) for r in drift.sources]),
    ]
    worst_limit = nice_limit(max((one.share for one in drift.worst), default=0.0))
    return made._replace(
        tiles=_tiles(audit, drift),
        position=position_heatmap(drift.positions) if drift.positions.layers else None,
        layers=_bars(audit, "By layer", "cell", "layer", [(str(r.layer), r.counts) for r in drift.layers]),
        gaps=_bars(
            audit, "By version gap", "gap", "versions apart", [(gap_label(r.gap), r.counts) for r in drift.version_gaps]
        ),
        others=[_bars(audit, title, key, head, rows) for head, title, key, rows in tables if rows],
        load=load_heatmap(drift.load) if drift.load.rows else None,
        shifts=_shifts(drift.load) if drift.load.rows else None,
        worst=[_worst(audit, one, worst_limit) for one in drift.worst],
    )


def _tiles(audit: Audit, drift: Drift) -> list[Tile]:
    total = drift.total
    cells, tokens = audit.interval(total), audit.interval(total, "tokens")
    bounds = [f"{between(one)}, 95 %" if one else "" for one in (cells, tokens)]
    return [
        Tile(
            "router_disagreement",
            "Router disagreement",
            percent(total.share),
            bounds[0] or f"{whole(total.differing)} of {whole(total.cells)} cells",
        ),
        Tile(
            "tokens_touched",
            "Tokens touched",
            percent(total.token_share),
            bounds[1] or f"{whole(total.tokens_differing)} of {whole(total.tokens)} tokens",
        ),
        Tile("layers_per_token", "Layers per token", decimal(total.layers_per_token), "that differ, on average"),
        Tile("jaccard", "Jaccard index", index(total.jaccard), "of the expert sets, on average"),
        Tile("order", "Order changes", percent(total.order_share), "of cells: same experts, other order"),
        Tile(
            "compared",
            "Referenced",
            percent(total.referenced / total.tokens),
            "of tokens stored once: equal, and not read",
        ),
    ]


def _bars(audit: Audit, title: str, key: str, head: str, table: Sequence[tuple[str, Counts]]) -> Bars:
    """Router disagreement of the rows of a table."""
    intervals = [audit.interval(counts) for _, counts in table]
    # Where nothing differs the interval is of what a sample may have missed: so wide that no other bar would be seen.
    whiskers = [interval if counts.differing else None for (_, counts), interval in zip(table, intervals, strict=True)]
    limit = nice_limit(
        max(
            (whisker.high if whisker else counts.share for (_, counts), whisker in zip(table, whiskers, strict=True)),
            default=0.0,
        )
    )
    rows = [
        (
            name,
            bar(counts.share, limit, interval=whisker),
            [
                percent(counts.share),
                *([between(interval) if interval else ""] if any(intervals) else []),
                percent(counts.token_share),
                whole(counts.cells),
            ],
        )
        for (name, counts), interval, whisker in zip(table, intervals, whiskers, strict=True)
    ]
    heads = [
        head,
        f"0 to {100 * limit:g} %",
        "disagreement",
        *(["95 %"] if any(intervals) else []),
        "tokens touched",
        "cells",
    ]
    return Bars(title, key, heads, rows, [])


def _shifts(load: Load) -> Bars:
    """Layers by the shift of their load, greatest first."""
    shift, violations = load.divergence, [load.max_violation("first"), load.max_violation()]
    least = [load.min_violation("first"), load.min_violation()]
    limit = nice_limit(float(np.nanmax(shift)))
    with np.errstate(invalid="ignore"):
        moved = load.second / load.second.sum(axis=1, keepdims=True) - load.first / load.first.sum(
            axis=1, keepdims=True
        )
    rows = []
    for i in np.argsort(-np.nan_to_num(shift), kind="stable").tolist():
        expert = int(np.argmax(np.abs(np.nan_to_num(moved[i]))))
        rows.append(
            (
                str(load.layers[i]),
                bar(float(np.nan_to_num(shift[i])), limit),
                [
                    decimal(float(shift[i])),
                    " → ".join(decimal(float(one[i])) for one in violations),
                    " → ".join(decimal(float(one[i])) for one in least),
                    f"{expert}: {percent(_part(load.first, i, expert))} → {percent(_part(load.second, i, expert))}",
                ],
            )
        )
    heads = ["layer", f"0 to {limit:g} bit", "shift, bit", "MaxVio", "MinVio", "most moved expert"]
    return Bars("Layers whose load shifted most", "load_shift", heads, rows[:_SHIFTED], rows[_SHIFTED:])


def _worst(audit: Audit, one: WorstTrajectory, limit: float) -> Worst:
    second = "the observation" if one.second_segment < 0 else f"segment {one.second_segment}"
    return Worst(
        id=one.id,
        group=one.group or "",
        share=percent(one.share),
        bar=bar(one.share, limit),
        cells=f"{whole(one.differing)} of {whole(one.cells)} cells",
        where=f"segment {one.first_segment} and {second} first differ in row {one.row}, layer {one.layer}",
        commands=look_at(audit.parameters.place, one),
    )


def _part(load: npt.NDArray[np.int64], layer: int, expert: int) -> float:
    total = int(load[layer].sum())
    return int(load[layer, expert]) / total if total else float("nan")
