"""The command that says how far the archiver is behind: `backlog`."""

from typing import Any

import click
import msgspec
from rich.filesize import decimal

from trajstore.backlog import Backlog
from trajstore.cli.place import open_run, store_argument
from trajstore.cli.terminal import print_fields, print_json, print_table

__all__ = ["backlog"]


@click.command()
@store_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def backlog(store: str, as_json: bool) -> None:
    """Show what the hot log holds that is not archived yet.

    How many trajectories wait, with how many payload bytes, how long the oldest has waited since it could be archived,
    and how full the server is: writers stop at 90 % of its maxmemory. Open segments count, although they wait for
    their writer. With --json: an object with these fields, also for each partition.

    \b
    Examples:
      trajstore backlog runs/exp1
      trajstore backlog 'redis://host:6379/0?run=exp1' --json | jq .nbytes
    """
    with open_run(store) as run:
        found = run.backlog()
        location = run.location
    if as_json:
        print_json(_document(found))
        return
    print_fields(location, _fields(found))
    rows = [
        (str(number), str(one.trajectories), decimal(one.nbytes), _age(one.seconds))
        for number, one in enumerate(found.partitions)
        if one.trajectories or one.seconds
    ]
    if rows:
        columns = ("partition", "trajectories", "payloads", "oldest")
        print_table(columns, rows, right=columns)


def _fields(found: Backlog) -> list[tuple[str, str]]:
    limit = f"of {decimal(found.maxmemory)} ({found.used_memory / found.maxmemory:.0%})" if found.maxmemory else "used"
    return [
        ("waiting", f"{found.trajectories} trajectories"),
        ("payloads", decimal(found.nbytes)),
        ("oldest", _age(found.seconds)),
        ("memory", f"{decimal(found.used_memory)} {limit}"),
    ]


def _document(found: Backlog) -> dict[str, Any]:
    return {
        "trajectories": found.trajectories,
        "nbytes": found.nbytes,
        "seconds": found.seconds,
        "used_memory": found.used_memory,
        "maxmemory": found.maxmemory,
        "partitions": [msgspec.structs.asdict(partition) for partition in found.partitions],
    }


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds else "-"
