"""A master dies and its replica takes over: what was acknowledged may be gone, and nobody writes above the hole."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

import trajstore
from tests.cluster.conftest import StartCluster
from tests.cluster.nodes import Cluster, Node
from tests.waiting import until
from trajstore.archive.verify.verify import verify
from trajstore.archiver import Archiver
from trajstore.materializer import Materializer
from trajstore.ready import assembly_name

OpenAt = Callable[..., trajstore.Store]


def cut_off(master: Node, replica: Node) -> None:
    """From now on the replica hears nothing of what the master does."""
    replica.ask("CONFIG", "SET", "masterauth", "wrong")
    master.ask("CLIENT", "KILL", "TYPE", "replica")
    until(lambda: "master_link_status:down" in replica.ask("INFO", "replication"), seconds=10)


def in_step(master: Node) -> bool:
    """The replica has acknowledged all that the master has done."""
    told = dict(line.partition(":")[::2] for line in master.ask("INFO", "replication").splitlines())
    return f"offset={told['master_repl_offset']}," in told["slave0"]


def with_replica(cluster: Cluster, store: trajstore.Store) -> tuple[Node, Node]:
    """The master that has the run's one partition, and a replica of it."""
    master = cluster.owner(store.keys.feed(0))
    return master, cluster.add_replica(master)


def test_writer_goes_on_at_the_replica_and_nothing_replicated_is_lost(
    start_cluster: StartCluster, open_at: OpenAt, tmp_path: Path
) -> None:
    cluster = start_cluster()
    store = open_at(cluster, archive=tmp_path / "archive", partitions=1)
    master, replica = with_replica(cluster, store)
    handle = store.create()
    segment = handle.segment(context=[0])
    for token in range(1, 10):
        segment.tokens([token], None)
        store.flush()
    until(lambda: in_step(master), seconds=10)
    master.kill()
    for token in range(10, 20):
        segment.tokens([token], None)
    store.flush()
    segment.close("stop")
    handle.close("completed")
    store.flush()
    assert "role:master" in replica.ask("INFO", "replication")
    assert list(store.load(handle.id).token_ids) == list(range(20))
    assert Materializer(store).run(once=True).trajectories == 1
    assert Archiver(store).run(once=True).trajectories == 1
    assert list(trajstore.open_archive(tmp_path / "archive").load(handle.id).token_ids) == list(range(20))


