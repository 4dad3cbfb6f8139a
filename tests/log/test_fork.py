"""After a fork: the child is told to open its own store, and the parent does not notice."""

import os
import signal
import threading

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_child(*calls):
    """What each call does in a forked child, as text."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # a child that hangs ends, and is seen to
        told = []
        for call in calls:
            try:
                call()
                told.append("passed")
            except trajstore.TrajstoreError as error:
                told.append(f"{type(error).__name__}: {error}")
        os.write(write, "\n".join(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return told


def test_child_is_refused_clearly_and_the_parent_is_unharmed(store):
    trajectory = record_seed_case(store)
    segment = trajectory.segment()
    store.flush()
    told = in_child(
        lambda: store.load(trajectory.id),
        lambda: store.create(),
        lambda: store.list(),
        lambda: store.flush(),
        lambda: segment.tokens([1]),
        lambda: segment.close("stop"),
        lambda: trajectory.observe([[[0, 1]] * 3], start=0, source="child"),
        lambda: store.close(),
    )
    assert len(told) == 8
    assert all(line.startswith("Conflict: this store was opened before a fork") for line in told[:-1]), told
    assert told[-1] == "passed"
    segment.tokens([7])
    segment.close("stop")
    store.flush()
    assert store.load(trajectory.id).token_ids.tolist()[-1] == 7


def test_handles_do_not_hang_in_a_child_forked_while_the_flusher_was_busy(store):
    """A lock that another thread holds at the fork is held in the child for ever."""
    trajectory = store.create(routing=SPEC)
    segment = trajectory.segment()
    with store._flusher._lock:
        told = in_child(lambda: segment.tokens([1]), lambda: trajectory.observe([[[0, 1]] * 3], start=0, source="x"))
    assert told[0].startswith("Conflict: this store was opened before a fork")
    segment.close("stop")
    store.flush()


def test_handles_do_not_hang_in_a_child_forked_while_a_thread_took_memory_for_a_payload(store, monkeypatch):
    segment = store.create(routing=SPEC).segment(context=[0] * 40_000)
    slabs, empty = store._flusher.slabs, np.empty
    inside, leave = threading.Event(), threading.Event()

    def slow(*arguments):
        if threading.current_thread() is thread:
            inside.set()
            leave.wait(20)
        return empty(*arguments)

    thread = threading.Thread(target=slabs.cut, args=(3 << 20,))
    monkeypatch.setattr(np, "empty", slow)
    thread.start()
    assert inside.wait(20)
    told = in_child(lambda: segment.routing(rows(40_000), start=0))
    leave.set()
    thread.join(20)
    assert told[0].startswith("Conflict: this store was opened before a fork")


def test_child_can_open_a_store_of_its_own(own_server, open_at):
    store = open_at(own_server)
    trajectory = record_seed_case(store)
    store.flush()

    def child():
        with trajstore.open(own_server.url(store.run)) as mine:
            mine.get(trajectory.id).reward(0.5)
            mine.flush()

    assert in_child(child) == ["passed"]
    assert store.load(trajectory.id).reward == 0.5
    store.get(trajectory.id).close()
    store.flush()
