"""Commands to look closer with, ready for a shell. Pure."""

import shlex

from trajstore_audit.document import shown_place
from trajstore_audit.result import Finding, WorstTrajectory

__all__ = ["look_at", "look_into"]


def look_at(place: str, one: WorstTrajectory) -> list[str]:
    """What shows how a trajectory drifted, and why the first row that differs is what it is."""
    where = _words(place, one.id)
    token = f"trajstore why {where} --token {one.row} --layer {one.layer}"
    if one.second_segment < 0:
        return [token]  # an observation is compared with rows that are there still
    if one.first_segment == one.second_segment:  # one of both came late: `diff` takes a segment as a whole
        first = f"trajstore events {where} --notes"
    else:
        first = f"trajstore diff {where} {one.first_segment} {one.second_segment}"
    return [first, token + _until(one.second_event)]


def look_into(place: str, finding: Finding) -> str:
    """What shows the place of a finding; "" where it names no trajectory."""
    if not finding.id:
        return ""
    where = _words(place, finding.id)
    if finding.row is None:
        return f"trajstore events {where} --notes"
    layer = "" if finding.layer is None else f" --layer {finding.layer}"
    return f"trajstore why {where} --token {finding.row}{layer}{_until(finding.event)}"


def _until(event: str) -> str:
    """As of then: a later segment may have made the row one of another token, or have ended before it."""
    return f" --until {shlex.quote(event)}" if event else ""


def _words(place: str, id: str) -> str:
    return f"{shlex.quote(shown_place(place))} {shlex.quote(id)}"
