"""An audit as one JSON document: its tables, with the shares that follow from the counts. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from trajstore.log.wire import describe_url
from trajstore_audit.measures import comparisons, counted, layer_loads, logprob_measures, missing_share
from trajstore_audit.result import Audit, Counts, Drift, Load, bucket_bounds
from trajstore_audit.thresholds import Outcome

__all__ = ["audit_document", "shown_place"]


def audit_document(audit: Audit, outcomes: Sequence[Outcome] = ()) -> dict[str, Any]:
    """What `trajstore audit --json` prints; NaN becomes null there. Fields: docs/audit.md.

    Args:
        outcomes: of the thresholds that it was held against.
    """
    return {
        "parameters": msgspec.to_builtins(audit.parameters) | {"place": shown_place(audit.parameters.place)},
        "totals": msgspec.to_builtins(audit.totals),
        "rows": msgspec.to_builtins(audit.rows) | {"missing_share": missing_share(audit)},
        **dict.fromkeys(("segments", "observations")),
        **{against: _drift(audit, drift) for against, drift in comparisons(audit).items()},
        "logprobs": logprob_measures(audit),
        "findings": msgspec.to_builtins(audit.findings),
        "findings_by_kind": audit.findings_by_kind,
        "thresholds": msgspec.to_builtins(outcomes),
    }


def shown_place(place: str) -> str:
    """A location fit for others' eyes: without user, password and options, but for the run's name."""
    if "://" not in place:
        return place
    _, _, options = place.partition("?")
    runs = [option for option in options.split("&") if option.startswith("run=")]
    return describe_url(place) + ("?" + runs[-1] if runs else "")


def _drift(audit: Audit, drift: Drift) -> dict[str, Any]:
    def rows(table: Iterable[Any], *keys: str) -> list[dict[str, Any]]:
        return [{key: getattr(row, key) for key in keys} | _counts(audit, row.counts) for row in table]

    positions = drift.positions
    return {
        "total": _counts(audit, drift.total),
        "layers": rows(drift.layers, "layer"),
        "segment_pairs": rows(drift.segment_pairs, "first", "second"),
        "version_gaps": rows(drift.version_gaps, "gap"),
        "engines": rows(drift.engines, "first", "second"),
        "origins": rows(drift.origins, "first", "second"),
        "sources": rows(drift.sources, "source"),
        "positions": {
            "layers": positions.layers,
            "buckets": positions.buckets,
            "bounds": [bucket_bounds(bucket) for bucket in positions.buckets],
            "cells": positions.cells.tolist(),
            "differing": positions.differing.tolist(),
        },
        "load": _load(drift.load),
        "worst": [msgspec.to_builtins(one) | {"router_disagreement": one.share} for one in drift.worst],
    }


def _counts(audit: Audit, counts: Counts) -> dict[str, Any]:
    return counted(audit, counts) | {"shared": {str(top_k): some for top_k, some in counts.shared.items()}}


def _load(load: Load) -> dict[str, Any]:
    return {
        "rows": load.rows,
        "of": load.of,
        "layers": layer_loads(load),
        "first": load.first.tolist(),
        "second": load.second.tolist(),
    }
