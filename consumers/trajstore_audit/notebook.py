"""An audit as a cell of a notebook shows it: the headline of each comparison. Pure; needs no extra."""

from html import escape

from trajstore.cli.terminal import plain
from trajstore_audit.document import shown_place
from trajstore_audit.measures import comparisons
from trajstore_audit.numbers import between, decimal, index, percent, whole
from trajstore_audit.result import Audit

__all__ = ["audit_cell"]


def audit_cell(audit: Audit) -> str:
    """HTML, for `Audit._repr_html_`."""
    found = comparisons(audit)
    intervals = [audit.interval(drift.total) for drift in found.values()]
    lines = [
        ("router disagreement", [percent(drift.total.share) for drift in found.values()]),
        ("95 %", [between(interval) if interval else "" for interval in intervals]),
        ("tokens touched", [percent(drift.total.token_share) for drift in found.values()]),
        ("layers per token", [decimal(drift.total.layers_per_token) for drift in found.values()]),
        ("Jaccard index", [index(drift.total.jaccard) for drift in found.values()]),
        ("cells", [whole(drift.total.cells) for drift in found.values()]),
    ]
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in lines
        if any(values)
    )
    heads = "".join(f"<th>{escape(name)}</th>" for name in found)
    kinds = ", ".join(f"{whole(count)} {kind}" for kind, count in audit.findings_by_kind.items()) or "none"
    totals = audit.totals
    return (
        f"<p><b>audit of {escape(plain(shown_place(audit.parameters.place)))}</b>: {whole(totals.trajectories)} of "
        f"{whole(totals.population)} trajectories; findings: {escape(plain(kinds))}</p>"
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )
