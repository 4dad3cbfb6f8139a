"""The gaps of `benchmarks/router_replay.py` as a picture: KL, routers that differ, and tokens that are far apart."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.tables import Table

__all__ = ["draw"]

PANELS = ("KL k3 e-3", "routers %", "F(1.1) %")


def draw(table: Table, path: Path) -> None:
    """Bars of every case, one for each kind of replay.

    Args:
        table: of gaps; its first columns name the case and what was replayed.
        path: .png or .svg.
    """
    mpl.use("Agg")
    cases = list(dict.fromkeys(row[0] for row in table.rows))
    kinds = list(dict.fromkeys(row[1] for row in table.rows))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 0.55 * len(cases) + 1.4), sharey=True)
    error = table.columns.index("+-")
    for panel, axis in zip(PANELS, axes, strict=True):
        column = table.columns.index(panel)
        for number, kind in enumerate(kinds):
            rows = {row[0]: row for row in table.rows if row[1] == kind}
            values: list[Any] = [rows[case][column] for case in cases]
            spread: list[Any] | None = [rows[case][error] for case in cases] if panel.startswith("KL") else None
            places = [index + 0.27 * (number - (len(kinds) - 1) / 2) for index in range(len(cases))]
            axis.barh(places, values, height=0.25, xerr=spread, label=f"replay: {kind}", error_kw={"lw": 0.8})
        axis.set_xlabel(panel)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [str(case) for case in cases])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(kinds), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=130)
    plt.close(figure)
