"""Commands find their servers, replies come in order, and nothing that may have run is sent again."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

import trajstore
from tests.builders import record_seed_case
from tests.cli.running import invoke
from tests.cluster.conftest import StartCluster
from tests.cluster.nodes import Cluster, Node
from tests.servers import free_port
from tests.waiting import until
from trajstore.archiver import Archiver
from trajstore.health import ready
from trajstore.log.bulk import Value
from trajstore.log.cluster import ClusterWire, connect
from trajstore.recovery import recover
from trajstore.status import RunLook

OpenAt = Callable[..., trajstore.Store]


def wire_to(cluster: Cluster, *, timeout: float = 10.0) -> ClusterWire:
    wire = connect(cluster.url("none").partition("?")[0], timeout=timeout)
    assert isinstance(wire, ClusterWire)
    return wire


def key_of(node: Node, cluster: Cluster, name: str) -> str:
    """A key that a server has; all of one name and server share a slot."""
    return next(key for n in range(1000) if cluster.owner(key := f"{{{name}-{n}}}") is node)


def other(cluster: Cluster, node: Node) -> Node:
    return next(one for one in cluster.nodes if one is not node)


def test_replies_of_all_servers_come_in_the_order_of_their_commands(cluster: Cluster, run_name: str) -> None:
    wire = wire_to(cluster)
    keys = [f"{run_name}-{n}" for n in range(300)]
    assert {cluster.owner(key).port for key in keys[:50]} == {node.port for node in cluster.nodes}
    assert wire.call_all([("SET", key, key) for key in keys]) == [b"OK"] * 300
    assert wire.call_all([("GET", key) for key in keys]) == [key.encode() for key in keys]
    assert wire.fetch([*keys, "not there"], lambda value: value.read()) == [*(key.encode() for key in keys), None]


def test_slot_that_moved_is_followed_and_nothing_runs_twice(cluster: Cluster, run_name: str) -> None:
    wire = wire_to(cluster)
    tag = f"{{{run_name}}}"
    wire.call("INCR", f"{tag}-a")
    source = cluster.owner(tag)
    cluster.move(key_slot(tag.encode()), other(cluster, source))
    assert wire.transaction([("INCR", f"{tag}-a"), ("INCR", f"{tag}-b")]) == [2, 1]
    assert wire.call_all([("INCR", f"{tag}-a"), ("GET", f"{tag}-b")]) == [3, b"1"]


def test_keys_on_their_way_are_found_at_either_server(cluster: Cluster, run_name: str) -> None:
    wire = wire_to(cluster)
    keys = [f"{{{run_name}}}-{n}" for n in range(7)]
    wire.call_all([("SET", key, key) for key in keys])
    seen = []

    def read(value: Value) -> bytes:
        data = value.read()
        assert value.command == ("GET", data.decode())
        return data

    def look() -> None:
        seen.append(wire.call_all([("GET", key) for key in keys]))
        seen.append(wire.fetch(keys, read))
        wire.call("INCR", f"{{{run_name}}}-count")

    cluster.move(key_slot(keys[0].encode()), other(cluster, cluster.owner(keys[0])), between=look)
    assert len(seen) >= 6
    assert seen == [[key.encode() for key in keys]] * len(seen)
    assert wire.call("GET", f"{{{run_name}}}-count") == str(len(seen) // 2).encode()


def test_transaction_over_keys_on_their_way_is_refused_whole_and_passes_afterwards(
    cluster: Cluster, run_name: str
) -> None:
    wire = wire_to(cluster)
    tag = f"{{{run_name}}}"
    wire.call_all([("SET", f"{tag}-{n}", 0) for n in range(7)])
    passed, refused = 0, []

    def add() -> None:
        nonlocal passed
        try:
            wire.transaction([("INCR", f"{tag}-{n}") for n in range(7)])
            passed += 1
        except trajstore.Unavailable as error:
            refused.append(error)

    cluster.move(key_slot(tag.encode()), other(cluster, cluster.owner(tag)), between=add)
    add()
    assert refused
    assert wire.call_all([("GET", f"{tag}-{n}") for n in range(7)]) == [str(passed).encode()] * 7


def test_watch_follows_a_slot_that_moved(cluster: Cluster, run_name: str) -> None:
    wire = wire_to(cluster)
    key = f"{{{run_name}}}"
    wire.call("SET", key, 1)
    cluster.move(key_slot(key.encode()), other(cluster, cluster.owner(key)))
    with wire.watching(key) as watch:
        assert watch.call("GET", key) == b"1"
        assert wire.transaction([("INCR", key)], watch=watch) == [2]
    with wire.watching(key) as watch:
        wire.call("INCR", key)
        assert wire.transaction([("INCR", key)], watch=watch) is None


def test_command_whose_reply_was_lost_is_not_sent_again(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    wire = wire_to(cluster, timeout=1.0)
    node = cluster.nodes[1]
    key = key_of(node, cluster, "counted")
    wire.call("INCR", key)
    node.pause()
    with pytest.raises(trajstore.Unavailable):
        wire.call("INCR", key)
    node.resume()
    cluster.until_well()
    assert wire_to(cluster).call("GET", key) == b"2"


def test_server_that_is_away_does_not_keep_new_entries_of_others_back(start_cluster: StartCluster) -> None:
    cluster = start_cluster(**{"cluster-require-full-coverage": "no"})
    wire = wire_to(cluster, timeout=5.0)
    streams = [key_of(node, cluster, "stream") for node in cluster.nodes]
    for stream in streams:
        wire.call_all([("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM"), ("XADD", stream, "1-0", "a", "b")])
    cluster.nodes[1].kill()
    new = ("XREADGROUP", "GROUP", "g", "STREAMS", "COUNT", 9, "BLOCK", 100, "STREAMS", *streams)
    found = wire.call(*new, *(">" for _ in streams))
    assert [name.decode() for name, _ in found] == [streams[0], streams[2]]
    with pytest.raises(trajstore.Unavailable):  # nothing new; and the one that is away may have something
        wire.call(*new, *(">" for _ in streams))
    with pytest.raises(trajstore.Unavailable):  # what a consumer has is told as a whole
        wire.call(*new, *("0" for _ in streams))


def test_partition_that_a_server_has_lost_does_not_keep_what_others_gave_out_back(
    cluster: Cluster, run_name: str
) -> None:
    wire = wire_to(cluster)
    streams = [key_of(node, cluster, run_name) for node in cluster.nodes]
    for stream in streams[1:]:
        wire.call_all([("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM"), ("XADD", stream, "1-0", "a", "b")])
    new = ("XREADGROUP", "GROUP", "g", "c", "STREAMS", *streams)
    assert [name.decode() for name, _ in wire.call(*new, *(">" for _ in streams))] == streams[1:]
    with pytest.raises(trajstore.Unavailable, match="NOGROUP"):
        wire.call(*new, *(">" for _ in streams))
    with pytest.raises(trajstore.Unavailable, match="NOGROUP"):
        wire.call(*new, *("0" for _ in streams))


def test_what_an_exec_has_done_is_no_failure_though_the_server_goes_away(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    wire = wire_to(cluster)
    key = key_of(cluster.nodes[1], cluster, "counted")
    with wire.watching(key) as watch:
        assert wire.transaction([("INCR", key)], watch=watch) == [1]
        cluster.nodes[1].kill()
    with pytest.raises(trajstore.Unavailable), wire.watching(key):
        pass


def test_replies_that_an_interrupted_caller_left_are_nobody_elses(
    cluster: Cluster, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = wire_to(cluster)
    keys = [key_of(node, cluster, run_name) for node in cluster.nodes[:2]]
    wire.call_all([("SET", key, key) for key in keys])
    session = wire.session(keys=keys)
    session.connect()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for exchange in (wire.exchange, session.exchange):
        with monkeypatch.context() as patch:
            patch.setattr("trajstore.log.slots.receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                exchange([("GET", key) for key in keys])
    assert wire.exchange([("STRLEN", key) for key in keys]) == [len(key) for key in keys]
    assert not session.connected
    session.connect()
    assert session.exchange([("STRLEN", key) for key in keys]) == [len(key) for key in keys]
    session.disconnect()


@contextlib.contextmanager
def hung_at(port: int) -> Iterator[socket.socket]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        yield listener


def callers(listener: socket.socket) -> list[socket.socket]:
    """Connections that were made since the last look."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(listener.accept()[0])
    return found


