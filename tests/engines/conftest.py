"""Torch on one thread, for the machine is shared and tiny models run no faster on more; and what several files use."""

import threading

import pytest
import torch

from tests.engines.vllm_rollouts import Held


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def held():
    """Sampling parameters at which the opening of a segment waits until it may."""
    yield Held
    Held.may_open.set()
    Held.opening, Held.may_open = threading.Event(), threading.Event()
