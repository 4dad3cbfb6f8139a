"""Which store a command is about: its arguments STORE and ID, TRAJSTORE_URL, and opening without creating."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import click

import trajstore
from trajstore.archive.root import ArchiveRoot
from trajstore.errors import NotFound
from trajstore.ingest import check_id
from trajstore.log.wire import describe_url, split_run
from trajstore.reading import Archive
from trajstore.store import Store

__all__ = [
    "Place",
    "is_archive",
    "open_reading",
    "open_run",
    "place_argument",
    "read_place",
    "shown_location",
    "store_argument",
]

ENVIRONMENT = "TRAJSTORE_URL"

_FORMS = (
    "a Redis URL that names a run (redis://host:6379/0?run=NAME), a store's directory, or an archive's folder or URL"
)

_OBJECT_STORES = ("s3://", "gs://", "az://")

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Place(NamedTuple):
    """A trajectory in a store."""

    store: str
    id: str


def store_argument(command: _Command) -> _Command:
    """Gives a command the parameter `store`, from `[STORE]` or the environment."""
    add = click.argument("store", required=False, metavar="[STORE]", envvar=ENVIRONMENT, callback=_one_store)
    return add(command)


def place_argument(command: _Command) -> _Command:
    """Gives a command the parameter `place`, from `[STORE] ID`: one word alone is the ID."""
    return click.argument("place", nargs=-1, metavar="[STORE] ID", callback=read_place)(command)


@contextmanager
def open_reading(location: str) -> Iterator[Archive]:
    """A store, or an archive without its server, to be read. Creates nothing.

    Raises:
        NotFound: there is neither.
    """
    if is_archive(location):
        yield trajstore.open_archive(location)
    else:
        with open_run(location) as store:
            yield store


def shown_location(location: str) -> str:
    """A store as messages and advice may repeat it: a URL without user, password and options but `run`."""
    if "://" not in location:
        return location
    _, run = split_run(location)
    return describe_url(location) + (f"?run={run}" if run else "")


def is_archive(location: str) -> bool:
    """True for an archive without its server, False for a run.

    Raises:
        NotFound: a folder that is neither.
    """
    if not _is_folder(location):
        return location.startswith(_OBJECT_STORES)
    folder = _folder(location)
    if (folder / "store.json").exists():
        return False
    if ArchiveRoot.at(folder).info() is None:
        raise NotFound(_nothing(folder))
    return True


def open_run(location: str, *, archive: str | None = None) -> Store:
    """A run with its server, which must exist.

    Args:
        archive: folder or URL to archive into; default the one that the run has.

    Raises:
        NotFound: there is none.
    """
    if not _is_folder(location):
        if location.startswith(_OBJECT_STORES):
            raise NotFound(
                f"{describe_url(location)} is an archive; this command wants the run itself: its directory or Redis URL"
            )
        return trajstore.open(location, archive=archive, create=False)
    folder = _folder(location)
    if not (folder / "store.json").exists():
        if ArchiveRoot.at(folder).info() is not None:
            raise NotFound(f"{folder} is an archive; this command wants the run itself: its directory or Redis URL")
        raise NotFound(_nothing(folder))
    return trajstore.open(folder, archive=archive, create=False)


def _is_folder(location: str) -> bool:
    return "://" not in location or location.startswith("file://")


def _folder(location: str) -> Path:
    return Path(location.removeprefix("file://"))


def _nothing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist (STORE is {_FORMS})"
    return f"there is no trajstore in {folder}: neither store.json nor archive.json"


def _one_store(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str:
    if not value:
        raise click.UsageError(f"which store? Give STORE, {_FORMS}; or set {ENVIRONMENT}", ctx)
    if "://" in value:
        try:
            urlsplit(value)
        except ValueError:  # which repeats a password
            raise click.BadParameter("STORE is no URL that can be read", ctx) from None
    return value


def read_place(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> Place:
    """The words `[STORE] ID` of a command line, as the callback of an argument."""
    if not 1 <= len(value) <= 2:
        raise click.UsageError("give the ID of a trajectory, and before it STORE unless TRAJSTORE_URL is set", ctx)
    *stores, id = value
    store = stores[0] if stores else os.environ.get(ENVIRONMENT)
    if not store:
        raise click.UsageError(
            f"{id!r} is the ID, but which store? Give STORE before it, {_FORMS}; or set {ENVIRONMENT}", ctx
        )
    return Place(_one_store(ctx, parameter, store), check_id(id))