def replaced_by_its_replica(cluster: Cluster, master: Node) -> Node:
    replica = cluster.add_replica(master)
    master.kill()
    cluster.until_promoted(replica)
    return replica


def test_replaced_master_that_hangs_is_asked_once_and_then_left_alone(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajstore.log.cluster._PATIENCE", 0.5)
    cluster = start_cluster()
    wire = wire_to(cluster)
    gone = cluster.nodes[0]  # the one of the URL, which has told who has what
    keys = [key_of(node, cluster, "k") for node in cluster.nodes]
    wire.call_all([("SET", key, key) for key in keys])
    replica = replaced_by_its_replica(cluster, gone)
    with hung_at(gone.port) as listener:
        for _ in range(3):
            assert {one.port for one in wire.servers()} == {node.port for node in (*cluster.nodes[1:3], replica)}
        for key in keys * 2:
            assert wire.call("GET", key) == key.encode()
        lines = callers(listener)
        for line in lines:
            line.close()
        assert len(lines) == 1


def test_other_slots_do_not_wait_while_a_hung_server_is_asked_who_has_what(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trajstore.log.cluster._PATIENCE", 60.0)
    cluster = start_cluster()
    wire = wire_to(cluster, timeout=60.0)
    healthy = key_of(cluster.nodes[1], cluster, "k")
    wire.call("SET", healthy, 1)
    gone = cluster.nodes[0]
    replica = replaced_by_its_replica(cluster, gone)
    found: list[set[int]] = []
    with hung_at(gone.port) as listener:
        looking = threading.Thread(target=lambda: found.append({one.port for one in wire.servers()}))
        looking.start()
        lines: list[socket.socket] = []
        until(lambda: bool(lines.extend(callers(listener)) or lines), seconds=20)
        assert wire.call("GET", healthy) == b"1"
        assert looking.is_alive()
        for line in lines:
            line.close()
        looking.join(60.0)
    assert found == [{node.port for node in (*cluster.nodes[1:3], replica)}]


def test_server_that_has_left_the_cluster_is_not_believed(start_cluster: StartCluster) -> None:
    cluster = start_cluster()
    wire = wire_to(cluster)
    gone = cluster.nodes[0]
    keys = [key_of(node, cluster, "k") for node in cluster.nodes]
    wire.call_all([("SET", key, key) for key in keys])
    replica = cluster.add_replica(gone)
    replica.ask("CLUSTER", "FAILOVER", "TAKEOVER")
    cluster.until_promoted(replica)
    until(lambda: "role:slave" in gone.ask("INFO", "replication"), seconds=20)
    name = gone.id
    for node in cluster.nodes:
        if node is not gone:
            node.ask("CLUSTER", "FORGET", name)
    gone.ask("CLUSTER", "RESET", "SOFT")
    assert gone.ask("CLUSTER", "SLOTS") == "[]"
    for _ in range(2):
        assert {one.port for one in wire.servers()} == {node.port for node in (*cluster.nodes[1:3], replica)}
        assert wire.fetch(keys, lambda value: value.read()) == [key.encode() for key in keys]


def test_store_is_not_ready_while_any_master_is_away(start_cluster: StartCluster, open_at: OpenAt) -> None:
    cluster = start_cluster(**{"cluster-require-full-coverage": "no"})
    for node in cluster.nodes:
        store = open_at(cluster, timeout=2.0)
        assert ready(store, seconds=30.0)().status == 200
        node.kill()
        assert ready(store, seconds=30.0)().status == 503
        node.start()
        cluster.until_well()


def test_waiting_for_several_slots_ends_with_the_first_entry(cluster: Cluster, run_name: str) -> None:
    wire = wire_to(cluster)
    streams = [f"{run_name}-{n}" for n in range(9)]
    assert wire.call("XREAD", "BLOCK", 20, "STREAMS", *streams, *("0" for _ in streams)) is None
    wire.call("XADD", streams[5], "1-0", "a", "b")
    found = wire.call("XREAD", "BLOCK", 10_000, "COUNT", 1, "STREAMS", *streams, *("0" for _ in streams))
    assert found == [[streams[5].encode(), [[b"1-0", [b"a", b"b"]]]]]


def test_any_server_of_several_in_the_url_will_do(cluster: Cluster, run_name: str) -> None:
    ports = [free_port(), cluster.nodes[2].port]
    url = f"redis://{','.join(f'127.0.0.1:{port}' for port in ports)}/0?run={run_name}"
    with trajstore.open(url, timeout=5.0) as store:
        assert f"127.0.0.1:{ports[1]}" in store.location
        id = store.create().id
        store.flush()
        assert store.load(id).status == "open"


def test_several_servers_that_are_no_cluster_are_refused(cluster: Cluster, own_server: Node) -> None:
    url = f"redis://127.0.0.1:{own_server.port},127.0.0.1:{cluster.nodes[0].port}/0?run=r"
    with pytest.raises(trajstore.SchemaError, match="no cluster"):
        trajstore.open(url)


def test_fsync_is_asked_of_every_server(start_cluster: StartCluster, open_at: OpenAt) -> None:
    cluster = start_cluster(appendfsync="always")
    open_at(cluster, ack="fsync")
    cluster.nodes[2].ask("CONFIG", "SET", "appendfsync", "everysec")
    with pytest.raises(trajstore.Conflict, match="everysec"):
        open_at(cluster, ack="fsync")


def test_one_full_server_stops_writers_before_it_refuses_them(start_cluster: StartCluster, open_at: OpenAt) -> None:
    cluster = start_cluster()
    node = cluster.owner(open_at(cluster).keys.feed(0))
    store = open_at(cluster, timeout=2.0)
    node.ask("CONFIG", "SET", "maxmemory", 1 << 20)
    assert store.backlog().maxmemory == 1 << 20
    assert RunLook(store).look().server.maxmemory == 1 << 20
    store.create()
    with pytest.raises(trajstore.StoreFull, match="writing stops at 90 %"):
        store.flush()
    node.ask("CONFIG", "SET", "maxmemory", 0)
    id = store.create().id
    store.flush()
    assert store.load(id).status == "open"


def test_partition_that_a_server_has_lost_is_told_and_made_whole(
    start_cluster: StartCluster, open_at: OpenAt, tmp_path: Path
) -> None:
    cluster = start_cluster()
    store = open_at(cluster, archive=tmp_path / "archive", partitions=8)
    kept = cluster.owner(store.keys.run_record(store.run))
    lost = next(node for node in cluster.nodes if node is not kept)
    lost.ask("FLUSHALL")
    with pytest.raises(trajstore.Unavailable, match="trajstore rebuild"):
        Archiver(store).run(once=True)
    assert not recover(cluster.url(store.run)).begun
    ids = {store.create().id for _ in range(20)}
    store.flush()
    Archiver(store).run(once=True)
    assert {summary.id for summary in trajstore.open_archive(tmp_path / "archive").list()} == ids


def test_commands_work_on_a_cluster(cluster: Cluster, open_at: OpenAt, tmp_path: Path) -> None:
    store = open_at(cluster, archive=tmp_path / "archive")
    ids = []
    for _ in range(6):
        writer = record_seed_case(store)
        writer.close("completed")
        ids.append(writer.id)
    store.close()
    url = cluster.url(store.run)
    assert all(id in invoke("ls", url).stdout for id in ids)
    assert json.loads(invoke("materialize", url, "--once", "--json").stdout)["trajectories"] == 6
    assert json.loads(invoke("archive", url, "--once", "--json").stdout)["trajectories"] == 6
    assert invoke("verify", url).exit_code == 0
    assert json.loads(invoke("backlog", url, "--json").stdout)["trajectories"] == 0
    assert invoke("show", url, ids[0]).exit_code == 0


def test_summaries_are_rebuilt_from_the_keys_of_all_servers(cluster: Cluster, open_at: OpenAt) -> None:
    store = open_at(cluster)
    ids = {store.create().id for _ in range(20)}
    store.flush()
    store.wire.call_all([("DEL", store.keys.summaries(p)) for p in range(4)])
    assert store.rebuild_summaries() == 20
    assert {summary.id for summary in store.list()} == ids
