"""Prints findings: of `verify`, of `doctor`, of whatever else looks for what is wrong."""

from collections import Counter
from collections.abc import Iterable, Iterator

import click
import msgspec

from trajstore.archive.verify.findings import Finding
from trajstore.cli.terminal import print_text, say

__all__ = ["account", "counted", "json_lines", "text_line"]

_STYLES = {"error": "bold red", "warning": "yellow", "information": "dim"}


def counted(findings: Iterable[Finding], counts: Counter[str]) -> Iterator[Finding]:
    """The same findings, counted by severity as they pass."""
    for finding in findings:
        counts[finding.severity] += 1
        yield finding


def text_line(finding: Finding, *, below: bool = False) -> None:
    """One finding as a line.

    Args:
        below: what to do stands on a line of its own.
    """
    where = [f"pack {finding.pack}"] if finding.pack else []
    where += [f"trajectory {finding.trajectory}"] if finding.trajectory else []
    where += [f"event {finding.event}"] if finding.event else []
    place = f" in {', '.join(where)}" if where else ""
    advice = f"{finding.what_to_do[:1].upper()}{finding.what_to_do[1:]}"
    beside = f". {advice}" if advice and not below else ""
    print_text((finding.severity, _STYLES[finding.severity]), f": {finding.kind}{place}: {finding.what}{beside}")
    if advice and below:
        print_text(f"    {advice}")


def json_lines(findings: Iterable[Finding]) -> None:
    """One array, a finding to a line as it comes.

    The comma leads, so that every element is complete when it is printed; the array is closed whatever happens.
    """
    click.echo(b"[")
    comma = b""
    try:
        for finding in findings:
            click.echo(comma + msgspec.json.encode(finding))
            comma = b","
    finally:
        click.echo(b"]")


def account(done: str, counts: Counter[str]) -> None:
    """The last line, on stderr: what was done and found. Ends the command with exit code 1 if anything is wrong.

    Raises:
        click.exceptions.Exit: there were errors or warnings.
    """
    text = f"{counts['error']} errors, {counts['warning']} warnings, {counts['information']} information"
    say(f"{done}: {text}")
    if counts["error"] or counts["warning"]:
        raise click.exceptions.Exit(1)
