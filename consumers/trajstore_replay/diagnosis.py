"""What is wrong with a run, and what to do: rollouts that nobody goes on with, stuck groups, missing workers.

It looks at summaries, at headers of what the hot log holds and of what might be gone on with, at the state of the
feeds, and at an archive's records; it reads no payload and changes nothing. What it holds is the summaries of one
partition, and a few words per group.
"""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from trajstore.archive.verify.findings import Finding, Severity
from trajstore.archive.verify.verify import verify
from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import FINAL_STATUSES
from trajstore.reading import ALL_STATUSES, Archive
from trajstore.ready import ReadyQueue
from trajstore.standing import standing, supersessions
from trajstore.store import Store
from trajstore.summary import Summary
from trajstore_replay.advice import resuming, what_to_do
from trajstore_replay.ages import Ages, told
from trajstore_replay.workers import check_workers

__all__ = ["check_files", "diagnose"]

_PAGE = 1000
_NAMED = 4


def diagnose(
    store: Archive, *, stale_seconds: float = 600.0, every_log: bool = False, name: str = ""
) -> Iterator[Finding]:
    """Look for what is wrong with a run or, as far as that can be told, an archive.

    Args:
        store: an open store, or an archive without its server: then nothing is known of writers and workers, and what
            stands open or aborted is only told.
        stale_seconds: from this age on, what waits for somebody is a warning; before, information or nothing.
        every_log: read the headers of what lies in the archive alone, too.
        name: of the store in the commands that the advice gives; default where it is. In such a command DIR stands for
            a model's folder, N for a number of tokens, R for a reward.

    Raises:
        Unavailable: the server or the archive does not answer.
    """
    run = store if isinstance(store, Store) else None
    where = shlex.quote(name or store.location or "STORE")
    damaged: list[Corrupt] = []
    groups: dict[str, _Group] = {}
    for partition in range(store.partitions):
        ages = Ages.of_run(run, partition) if run is not None else Ages.of_archive()
        found = store.list(status=ALL_STATUSES, partition=partition, on_corrupt=damaged.append)
        for summary in found:
            _count(groups, summary, ages)
            if summary.status != "deleted":
                yield from _rollout(summary, ages, where, run, stale_seconds)
        wanted = found if every_log or run is None else _in_hot_log(run, found)
        if every_log or run is not None:
            for summary in wanted:
                if summary.status != "deleted" and summary.segments:
                    yield from _log(store, summary, where)
    for group in sorted(groups):
        yield from _group(group, groups[group], run, stale_seconds)
    for error in damaged:
        yield Finding(
            kind="damaged",
            severity="error",
            what=str(error),
            what_to_do=f"`trajstore verify {where}` tells more; restore it from a copy, or `trajstore rebuild {where}` "
            "makes of what is left what can be made",
        )
    if run is not None:
        yield from check_workers(run, stale_seconds=stale_seconds, where=where)
        if run.archive is not None:
            yield from check_files(run)


def _rollout(summary: Summary, ages: Ages, where: str, run: Store | None, stale: float) -> Iterator[Finding]:
    """What its summary tells of one trajectory."""
    age = ages.of(summary)
    is_stale = run is not None and age >= stale
    kind = _kind(summary)
    if not kind or (kind in ("idle", "unbegun") and not is_stale):
        return
    waits = "" if kind == "failed" else f"; nothing has happened for {told(age)}"
    yield Finding(
        kind=kind,
        severity="warning" if is_stale and kind != "failed" else "information",
        trajectory=summary.id,
        event=summary.last,
        what=f"{standing(summary)}{waits}",
        what_to_do=what_to_do(kind, summary, where, run),
    )


def _kind(summary: Summary) -> str:
    """Which finding a trajectory is, "" for none."""
    if summary.status == "failed":
        return "failed"
    if summary.status in FINAL_STATUSES:
        return ""
    if summary.has_open_segment:
        return "open-segment"
    if summary.finish_reason == "lost":
        return "lost"
    if summary.status == "aborted" or summary.finish_reason in ("abort", "error"):
        return "aborted"
    return "idle" if summary.segments else "unbegun"


