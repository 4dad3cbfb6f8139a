"""Thresholds: what can be said, what is met, and that what cannot be told does not pass."""

import math
import re

import pytest

from tests.consumers.audits import empty_audit, made_up_audit
from trajstore.errors import SchemaError
from trajstore_audit.result import Finding, Totals
from trajstore_audit.thresholds import KINDS, METRICS, check_thresholds, parse_threshold


def outcome(text, audit):
    (one,) = check_thresholds([parse_threshold(text)], audit)
    return one


def test_a_threshold_is_a_name_an_operator_and_a_number():
    one = parse_threshold(" observations.router_disagreement >= 1.2e-1 ")
    assert (one.against, one.metric, one.operator, one.limit) == ("observations", "router_disagreement", ">=", 0.12)


@pytest.mark.parametrize(
    ("operator", "met"),
    [("<", "001"), ("<=", "011"), (">", "100"), (">=", "110"), ("==", "010")],
)
def test_every_operator_says_what_it_says(operator, met):
    """Against limits below, at and above the value, 0.05."""
    audit = made_up_audit()
    for limit, expected in zip((0.04, 0.05, 0.06), met, strict=True):
        assert outcome(f"segments.router_disagreement{operator}{limit}", audit).failed is bool(int(expected))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router_disagreement", "NAME OPERATOR NUMBER"),
        ("", "NAME OPERATOR NUMBER"),
        ("router_disagreement=0.1", "NAME OPERATOR NUMBER"),
        ("router_disagreement!=0.1", "NAME OPERATOR NUMBER"),
        ("0.1<router_disagreement", "NAME OPERATOR NUMBER"),
        ("router_disagreement>12%", "'12%' in the threshold"),
        ("router_disagreement>nan", "no number"),
        ("router_disagreement>inf", "no number"),
        ("router_disagrement>0.1", "router_disagreement, tokens_touched"),
        ("observations.findings>0", "observations: router_disagreement"),
        ("segments.k3_kl>0", "no metric 'segments.k3_kl'"),
        ("findings.no-such>0", "unexpected-change"),
        ("findings.>0", "NAME OPERATOR NUMBER|no metric"),
    ],
)
def test_what_is_no_threshold_is_refused_and_told_what_there_is(text, said):
    with pytest.raises(SchemaError, match=said):
        parse_threshold(text)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_value(name):
    """In an audit of everything; so the table of names and what is looked up agree."""
    assert not math.isnan(outcome(f"{name}>1e9", made_up_audit()).value)


def test_a_name_without_comparison_holds_every_comparison_to_the_limit():
    audit = made_up_audit()  # 0.05 between segments, 0.02 of observations
    assert outcome("router_disagreement>0.03", audit).failed
    assert outcome("router_disagreement<0.03", audit).why == "observations.router_disagreement is 0.02"
    assert not outcome("router_disagreement>0.06", audit).failed
    assert not outcome("observations.router_disagreement>0.03", audit).failed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("router_disagreement>0.1", "no trajectory was audited"),
        ("segments.jaccard<0.5", "no trajectory was audited"),
        ("observations.jaccard<0.5", "observations were not compared"),
        ("k3_kl>1", "--logprobs"),
        ("missing_rows>0.5", "no trajectory was audited"),
        ("findings>0", "no trajectory was audited"),
        ("findings.shifted>0", "no trajectory was audited"),
        ("skipped>0", "no trajectory was audited"),
        ("zero_rows>0", "no trajectory was audited"),
        ("findings<1", "no trajectory was audited"),
    ],
)
def test_what_cannot_be_told_has_failed_and_says_why(text, why):
    found = outcome(text, empty_audit())
    assert found.failed
    assert math.isnan(found.value)
    assert why in found.why


@pytest.mark.parametrize("name", ["zero_rows", "duplicate_rows", "repeated_rows"])
def test_rows_that_nobody_read_are_not_free_of_fault(name):
    audit = empty_audit()
    audit.totals = Totals(population=3, trajectories=3)
    found = outcome(f"{name}>0", audit)
    assert (found.failed, found.why) == (True, f"there is no {name}: no row was read")
    assert outcome("router_disagreement>0", audit).why == "there is no router_disagreement: nothing was compared"
    assert not outcome("findings>0", audit).failed
    assert not outcome("skipped>0", audit).failed


def test_what_was_found_is_told_even_where_no_trajectory_could_be_audited():
    audit = empty_audit()
    audit.findings_by_kind, audit.totals.skipped = {"unreadable": 2}, {"damaged": 2}
    assert outcome("findings>0", audit).value == outcome("skipped>0", audit).value == 2
    assert not outcome("findings>5", audit).failed
    assert math.isnan(outcome("findings.shifted>0", audit).value)


def test_a_comparison_with_nothing_in_it_does_not_spoil_the_other():
    audit = made_up_audit()
    audit.observations = empty_audit().segments
    assert not outcome("router_disagreement>0.06", audit).failed
    assert outcome("observations.router_disagreement>0.06", audit).failed


def test_findings_are_counted_in_all_and_by_kind():
    audit = made_up_audit()
    audit.findings_by_kind = {"shifted": 3, "swapped": 2}
    assert outcome("findings>4", audit).value == 5
    assert outcome("findings.swapped>1", audit).failed
    assert not outcome("findings.zero-layer>0", audit).failed
    audit.totals.skipped = {"deleted": 4, "damaged": 1}
    assert outcome("skipped>0", audit).value == 1


def test_every_kind_of_finding_can_be_named():
    said = Finding.__doc__.partition("kind:")[2].partition("id, group:")[0]
    assert set(re.findall(r"`([a-z-]+)`", said)) == set(KINDS)
    assert [parse_threshold(f"findings.{kind}>0").metric for kind in KINDS] == [f"findings.{kind}" for kind in KINDS]


def test_missing_rows_leave_out_the_last_tokens():
    assert outcome("missing_rows>0.1", made_up_audit()).value == 800 / 200_000
