"""The notes stream: observations and late recordings at any time, by anybody, fencing nobody."""

import threading

import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.log.looking import entries, notes, payload_fields
from trajstore.archiver import Archiver


def sources(store, id):
    """Who noted something, in order."""
    return [note.header.source for note in store.notes(id)]


def test_notes_of_several_writers_are_renumbered_and_none_is_lost(store, open_store, client):
    id = record_seed_case(store).id
    store.flush()
    stores = [store, open_store(), open_store()]
    start = threading.Barrier(len(stores))

    def note(mark):
        handle = stores[mark].get(id)
        start.wait(10)
        for i in range(10):
            handle.observe(rows(5, seed=mark), start=0, source=f"{mark}-{i}")
        stores[mark].flush(id)

    threads = [threading.Thread(target=note, args=(mark,)) for mark in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(sources(store, id)) == sorted(f"{mark}-{i}" for mark in range(3) for i in range(10))
    assert [at for at, _ in notes(client, store, id)] == [f"{n}-0" for n in range(1, 31)]
    for mark in range(3):  # and each writer's own in its order
        mine = [source for source in sources(store, id) if source.startswith(f"{mark}-")]
        assert mine == [f"{mark}-{i}" for i in range(10)]


def test_each_note_keeps_its_own_rows(store, open_store):
    id = record_seed_case(store).id
    store.flush()
    first, second = store.get(id), open_store().get(id)
    for i in range(5):
        first.observe(rows(10, seed=i), start=0, source=f"a{i}")
        second.observe(rows(10, seed=100 + i), start=0, source=f"b{i}")
    store.flush()
    second._flusher.flush()
    for one in store.plan(id).history.observations:
        seed = int(one.source[1:]) + (100 if one.source[0] == "b" else 0)
        assert (store.recorded_rows(id, one) == rows(10, seed=seed)).all()


def test_first_note_leaves_no_payload_behind(store, client):
    """It is numbered before it is sent, not by trial: its payload would stay under a number that it did not get."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[0] * 100) as segment:
        segment.close("stop")
    store.flush()
    trajectory.observe(rows(100), start=0, source="trainer")
    store.flush()
    assert [field.partition(":")[0] for field in payload_fields(client, store, trajectory.id)] == ["n1-0"]


def test_notes_fence_nobody_and_are_fenced_by_nobody(store, open_store):
    trajectory = store.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2, 3])
    segment.tokens([4])
    store.flush()
    other = open_store()
    observer = other.get(trajectory.id)
    observer.observe(rows(3), start=0, source="trainer")
    other.flush()
    segment.tokens([5])
    segment.close("stop")
    trajectory.close()
    store.flush()
    observer.observe(rows(3), start=0, source="again")
    other.flush()
    assert sources(store, trajectory.id) == ["trainer", "again"]
    assert store.load(trajectory.id).status == "completed"


def test_observations_never_enter_a_fold(store):
    trajectory = record_seed_case(store)
    store.flush()
    before = store.load(trajectory.id).routed_experts.copy()
    trajectory.observe(rows(10, seed=5), start=0, source="trainer")
    store.flush()
    assert (store.load(trajectory.id).routed_experts == before).all()


def test_late_recording_folds_after_the_close(store):
    """Pitfall 9: "last" is by segment order, not by arrival."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
        segment.close("stop")
    trajectory.close()
    store.flush()
    assert not store.load(trajectory.id).routing_mask.any()
    trajectory.late_routing(rows(3, seed=1), segment=0, start=0)
    store.flush()
    loaded = store.load(trajectory.id)
    assert loaded.routing_mask.tolist() == [True, True, True, False]
    assert (loaded.routed_experts[:3] == rows(3, seed=1)).all()


@pytest.fixture
def archived(start_server, tmp_path, open_at):
    """A final trajectory with two notes, all of it archived; with its store and server."""
    server = start_server(appendfsync="always")
    store = open_at(server, archive=tmp_path / "archive")
    trajectory = record_seed_case(store)
    trajectory.close()
    for source in ("one", "two"):
        trajectory.observe(rows(5), start=0, source=source)
    store.flush()
    Archiver(store).run(once=True)
    return server, store, trajectory.id


def test_notes_go_on_after_archiving(archived):
    server, store, id = archived
    with server.client() as client:
        assert client.xlen(store.keys.notes(id)) == 0
        store.get(id).observe(rows(5), start=0, source="three")
        store.flush()
        assert client.ttl(store.keys.notes(id)) == -1  # they do not go with the final trajectory's keys
        assert sources(store, id) == ["one", "two", "three"]
        Archiver(store).run(once=True)
        assert client.xlen(store.keys.notes(id)) == 0
    assert sources(store, id) == ["one", "two", "three"]
    assert [note.at.epoch for note in store.notes(id)] == [1, 2, 3]


def test_notes_go_on_after_removal_and_their_numbers_too(archived, open_at, tmp_path):
    """A deleted stream would take number 1 again; the archive knows better."""
    server, store, id = archived
    stale = store.get(id)
    with server.client() as client:
        for key in (store.keys.entries(id), store.keys.payloads(id), store.keys.notes(id)):
            client.delete(key)
    for handle, source in ((stale, "three"), (open_at(server, archive=tmp_path / "archive").get(id), "four")):
        handle.observe(rows(5), start=0, source=source)
        handle._flusher.flush(id)
    assert sources(store, id) == ["one", "two", "three", "four"]
    assert [note.at.epoch for note in store.notes(id)] == [1, 2, 3, 4]


def test_note_of_a_handle_that_knew_of_no_notes_takes_a_free_number_after_removal(start_server, tmp_path, open_at):
    server = start_server(appendfsync="always")
    store = open_at(server, archive=tmp_path / "archive")
    trajectory = record_seed_case(store)
    trajectory.close()
    store.flush()
    unknowing = store.get(trajectory.id)
    open_at(server).get(trajectory.id).observe(rows(5), start=0, source="first")
    server_side = open_at(server, archive=tmp_path / "archive")
    server_side.get(trajectory.id).observe(rows(5), start=0, source="second")
    server_side.flush()
    Archiver(server_side).run(once=True)
    with server.client() as client:
        client.delete(store.keys.notes(trajectory.id))
    taken = len(store.notes(trajectory.id))
    unknowing.observe(rows(5), start=0, source="late")
    store.flush()
    assert sources(store, trajectory.id)[-1] == "late"
    assert len(store.notes(trajectory.id)) == taken + 1


def begun(store, **options):
    """A trajectory of five tokens, of which nothing is waited for."""
    trajectory = store.create(routing=SPEC, **options)
    trajectory.segment(context=[1, 2, 3, 4, 5]).close("stop")
    return trajectory


def test_note_goes_out_only_once_its_trajectory_is_there(own_server, own_client, proxy, open_at):
    """Found by simulation seed 30002: the trajectory was never written, and its note stayed in the log for good."""
    store = open_at(proxy)
    busy = proxy.hold_before(b"XADD")
    begun(store)
    assert proxy.fired.wait(10)
    trajectory = begun(store)
    trajectory.observe(rows(5), start=0, source="trainer")
    gate = proxy.hold_before(b":n:")
    busy.set()
    assert proxy.fired.wait(10)
    assert entries(own_client, store, trajectory.id)
    gate.set()
    store.flush()
    assert sources(store, trajectory.id) == ["trainer"]


def test_note_of_whoever_came_too_late_to_create_a_trajectory_is_not_the_others(own_server, proxy, open_at):
    store, other = open_at(proxy), open_at(own_server)
    gate = proxy.hold_before(b"XADD")
    loser = begun(store, id="mine")
    loser.observe(rows(5), start=0, source="loser")
    assert proxy.fired.wait(10)
    begun(other, id="mine").observe(rows(5), start=0, source="winner")
    other.flush()
    gate.set()
    with pytest.raises(trajstore.Fenced):  # alone: it is one failure
        store.flush()
    with pytest.raises(trajstore.Fenced):
        loser.observe(rows(5), start=0, source="loser")
    with pytest.raises(trajstore.Fenced):
        store.flush("mine")
    assert sources(store, "mine") == ["winner"]
    store.get("mine").observe(rows(5), start=0, source="loser")
    store.flush()
    assert sources(store, "mine") == ["winner", "loser"]


def test_rows_past_the_end_are_refused_at_the_call(store):
    trajectory = record_seed_case(store)
    with pytest.raises(trajstore.RoutingError, match="past the 10 tokens"):
        trajectory.observe(rows(11), start=0, source="trainer")
    assert store.notes(trajectory.id) == []
