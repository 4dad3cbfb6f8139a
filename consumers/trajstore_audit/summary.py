"""An audit as a person reads it in a terminal: fields and tables, what matters first. Pure; the command prints them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trajstore_audit.commands import look_at, look_into
from trajstore_audit.document import shown_place
from trajstore_audit.labels import gap_label, pair_label, segment_label, source_label
from trajstore_audit.measures import comparisons, logprob_measures, missing_share
from trajstore_audit.numbers import between, count, decimal, distance, index, percent, size, whole
from trajstore_audit.result import TAUS, Audit, Counts, Drift, Load, PositionDrift, bucket_bounds

__all__ = ["Fields", "Lines", "Part", "TablePart", "summary"]

_SHOWN = 5
"""Worst trajectories, findings, and layers whose load shifted; the rest is in the other outputs."""

_TITLES = {"segments": "between segments", "observations": "observations against the rollout"}

_BLOCKS = " ▁▂▃▄▅▆▇█"


class Fields(NamedTuple):
    """Named values."""

    title: str
    fields: list[tuple[str, str]]


class TablePart(NamedTuple):
    """A table; all columns but the first are aligned to the right, and the first may be folded."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Lines(NamedTuple):
    """A title, and lines that are wrapped by the terminal only."""

    title: str
    lines: list[str]


Part = Fields | TablePart | Lines


def summary(audit: Audit) -> Iterator[Part]:
    """The parts, in order."""
    yield Fields(f"audit of {shown_place(audit.parameters.place)}", _coverage(audit))
    for against, drift in comparisons(audit).items():
        yield from _comparison(audit, _TITLES[against], drift)
    if (found := logprob_measures(audit)) is not None:
        fields = [("tokens", whole(int(found["tokens"] or 0))), ("k3 KL, nats per token", decimal(found["k3_kl"]))]
        fields += [("F(τ)", ", ".join(f"{tau:g}: {percent(found[f'f_{tau:g}'])}" for tau in TAUS))]
        fields += [
            ("drift and |Δ logprob|", f"Pearson {decimal(found['pearson'])}, Spearman {decimal(found['spearman'])}")
        ]
        yield Fields("logprobs", fields)
    if audit.findings_by_kind:
        yield from _findings(audit)


def _coverage(audit: Audit) -> list[tuple[str, str]]:
    totals, rows = audit.totals, audit.rows
    skipped = ", ".join(f"{whole(number)} {reason}" for reason, number in totals.skipped.items())
    missing = ", ".join(f"{whole(number)} {reason}" for reason, number in rows.missing.items())
    doubtful = [(rows.zero, "of zeros"), (rows.duplicates, "with an expert twice"), (rows.repeated, "repeated")]
    taken = f" ({percent(audit.parameters.sample)} sampled)" if audit.parameters.sample < 1 else ""
    audited = f"{whole(totals.trajectories)} of {whole(totals.population)}{taken}"
    fields = [
        (
            "trajectories",
            f"{audited}; {whole(totals.with_routing)} have routing",
        ),
        ("skipped", skipped),
        (
            "recordings",
            f"{whole(totals.recordings)}; {size(totals.bytes_read)} of routing read in {totals.seconds:.3g} s",
        ),
        (
            "rows missing",
            f"{whole(sum(rows.missing.values()))} of {whole(rows.total)}: {missing}; "
            f"{percent(missing_share(audit))} without last tokens"
            if missing
            else "",
        ),
        ("observed, left out", ", ".join(f"{whole(number)} {reason}" for reason, number in rows.left_out.items())),
        ("rows in doubt", ", ".join(f"{whole(number)} {what}" for number, what in doubtful if number)),
    ]
    return [(name, value) for name, value in fields if value]


def _comparison(audit: Audit, title: str, drift: Drift) -> Iterator[Part]:
    total = drift.total
    if not total.cells:
        yield Lines(title, ["nothing to compare"])
        return
    yield Fields(title, _headline(audit, drift))
    yield from _divided(
        audit, "by version gap", "gap", [(gap_label(row.gap), row.counts) for row in drift.version_gaps]
    )
    for name, head, rows in (
        (
            "by segments",
            "segments",
            [(segment_label(row.first, row.second), row.counts) for row in drift.segment_pairs],
        ),
        ("by engine", "engines", [(pair_label(row.first, row.second), row.counts) for row in drift.engines]),
        ("by origin", "origins", [(pair_label(row.first, row.second), row.counts) for row in drift.origins]),
        ("by who recorded", "source", [(source_label(row.source), row.counts) for row in drift.sources]),
    ):
        if len(rows) > 1:
            yield from _divided(audit, name, head, rows)
    if drift.worst:
        yield TablePart(
            "worst trajectories",
            ["id", "disagreement", "cells", "first differs"],
            [
                [one.id, percent(one.share), whole(one.cells), f"row {one.row}, layer {one.layer}"]
                for one in drift.worst[:_SHOWN]
            ],
        )
        yield Lines("", [f"look closer: {line}" for line in look_at(audit.parameters.place, drift.worst[0])])


