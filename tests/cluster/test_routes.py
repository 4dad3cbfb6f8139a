"""Commands find their servers, replies come in order, and nothing that may have run is sent again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.crc import key_slot

import trajstore
from tests.builders import record_seed_case
from tests.cli.running import invoke
from tests.cluster.conftest import StartCluster
from tests.cluster.nodes import Cluster, Node
from tests.servers import free_port
from trajstore.archiver import Archiver
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

    def look() -> None:
        seen.append(wire.call_all([("GET", key) for key in keys]))
        seen.append(wire.fetch(keys, lambda value: value.read()))
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
    wire = wire_to(cluster, timeout=0.5)
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
    store = open_at(cluster, timeout=1.0)
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
