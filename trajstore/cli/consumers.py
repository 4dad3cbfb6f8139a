"""The command about the consumer groups of the ready streams: `consumers` lists them, and removes one."""

import click

from trajstore.cli.place import open_run, store_argument
from trajstore.cli.terminal import print_json, print_table, say
from trajstore.consumer_groups import remove_consumer_group
from trajstore.status import GroupStanding, measure_ready
from trajstore_replay.ages import told

__all__ = ["consumers"]


@click.command()
@store_argument
@click.option("--remove", metavar="NAME", help="Remove this group, and the entries that are kept for it alone.")
@click.option("--force", is_flag=True, help="With --remove: although consumers have not signed off from it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
def consumers(store: str, remove: str | None, force: bool, as_json: bool) -> None:
    """List the consumer groups that take finished trajectories, or remove one.

    Each group gets everything that is published, and everything is kept for it until it has acknowledged it: one that
    nobody uses any more costs the server memory for ever. --remove ends it. Whoever reads under its name afterwards
    begins with what is still there, also after a checkpoint. Consumers sign off when they are closed; those that have
    something in hand, for they died or train by checkpoint, are named, and want --force. The last group stays: where
    nobody trains, run no materializer. `trajstore status` shows each consumer.

    \b
    Examples:
      trajstore consumers runs/exp1
      trajstore consumers runs/exp1 --remove look
    """
    if force and remove is None:
        raise click.UsageError("--force goes with --remove NAME")
    with open_run(store) as run:
        if remove is not None:
            remove_consumer_group(run.wire, run.keys, remove, force=force)
            say(f"consumer group {remove!r} is removed; nothing is kept for it any more")
        found = measure_ready(run)
    if as_json:
        print_json(found)
        return
    columns = ("group", "waiting", "in hand", "oldest", "consumers")
    print_table(columns, [_cells(group) for group in found], right=columns[1:])


def _cells(group: GroupStanding) -> tuple[str, ...]:
    oldest = told(group.seconds) if group.seconds else "-"
    return group.name, f"{group.waiting:,}", f"{group.held:,}", oldest, f"{len(group.consumers)}"
