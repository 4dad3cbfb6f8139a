"""An audit as flat tables, for Parquet and data frames: their columns, and the rows of an outcome. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias, get_args

import msgspec

from trajstore_audit.measures import comparisons, counted, layer_loads, logprob_measures
from trajstore_audit.result import TAUS, Audit, Drift, PairDrift, bucket_bounds

__all__ = ["COLUMNS", "PAIR_COLUMNS", "Column", "Table", "pair_row", "tables"]

Value: TypeAlias = int | float | str | None

Table: TypeAlias = dict[str, list[Value]]
"""Column → values; all of one length. `pandas.DataFrame(table)` and `polars.DataFrame(table)` take it."""


class Column(NamedTuple):
    """A column of a table. Any value may be missing (None), where `what` says so."""

    name: str
    type: Literal["int64", "float64", "string"]
    what: str


def _ints(**columns: str) -> tuple[Column, ...]:
    return tuple(Column(name, "int64", what) for name, what in columns.items())


def _floats(**columns: str) -> tuple[Column, ...]:
    return tuple(Column(name, "float64", what) for name, what in columns.items())


def _texts(**columns: str) -> tuple[Column, ...]:
    return tuple(Column(name, "string", what) for name, what in columns.items())


def _column_type(hint: object) -> Literal["int64", "float64", "string"]:
    """Of a field of a struct, whether or not it may be None."""
    hints = (hint, *get_args(hint))
    return "int64" if int in hints else "float64" if float in hints else "string"


_AGAINST = _texts(against="segments or observations")

_COUNTED = (
    *_ints(
        trajectories="that have any such row",
        pairs="pieces of pairs of recordings",
        tokens="rows compared",
        tokens_differing="rows whose expert set differs in any layer",
        cells="(token, layer) compared",
        differing="cells whose expert set differs",
        order_changes="cells with the same experts in another order",
        referenced="rows that the archive stores as a reference: equal, and not read",
    ),
    *_floats(
        router_disagreement="differing / cells",
        router_disagreement_low="lower bound of its 95 % interval; missing unless trajectories were sampled",
        router_disagreement_high="upper bound",
        tokens_touched="tokens_differing / tokens",
        tokens_touched_low="lower bound of its 95 % interval; missing unless trajectories were sampled",
        tokens_touched_high="upper bound",
        layers_per_token="differing / tokens",  # noqa: S106 - no secret
        jaccard="mean Jaccard index of the expert sets",
        order_share="order_changes / cells",
    ),
)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "totals": (*_AGAINST, *_COUNTED),
    "layers": (*_AGAINST, *_ints(layer="global id"), *_COUNTED),
    "segment_pairs": (
        *_AGAINST,
        *_ints(first="index of the older segment; 16: that one or later", second="of the newer; -1: an observation"),
        *_COUNTED,
    ),
    "version_gaps": (*_AGAINST, *_ints(gap="weight versions between; missing where a label has no number"), *_COUNTED),
    "engines": (*_AGAINST, *_texts(first="engine of the older recording", second="of the newer"), *_COUNTED),
    "origins": (*_AGAINST, *_texts(first="origin of the older recording", second="of the newer"), *_COUNTED),
    "sources": (*_AGAINST, *_texts(source="of the newer: empty for a segment, late, or who observed"), *_COUNTED),
    "positions": (
        *_AGAINST,
        *_ints(
            layer="global id",
            bucket="sign and bit length of the distance",
            nearest="first distance of the bucket: row - base of the resumed segment",
            farthest="last distance",
            cells="(token, layer) compared",
            differing="cells whose expert set differs",
        ),
        *_floats(router_disagreement="differing / cells; missing where nothing was compared"),
    ),
    "load": (
        *_AGAINST,
        *_ints(
            layer="global id",
            expert="id",
            first="how often it was chosen in the older recordings",
            second="in the newer ones",
        ),
    ),
    "layer_load": (
        *_AGAINST,
        *_ints(layer="global id", experts="of the layer"),
        *_floats(
            load_shift="Jensen-Shannon divergence of both loads, bits",
            max_violation_first="max load / mean load - 1, older recordings",
            max_violation="newer ones",
            min_violation_first="1 - min load / mean load, older recordings",
            min_violation="newer ones",
        ),
    ),
    "worst": (
        *_AGAINST,
        *_texts(id="of the trajectory", group="missing where it has none"),
        *_ints(pairs="pieces of pairs of recordings", cells="compared", differing="of them"),
        *_floats(router_disagreement="differing / cells"),
        *_texts(first_event="older recording of the first pair that differs", second_event="its newer one"),
        *_ints(
            first_segment="of the older; -1: an observation",
            second_segment="of the newer",
            row="first that differs there",
            layer="its first layer that does, global id",
        ),
    ),
    "findings": (
        *_texts(kind="what is wrong", id="of the trajectory", group="missing where it has none"),
        *_texts(event="of the recording; empty where it is about the trajectory"),
        *_ints(row="first concerned; missing where it is about all", layer="global id; missing likewise"),
        *_texts(what="the evidence", what_to_do="empty where nothing can be done"),
    ),
    "coverage": (
        *_texts(
            what="population, trajectories, with_routing, skipped, recordings, bytes_read, rows, missing, left_out, "
            "rows_read, zero, duplicates, repeated",
            reason="of what was skipped, is missing or was left out; else empty",
        ),
        *_ints(count="how many"),
    ),
    "logprobs": (
        *_ints(tokens="that have both logprobs", compared="of them, those whose row was compared"),
        *_floats(
            k3_kl="k3 estimate of KL, nats per token",
            logprob_difference="mean of the absolute difference, nats",
            **{f"f_{tau:g}": f"share with a probability ratio outside [1/{tau:g}, {tau:g}]" for tau in TAUS},
            pearson="correlation of drift with the difference",
            spearman="rank correlation",
        ),
    ),
}
"""Table → its columns."""

PAIR_COLUMNS = tuple(
    Column(field.name, _column_type(field.type), "see trajstore_audit.PairDrift")
    for field in msgspec.structs.fields(PairDrift)
)
"""Columns of the table of pairs: the fields of `PairDrift`, in order."""


def tables(audit: Audit) -> dict[str, Table]:
    """Every table of `COLUMNS`; empty ones too."""
    rows: dict[str, list[Mapping[str, Value]]] = {name: [] for name in COLUMNS}
    for against, drift in comparisons(audit).items():
        for name, found in _of_drift(audit, drift):
            rows[name].append({"against": against, **found})
    rows["findings"] = [msgspec.structs.asdict(finding) for finding in audit.findings]
    rows["coverage"] = list(_coverage(audit))
    logprobs = logprob_measures(audit)
    rows["logprobs"] = [] if logprobs is None else [logprobs]
    return {
        name: {column.name: [row[column.name] for row in rows[name]] for column in columns}
        for name, columns in COLUMNS.items()
    }


def pair_row(pair: PairDrift) -> tuple[Value, ...]:
    """Values of `PAIR_COLUMNS`."""
    return msgspec.structs.astuple(pair)


def _of_drift(audit: Audit, drift: Drift) -> Iterator[tuple[str, Mapping[str, Value]]]:
    """Rows of one comparison, with the name of their table."""
    yield "totals", counted(audit, drift.total)
    for layer in drift.layers:
        yield "layers", {"layer": layer.layer, **counted(audit, layer.counts)}
    for pair in drift.segment_pairs:
        yield "segment_pairs", {"first": pair.first, "second": pair.second, **counted(audit, pair.counts)}
    for gap in drift.version_gaps:
        yield "version_gaps", {"gap": gap.gap, **counted(audit, gap.counts)}
    for engines in drift.engines:
        yield "engines", {"first": engines.first, "second": engines.second, **counted(audit, engines.counts)}
    for origins in drift.origins:
        yield "origins", {"first": origins.first, "second": origins.second, **counted(audit, origins.counts)}
    for source in drift.sources:
        yield "sources", {"source": source.source, **counted(audit, source.counts)}
    yield from (("positions", row) for row in _positions(drift))
    yield from (("load", row) for row in _load(drift))
    yield from (("layer_load", row) for row in layer_loads(drift.load))
    for worst in drift.worst:
        yield "worst", {**msgspec.structs.asdict(worst), "router_disagreement": worst.share}


def _positions(drift: Drift) -> Iterator[Mapping[str, Value]]:
    found = drift.positions
    for i, layer in enumerate(found.layers):
        for j, bucket in enumerate(found.buckets):
            cells, differing = int(found.cells[i, j]), int(found.differing[i, j])
            nearest, farthest = sorted(bucket_bounds(bucket), key=abs)
            yield {
                "layer": layer,
                "bucket": bucket,
                "nearest": nearest,
                "farthest": farthest,
                "cells": cells,
                "differing": differing,
                "router_disagreement": differing / cells if cells else None,
            }


def _load(drift: Drift) -> Iterator[Mapping[str, Value]]:
    found = drift.load
    for i, (layer, experts) in enumerate(zip(found.layers, found.num_experts, strict=True)):
        firsts, seconds = found.first[i, :experts].tolist(), found.second[i, :experts].tolist()
        for expert, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            yield {"layer": layer, "expert": expert, "first": first, "second": second}


def _coverage(audit: Audit) -> Iterable[Mapping[str, Value]]:
    totals, rows = audit.totals, audit.rows
    counts = [
        ("population", "", totals.population),
        ("trajectories", "", totals.trajectories),
        ("with_routing", "", totals.with_routing),
        *(("skipped", reason, count) for reason, count in totals.skipped.items()),
        ("recordings", "", totals.recordings),
        ("bytes_read", "", totals.bytes_read),
        ("rows", "", rows.total),
        *(("missing", reason, count) for reason, count in rows.missing.items()),
        *(("left_out", reason, count) for reason, count in rows.left_out.items()),
        ("rows_read", "", rows.read),
        ("zero", "", rows.zero),
        ("duplicates", "", rows.duplicates),
        ("repeated", "", rows.repeated),
    ]
    return [{"what": what, "reason": reason, "count": count} for what, reason, count in counts]
