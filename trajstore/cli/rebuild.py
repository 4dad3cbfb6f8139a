"""The command `rebuild`: a run or an archive made whole again from what is left of it."""

import time
from pathlib import Path

import click
import msgspec

from trajstore.archive.rebuild.rebuild import Rebuilt, rebuild_archive
from trajstore.archive.root import ArchiveRoot
from trajstore.cli.group import Failure
from trajstore.cli.terminal import print_json, say
from trajstore.log.wire import describe_url
from trajstore.recovery import Recovered, recover
from trajstore.routing import ORDERS, RoutingOrder

__all__ = ["rebuild"]

_SERVERS = ("redis://", "rediss://", "unix://")


@click.command()
@click.argument("location", metavar="STORE|ARCHIVE")
@click.option("--archive", "folder", metavar="ARCHIVE", help="Where the run is archived; default what the run has.")
@click.option("--digests", is_flag=True, help="Compare the content of every pack with its record, too.")
@click.option(
    "--without",
    multiple=True,
    metavar="PACK",
    help="Give this pack up: one without a record that cannot be read, or a damaged one while the packs that it was "
    "compacted from are still there, which are live again then; may be repeated.",
)
@click.option("--partitions", type=click.IntRange(min=1), help="Of a lost archive.json, where packs do not tell.")
@click.option(
    "--routing-order", type=click.Choice(ORDERS), help="Of a run that is begun again; default what its archive has."
)
@click.option("--json", "as_json", is_flag=True, help="The account as one JSON object on stdout.")
def rebuild(
    location: str,
    folder: str | None,
    digests: bool,
    without: tuple[str, ...],
    partitions: int | None,
    routing_order: RoutingOrder | None,
    as_json: bool,
) -> None:
    """Make whole what was lost, from what is left.

    Of an archive: archive.json, manifest records and lookup tables, from its packs. Of a run also its server: where
    that is empty, the run goes on there from its archive, as --archive or the embedded store's folder has it; what was
    in the lost server only is lost. At last the hot log's summaries. What is there and sound is not touched, damaged
    files get another name, and it may be repeated at any time. Stop the run's archivers before.

    Exit code 1 if something cannot be made whole: stderr says what.

    \b
    Examples:
      trajstore rebuild /data/exp1
      trajstore rebuild 'redis://host:6379/0?run=exp1' --archive s3://bucket/exp1
    """
    begun = time.monotonic()
    if location.startswith(_SERVERS) or (Path(location) / "store.json").exists():
        if partitions is not None:
            run = describe_url(location)
            raise click.UsageError(f"--partitions is for an archive, and {run} is a run, which knows its own")
        found = recover(location, archive=folder, routing_order=routing_order, digests=digests, without=without)
    else:
        for flag, given in (("--archive", folder), ("--routing-order", routing_order)):
            if given is not None:
                raise click.UsageError(f"{flag} is for a run, and {describe_url(location)} is none")
        root = ArchiveRoot.at(location)
        found = Recovered(archive=rebuild_archive(root, digests=digests, without=without, partitions=partitions))
    _account(found, begun=begun, as_json=as_json)


def _account(done: Recovered, *, begun: float, as_json: bool) -> None:
    """What was done on stderr, and for programs on stdout; then what is not as it should be."""
    lines = [] if done.archive is None else _archive_lines(done.archive)
    if done.begun:
        lines.append(
            f"the run goes on from its archive; {done.unfinished} of its trajectories are open or aborted there, and "
            "what they had beyond it is lost"
        )
    if done.summaries:
        lines.append(f"{done.summaries} summaries of the hot log written anew")
    for line in lines:
        say(line)
    say(f"done after {time.monotonic() - begun:.1f} s")
    if as_json:
        print_json(msgspec.to_builtins(done))
    if done.archive is not None and (done.archive.unreadable or done.archive.damaged):
        raise Failure("\n".join([*done.archive.unreadable, *done.archive.damaged]))


def _archive_lines(done: Rebuilt) -> list[str]:
    lines = [f"{done.records} records, {done.tables} lookup tables{', archive.json' * done.identity} made anew"]
    for about, found in (
        ("set aside, for they are damaged", done.set_aside),
        ("written again under another number", done.renumbered),
        ("left over from a crash and not needed", done.leftovers),
        ("dropped by retention", done.dropped),
        ("gone, whatever these records said", done.gaps),
        ("given up, and what they were compacted from is live again", done.undone),
        ("of another run, left alone", done.foreign),
    ):
        if found:
            lines.append(f"{about}: {', '.join(found)}")
    return lines
