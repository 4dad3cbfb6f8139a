"""Fixtures that every part of the suite shares: servers, stores, and the report of what could not be tested here."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ulid import ULID

import trajstore
from tests.cluster.nodes import Cluster
from tests.servers import BACKENDS, FAKEREDIS_CANNOT_SHOW, FakeServer, RealServer, binary_of, running

log = logging.getLogger(__name__)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores, and its threads spin

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background of a shell: what tests start would
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignore it, too

OpenStore = Callable[..., trajstore.Store]

LONG = ("soak", "simulation", "demo", "packaging")

REAL = tuple(name for name in BACKENDS if name != "fakeredis")


def _require(name: str) -> None:
    if name != "fakeredis" and binary_of(name) is None:
        pytest.skip(f"backend {name}: no server of that kind on this machine")


@pytest.fixture(scope="session")
def shared_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Starts a server by name once for the whole session: each file of tests asks for all of them in turn."""
    started: dict[str, FakeServer | RealServer | Cluster] = {}

    def start(name: str) -> Any:
        if name not in started:
            if name == "fakeredis":
                started[name] = FakeServer()
            elif name == Cluster.name:
                started[name] = Cluster(cluster_server(), tmp_path_factory.mktemp("cluster"))
            else:
                _require(name)
                started[name] = RealServer(name, tmp_path_factory.mktemp("srv"))
        return started[name]

    yield start
    for server in started.values():
        server.stop()


@pytest.fixture(scope="session", params=(*BACKENDS, Cluster.name))
def backend(request: pytest.FixtureRequest, shared_servers: Callable[[str], Any]) -> Any:
    """Each backend in turn, one server for the whole session; a test keeps apart by its run's name."""
    return shared_servers(request.param)


def cluster_server() -> str:
    """Which server's cluster mode is tested: Redis' where it is there, else Valkey's."""
    found = next((name for name in ("redis", "valkey") if binary_of(name) is not None), None)
    if found is None:
        pytest.skip("backend cluster: no server on this machine")
    return found


@pytest.fixture(params=REAL)
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealServer]:
    """A real server of this test's own, to kill, pause, restart or fill."""
    _require(request.param)
    with running(request.param, tmp_path / "server") as server:
        yield server


@pytest.fixture
def run_name() -> str:
    """A run that no other test uses."""
    return f"test-{ULID()}"


@pytest.fixture
def open_store(backend: Any, run_name: str) -> Iterator[OpenStore]:
    """Opens stores of this test's run on the backend, `open_store(archive=...)`; closes them at the end."""
    with ExitStack() as stores:

        def open_(**options: Any) -> trajstore.Store:
            store = trajstore.open(backend.url(run_name), **({"partitions": 2, "timeout": 10.0} | options))
            stores.callback(_close_quietly, store)
            return store

        yield open_


@pytest.fixture
def store(open_store: OpenStore, tmp_path: Path) -> trajstore.Store:
    """An open store with an archive, on each backend in turn."""
    return open_store(archive=tmp_path / "archive")


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[trajstore.Store]:
    """An embedded store over whatever server the machine has."""
    with trajstore.open(tmp_path / "store", partitions=2) as store:
        yield store


def _close_quietly(store: trajstore.Store) -> None:
    """What a test left unwritten on purpose has been looked at by the test; where one fails, its log shows it."""
    try:
        store.close()
    except (trajstore.TrajstoreError, ExceptionGroup) as left:
        log.warning("left unwritten: %r", left)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders with files that take minutes come first, so that at the end no worker is left alone with one."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which servers the log suite ran on, and what a fake one cannot show."""
    missing = [name for name in REAL if binary_of(name) is None]
    found = ", ".join(name for name in BACKENDS if name not in missing)
    cluster = "" if len(missing) == len(REAL) else f", {Cluster.name}"
    terminalreporter.write_line(f"log backends: {found}{cluster}. fakeredis cannot show: {FAKEREDIS_CANNOT_SHOW}")
    for name in missing:
        terminalreporter.write_line(f"log backend NOT TESTED: {name}, for there is no such server here", red=True)
    if len(missing) == len(REAL):
        terminalreporter.write_line("Redis Cluster NOT TESTED, for there is no server here", red=True)
