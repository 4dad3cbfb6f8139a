"""What the tests of the embedded server and the facade share: a folder, and processes that use it."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.store.children import Child, servers_of
from trajstore.server import stop_server

NewChild = Callable[..., Child]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of an embedded store, not yet there; no server stays behind, whatever the test did to it."""
    path = tmp_path / "store"
    yield path
    if servers_of(path):
        with suppress(trajstore.NotFound):
            stop_server(path)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[NewChild]:
    """Starts Python processes; those still there at the end are killed."""
    children: list[Child] = []

    def new(**options: Any) -> Child:
        children.append(Child(tmp_path / f"child-{len(children)}.err", **options))
        return children[-1]

    yield new
    for one in children:
        one.dispose()


@pytest.fixture
def user(child: NewChild, folder: Path) -> NewChild:
    """Starts processes that have the folder's store open, as `store`."""

    def new(options: str = "partitions=1", **more: Any) -> Child:
        one = child(**more)
        one.do(f"store = trajstore.open({str(folder)!r}, {options})")
        return one

    return new
