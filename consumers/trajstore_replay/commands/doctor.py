"""The command `doctor`: what is wrong with a run, and what to do about it."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import click

from trajstore.archive.verify.findings import Finding
from trajstore.cli.findings import account, counted, json_lines, text_line
from trajstore.cli.place import is_archive, open_reading, shown_location, store_argument
from trajstore.cli.seconds import SECONDS
from trajstore.cli.terminal import print_text
from trajstore_replay.diagnosis import check_files, diagnose

__all__ = ["doctor"]

_ORDER = ("error", "warning", "information")


@click.command()
@store_argument
@click.option(
    "--stale-seconds",
    type=SECONDS,
    default=600.0,
    show_default=True,
    help="What has waited for so long for somebody is a warning.",
)
@click.option("--every-log", is_flag=True, help="Also read the headers of what lies in the archive alone.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Findings of one kind to print."
)
@click.option("--json", "as_json", is_flag=True, help="An array of all findings on stdout, one to a line as they come.")
def doctor(store: str, stale_seconds: float, every_log: bool, limit: int, as_json: bool) -> None:
    """Say what is wrong with a run, and what to do.

    Open segments whose writer is gone, lost, aborted and failed rollouts, gaps, groups that wait for a member, entries
    that no trainer takes, feeds that no worker follows, a full server, damaged packs. It reads no payload and changes
    nothing. An archive's folder is looked at as far as it goes without its server. Exit code 0: nothing is wrong; 1:
    there are errors or warnings, or it could not look at everything.

    \b
    Examples:
      trajstore doctor runs/exp1
      trajstore doctor runs/exp1 --stale-seconds 60
      trajstore doctor runs/exp1 --json | jq '.[] | select(.severity == "warning") | .what_to_do'
    """
    counts: Counter[str] = Counter()
    with open_reading(store) as archive:
        found = diagnose(archive, stale_seconds=stale_seconds, every_log=every_log, name=shown_location(store))
        if is_archive(store):
            found = chain(found, check_files(store))
        findings = counted(found, counts)
        if as_json:
            json_lines(findings)
        else:
            _print(findings, limit)
    account(f"looked at {shown_location(store)}", counts)


def _print(findings: Iterator[Finding], limit: int) -> None:
    """The worst first, of each kind some."""
    kept: dict[tuple[str, str], list[Finding]] = {}
    more: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        some = kept.setdefault((finding.severity, finding.kind), [])
        if len(some) < limit:
            some.append(finding)
        else:
            more[finding.severity, finding.kind] += 1
    for severity, kind in sorted(kept, key=lambda key: (_ORDER.index(key[0]), key[1])):
        for finding in kept[severity, kind]:
            text_line(finding, below=True)
        if more[severity, kind]:
            print_text(f"and {more[severity, kind]} more of the kind {kind} (--limit, --json)")