def test_acknowledged_events_that_the_replica_lacks_are_written_again(
    start_cluster: StartCluster, open_at: OpenAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajstore.store.FSYNC_HORIZON", 600.0)  # else a slow machine takes longer
    cluster = start_cluster()
    store = open_at(cluster, partitions=1)
    master, replica = with_replica(cluster, store)
    handle = store.create()
    segment = handle.segment(context=[0])
    segment.tokens([1], None)
    store.flush()
    until(lambda: in_step(master), seconds=10)
    cut_off(master, replica)
    for token in range(2, 6):
        segment.tokens([token], None)
        store.flush()
    master.kill()
    segment.tokens([6], None)
    store.flush()
    assert list(store.load(handle.id).token_ids) == list(range(7))
    ids = [event.id for event in store.events(handle.id)]
    assert len(set(ids)) == len(ids) == 8


class LostTail(NamedTuple):
    """What a test of a lost tail has to do with."""

    cluster: Cluster
    store: trajstore.Store
    master: Node
    replica: Node
    segment: trajstore.SegmentWriter
    id: str


def lost_tail(start_cluster: StartCluster, open_at: OpenAt) -> LostTail:
    """A writer whose newest acknowledged token is on the master's disk only, and that keeps nothing to send again."""
    cluster = start_cluster(appendfsync="always")
    store = open_at(cluster, partitions=1, ack="fsync")
    master, replica = with_replica(cluster, store)
    handle = store.create()
    segment = handle.segment(context=[0])
    segment.tokens([1], None)
    store.flush()
    until(lambda: in_step(master), seconds=10)
    cut_off(master, replica)
    segment.tokens([2], None)
    store.flush()
    return LostTail(cluster, store, master, replica, segment, handle.id)


def test_nothing_is_written_above_what_the_failover_lost(start_cluster: StartCluster, open_at: OpenAt) -> None:
    _, store, master, _, segment, id = lost_tail(start_cluster, open_at)
    master.kill()
    segment.tokens([3], None)
    with pytest.raises(trajstore.SequenceGap) as raised:
        store.flush(id)
    assert raised.value.last_good == "2-1"
    assert list(store.load(id).token_ids) == [0, 1]
    resumed = store.get(id)
    with resumed.segment(base=None, context=[]) as again:
        again.tokens([7], None)
    store.flush(id)
    assert list(store.load(id).token_ids) == [0, 1, 7]


def test_what_was_archived_is_there_whatever_the_replica_lacks(
    start_cluster: StartCluster, open_at: OpenAt, tmp_path: Path
) -> None:
    cluster = start_cluster(appendfsync="always")
    store = open_at(cluster, partitions=1, ack="fsync", archive=tmp_path / "archive")
    master, replica = with_replica(cluster, store)
    handle = store.create()
    store.flush()
    until(lambda: in_step(master), seconds=10)
    cut_off(master, replica)
    with handle.segment(context=[0]) as segment:
        segment.tokens([1, 2], None)
    handle.close("aborted")
    store.flush()
    Archiver(store).run(once=True)
    master.kill()
    cluster.until_promoted(replica)
    assert list(store.load(handle.id).token_ids) == [0, 1, 2]
    store.create()
    store.flush()  # does not take for lost what the first handle has written
    resumed = store.get(handle.id)
    with resumed.segment(base=None, context=[]) as segment:
        segment.tokens([3], None)
    resumed.close("completed")
    store.flush()
    Archiver(store).run(once=True)
    assert list(trajstore.open_archive(tmp_path / "archive").load(handle.id).token_ids) == [0, 1, 2, 3]
    assert [finding for finding in verify(store) if finding.severity != "information"] == []


def test_master_that_was_replaced_and_came_back_is_not_taken_for_what_it_was(
    start_cluster: StartCluster, open_at: OpenAt
) -> None:
    """Two failovers while a writer says nothing: its connection outlives both, and its newest event does not."""
    cluster, store, master, replica, segment, id = lost_tail(start_cluster, open_at)
    master.pause()
    cluster.until_promoted(replica)
    master.resume()
    until(lambda: "master_link_status:up" in master.ask("INFO", "replication"), seconds=20)
    master.ask("CLUSTER", "FAILOVER", "TAKEOVER")
    cluster.until_promoted(master)
    assert store._flusher._session.connected
    segment.tokens([3], None)
    with pytest.raises(trajstore.SequenceGap):
        store.flush(id)
    assert list(store.load(id).token_ids) == [0, 1]


def test_without_a_replica_the_partition_is_unavailable_and_comes_back_whole(
    start_cluster: StartCluster, open_at: OpenAt
) -> None:
    cluster = start_cluster(appendfsync="always")
    store = open_at(cluster, partitions=1, ack="fsync", timeout=1.5)
    handle = store.create()
    store.flush()
    master = cluster.owner(store.keys.feed(0))
    master.kill()
    handle.segment(context=[0])
    with pytest.raises(trajstore.Unavailable):
        store.flush(handle.id)
    with pytest.raises(trajstore.Unavailable):
        store.load(handle.id)
    master.start()
    cluster.until_well()
    again = store.get(handle.id).segment(context=[0])
    again.tokens([1], None)
    store.flush(handle.id)
    assert list(store.load(handle.id).token_ids) == [0, 1]


def published_elsewhere(cluster: Cluster, store: trajstore.Store, *, group: str | None = "g") -> tuple[str, str, Node]:
    """A closed trajectory that is published on another server than its own: its id, where, and that server."""
    owners = [cluster.owner(store.keys.feed(partition)) for partition in range(store.partitions)]
    for id in map(str, count()):
        size = None if group is None else 1
        there = store.keys.partition(assembly_name(id, group, size))
        if owners[there] is not owners[store.keys.partition(id)]:
            store.create(id=id, group=group, group_size=size).close("completed")
            store.flush()
            return id, store.keys.ready(there), owners[there]
    raise AssertionError


@pytest.mark.parametrize("group", ["g", None], ids=["a group", "one by itself"])
def test_group_is_published_again_if_its_server_loses_it_while_a_members_server_has_the_hint_as_done(
    start_cluster: StartCluster, open_at: OpenAt, group: str | None
) -> None:
    cluster = start_cluster()
    store = open_at(cluster, partitions=8)
    id, ready, keeper = published_elsewhere(cluster, store, group=group)
    before = keeper.aof().stat().st_size
    materializer, stop = Materializer(open_at(cluster, partitions=8)), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(materializer.run, stop=stop)
        try:
            until(lambda: materializer.done.groups == 1, seconds=30)
            keeper.kill()
            os.truncate(
                keeper.aof(), before
            )  # as a power cut does, or a replica that takes over and has not heard of it
            keeper.start()
            cluster.until_well()
            until(lambda: store.wire.call("XLEN", ready) == 1, seconds=20, what="that it is there again")
            feed = store.keys.feed(store.keys.partition(id))
            until(
                lambda: not store.wire.call("XPENDING", feed, "materializer")[0],
                seconds=20,
                what="that its hint is done",
            )
        finally:
            stop.set()
        working.result(30)
    assert store.wire.call("XLEN", ready) == 1


def test_materializer_goes_on_at_the_replica_of_a_groups_server_that_does_not_come_back(
    start_cluster: StartCluster, open_at: OpenAt
) -> None:
    cluster = start_cluster()
    store = open_at(cluster, partitions=8)
    id, ready, keeper = published_elsewhere(cluster, store)
    replica = cluster.add_replica(keeper)
    materializer, stop = Materializer(open_at(cluster, partitions=8)), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(materializer.run, stop=stop)
        try:
            until(lambda: materializer.done.groups == 1, seconds=30)
            until(lambda: in_step(keeper), seconds=10)
            keeper.kill()
            cluster.until_promoted(replica)
            feed = store.keys.feed(store.keys.partition(id))
            until(
                lambda: not store.wire.call("XPENDING", feed, "materializer")[0],
                seconds=30,
                what="that its hint is done",
            )
        finally:
            stop.set()
        working.result(30)
    assert store.wire.call("XLEN", ready) == 1


def test_hints_are_acknowledged_in_time_however_much_a_materializer_has_in_hand(
    cluster: Cluster, open_at: OpenAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else others would take over what is done."""
    monkeypatch.setattr("trajstore.materializer.FSYNC_HORIZON", 0.0)
    store = open_at(cluster, partitions=8)
    id, _, _ = published_elsewhere(cluster, store)
    feed = store.keys.feed(store.keys.partition(id))
    later = [
        next(one for one in map(str, count(1000 * n)) if store.keys.feed(store.keys.partition(one)) == feed)
        for n in range(1, 4)
    ]
    for one in later:
        store.create(id=one, group="g", group_size=1).close("completed")
        store.flush()
    pending = []

    def look(step: str) -> None:
        if step == "acknowledged":
            pending.append(store.wire.call("XPENDING", feed, "materializer")[0])

    Materializer(store, on_step=look).run(once=True)
    assert pending[0] == 4
    assert pending[-1] < 3
