"""The keys of a finished trajectory expire after a grace period, and nothing that comes meanwhile goes with them."""

import contextlib
import threading
from functools import partial

import pytest

import trajstore
from tests import waiting
from tests.builders import record_seed_case, rows
from tests.log.proxy import FaultyProxy
from trajstore.archiver import Archiver

until = partial(waiting.until, seconds=20.0)


@pytest.fixture
def client(own_server):
    """A plain client of a server that fsyncs, so that an archiver need not wait."""
    with own_server.client() as client:
        client.config_set("appendfsync", "always")
        yield client


@pytest.fixture
def proxy(own_server):
    """Between an archiver and the server."""
    with FaultyProxy(own_server.port) as proxy:
        yield proxy


@pytest.fixture
def open_at(client, run_name, tmp_path):
    """Opens stores of this test's run at the server or the proxy."""
    with contextlib.ExitStack() as stores:

        def open_(place, **options):
            options = {"partitions": 1, "ack": "fsync", "archive": tmp_path / "archive"} | options
            return stores.enter_context(trajstore.open(place.url(run_name), **options))

        yield open_


def finished(store):
    """A finished trajectory."""
    trajectory = record_seed_case(store)
    trajectory.close("completed")
    store.flush()
    return trajectory


def left_of(store, id):
    """Milliseconds until the streams of a trajectory go: -1 for never, -2 for one that is not there."""
    return [store.wire.call("PTTL", key) for key in (store.keys.entries(id), store.keys.notes(id))]


def connections(client):
    return {one["id"] for one in client.client_list()}


@pytest.mark.parametrize("deleted", [False, True], ids=["a note", "a tombstone"])
def test_what_came_before_a_late_request_to_let_a_trajectory_go_does_not_go_with_it(
    own_server, client, proxy, open_at, deleted
):
    """Found by simulation seed 20143: it arrived when its archiver was gone, and no other came before the keys went."""
    store = open_at(own_server)
    trajectory = finished(store)
    there = connections(client)
    with open_at(proxy, timeout=1.0) as archiving, contextlib.suppress(trajstore.Unavailable):
        gate = proxy.hold_before(b"PEXPIRE")
        Archiver(archiving).run(once=True)
    assert proxy.fired.is_set()
    held = connections(client) - there
    assert held
    if deleted:
        assert store.delete(trajectory.id) == 1
    else:
        store.get(trajectory.id).observe(rows(3), start=0, source="trainer")
        store.flush()
    gate.set()
    until(lambda: not held & connections(client))
    entries, notes = left_of(store, trajectory.id)
    assert (entries if deleted else notes) == -1, "it is not archived yet"


def test_note_that_comes_while_many_are_let_go_stays_and_holds_up_no_other(own_server, client, proxy, open_at):
    store, archiving = open_at(own_server), open_at(proxy)
    trajectories = [finished(store) for _ in range(5)]
    noted = trajectories[3]
    gate = proxy.hold_before(b"PEXPIRE")
    trimmed = []

    def look(step):
        if step == "trimmed":
            trimmed.append([left_of(store, one.id) for one in trajectories])

    thread = threading.Thread(target=lambda: Archiver(archiving, on_step=look).run(once=True))
    thread.start()
    assert proxy.fired.wait(20)
    store.get(noted.id).observe(rows(3), start=0, source="trainer")
    store.flush()
    gate.set()
    thread.join(30)
    assert not thread.is_alive()
    assert [entries > 0 for entries, _ in trimmed[0]] == [True, True, True, False, True]
    assert trimmed[0][3] == [-1, -1]
    assert all(left > 0 for left in left_of(store, noted.id)), "by now the note is archived"
    assert [note.stored == "hot" for note in store.notes(noted.id)] == [False]


def test_keys_that_a_full_server_does_not_let_go_are_let_go_once_it_has_room(own_server, client, open_at):
    """Redis takes no transaction while its memory is full, not even of what needs none; Valkey 9 does."""
    store = open_at(own_server)
    trajectory = finished(store)
    client.config_set("maxmemory", "1")
    done = Archiver(store).run(once=True)
    assert (done.trajectories, done.refused) == (1, 0)
    assert store.hot.read(trajectory.id)[0] == []
    waits = client.xpending(store.keys.feed(0), "archiver")["pending"] > 0
    assert (left_of(store, trajectory.id)[0] == -1) == waits
    client.config_set("maxmemory", "0")
    assert Archiver(store).run(once=True).packs == 0
    assert left_of(store, trajectory.id)[0] > 0
    assert client.xpending(store.keys.feed(0), "archiver")["pending"] == 0
