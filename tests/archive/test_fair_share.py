"""Archivers of one run share its partitions, whoever came first; one that cannot archive lets the others do it."""

import contextlib
import errno
import logging
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trajstore
from tests import waiting
from tests.archive.test_archiver import hot_entries, until
from tests.builders import SPEC, record_seed_case
from tests.servers import binary_of, running
from trajstore.abandon import sweep
from trajstore.archive.fair_share import FairShare
from trajstore.archiver import Archiver
from trajstore.log.lease import Lease

LEASE = 0.6


def share(partitions, others, *, ago=0.0, name="a"):
    """As it stands once these others have been there for `ago` seconds, of 10 that count."""
    found = FairShare(partitions, name=name, seconds=10.0)
    found.look(others, 100.0)
    found.look(others, 100.0 + ago)
    return found


@given(partitions=st.integers(1, 64), names=st.sets(st.text(max_size=3), min_size=1, max_size=9))
def test_shares_add_up_and_differ_by_one_at_most(partitions, names):
    shares = [share(partitions, names - {name}, ago=10.0, name=name).most for name in names]
    assert sum(shares) == partitions
    assert max(shares) - min(shares) <= 1


def test_partitions_with_the_least_in_hand_are_given_up_first():
    assert share(4, ["b"], ago=10.0).surplus({0: "xx", 1: "", 2: "x", 3: "xxx"}) == [1, 2]
    assert share(4, ["b"], ago=10.0).surplus({0: "xx", 3: "xxx"}) == []


