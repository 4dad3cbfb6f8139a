"""Clusters to move slots in, and clusters of a test's own to lose masters of."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.cluster.nodes import Cluster, cluster_of
from tests.conftest import REAL, _close_quietly, cluster_server
from tests.servers import binary_of

StartCluster = Callable[..., Cluster]


def _require(name: str) -> str:
    if binary_of(name) is None:
        pytest.skip(f"cluster of {name}: no server of that kind on this machine")
    return name


@pytest.fixture(scope="session", params=REAL)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for the whole session, whose servers all live; a test keeps apart by its run's name."""
    with cluster_of(_require(request.param), tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """Starts a cluster of this test's own, with options of its servers: `start_cluster(appendfsync="always")`."""
    with ExitStack() as clusters:

        def start(**options: str) -> Cluster:
            return clusters.enter_context(cluster_of(cluster_server(), tmp_path / "cluster", **options))

        yield start


@pytest.fixture
def open_at(run_name: str) -> Iterator[Callable[..., trajstore.Store]]:
    """Opens stores of this run on a cluster, `open_at(cluster, archive=...)`; closes them at the end."""
    with ExitStack() as stores:

        def open_(cluster: Cluster, **options: Any) -> trajstore.Store:
            store = trajstore.open(cluster.url(run_name), **({"partitions": 4, "timeout": 20.0} | options))
            stores.callback(_close_quietly, store)
            return store

        yield open_
