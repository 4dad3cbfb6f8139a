"""A server whose memory is full: writers stop in time, reads go on, and an archiver drains it without new memory."""

import numpy as np
import pytest
import redis

import trajstore
from tests.builders import SPEC
from trajstore.archiver import Archiver
from trajstore.ready_follower import ReadyFollower

BLOCK = 20_000


def fill(store, *, most=400):
    """Write finished trajectories until the store is full; returns those acknowledged, with their routing."""
    written = {}
    for seed in range(most):
        first = np.random.default_rng(seed).integers(0, 4, (BLOCK, 3, 1), np.uint8)
        block = np.concatenate([first, first + 4], axis=-1)
        try:
            trajectory = store.create(routing=SPEC)
            with trajectory.segment(context=[0] * BLOCK) as segment:
                segment.routing(block, start=0)
                segment.close("stop")
            trajectory.close()
            store.flush(trajectory.id)
        except trajstore.StoreFull:
            return written
        written[trajectory.id] = block
    raise AssertionError("the server never filled up")


@pytest.fixture
def full(start_server, tmp_path, open_at):
    """A server that fsyncs (so that the archiver need not wait), and a store on it with a short deadline."""
    server = start_server(maxmemory="16mb", appendfsync="always")
    return server, open_at(server, archive=tmp_path / "archive", timeout=1.0)


def test_writers_stop_short_of_a_full_server_and_change_nothing(full):
    server, store = full
    written = fill(store)
    assert written
    with server.client() as client:
        info = client.info("memory")
        assert 0.85 * info["maxmemory"] < info["used_memory"] < info["maxmemory"]
    for id, block in written.items():
        loaded = store.load(id)
        assert loaded.status == "completed"
        assert (loaded.routed_experts == block).all()


def test_store_full_is_what_the_failed_trajectory_says_until_it_is_opened_again(full):
    _, store = full
    written = fill(store)
    trajectory = store.get(next(iter(written)))
    trajectory.observe(written[trajectory.id][:5], start=0, source="trainer")
    with pytest.raises(trajstore.StoreFull, match="Start an archiver"):
        store.flush(trajectory.id)
    with pytest.raises(trajstore.StoreFull):
        trajectory.observe(written[trajectory.id][:5], start=0, source="trainer")
    assert store.notes(trajectory.id) == []
    assert store.load(trajectory.id).status == "completed"


@pytest.mark.parametrize("over", [False, True], ids=["at 90 %", "far above maxmemory"])
def test_an_archiver_started_on_the_full_server_drains_it_and_writing_goes_on(full, tmp_path, over):
    server, store = full
    written = fill(store)
    with server.client() as client:
        if over:
            client.config_set("maxmemory", "8mb")
        before = client.info("memory")["used_memory"]
        with trajstore.open(server.url(store.run), archive=tmp_path / "archive") as archiving:
            done = Archiver(archiving).run(once=True)
        assert done.trajectories >= len(written)
        assert client.info("memory")["used_memory"] < before / 2
    for id, block in written.items():
        assert (store.load(id).routed_experts == block).all()
    again = store.create(routing=SPEC)
    again.close()
    store.flush(again.id)
    assert store.load(again.id).status == "completed"


def test_consumer_groups_exist_since_the_first_open(store, client):
    """A full server refuses XGROUP CREATE, so nobody may need one later."""
    for partition in range(store.partitions):
        groups = {group["name"].decode() for group in client.xinfo_groups(store.keys.feed(partition))}
        assert groups == {"archiver", "materializer"}
        assert client.xinfo_groups(store.keys.lease(partition))
        assert client.xinfo_groups(store.keys.ready(partition))


def test_trainer_of_a_consumer_group_of_its_own_comes_back_on_a_full_server(full):
    """Found by the chaos run: the server refuses to make its group, although there is one."""
    server, store = full
    group, consumers = "another", ("first", "second")
    ReadyFollower(store.wire, store.keys, group, consumers[0])
    ready = store.keys.ready(0)
    with server.client() as client:
        client.xadd(ready, {"g": b"entry"})
        client.config_set("maxmemory", "1mb")
        with pytest.raises(redis.OutOfMemoryError):
            client.xgroup_create(ready, group)
        ReadyFollower(store.wire, store.keys, group, consumers[1])
        assert client.xreadgroup(group, consumers[1], {ready: ">"})[0][1][0][1] == {b"g": b"entry"}


def test_new_run_on_a_full_server_is_refused_as_full(full):
    server, store = full
    fill(store)
    with server.client() as client:
        client.config_set("maxmemory", "8mb")
        with pytest.raises(trajstore.StoreFull):
            trajstore.open(server.url(store.run + "-2"))
        assert not client.exists(f"trajstore:{{{store.run}-2}}:run")
