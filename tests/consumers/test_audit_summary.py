"""What a terminal is told of an audit: what matters first, and nothing that is not there."""

import shlex

import msgspec
import pytest

from tests.consumers.audits import counts, empty_audit, made_up_audit
from trajstore_audit.commands import look_at, look_into
from trajstore_audit.result import Finding
from trajstore_audit.summary import Fields, Lines, TablePart, sparkline, summary


def parts(audit):
    return list(summary(audit))


def test_the_headline_comes_before_any_table():
    found = parts(made_up_audit())
    assert [type(part) for part in found[:3]] == [Fields, Fields, TablePart]
    assert found[0].title == "audit of redis://host:6379/0?run=exp1"
    name, value = found[1].fields[0]
    assert (name, value) == ("router disagreement", "5.00 % of 4,800,000 cells (token, layer)")
    assert found[2].rows[1] == ["1", "2.50 %", "20.0 %", "240,000"]


def test_only_a_sample_has_intervals():
    (exact,) = (part for part in parts(made_up_audit())[:3] if isinstance(part, TablePart))
    (sampled,) = (part for part in parts(made_up_audit(sampled=True))[:3] if isinstance(part, TablePart))
    assert exact.columns == ["gap", "disagreement", "tokens touched", "cells"]
    assert sampled.columns == ["gap", "disagreement", "95 %", "tokens touched", "cells"]
    assert sampled.rows[2][2] == "2.4\N{EN DASH}7.6 %"


def test_a_finding_about_no_trajectory_names_none():
    audit = made_up_audit()
    audit.findings = [Finding(kind="unreadable", id="", what="the manifest record 3 of partition 0 is missing")]
    assert "unreadable: the manifest record 3 of partition 0 is missing" in parts(audit)[-1].lines


def test_tables_of_one_row_are_left_out():
    titles = [part.title for part in parts(made_up_audit()) if isinstance(part, TablePart)]
    assert "by engine" in titles
    assert "by origin" not in titles


def test_the_worst_come_with_commands_that_show_why():
    lines = [line for part in parts(made_up_audit()) if isinstance(part, Lines) for line in part.lines]
    place, id = "'redis://host:6379/0?run=exp1'", "01JD3Z00000000000000000000"
    assert f"look closer: trajstore diff {place} {id} 0 1" in lines
    assert f"look closer: trajstore why {place} {id} --token 812 --layer 1 --until 3-3" in lines
    (observed,) = look_at("runs/exp1", made_up_audit().observations.worst[0])
    assert observed == f"trajstore why runs/exp1 {id} --token 812 --layer 1"


def test_two_recordings_of_one_segment_are_not_shown_as_two_segments():
    one = made_up_audit().segments.worst[0]
    one.second_segment, one.second_event = 0, "note 1-0"
    assert look_at("runs/exp1", one) == [
        f"trajstore events runs/exp1 {one.id} --notes",
        f"trajstore why runs/exp1 {one.id} --token 812 --layer 1 --until 'note 1-0'",
    ]


def test_commands_hold_together_in_a_shell_whatever_the_names_are():
    audit = made_up_audit()
    (one, *_), (finding, *_) = audit.segments.worst, audit.findings
    one.id = "x; rm -rf ~ '$(id)"
    place = "runs/my 'own' exp"
    for line in (*look_at(place, one), look_into(place, msgspec.structs.replace(finding, id=one.id))):
        assert shlex.split(line)[2:4] == [place, one.id]


def test_findings_are_counted_named_and_say_what_to_do():
    *_, last = parts(made_up_audit())
    assert last.title == "findings: 1 shifted, 1 unexpected-change"
    assert last.lines[0].startswith("shifted: 01JD3Z00000000000000000007, event 3-3, row 128: rows 128-511 agree")
    assert last.lines[1].startswith("  Leave the segment's routing out")


def test_more_findings_than_are_shown_are_counted():
    audit = made_up_audit()
    audit.findings *= 8
    audit.findings_by_kind = {"shifted": 40}
    *_, last = parts(audit)
    assert last.lines[-1].startswith("and 35 more findings")


def test_no_drift_is_said_and_nothing_is_drawn():
    audit = made_up_audit()
    for layer in audit.segments.layers:
        layer.counts = counts(1000, 0.0)
    audit.segments.positions.differing[:] = 0
    fields = dict(parts(audit)[1].fields)
    assert (fields["layers 1-48"], fields["rows \N{MINUS SIGN}4k to +1"]) == ("no drift", "no drift")


def test_nothing_to_compare_is_said():
    found = parts(empty_audit())
    assert found[-1] == Lines("between segments", ["nothing to compare"])


@pytest.mark.parametrize(
    ("shares", "drawn"),
    [([0.0, 0.0], "  "), ([0.0, 1e-9, 0.5, 1.0], " ▁▄█"), ([float("nan"), 1.0], " █"), ([1.0] * 100, "█" * 24)],
)
def test_a_sparkline_leaves_blank_only_what_is_nothing(shares, drawn):
    assert sparkline(shares) == drawn