def test_another_counts_only_once_it_has_been_there_for_long():
    fair = share(4, ["b"], ago=9.9)
    assert (fair.others, fair.surplus(dict.fromkeys(range(4), ()))) == ([], [])
    fair.look(["b"], 110.0)
    assert fair.others == ["b"]
    fair.look([], 111.0)
    fair.look(["b"], 112.0)
    assert fair.others == [], "it was away in between"
    fair.look(["b"], 122.0)
    assert fair.others == ["b"]
    fair.begin_anew()
    fair.look(["b"], 122.5)
    assert fair.others == [], "what is held now may be what it has just left"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all: an archiver at work takes time."""
    name = next(name for name in ("redis", "valkey") if binary_of(name) is not None)
    with running(name, tmp_path_factory.mktemp("server"), appendfsync="always") as server:
        yield server


@pytest.fixture
def store(server, run_name, tmp_path):
    with trajstore.open(server.url(run_name), partitions=4, archive=tmp_path / "archive") as store:
        yield store


@contextlib.contextmanager
def at_work(store, **options):
    """An archiver, for the length of the block."""
    stop = threading.Event()
    archiver = Archiver(store, pack_seconds=0.0, lease_seconds=LEASE, **options)
    thread = threading.Thread(target=archiver.run, kwargs={"stop": stop})
    thread.start()
    try:
        yield archiver
    finally:
        stop.set()
        thread.join(60)


def held(*archivers):
    """How many partitions each has."""
    return [archiver.done.partitions for archiver in archivers]


def write(store, count=12):
    """Ids of finished trajectories."""
    ids = [record_seed_case(store).id for _ in range(count)]
    store.flush()
    return ids


def archived(store, ids):
    return not any(hot_entries(store, id) for id in ids)


def entries_of(store, ids):
    return sum(len(store.archive.read(id)[0]) for id in ids)


def test_archiver_that_comes_later_gets_its_share_and_leaves_it_at_its_end(store):
    with at_work(store) as first:
        until(lambda: held(first) == [4])
        ids = write(store)
        with at_work(store) as second:
            until(lambda: held(first, second) == [2, 2])
            ids += write(store)
            until(lambda: archived(store, ids))
            assert second.done.trajectories > 0
        until(lambda: held(first) == [4])
        ids += write(store)
        until(lambda: archived(store, ids))
    assert first.done.entries + second.done.entries == entries_of(store, ids), "each once"


def test_another_is_seen_by_what_it_holds_or_tries(store):
    busy, idle = (Lease(store.wire, store.keys, name, seconds=60.0) for name in ("busy", "idle"))
    one = Lease(store.wire, store.keys, "one", seconds=60.0)
    assert one.others() == set()
    assert busy.acquire(2)
    idle.renew(0)
    assert one.others() == {"busy", "idle"}
    assert busy.others() == {"idle"}
    for silent, seen in ((29.0, {"busy"}), (59.0, {"busy"}), (61.0, set())):
        lease = store.keys.lease(2)
        store.wire.call("XCLAIM", lease, "archiver", "busy", 0, "1-0", "IDLE", int(1000 * silent), "JUSTID")
        assert one.others() - {"idle"} == seen
    assert Lease(store.wire, store.keys, "one", seconds=0.0).others() == set()
    busy.release(2)
    assert one.others() == {"idle"}


def test_user_who_may_not_ask_for_consumers_sees_holders(store, server, run_name):
    assert Lease(store.wire, store.keys, "holder", seconds=60.0).acquire(1)
    Lease(store.wire, store.keys, "idle", seconds=60.0).renew(0)
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "old", "on", ">secret", "~*", "&*", "+@all", "-xinfo|consumers")
    url = server.url(run_name).replace("//", "//old:secret@")
    with trajstore.open(url, create=False) as other:
        assert Lease(other.wire, other.keys, "one", seconds=60.0).others() == {"holder"}


def test_what_another_has_left_is_not_given_up_again(store, caplog):
    caplog.set_level(logging.INFO, logger="trajstore.archiver")
    with at_work(store) as first:
        with at_work(store) as second:
            until(lambda: held(first, second) == [2, 2])
        given = caplog.text.count("is left to other archivers")
        until(lambda: held(first) == [4])
        for _ in range(10):
            assert held(first) == [4]
            threading.Event().wait(LEASE / 3)
    assert caplog.text.count("is left to other archivers") == given >= 2


def test_share_of_an_archiver_that_dies_is_taken_back(store, monkeypatch):
    with at_work(store) as first:
        with at_work(store) as second:
            until(lambda: held(first, second) == [2, 2])
            monkeypatch.setattr(second, "_leave", lambda: None)  # as after kill -9
        ids = write(store)
        until(lambda: archived(store, ids))
        until(lambda: held(first) == [4])


def test_partitions_that_nobody_takes_are_taken_back(store):
    """The other tries for leases and takes none: it hangs in between, say."""
    rival = Lease(store.wire, store.keys, "rival", seconds=1e6)
    with at_work(store) as first:
        until(lambda: held(first) == [4])
        ids = write(store)

        def is_given_up():
            assert not rival.renew(0), "it only lets itself be seen"
            return held(first) == [2]

        until(is_given_up)
        ids += write(store)
        until(lambda: archived(store, ids))


def test_archiver_that_cannot_archive_leaves_everything_to_one_that_can(store):
    """The folder of one is full, or not writable there; it came first, and held all partitions for good."""
    tries = []

    def fail(step):
        tries.append(step)
        raise OSError(errno.ENOSPC, "No space left on device")

    with at_work(store, on_step=fail) as full:
        until(lambda: held(full) == [4])
        with at_work(store) as sound:
            until(lambda: held(full, sound) == [2, 2])
            ids = write(store)
            until(lambda: archived(store, ids))
            assert (full.done.entries, sound.done.entries) == (0, entries_of(store, ids))
            until(lambda: held(full, sound) == [0, 4])
            while full._next_aside < 4.0:  # it tries again now and then
                ids += write(store, count=1)
                if time.monotonic() < full._aside_until:
                    assert isinstance(full.pulse.trouble, OSError), "it is not ready, for whoever asks"
                threading.Event().wait(LEASE / 6)
            until(lambda: archived(store, ids))
        tries.clear()
        late = write(store)
        until(lambda: len(tries) > 1, what="it tries again where there is no other")
        assert not archived(store, late)
    Archiver(store).run(once=True)
    assert archived(store, late)


def test_one_failure_of_the_sound_archiver_does_not_leave_everything_to_the_other(store):
    """It stood aside for 16 leases, and was not seen meanwhile by the one that fails for good."""
    failures = iter([OSError(errno.EIO, "Input/output error")])

    def fail_once(step):
        for error in failures:
            raise error

    def fail(step):
        raise OSError(errno.ENOSPC, "No space left on device")

    with at_work(store, on_step=fail), at_work(store, on_step=fail_once) as sound:
        until(lambda: held(sound) == [2])
        ids = write(store)
        waiting.until(lambda: archived(store, ids), seconds=15 * LEASE)
        until(lambda: sound.pulse.trouble is None)


def test_archiver_that_is_alone_goes_on_trying(store):
    failures = iter([OSError(errno.EIO, "Input/output error")] * 2)

    def fail(step):
        for error in failures:
            raise error

    with at_work(store, on_step=fail):
        ids = write(store)
        until(lambda: archived(store, ids))


def test_run_once_beside_another_gives_nothing_up(store):
    rival = Lease(store.wire, store.keys, "rival", seconds=LEASE)
    begun = time.monotonic()
    ids = write(store)

    def linger(step):
        """Until the rival would count, which lets itself be seen."""
        while time.monotonic() < begun + 4 * LEASE:
            rival.renew(0)
            threading.Event().wait(LEASE / 6)

    archiver = Archiver(store, lease_seconds=LEASE, on_step=linger)
    archiver.run(once=True)
    assert archiver.done.entries == entries_of(store, ids)
    assert archiver.done.partitions == 4


def test_partition_that_is_held_on_is_not_gone_through_with_every_look_at_the_leases(store, monkeypatch):
    swept = []

    def count(run, partitions, **options):
        swept.extend(partitions)
        return sweep(run, partitions, **options)

    monkeypatch.setattr("trajstore.archiver.sweep", count)
    with at_work(store) as archiver:
        until(lambda: held(archiver) == [4])
        threading.Event().wait(2 * LEASE)
    assert sorted(swept) == [0, 1, 2, 3]


def test_what_was_refused_is_tried_again_by_who_takes_its_partition_anew(store):
    """Also by the same archiver, after a failure."""
    failures: list[OSError] = []

    def fail(step):
        while failures:
            raise failures.pop()

    with at_work(store, on_step=fail) as archiver:
        until(lambda: held(archiver) == [4])
        trajectory = store.create(routing=SPEC)
        store.flush()
        with trajectory.segment(context=[1]) as segment:
            segment.close("stop")
        store.flush()
        store.wire.call("XADD", store.keys.entries(trajectory.id), "9-0", "e", b"not trajstore's")
        store.wire.call(
            "XADD", store.keys.feed(store.keys.partition(trajectory.id)), "*", "t", trajectory.id, "k", "x", "e", "9-0"
        )
        until(lambda: archiver.done.refused)
        store.wire.call("XDEL", store.keys.entries(trajectory.id), "9-0")
        failures.append(OSError(errno.EIO, "Input/output error"))
        ids = write(store, count=1)
        until(lambda: archived(store, [*ids, trajectory.id]))
