"""Commands that move trajectories: `export` and `import`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import msgspec
from rich.filesize import decimal

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.transfer.copies import Transferred
from trajstore.cli.damage import Damage
from trajstore.cli.place import is_archive, open_run
from trajstore.cli.statuses import StatusChoice
from trajstore.cli.terminal import diagnostics, plain, print_json, say
from trajstore.errors import NotFound
from trajstore.events import CLOSED_STATUSES
from trajstore.exchange import Exported, Imported, export, import_archive
from trajstore.log.wire import describe_url
from trajstore.opening import read_archive
from trajstore.store import Store

__all__ = ["export_command", "import_command"]

_as_json = click.option("--json", "as_json", is_flag=True, help="The account as one JSON object on stdout.")


@click.command("export")
@click.argument("source", metavar="STORE|ARCHIVE")
@click.argument("dest", metavar="DEST")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only this trajectory; may be repeated.")
@click.option("--group", "groups", multiple=True, metavar="GROUP", help="Only members of this group; may be repeated.")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=StatusChoice(("open", *CLOSED_STATUSES)),
    help="Only trajectories of this status; may be repeated.",
)
@click.option("--no-check", is_flag=True, help="Do not compare the folds of source and copy.")
@_as_json
def export_command(
    source: str,
    dest: str,
    ids: tuple[str, ...],
    groups: tuple[str, ...],
    statuses: tuple[str, ...],
    no_check: bool,
    as_json: bool,
) -> None:
    """Copy trajectories to a new archive of their own.

    DEST is a new or empty folder, or an object store's URL. It gets every event, note and payload of the selected
    trajectories as they stand now; deleted ones are left out. Every copy is folded and compared with its source. What
    is damaged is named on stderr and left out, all else is exported; the exit code is 1 then.

    \b
    Examples:
      trajstore export runs/exp1 /backup/exp1
      trajstore export 'redis://host:6379/0?run=exp1' s3://bucket/best --status completed --group prompt-17
    """
    begun = time.monotonic()
    damage = Damage()
    with _opened(source) as opened, _progress(f"exporting {describe_url(source)}") as on_progress:
        try:
            done = export(
                opened,
                dest,
                ids=ids,
                groups=groups,
                statuses=statuses,
                check=not no_check,
                on_progress=lambda done: on_progress(_exported(done)),
                on_corrupt=damage.hear,
            )
        except NotFound as error:
            damage.fail(str(error))
            raise
    _account(done, _exported(done), begun=begun, as_json=as_json)
    damage.fail(f"all else is in {dest}")


@click.command("import")
@click.argument("store", metavar="STORE")
@click.argument("archive", metavar="SRC")
@click.option("--skip-conflicts", is_flag=True, help="Leave out what cannot be imported, and import the others.")
@_as_json
def import_command(store: str, archive: str, skip_conflicts: bool, as_json: bool) -> None:
    """Add the trajectories of an archive to a run.

    The run must have an archive; they go there. What it holds already is left as it is, what goes on in SRC is
    continued, and an id under which the run holds something else stops the import before anything is written. It may
    be repeated at any time. Imported trajectories can be loaded and resumed; trainers do not get them anew.

    \b
    Examples:
      trajstore import runs/exp2 /backup/exp1
      trajstore import 'redis://host:6379/0?run=exp2' s3://bucket/best --skip-conflicts
    """
    begun = time.monotonic()
    with open_run(store) as run, _progress(f"importing {describe_url(archive)}") as on_progress:
        done = import_archive(
            run,
            read_archive(archive),
            skip_conflicts=skip_conflicts,
            on_progress=lambda done: on_progress(_imported(done)),
        )
    _account(done, _imported(done), begun=begun, as_json=as_json)


@contextmanager
def _opened(location: str) -> Iterator[Store | ArchiveReader]:
    if is_archive(location):
        yield read_archive(location.removeprefix("file://"))
    else:
        with open_run(location) as store:
            yield store


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """A line that is kept up to date, in a terminal only."""
    if not diagnostics().is_terminal:
        yield lambda _: None
        return
    with diagnostics().status(plain(title)) as status:
        yield lambda text: status.update(plain(f"{title}: {text}"))


def _exported(done: Exported) -> str:
    return f"{done.trajectories} trajectories, {_volume(done)}, {done.checked} compared with their source"


def _imported(done: Imported) -> str:
    others = {"continued": done.continued, "known": done.known, "gone": done.gone, "in conflict": done.conflicts}
    text = "".join(f", {count} {name}" for name, count in others.items() if count)
    return f"{done.added} trajectories added{text}, {_volume(done)}"


def _volume(done: Transferred) -> str:
    return f"{done.packs} packs, {decimal(done.nbytes)} of payloads in {decimal(done.stored)}"


def _account(done: Transferred, text: str, *, begun: float, as_json: bool) -> None:
    """The last line, for people on stderr, and for programs the numbers on stdout."""
    elapsed = time.monotonic() - begun
    say(f"done after {elapsed:.1f} s: {text}")
    if as_json:
        print_json({**msgspec.structs.asdict(done), "elapsed": elapsed})
