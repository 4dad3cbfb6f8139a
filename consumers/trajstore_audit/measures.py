"""The numbers that are shown of an audit, by the names that thresholds, JSON and tables have in common."""

import math
from typing import TypeAlias

import numpy as np

from trajstore_audit.result import TAUS, Audit, Counts, Drift, Load

__all__ = [
    "COMPARISONS",
    "LAST_TOKEN",
    "Measures",
    "comparisons",
    "counted",
    "drift_metrics",
    "layer_loads",
    "logprob_measures",
    "missing_share",
]

Measures: TypeAlias = dict[str, int | float | None]

COMPARISONS = ("segments", "observations")
"""What may be compared: recordings of segments with each other, observations with the recording that wins."""

LAST_TOKEN = "last token"  # noqa: S105
"""The reason for which the row of a trajectory's last token is missing; no fault."""


def comparisons(audit: Audit) -> dict[str, Drift]:
    """Those of `COMPARISONS` that were asked for."""
    found = {"segments": audit.segments, "observations": audit.observations}
    return {name: drift for name, drift in found.items() if drift is not None}


def counted(audit: Audit, counts: Counts) -> Measures:
    """A `Counts` as flat columns: what was counted, the shares, and their bounds where trajectories were sampled."""
    cells, tokens = audit.interval(counts), audit.interval(counts, "tokens")
    return {
        "trajectories": counts.trajectories,
        "pairs": counts.pairs,
        "tokens": counts.tokens,
        "tokens_differing": counts.tokens_differing,
        "cells": counts.cells,
        "differing": counts.differing,
        "order_changes": counts.order_changes,
        "referenced": counts.referenced,
        "router_disagreement": counts.share,
        "router_disagreement_low": None if cells is None else cells.low,
        "router_disagreement_high": None if cells is None else cells.high,
        "tokens_touched": counts.token_share,
        "tokens_touched_low": None if tokens is None else tokens.low,
        "tokens_touched_high": None if tokens is None else tokens.high,
        "layers_per_token": counts.layers_per_token,
        "jaccard": counts.jaccard,
        "order_share": counts.order_share,
    }


def drift_metrics(drift: Drift) -> dict[str, float]:
    """What a threshold may speak of in one comparison; NaN where nothing was compared or counted."""
    total = drift.total
    return {
        "router_disagreement": total.share,
        "tokens_touched": total.token_share,
        "layers_per_token": total.layers_per_token,
        "jaccard": total.jaccard,
        "order_share": total.order_share,
        "layer_disagreement": _worst([layer.counts.share for layer in drift.layers]),
        "load_shift": _worst(drift.load.divergence),
        "max_violation": _worst(drift.load.max_violation()),
        "min_violation": _worst(drift.load.min_violation()),
    }


def layer_loads(load: Load) -> list[Measures]:
    """Per layer: its load's shift and balance, in the first and the second recordings."""
    columns = {
        "load_shift": load.divergence,
        "max_violation_first": load.max_violation("first"),
        "max_violation": load.max_violation(),
        "min_violation_first": load.min_violation("first"),
        "min_violation": load.min_violation(),
    }
    return [
        {"layer": layer, "experts": experts, **{name: float(values[i]) for name, values in columns.items()}}
        for i, (layer, experts) in enumerate(zip(load.layers, load.num_experts, strict=True))
    ]


def logprob_measures(audit: Audit) -> Measures | None:
    """Recorded logprobs against the other party's; None unless these were given."""
    found = audit.logprobs
    if found is None:
        return None
    return {
        "tokens": found.tokens,
        "compared": found.compared,
        "k3_kl": found.mean_k3,
        "logprob_difference": found.mean_difference,
        **{f"f_{tau:g}": found.extreme_share(tau) for tau in TAUS},
        "pearson": found.pearson,
        "spearman": found.spearman,
    }


def missing_share(audit: Audit) -> float:
    """Share of the folded rows that have no routing, but for those of last tokens; NaN without rows."""
    missing = sum(count for reason, count in audit.rows.missing.items() if reason != LAST_TOKEN)
    return missing / audit.rows.total if audit.rows.total else math.nan


def _worst(values: object) -> float:
    """The greatest that is a number; NaN if none is."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.max()) if numbers.size else math.nan
