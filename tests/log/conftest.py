"""Servers with options of the test's own, and a proxy that loses things between a store and its server."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

import trajstore
from tests.conftest import REAL
from tests.log.proxy import FaultyProxy
from tests.servers import RealServer, binary_of, running

StartServer = Callable[..., RealServer]


@pytest.fixture(params=REAL)
def start_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartServer]:
    """Starts a real server with options: `start_server(appendfsync="always")`."""
    if binary_of(request.param) is None:
        pytest.skip(f"backend {request.param}: no server of that kind on this machine")
    with ExitStack() as servers:

        def start(**options: str) -> RealServer:
            return servers.enter_context(running(request.param, tmp_path / "server", **options))

        yield start


@pytest.fixture
def client(backend: Any) -> Iterator[redis.Redis]:
    """A plain client of the backend."""
    with backend.client() as client:
        yield client


@pytest.fixture
def own_client(own_server: RealServer) -> Iterator[redis.Redis]:
    """A plain client of the test's own server."""
    with own_server.client() as client:
        yield client


@pytest.fixture
def proxy(own_server: RealServer) -> Iterator[FaultyProxy]:
    """Between a store and the test's own server."""
    with FaultyProxy(own_server.port) as proxy:
        yield proxy


@pytest.fixture
def open_at(run_name: str) -> Iterator[Callable[..., trajstore.Store]]:
    """Opens stores of this run at a server or a proxy, `open_at(server, archive=...)`; closes them at the end."""
    with ExitStack() as stores:

        def open_(server: Any, **options: Any) -> trajstore.Store:
            store = trajstore.open(server.url(run_name), **({"partitions": 2, "timeout": 10.0} | options))
            stores.callback(_close_quietly, store)
            return store

        yield open_


def _close_quietly(store: trajstore.Store) -> None:
    with suppress(trajstore.TrajstoreError, ExceptionGroup):
        store.close()