def _in_hot_log(run: Store, found: list[Summary]) -> Iterator[Summary]:
    """Those with entries in the hot log."""
    for first in range(0, len(found), _PAGE):
        page = found[first : first + _PAGE]
        lengths = run.wire.exchange([("XLEN", run.keys.entries(summary.id)) for summary in page])
        yield from (summary for summary, length in zip(page, lengths, strict=True) if length)


def _log(store: Archive, summary: Summary, where: str) -> Iterator[Finding]:
    """What the headers of one trajectory tell."""
    id = summary.id
    kind: str = "unreadable"
    severity: Severity = "error"
    last_good = ""
    advice = f"`trajstore events {where} {id}` shows what was recorded; until= loads an earlier state"
    try:
        superseded = list(supersessions(store.plan(id).history))
    except NotFound:
        return  # deleted or dropped meanwhile
    except SequenceGap as gap:
        kind, severity, last_good, what = "gap", "warning", gap.last_good, str(gap)
        if last_good:
            advice = f"`trajstore show {where} {id} --until {last_good}` is what is sound"
            if isinstance(store, Store) and (resume := resuming(summary, where, store)):
                advice += f"; {resume.partition(' goes on')[0]} goes on from there"
    except (SchemaError, RoutingError, Corrupt) as error:
        what = str(error)
    else:
        for what in superseded:
            yield Finding(
                kind="superseded",
                severity="information",
                trajectory=id,
                what=what,
                what_to_do=f"`trajstore replay {where} {id}` shows it",
            )
        return
    yield Finding(kind=kind, severity=severity, trajectory=id, event=last_good, what=what, what_to_do=advice)


class _Group(NamedTuple):
    """What is known of a group.

    Attributes:
        size: how many members it is to have.
        members: known, deleted ones too.
        come: of them, closed or deleted.
        there: of them, closed: somebody waits for the others because of them.
        waiting: some that have not come, and why.
        age: seconds since anything happened to a member.
    """

    size: int
    members: int
    come: int
    there: int
    waiting: tuple[str, ...]
    age: float


def _count(groups: dict[str, _Group], summary: Summary, ages: Ages) -> None:
    if summary.group is None or summary.group_size is None:
        return
    known = groups.get(summary.group, _Group(0, 0, 0, 0, (), float("inf")))
    has_come = summary.status != "open"
    waiting = known.waiting
    if not has_come and len(waiting) < _NAMED:
        waiting += (f"{summary.id}: {standing(summary)}",)
    groups[summary.group] = _Group(
        size=max(known.size, summary.group_size),
        members=known.members + 1,
        come=known.come + has_come,
        there=known.there + (has_come and summary.status != "deleted"),
        waiting=waiting,
        age=min(known.age, ages.of(summary)),
    )


def _group(name: str, group: _Group, run: Store | None, stale: float) -> Iterator[Finding]:
    if group.there == 0 or group.come >= group.size or (run is not None and group.age < stale):
        return
    missing = list(group.waiting)
    open_ones = group.members - group.come
    if open_ones > len(missing):
        missing.append(f"{open_ones - len(missing)} more that are open")
    if group.size > group.members:
        missing.append(f"{group.size - group.members} never created, or dropped since")
    published = run is not None and ReadyQueue(run.wire, run.keys).published(name) > 0
    yield Finding(
        kind="stuck-group",
        severity="warning" if run is not None and not published else "information",
        what=f"group {name} "
        + (
            f"was published with {group.come} of {group.size} members; nothing has happened for {told(group.age)}: "
            if published
            else f"waits, with {group.come} of {group.size} members, for {told(group.age)}: "
        )
        + "; ".join(missing),
        what_to_do="resume or close those that are open, and create what is missing"
        + ("; it is published again when they come" if published else ", or give it up: store.delete(group=...)"),
    )


def check_files(place: str | Store) -> Iterator[Finding]:
    """What `verify` can tell of an archive without reading its data: its records, and that its files are there.

    Args:
        place: an archive's folder or URL, or an open store.

    Raises:
        NotFound: there is no archive.
        Unavailable: it does not answer.
    """
    return (finding for finding in verify(place, quick=True) if finding.severity != "information")
