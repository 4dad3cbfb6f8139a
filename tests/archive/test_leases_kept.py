"""An archiver that has a lot to look at keeps its leases meanwhile; else two of them would take turns, and get nowhere.

A look, or an answer, takes as long as a test says: by the archiver's clock, and by the server's, which counts how long
a holder was silent.
"""

import threading
import time
from itertools import chain
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
def store(request, tmp_path):
    with trajstore.open(tmp_path / "store", partitions=2, ack=getattr(request, "param", "fsync")) as store:
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
    """Makes looks slow, or what the server tells of itself, and calls back with the trajectory's id, if any, after
    each."""

    def slow_(archiver, after, *, place=store.hot, name="read"):
        passed, call = 0.0, getattr(place, name)

        def slowly(of):
            nonlocal passed
            passed += LOOK
            for partition in range(store.partitions):
                _age(store, partition, archiver.name, seconds=LOOK)
            found = call(of)
            after(of)
            return found

        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed, perf_counter=time.perf_counter)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(place, name, slowly)

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


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_archiver_keeps_its_leases_however_slowly_the_server_tells_of_itself(store, backlog, slow):
    archiver = Archiver(store, lease_seconds=LEASE)
    rival = Lease(store.wire, store.keys, "rival", seconds=LEASE)
    answers = 0

    def try_to_take(wire):
        nonlocal answers
        answers += 1
        if answers > 1:  # the first comes before it has a lease
            assert not any(rival.acquire(partition) for partition in range(store.partitions)), f"lost at {answers}"

    slow(archiver, try_to_take, place=module, name="server_info")
    assert archiver.run(once=True).trajectories == sum(map(len, backlog.values()))


def test_two_archivers_that_stand_still_for_longer_than_a_lease_do_not_take_turns_for_ever(store, backlog, monkeypatch):
    """Whatever holds them up, once they have got a partition: here it is each look."""
    lease, stop, read = 0.1, threading.Event(), store.hot.read
    archivers = [Archiver(store, lease_seconds=lease, pack_seconds=0.0) for _ in range(2)]

    def stand_still(id):
        threading.Event().wait(3 * lease)
        return read(id)

    monkeypatch.setattr(store.hot, "read", stand_still)
    threads = [threading.Thread(target=archiver.run, kwargs={"stop": stop}) for archiver in archivers]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 60
        while any(hot_entries(store, id) for id in chain(*backlog.values())):
            assert time.monotonic() < deadline, [archiver.done for archiver in archivers]
            threading.Event().wait(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=30)


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
