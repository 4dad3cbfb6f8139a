"""The commands that keep an archive small: `compact` and `gc`. Both work without Redis, too."""

import logging
import re
import time
from collections.abc import Iterator
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
from trajstore.cli.damage import Damage
from trajstore.cli.dropping import Choice, Dropped
from trajstore.cli.place import is_archive, open_run, store_argument
from trajstore.cli.signals import graceful_stop
from trajstore.cli.terminal import print_json, print_table, say
from trajstore.errors import Corrupt, Fenced, NotFound, SchemaError
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
    it after the pack at hand, a second one at once; either is safe. What is damaged is named on stderr and stays as it
    is, all else is compacted; the exit code is 1 then.

    \b
    Examples:
      trajstore compact runs/exp1
      trajstore compact s3://bucket/exp1 --json
    """
    done: list[tuple[list[Record], Record]] = []
    damage = Damage()
    with graceful_stop() as stopped, _opened(store) as (reader, _):
        for partition in range(reader.info.partitions):
            candidates = Candidates(reader, partition, remnants=True)
            try:
                while not stopped.is_set():
                    if not candidates.look():
                        continue
                    records = candidates.due()
                    if not records:
                        break
                    try:
                        done.append((records, _compact(reader, partition, candidates, records)))
                    except (SchemaError, Corrupt) as error:
                        candidates.pass_over(records)
                        damage.hear(error)
            except (SchemaError, Corrupt) as error:  # of its manifest; the other partitions go on
                damage.hear(error)
            for fault in candidates.faults:
                damage.hear(fault)
    old, new = [one for records, _ in done for one in records], [record for _, record in done]
    before, after = sum(map(_nbytes, old)), sum(map(_nbytes, new))
    if as_json:
        print_json({"compactions": len(new), "packs": len(old), "bytes_before": before, "bytes_after": after})
    say(f"{len(old)} packs of {decimal(before)} are {len(new)} of {decimal(after)}")
    damage.fail("these stay as they are, the others were compacted as far as it is due")


@click.command()
@store_argument
@click.option("--older-than", type=_DURATION, metavar="AGE", help="Drop packs whose newest events are older: 30d, 12h.")
@click.option("--pack", "packs", multiple=True, metavar="NAME", help="Drop this pack; repeatable.")
@click.option("--lost", is_flag=True, help="With --pack: these are damaged; give them up, with all that they held.")
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
    lost: bool,
    whole_trajectories: bool,
    grace: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what an archive does not need any more.

    That is files of packs that were replaced or dropped, and what crashes left. With --older-than or --pack, packs are
    dropped for good first: their trajectories are not found any more, and their ids stay taken. An open trajectory is
    never dropped by its age. Files that are not trajstore's are listed and stay. STORE may also be an archive without
    its server; then nothing is known of what the hot log still holds.

    What is damaged is named on stderr and stays, as does all that may be needed by it; the exit code is 1 then. With
    --pack NAME --lost a damaged pack is given up, with every trajectory that has a part in it.

    \b
    Examples:
      trajstore gc runs/exp1 --dry-run
      trajstore gc 'redis://host:6379/0?run=exp1' --older-than 30d
      trajstore gc runs/exp1 --pack 07/00000012-01M8A... --lost --dry-run
    """
    for flag, given in (("--whole-trajectories", whole_trajectories), ("--lost", lost)):
        if given and not packs:
            raise click.UsageError(f"{flag} belongs to --pack")
    damage = Damage()
    with _opened(store) as (reader, run):
        before = None if older_than is None else time.time() - older_than
        choice = Choice(reader, run, before, packs, whole=whole_trajectories, lost=lost, damage=damage)
        if packs:
            choice.named()  # refused before anything is dropped
        dropped: list[Dropped] = []
        for partition in range(reader.info.partitions):
            dropped += choice.look(partition) if dry_run else choice.drop(partition)
        dropping = [one.record for one in dropped] if dry_run else ()
        removed: list[Garbage] = []
        for found in find_garbage(
            reader,
            now=time.time(),
            grace=grace,
            dropping=dropping,
            ledgers=choice.ledgers,
            on_corrupt=damage.hear,
        ):
            removed.append(found)
            if not dry_run and len(removed) % _REMOVED_AT_ONCE == 0:
                remove_garbage(reader, removed[-_REMOVED_AT_ONCE:])
        if not dry_run:
            remove_garbage(reader, removed[len(removed) // _REMOVED_AT_ONCE * _REMOVED_AT_ONCE :])
        foreign = sorted(find_foreign(reader, ledgers=choice.ledgers))
    _report(dropped, removed, foreign, dry_run=dry_run, as_json=as_json)
    damage.fail("what is damaged stays, with all that it may need")


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


def _nbytes(record: Record) -> int:
    return sum(file.size for file in record.files.values())


def _report(
    dropped: list[Dropped], removed: list[Garbage], foreign: list[StoredFile], *, dry_run: bool, as_json: bool
) -> None:
    nbytes = sum(garbage.nbytes for garbage in removed)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "dropped": [
                    {"pack": one.record.pack, "trajectories": one.record.trajectories, "bytes": one.record.nbytes}
                    | ({"lost": True, "ids": one.ids} if one.lost else {})
                    for one in dropped
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
        rows = [("drop", str(one.record.nbytes), f"packs/{one.record.pack}", _why(one)) for one in dropped]
        rows += [("remove", str(garbage.nbytes), garbage.path, garbage.reason) for garbage in removed]
        rows += [("foreign", str(file.size), file.path, "not trajstore's; stays") for file in foreign]
        if rows:
            print_table(("what", "bytes", "path", "why"), rows, right=("bytes",), flexible=("path",))
    would = "would be " if dry_run else ""
    for one in dropped:
        if one.lost:
            say(_lost_with(one, would))
    say(f"{len(dropped)} packs {would}dropped, {decimal(nbytes)} {would}removed, {len(foreign)} foreign files")


def _why(one: Dropped) -> str:
    return "damaged and given up" if one.lost else "asked for"


def _lost_with(one: Dropped, would: str) -> str:
    if one.ids is None:
        return (
            f"{one.record.trajectories} trajectories {would}dropped with {one.record.pack}; which they are cannot be "
            "read any more. Of one that has parts in other packs, too, `trajstore verify` tells what it misses"
        )
    return f"dropped with {one.record.pack}{', it would be' if would else ''}: {', '.join(one.ids)}"
