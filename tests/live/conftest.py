"""Fixtures of the suites over real engines: a store, a loop to run coroutines in, and prompts."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import trajstore

DEADLINE = 120.0
"""Seconds that one scenario may take."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[trajstore.Store]:
    """An embedded store."""
    with trajstore.open(tmp_path / "store", partitions=2) as store:
        yield store


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines of one module's tests in one loop, which an asynchronous engine stays with."""
    with asyncio.Runner() as runner:
        yield lambda scenario: runner.run(asyncio.wait_for(scenario, DEADLINE))


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> npt.NDArray[np.int32]:
    """Token ids that no other test uses, int32 `[50]`."""
    return random_prompt(request.node.nodeid, 50)


def random_prompt(name: str, length: int) -> npt.NDArray[np.int32]:
    """Token ids drawn for a name."""
    return np.random.default_rng([*name.encode()]).integers(4, 256, length, dtype=np.int32)