def _headline(audit: Audit, drift: Drift) -> list[tuple[str, str]]:
    total = drift.total
    cells, tokens = audit.interval(total), audit.interval(total, "tokens")
    fields = [
        ("router disagreement", f"{percent(total.share)} of {whole(total.cells)} cells (token, layer){_sure(cells)}"),
        ("tokens touched", f"{percent(total.token_share)} of {whole(total.tokens)} tokens{_sure(tokens)}"),
        ("layers per token", f"{decimal(total.layers_per_token)} of {len(drift.layers)}"),
        ("Jaccard index", index(total.jaccard)),
        ("order changes", f"{percent(total.order_share)} of cells"),
        ("referenced", f"{percent(total.referenced / total.tokens)} of tokens: stored once, equal"),
        *_by_layer(drift),
        *_by_position(drift.positions),
        *_load(drift.load),
    ]
    return fields


def _sure(interval: tuple[float, float] | None) -> str:
    return f"; 95 %: {between(interval)}" if interval else ""


def _by_layer(drift: Drift) -> list[tuple[str, str]]:
    shares = [row.counts.share for row in drift.layers]
    worst = int(np.nanargmax(shares))
    layers = [row.layer for row in drift.layers]
    most = f"layer {layers[worst]}, {percent(shares[worst])}"
    return [(f"layers {layers[0]}-{layers[-1]}", _drawn(shares, most))]


def _by_position(found: PositionDrift) -> list[tuple[str, str]]:
    cells, differing = found.cells.sum(axis=0), found.differing.sum(axis=0)
    there = np.flatnonzero(cells)
    if len(there) == 0:
        return []
    shares = [float(differing[i] / cells[i]) for i in there]
    names = [distance(min(bucket_bounds(found.buckets[i]), key=abs)) for i in there]
    worst = int(np.argmax(shares))
    most = f"{names[worst]} from the resume point, {percent(shares[worst])}"
    return [(f"rows {names[0]} to {names[-1]}", _drawn(shares, most))]


def _drawn(shares: Sequence[float], most: str) -> str:
    return f"{sparkline(shares)}  most: {most}" if any(share > 0 for share in shares) else "no drift"


def _load(load: Load) -> list[tuple[str, str]]:
    if not load.rows:
        return []
    shift, violation = load.divergence, load.max_violation()
    before = load.max_violation("first")
    moved, worst = int(np.nanargmax(shift)), int(np.nanargmax(violation))
    return [
        ("load shift", f"{decimal(float(shift[moved]))} bit at most, layer {load.layers[moved]} (Jensen-Shannon)"),
        (
            "load balance",
            f"MaxVio {decimal(float(before[worst]))} → {decimal(float(violation[worst]))}, layer {load.layers[worst]}",
        ),
    ]


def _divided(audit: Audit, title: str, head: str, rows: Sequence[tuple[str, Counts]]) -> Iterable[Part]:
    if not rows:
        return []
    intervals = [audit.interval(counts) for _, counts in rows]
    sampled = any(interval is not None for interval in intervals)
    columns = [head, "disagreement", *(["95 %"] if sampled else []), "tokens touched", "cells"]
    table = [
        [
            name,
            percent(counts.share),
            *([between(interval) if interval else ""] if sampled else []),
            percent(counts.token_share),
            whole(counts.cells),
        ]
        for (name, counts), interval in zip(rows, intervals, strict=True)
    ]
    return [TablePart(title, columns, table)]


def _findings(audit: Audit) -> Iterator[Part]:
    kinds = ", ".join(f"{whole(number)} {kind}" for kind, number in audit.findings_by_kind.items())
    lines = []
    for finding in audit.findings[:_SHOWN]:
        where = [finding.id, f"event {finding.event}" if finding.event else ""]
        where += [f"row {finding.row}"] if finding.row is not None else []
        where += [f"layer {finding.layer}"] if finding.layer is not None else []
        lines.append(": ".join(filter(None, [finding.kind, ", ".join(filter(None, where)), finding.what])))
        look = look_into(audit.parameters.place, finding)
        lines += [f"  {line}" for line in (finding.what_to_do, look) if line]
    total = sum(audit.findings_by_kind.values())
    if total > _SHOWN:
        lines.append(f"and {count(total - _SHOWN, 'more finding')}: --json, --parquet and --html list them")
    yield Lines(f"findings: {kinds}", lines)


def sparkline(shares: Sequence[float], *, most: int = 24) -> str:
    """Shares as blocks, the highest as a full one; neighbours share a block where there are too many.

    A blank is exactly 0 or nothing: what is not 0 has the lowest block at least.
    """
    groups = np.array_split(np.nan_to_num(np.array(shares, np.float64)), min(most, len(shares)))
    means = np.array([float(group.mean()) for group in groups])
    top = means.max(initial=0.0)
    return "".join(_BLOCKS[0 if mean == 0 else max(1, round(8 * mean / top))] for mean in means.tolist())
