"""The command `verify`: prints what is wrong with an archive as it is found; its exit code says whether anything is."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trajstore.archive.verify.verify import Run
from trajstore.archive.verify.verify import verify as check
from trajstore.cli.findings import account, counted, json_lines, text_line
from trajstore.cli.place import is_archive, open_run, store_argument
from trajstore.cli.terminal import diagnostics
from trajstore.errors import Corrupt
from trajstore.log.wire import describe_url

__all__ = ["verify"]


@click.command()
@store_argument
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only this trajectory; repeatable.")
@click.option("--pack", "packs", multiple=True, metavar="NAME", help="Only this pack, e.g. 07/00000012-01M8...")
@click.option("--quick", is_flag=True, help="Only records, and that files are there and have their sizes.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=2,
    show_default=True,
    help="Packs checked at a time; each is held.",
)
@click.option("--json", "as_json", is_flag=True, help="An array of findings on stdout, one to a line as they come.")
def verify(store: str, ids: tuple[str, ...], packs: tuple[str, ...], quick: bool, workers: int, as_json: bool) -> None:
    """Check an archive, and a run's hot log against it.

    Digests, counts, sequence and routing rows: everything is read and nothing changed. STORE may be in use. Exit code
    0: sound; 1: there are errors or warnings, or it could not be read to the end. Information, such as rows that were
    never recorded, is printed and harmless.

    \b
    Examples:
      trajstore verify runs/exp1
      trajstore verify s3://bucket/exp1 --quick
      trajstore verify runs/exp1 --id 01JD3Z... --json | jq '.[].what'
    """
    if ids and packs:
        raise click.UsageError("give --id or --pack, not both")
    if quick and ids:
        raise click.UsageError("--quick reads no trajectory; leave out --id")
    counts: Counter[str] = Counter()
    with _place(store) as place, _bar() as bar:
        task = bar.add_task("records", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        found = counted(check(place, ids=ids, packs=packs, quick=quick, workers=workers, on_record=show), counts)
        if as_json:
            json_lines(found)
        else:
            for finding in found:
                text_line(finding)
    account(f"verified {describe_url(store)}", counts)


@contextmanager
def _place(store: str) -> Iterator[str | Run]:
    """What to check: an archive by its location, or an open run."""
    if _is_archive(store):
        yield store
    else:
        with open_run(store) as run:
            yield run


def _is_archive(store: str) -> bool:
    try:
        return is_archive(store)
    except Corrupt:
        return True  # of which `verify` tells


def _bar() -> Progress:
    """In a terminal only."""
    return Progress(
        TextColumn("verifying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=diagnostics(),
        transient=True,
        disable=not diagnostics().is_terminal,
        redirect_stdout=False,
    )
