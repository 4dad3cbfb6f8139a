"""Chunks that are decoded side by side: nobody waits for a thread that has not begun, and no failure is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from trajstore.archive.arrays import threads as module
from trajstore.archive.arrays.threads import run_all
from trajstore.errors import Corrupt

DEADLINE = 30


def test_read_does_not_wait_for_threads_that_are_busy_elsewhere(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    release = threading.Event()
    done: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(release.wait, DEADLINE)
        run_all([lambda number=number: done.append(number) for number in range(8)], threads)
        assert not release.is_set()
        assert not busy.done()
        release.set()
    assert done == list(range(8))


def test_threads_that_are_free_take_a_part(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 2)  # whatever this machine has
    both = threading.Barrier(2)
    names: list[str] = []

    def job() -> None:
        both.wait(DEADLINE)  # passes only where two threads are at work
        names.append(threading.current_thread().name)

    with ThreadPoolExecutor(1, thread_name_prefix="other") as threads:
        run_all([job, job], threads)
    assert sorted(names) == sorted([threading.current_thread().name, "other_0"])


@pytest.mark.parametrize("bad", range(3))
def test_failure_of_any_job_is_the_failure_of_the_read(bad):
    def job(number: int) -> None:
        if number == bad:
            raise Corrupt(f"chunk {number}")

    with ThreadPoolExecutor(2) as threads, pytest.raises(Corrupt, match=f"chunk {bad}"):
        run_all([lambda number=number: job(number) for number in range(3)], threads)
