"""An archiver that has a lot to look at keeps its leases meanwhile; else two of them would take turns, and get nowhere.

A look takes as long as a test says: by the archiver's clock, and by the server's, which counts how long a holder was
silent.
"""

import threading
import time
from types import SimpleNamespace

import pytest

import trajstore
from tests.archive.test_archiver import hot_entries
from tests.builders import record_seed_case
from trajstore import archiver as module
from trajstore.archiver import Archiver
from trajstore.log.lease import LEASE_GROUP, Lease

LEASE = 60.0
LOOK = LEASE / 3


@pytest.fixture
def store(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=2, ack="fsync") as store:
        yield store


@pytest.fixture
def backlog(store):
    """Ids of finished trajectories, by partition: more than can be looked at within a lease."""
    ids = {0: [], 1: []}
    while min(map(len, ids.values())) < 5:
        id = record_seed_case(store).id
        ids[store.keys.partition(id)].append(id)
    store.flush()
    return ids


@pytest.fixture
def slow(store, monkeypatch):
    """Makes looks slow, and calls back with the id after each."""

    def slow_(archiver, on_look):
        passed, read = 0.0, store.hot.read

        def look(id):
            nonlocal passed
            passed += LOOK
            for partition in range(store.partitions):
                _age(store, partition, archiver.name, seconds=LOOK)
            found = read(id)
            on_look(id)
            return found

        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed, perf_counter=time.perf_counter)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(store.hot, "read", look)

    return slow_


def _age(store, partition, holder, *, seconds):
    """Its holder has been silent for so much longer."""
    lease = store.keys.lease(partition)
    for at, name, idle, _ in store.wire.call("XPENDING", lease, LEASE_GROUP, "-", "+", 1, holder):
        silent = idle + int(seconds * 1000)
        store.wire.call("XCLAIM", lease, LEASE_GROUP, name, 0, at, "IDLE", silent, "JUSTID")


def test_archiver_keeps_its_leases_however_long_it_looks_at_a_backlog(store, backlog, slow):
    archiver = Archiver(store, lease_seconds=LEASE)
    rival = Lease(store.wire, store.keys, "rival", seconds=LEASE)

    def try_to_take(id):
        assert not any(rival.acquire(partition) for partition in range(store.partitions)), f"lost, looking at {id}"

    slow(archiver, try_to_take)
    assert archiver.run(once=True).trajectories == sum(map(len, backlog.values()))


@pytest.mark.parametrize("second", [False, True], ids=["first look", "second look"])
def test_archiver_that_loses_a_partition_in_the_midst_of_its_looks_leaves_it_and_goes_on(store, backlog, slow, second):
    archiver = Archiver(store, lease_seconds=LEASE, pack_seconds=0.0)
    stop = threading.Event()
    looks = 2 + len(backlog[0]) * second
    looked: list[str] = []

    def lose(id):
        if id in backlog[0]:
            looked.append(id)
            if len(looked) == looks:
                assert Lease(store.wire, store.keys, "rival", seconds=0.0).acquire(0)

    slow(archiver, lose)
    archiver.run(stop=stop, on_progress=lambda done: stop.set() if done.trajectories >= len(backlog[1]) else None)
    assert len(looked) == looks, "it has looked on at what is another's"
    assert all(hot_entries(store, id) for id in backlog[0])
    assert not any(hot_entries(store, id) for id in backlog[1])
