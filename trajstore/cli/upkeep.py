"""The commands that keep an archive small: `compact` and `gc`. Both work without Redis, too."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.filesize import decimal

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import Record
from trajstore.archive.storage.protocol import StoredFile
from trajstore.archive.upkeep.candidates import Candidates
from trajstore.archive.upkeep.compaction import compact as compact_packs
from trajstore.archive.upkeep.garbage import Garbage, find_foreign, find_garbage, remove_garbage
from trajstore.archive.upkeep.retention import drop, expired, named, nothing_hot, still_hot
from trajstore.cli.place import is_archive, open_run, store_argument
from trajstore.cli.signals import graceful_stop
from trajstore.cli.terminal import diagnostics, print_json, print_table
from trajstore.errors import Corrupt, Fenced, NotFound, SchemaError, TrajstoreError
from trajstore.log.feed import worker_name
from trajstore.opening import read_archive
from trajstore.store import Store

__all__ = ["compact", "gc"]

log = logging.getLogger(__name__)

_TRIES = 10
"""An archiver at work writes records, too; whoever comes second looks again."""

_REMOVED_AT_ONCE = 256


class _Duration(click.types.FloatParamType):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", value)
        if match is None:
            self.fail(f"{value!r} is no duration with a unit; give 90s, 15m, 12h, 30d or 4w", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]


_DURATION = _Duration()
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for programs.")


@click.command()
@store_argument
@_as_json
def compact(store: str, as_json: bool) -> None:
    """Write packs anew: without deleted data, small ones together.

    STORE may also be an archive without its server. The packs that were replaced are removed by `trajstore gc`. A
    running archiver does the same while it is idle; beside one, either may have to look again. SIGTERM or Ctrl-C stops
    it after the pack at hand, a second one at once; either is safe.

    \b
    Examples:
      trajstore compact runs/exp1
      trajstore compact s3://bucket/exp1 --json
    """
    done: list[tuple[list[Record], Record]] = []
    refused: list[TrajstoreError] = []
    with graceful_stop() as stopped, _opened(store) as (reader, _):
        for partition in range(reader.info.partitions):
            candidates = Candidates(reader, partition, remnants=True)
            while not stopped.is_set():
                if not candidates.look():
                    continue
                records = candidates.due()
                if not records:
                    break
                try:
                    done.append((records, _compact(reader, partition, candidates, records)))
                except (SchemaError, Corrupt) as error:
                    log.error("packs of partition %d were left as they are: %s", partition, error)
                    candidates.pass_over(records)
                    refused.append(error)
    old, new = [one for records, _ in done for one in records], [record for _, record in done]
    before, after = sum(map(_nbytes, old)), sum(map(_nbytes, new))
    if as_json:
        print_json({"compactions": len(new), "packs": len(old), "bytes_before": before, "bytes_after": after})
    diagnostics().print(f"{len(old)} packs of {decimal(before)} are {len(new)} of {decimal(after)}", soft_wrap=True)
    if refused:
        raise refused[0]


@click.command()
@store_argument
@click.option("--older-than", type=_DURATION, metavar="AGE", help="Drop packs whose newest events are older: 30d, 12h.")
@click.option("--pack", "packs", multiple=True, metavar="NAME", help="Drop this pack; repeatable.")
@click.option(
    "--whole-trajectories", is_flag=True, help="With --pack: drop also trajectories that have parts in other packs."
)
@click.option(
    "--grace",
    type=_DURATION,
    default="10m",
    show_default=True,
    help="How long files stay after their pack was replaced or dropped.",
)
@click.option("--dry-run", is_flag=True, help="Tell what would go; change nothing.")
@_as_json
def gc(
    store: str,
    older_than: float | None,
    packs: tuple[str, ...],
    whole_trajectories: bool,
    grace: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what an archive does not need any more.

    That is files of packs that were replaced or dropped, and what crashes left. With --older-than or --pack, packs are
    dropped for good first: their trajectories are not found any more, and their ids stay taken. Files that are not
    trajstore's are listed and stay. STORE may also be an archive without its server; then nothing is known of what the
    hot log still holds.

    \b
    Examples:
      trajstore gc runs/exp1 --dry-run
      trajstore gc 'redis://host:6379/0?run=exp1' --older-than 30d
    """
    if whole_trajectories and not packs:
        raise click.UsageError("--whole-trajectories belongs to --pack")
    with _opened(store) as (reader, run):
        choose = _chooser(
            reader, run, None if older_than is None else time.time() - older_than, packs, whole_trajectories
        )
        if packs:
            choose(None)  # refused before anything is dropped
        dropped: list[Record] = []
        for partition in range(reader.info.partitions):
            dropped += choose(partition) if dry_run else _drop(reader, partition, choose)
        removed: list[Garbage] = []
        for found in find_garbage(reader, now=time.time(), grace=grace, dropping=dropped if dry_run else ()):
            removed.append(found)
            if not dry_run and len(removed) % _REMOVED_AT_ONCE == 0:
                remove_garbage(reader, removed[-_REMOVED_AT_ONCE:])
        if not dry_run:
            remove_garbage(reader, removed[len(removed) // _REMOVED_AT_ONCE * _REMOVED_AT_ONCE :])
        foreign = sorted(find_foreign(reader))
    _report(dropped, removed, foreign, dry_run=dry_run, as_json=as_json)


_Choose = Callable[[int | None], list[Record]]
"""Packs of one partition that may go, or of all."""


@contextmanager
def _opened(location: str) -> Iterator[tuple[ArchiveReader, Store | None]]:
    """An archive, and the run if it was named."""
    if is_archive(location):
        yield read_archive(location), None
        return
    with open_run(location) as run:
        if run.archive is None:
            raise NotFound(f"{run.location} has no archive; `trajstore archive --archive FOLDER` begins one")
        yield run.archive, run


def _compact(reader: ArchiveReader, partition: int, candidates: Candidates, records: list[Record]) -> Record:
    writer = worker_name()
    for _ in range(_TRIES - 1):
        try:
            return compact_packs(reader, partition, records, writer=writer)
        except Fenced as error:
            log.info("%s", error)
            while not candidates.look():
                pass
            records[:] = candidates.due() or records
    return compact_packs(reader, partition, records, writer=writer)


def _chooser(
    reader: ArchiveReader, run: Store | None, before: float | None, packs: tuple[str, ...], whole: bool
) -> _Choose:
    busy = nothing_hot if run is None else still_hot(run.wire, run.keys)

    def choose(partition: int | None) -> list[Record]:
        wanted = [pack for pack in packs if partition is None or pack.startswith(f"{partition:02}/")]
        found = {record.number: record for record in named(reader, wanted, whole=whole, busy=busy)}
        if before is not None and partition is not None:
            found |= {record.number: record for record in expired(reader.manifest(partition), before=before, busy=busy)}
        return [found[number] for number in sorted(found)]

    return choose


def _drop(reader: ArchiveReader, partition: int, choose: _Choose) -> list[Record]:
    """Drop a partition's packs in one record; returns theirs."""
    writer = worker_name()
    for left in reversed(range(_TRIES)):
        records = choose(partition)
        if not records:
            break
        try:
            drop(reader, partition, records, writer=writer)
            return records
        except Fenced as error:
            if not left:
                raise
            log.info("%s", error)
    return []


def _nbytes(record: Record) -> int:
    return sum(file.size for file in record.files.values())


def _report(
    dropped: list[Record], removed: list[Garbage], foreign: list[StoredFile], *, dry_run: bool, as_json: bool
) -> None:
    nbytes = sum(garbage.nbytes for garbage in removed)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "dropped": [
                    {"pack": record.pack, "trajectories": record.counts.trajectories, "bytes": _nbytes(record)}
                    for record in dropped
                ],
                "removed": [
                    {
                        "path": garbage.path,
                        "reason": garbage.reason,
                        "files": len(garbage.files),
                        "bytes": garbage.nbytes,
                    }
                    for garbage in removed
                ],
                "foreign": [{"path": file.path, "bytes": file.size} for file in foreign],
                "bytes": nbytes,
            }
        )
    else:
        rows = [("drop", str(_nbytes(record)), f"packs/{record.pack}", "asked for") for record in dropped]
        rows += [("remove", str(garbage.nbytes), garbage.path, garbage.reason) for garbage in removed]
        rows += [("foreign", str(file.size), file.path, "not trajstore's; stays") for file in foreign]
        if rows:
            print_table(("what", "bytes", "path", "why"), rows, right=("bytes",), flexible=("path",))
    would = "would be " if dry_run else ""
    diagnostics().print(
        f"{len(dropped)} packs {would}dropped, {decimal(nbytes)} {would}removed, {len(foreign)} foreign files",
        soft_wrap=True,
    )
