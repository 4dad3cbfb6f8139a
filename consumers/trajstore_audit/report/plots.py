"""The ink of the report's plots as inline SVG: heatmaps and bars, coloured by the page's style sheet. Pure.

Only shapes are drawn: they stretch to the width that the page has (`preserveAspectRatio="none"`), while labels are text
of the page, which stays as large as it is. Colours are classes, so that the dark page has its own.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

__all__ = ["LOAD_STEPS", "SHARE_STEPS", "bar", "load_steps", "nice_limit", "share_bounds", "share_steps", "steps_svg"]

SHARE_STEPS = 9
"""Colours of a share above 0, classes r1 to r9; r0 is exactly 0."""

LOAD_STEPS = 9
"""Colours of a load, classes b1 (an eighth of the mean or less) to b9 (eight times or more); b0 is no load at all."""

_LOAD_BOUNDS = (-2.5, -1.5, -0.75, -0.25, 0.25, 0.75, 1.5, 2.5)
"""Between them, in powers of two of the mean: finer near it, where most loads are."""

NOTHING = -1
"""Where nothing was compared: no shape."""


def nice_limit(value: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `value`; 1 for a share above 0.5, or none."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return min((step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9)), default=1.0)


def share_bounds(limit: float) -> list[float]:
    """Upper bounds of the colours r1 to r9: squares, so that small shares are told apart beside large ones."""
    return [limit * (step / SHARE_STEPS) ** 2 for step in range(1, SHARE_STEPS + 1)]


def share_steps(shares: npt.NDArray[np.float64], limit: float) -> npt.NDArray[np.int8]:
    """Colours of shares, int8 of the same shape: 0 for exactly 0, 1 to `SHARE_STEPS`, `NOTHING` for NaN."""
    steps = np.ceil(SHARE_STEPS * np.sqrt(np.nan_to_num(shares) / limit) - 1e-9)
    found = np.where(shares > 0, np.clip(steps, 1, SHARE_STEPS), 0)
    return np.where(np.isnan(shares), NOTHING, found).astype(np.int8)


def load_steps(ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    """Colours of load / mean load, int8 of the same shape: 1 to `LOAD_STEPS`, 5 is the mean; 0 is no load."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = 1 + np.digitize(np.log2(ratio), _LOAD_BOUNDS)
    return np.where(np.isnan(ratio), NOTHING, np.where(ratio == 0, 0, steps)).astype(np.int8)


def steps_svg(
    steps: npt.NDArray[np.int8], family: str, *, alt: str, titles: Sequence[Sequence[str]] | None = None
) -> Markup:
    """A heatmap.

    Args:
        steps: `[rows, columns]`, as `share_steps` or `load_steps` gives them.
        family: letter of the classes, "r" or "b".
        alt: what it shows, for those who cannot see it.
        titles: `[rows][columns]`, shown where the mouse rests. Without them, neighbours of one colour are one shape.
    """
    height, width = steps.shape
    shapes = _cells(steps, family, titles) if titles is not None else _runs(steps, family)
    return _svg(width, height, shapes, alt=alt, kind="heat")


def bar(value: float, limit: float, *, interval: tuple[float, float] | None = None, alt: str = "") -> Markup:
    """One bar to be put into a cell of a table, `limit` wide at most, with a whisker over its interval.

    Args:
        alt: "" where the table says the same in words.
    """
    shapes = []
    if value > 0:
        # Never narrower than can be seen: what is not 0 must not look like it.
        shapes.append(
            f'<rect class="bar" x="0" y="1" width="{max(0.6, 100 * min(1.0, value / limit)):.4g}" height="8"/>'
        )
    if interval is not None:
        low, high = (100 * min(1.0, bound / limit) for bound in interval)
        shapes.append(f'<path class="whisker" d="M{low:.4g} 5H{high:.4g}M{low:.4g} 2V8M{high:.4g} 2V8"/>')
    return _svg(100, 10, shapes, alt=alt, kind="bars")


def _cells(steps: npt.NDArray[np.int8], family: str, titles: Sequence[Sequence[str]]) -> list[str]:
    return [
        f'<rect class="{family}{step}" x="{x}" y="{y}" width="1" height="1">'
        f"<title>{escape(titles[y][x])}</title></rect>"
        for y, row in enumerate(steps.tolist())
        for x, step in enumerate(row)
        if step != NOTHING
    ]


def _runs(steps: npt.NDArray[np.int8], family: str) -> list[str]:
    """One path per colour: far smaller than a shape per cell."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(steps):
        edges = np.flatnonzero(np.diff(row)) + 1
        for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(row)], strict=True):
            paths.setdefault(int(row[start]), []).append(f"M{start} {y}h{stop - start}v1H{start}z")
    return [f'<path class="{family}{step}" d="{"".join(path)}"/>' for step, path in paths.items() if step != NOTHING]


def _svg(width: int, height: int, shapes: Sequence[str], *, alt: str, kind: str) -> Markup:
    named = f'role="img" aria-label="{escape(alt)}"' if alt else 'aria-hidden="true"'
    return Markup(  # noqa: S704 - numbers, and what was escaped above
        f'<svg class="{kind}" {named} viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(shapes)}</svg>'
    )
