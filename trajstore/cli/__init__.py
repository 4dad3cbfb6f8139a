"""The `trajstore` command: it finds its subcommands by entry point and loads the one that is called.

`read.py` looks at trajectories, `workers.py` runs the archiver and the materializer; others register more commands in
the entry-point group `trajstore.commands`.
"""

import click

import trajstore
from trajstore.cli.group import EXIT_CODES, CommandGroup
from trajstore.cli.logs import use_format
from trajstore.cli.terminal import prepare_streams

__all__ = ["main"]


@click.group(cls=CommandGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(trajstore.__version__, prog_name="trajstore", message="%(prog)s %(version)s")
def main() -> None:
    """Look at a trajectory store, and run the processes that work on it.

    STORE is a Redis URL that names a run, the directory of an embedded store or, for looking, an archive's folder.
    Where it is left out, TRAJSTORE_URL serves.

    \b
    Examples:
      trajstore ls runs/exp1
      trajstore show redis://host:6379/0?run=exp1 01JD3Z...
      TRAJSTORE_URL=runs/exp1 trajstore tail --json
    """
    prepare_streams()
    use_format("text")  # a command with --log-format says otherwise
