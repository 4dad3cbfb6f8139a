"""The report's heatmaps, layers by something: their ink, labels, legend, and the same as a table. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from trajstore_audit.numbers import decimal, distance, percent, whole
from trajstore_audit.report.plots import SHARE_STEPS, load_steps, nice_limit, share_bounds, share_steps, steps_svg
from trajstore_audit.result import Load, PositionDrift, bucket_bounds

__all__ = ["Heatmap", "Label", "load_heatmap", "position_heatmap"]

_Y_LABELS, _X_LABELS = 16, 14
"""So many labels of an axis at most; a narrow page shows every other one of the lower axis."""

_LOADS = ("≤ ⅛", "¼", "½", "0.7", "mean", "1.4", "2", "4", "≥ 8")


class Label(NamedTuple):
    """Of an axis, at `at` percent of it."""

    at: float
    text: str


class Heatmap(NamedTuple):
    """A plot of layers by something.

    Attributes:
        key: of the definition that its title leads to.
        svg: its ink.
        height: of the ink, CSS pixels.
        y, x: labels of both axes.
        mark: percent of the lower axis where a line stands; None for none.
        margin: ink beside it, per layer; empty for none.
        legend: (class of the colour, text).
        heads, rows: the same as a table.
    """

    title: str
    key: str
    lead: str
    svg: Markup
    height: int
    y: list[Label]
    x: list[Label]
    x_title: str
    mark: float | None
    margin: Markup
    margin_title: str
    legend: list[tuple[str, str]]
    heads: list[str]
    rows: list[list[str]]


def position_heatmap(found: PositionDrift) -> Heatmap:
    """Router disagreement by layer and bucket of positions; there is one bucket at least."""
    buckets = list(range(found.buckets[0], found.buckets[-1] + 1))
    cells, differing = (np.zeros((len(found.layers), len(buckets)), np.int64) for _ in range(2))
    at = np.array(found.buckets) - buckets[0]
    cells[:, at], differing[:, at] = found.cells, found.differing
    with np.errstate(invalid="ignore"):
        shares = differing / cells
        by_layer = differing.sum(axis=1) / cells.sum(axis=1)
    limit = nice_limit(float(np.nanmax(shares)))
    texts = [
        [f"{percent(share)} of {whole(n)}" if n else "" for share, n in zip(row, counts, strict=True)]
        for row, counts in zip(shares.tolist(), cells.tolist(), strict=True)
    ]
    names = [_bucket_name(bucket) for bucket in buckets]
    return Heatmap(
        title="Layer by position",
        key="position",
        lead="Router disagreement by layer and by how far a row lies from the point where the second segment resumed.",
        svg=steps_svg(
            share_steps(shares, limit),
            "r",
            alt="Heatmap of router disagreement by layer and position; the greatest is "
            f"{percent(float(np.nanmax(shares)))}. The table below has its numbers.",
            titles=[
                [f"layer {layer}, {name}: {text}" for name, text in zip(names, row, strict=True)]
                for layer, row in zip(found.layers, texts, strict=True)
            ],
        ),
        height=_height(len(found.layers)),
        y=_labels([str(layer) for layer in found.layers], _Y_LABELS),
        x=_labels([distance(min(bucket_bounds(bucket), key=abs)) for bucket in buckets], _X_LABELS),
        x_title="rows from the resume point",
        mark=100 * (-buckets[0]) / len(buckets) if buckets[0] < 0 <= buckets[-1] else None,
        margin=_margin(by_layer),
        margin_title="by layer",
        legend=_share_legend(limit),
        heads=["layer", *names],
        rows=[[str(layer), *row] for layer, row in zip(found.layers, texts, strict=True)],
    )


def load_heatmap(load: Load) -> Heatmap:
    """Load of the second recordings by layer and expert; there is one row at least."""
    experts = load.second.shape[1]
    means = load.second.sum(axis=1) / np.array(load.num_experts)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = load.second / means[:, None]
    ratio[np.arange(experts) >= np.array(load.num_experts)[:, None]] = np.nan
    return Heatmap(
        title="Load per expert",
        key="violation",
        lead="How often each expert was chosen in the second recordings, as a multiple of the mean of its layer"
        + ("." if load.rows == load.of else f"; counted over {whole(load.rows)} of {whole(load.of)} rows."),
        svg=steps_svg(
            load_steps(ratio),
            "b",
            alt="Heatmap of load by layer and expert; the greatest is "
            f"{decimal(float(np.nanmax(ratio)))} times the mean. The table below has shift and balance of each layer.",
        ),
        height=_height(len(load.layers)),
        y=_labels([str(layer) for layer in load.layers], _Y_LABELS),
        x=_labels([str(expert) for expert in range(experts)], _X_LABELS),
        x_title="expert",
        mark=None,
        margin=_margin(load.divergence),
        margin_title="shift",
        legend=[
            ("b0", "none"),
            *((f"b{step}", text) for step, text in enumerate(_LOADS, 1)),
        ],
        heads=[],
        rows=[],
    )


def _margin(values: npt.NDArray[np.float64]) -> Markup:
    """Bars beside a heatmap, one per layer."""
    finite = np.nan_to_num(values)
    limit = float(finite.max(initial=0.0)) or 1.0
    shapes = "".join(
        f'<rect class="bar" x="0" y="{i + 0.1:g}" width="{100 * value / limit:.4g}" height="0.8"/>'
        for i, value in enumerate(finite.tolist())
        if value > 0
    )
    return Markup(  # noqa: S704 - numbers only
        f'<svg aria-hidden="true" viewBox="0 0 100 {len(values)}" preserveAspectRatio="none">{shapes}</svg>'
    )


def _share_legend(limit: float) -> list[tuple[str, str]]:
    bounds = share_bounds(limit)
    named = {1, 3, 5, 7, SHARE_STEPS}
    return [("r0", "0"), *((f"r{i}", f"≤ {100 * b:.2g} %" if i in named else "") for i, b in enumerate(bounds, 1))]


def _labels(texts: Sequence[str], most: int) -> list[Label]:
    """At the middles of equal parts of an axis, thinned out."""
    step = -(-len(texts) // most)
    return [Label(100 * (i + 0.5) / len(texts), text) for i, text in enumerate(texts) if i % step == 0]


def _bucket_name(bucket: int) -> str:
    """Its bounds in full, the nearest first."""
    nearest, farthest = sorted(bucket_bounds(bucket), key=abs)
    sign = distance(bucket)[:1] if bucket else ""
    names = [f"{sign}{whole(abs(bound))}" for bound in (nearest, farthest)]
    return names[0] if nearest == farthest else " to ".join(names)


def _height(rows: int) -> int:
    return min(max(12 * rows, 120), 560)
