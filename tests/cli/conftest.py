"""Stores for the command to look at, and to work on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import trajstore
from tests.builders import record_seed_case
from tests.servers import RealServer, binary_of, running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the embedded store."""
    return tmp_path / "store"


@pytest.fixture
def durable(folder: Path) -> Iterator[trajstore.Store]:
    """An embedded store that fsyncs before it answers, so that the archiver need not wait for anything to ripen."""
    with trajstore.open(folder, partitions=2, ack="fsync") as store:
        yield store


@pytest.fixture
def seed(durable: trajstore.Store) -> str:
    """Id of the seed case in `durable`: scored and completed, with a group and metadata."""
    writer = record_seed_case(durable, group="prompt-17", metadata={"task": "gsm8k"})
    writer.reward(1.0, components={"format": 0.5})
    writer.close("completed")
    durable.flush()
    return writer.id


@pytest.fixture
def durable_server(tmp_path: Path) -> Iterator[RealServer]:
    """A real server with a URL that fsyncs before it answers."""
    name = next(name for name in ("redis", "valkey") if binary_of(name) is not None)
    with running(name, tmp_path / "server", appendfsync="always") as server:
        yield server
