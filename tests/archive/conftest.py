"""Stores whose archiver need not wait: the embedded server fsyncs before it answers, so nothing has to ripen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.s3 import S3Server
from trajstore.archiver import Archived, Archiver

Archive = Callable[..., Archived]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the embedded store."""
    return tmp_path / "store"


@pytest.fixture
def durable(folder: Path) -> Iterator[trajstore.Store]:
    """An embedded store with one partition that acknowledges after the fsync."""
    with trajstore.open(folder, partitions=1, ack="fsync") as store:
        yield store


@pytest.fixture
def archive(durable: trajstore.Store) -> Archive:
    """Flushes the store and archives what is there."""

    def archive_(**options: Any) -> Archived:
        durable.flush()
        return Archiver(durable, **options).run(once=True)

    return archive_


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A server of the S3 protocol for the whole session; a test keeps apart by its prefix, `s3.url(name)`."""
    server = S3Server()
    yield server
    server.stop()
