"""Thresholds such as `router_disagreement>0.12`, for an exit code in CI: read, and held against an audit. Pure."""

import math
import operator
import re
from collections.abc import Callable, Mapping

import msgspec

from trajstore.errors import SchemaError
from trajstore_audit.measures import COMPARISONS, comparisons, drift_metrics, logprob_measures, missing_share
from trajstore_audit.result import TAUS, Audit

__all__ = ["KINDS", "METRICS", "Outcome", "Threshold", "check_thresholds", "parse_threshold"]

_OF_A_COMPARISON = {
    "router_disagreement": "share of (token, layer) whose expert set differs",
    "tokens_touched": "share of tokens whose expert set differs in any layer",
    "layers_per_token": "mean number of differing layers of a token",
    "jaccard": "mean Jaccard index of the expert sets, 1 where they are equal",
    "order_share": "share of (token, layer) with the same experts in another order",
    "layer_disagreement": "router_disagreement of the layer where it is greatest",
    "load_shift": "Jensen-Shannon divergence of the expert loads, bits, of the layer where it is greatest",
    "max_violation": "max load / mean load - 1 in the second recordings, of the layer where it is greatest",
    "min_violation": "1 - min load / mean load in the second recordings, of the layer where it is greatest",
}

_OF_LOGPROBS = {
    "k3_kl": "k3 estimate of KL(rollout || given), nats per token",
    "logprob_difference": "mean |given - recorded logprob|, nats",
    **{f"f_{tau:g}": f"share of tokens whose probability ratio lies outside [1/{tau:g}, {tau:g}]" for tau in TAUS},
    "pearson": "correlation of a token's drift with |given - recorded logprob|",
    "spearman": "rank correlation of both",
}

_OF_ALL = {
    "missing_rows": "share of rows without routing, last tokens apart",
    "zero_rows": "rows with a layer of which every expert id is 0",
    "duplicate_rows": "rows with a layer that names an expert twice",
    "repeated_rows": "rows equal to the row before in every layer",
    "findings": "findings of any kind; findings.KIND for those of one kind",
    "skipped": "trajectories that could not be audited, deleted ones apart",
}

_OF_ROWS = {"zero_rows": "zero", "duplicate_rows": "duplicates", "repeated_rows": "repeated"}
"""Their fields in `Rows`."""

METRICS: Mapping[str, str] = _OF_A_COMPARISON | _OF_LOGPROBS | _OF_ALL
"""Every name that a threshold may have, and what it is. Those of a comparison may be preceded by which one it is,
as in `observations.jaccard`."""

KINDS = (
    *("zero-layer", "constant-layer", "repeated-rows", "experts"),
    *("shifted", "swapped", "other-sequence", "unexpected-change", "unreadable"),
)
"""Of findings, see `trajstore_audit.Finding`."""

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}

_FORM = re.compile(r"\s*([A-Za-z][\w.-]*?)\s*(<=|>=|==|<|>)\s*(\S+)\s*")


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """What must not be.

    Attributes:
        text: as it was given.
        metric: a name of `METRICS`, or `findings.KIND`.
        against: one of `COMPARISONS`; None for any that was made, and for metrics that belong to none.
        operator: <, <=, >, >= or ==.
        limit: a finite number.
    """

    text: str
    metric: str
    against: str | None
    operator: str
    limit: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold held against an audit.

    Attributes:
        threshold: as it was given.
        value: of the metric; NaN where there is none.
        failed: the threshold is met, or cannot be told.
        why: a sentence.
    """

    threshold: str
    value: float
    failed: bool
    why: str


def parse_threshold(text: str) -> Threshold:
    """Read `NAME OPERATOR NUMBER`.

    Raises:
        SchemaError: it has another form, or there is no such name or number; says which there are.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise SchemaError(
            f"{text!r} is no threshold: give NAME OPERATOR NUMBER, e.g. router_disagreement>0.12; "
            f"operators are {' '.join(_OPERATORS)}"
        )
    name, sign, number = found.groups()
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise SchemaError(f"{number!r} in the threshold {text!r} is no number; give e.g. 0.12")
    against, metric = None, name
    if name.startswith(tuple(f"{one}." for one in COMPARISONS)):
        against, _, metric = name.partition(".")
    kinds = [f"findings.{kind}" for kind in KINDS]
    known = _OF_A_COMPARISON if against is not None else [*METRICS, *kinds]
    if metric not in known:
        names = ", ".join(known)
        raise SchemaError(f"there is no metric {name!r} to set a threshold on; {against or 'metrics'}: {names}")
    return Threshold(text=text, metric=metric, against=against, operator=sign, limit=limit)


def check_thresholds(thresholds: list[Threshold], audit: Audit) -> list[Outcome]:
    """What became of each threshold, in order. One that cannot be told has failed: it must not pass unseen.

    That nothing was found can be told only where something was looked at: there is no 0 of no trajectories, or no rows.
    """
    return [_check(one, audit) for one in thresholds]


def _check(threshold: Threshold, audit: Audit) -> Outcome:
    values = _values(threshold, audit)
    numbers = {name: value for name, value in values.items() if not math.isnan(value)}
    if not numbers:
        return Outcome(threshold=threshold.text, value=math.nan, failed=True, why=_why_none(threshold, audit))
    holds = _OPERATORS[threshold.operator]
    met = {name: value for name, value in numbers.items() if holds(value, threshold.limit)}
    # Of several comparisons the one that fails is told, else the first that has a value.
    name, value = next(iter((met or numbers).items()))
    where = f"{name}.{threshold.metric}" if name else threshold.metric
    return Outcome(threshold=threshold.text, value=value, failed=bool(met), why=f"{where} is {value:.6g}")


def _values(threshold: Threshold, audit: Audit) -> dict[str, float]:
    """Comparison → value of the metric, "" for a metric that belongs to none."""
    metric = threshold.metric
    if metric in _OF_A_COMPARISON:
        return {
            name: drift_metrics(drift)[metric]
            for name, drift in comparisons(audit).items()
            if threshold.against in (None, name)
        }
    if metric in _OF_LOGPROBS:
        found = logprob_measures(audit)
        value = math.nan if found is None else found[metric]
        return {"": math.nan if value is None else float(value)}
    rows, totals, kinds = audit.rows, audit.totals, audit.findings_by_kind
    if metric == "missing_rows":
        return {"": missing_share(audit)}
    if metric in _OF_ROWS:
        return {"": float(getattr(rows, _OF_ROWS[metric]) if rows.read else math.nan)}
    if metric == "skipped":
        count = sum(count for reason, count in totals.skipped.items() if reason != "deleted")
    else:
        kind = metric.partition(".")[2]
        count = kinds.get(kind, 0) if kind else sum(kinds.values())
    return {"": float(count if count or totals.trajectories else math.nan)}


def _why_none(threshold: Threshold, audit: Audit) -> str:
    if threshold.metric in _OF_LOGPROBS:
        given = audit.parameters.logprobs
        return f"there is no {threshold.metric}: " + (
            "no token has both logprobs" if given else "no other party's logprobs were given (--logprobs)"
        )
    if threshold.against is not None and threshold.against not in comparisons(audit):
        return f"{threshold.against} were not compared (--against {audit.parameters.against})"
    if not audit.totals.trajectories:
        what = "no trajectory was audited"
    else:
        what = "no row was read" if threshold.metric in _OF_ROWS else "nothing was compared"
    return f"there is no {threshold.metric}: {what}"
