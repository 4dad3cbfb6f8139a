"""The chaos run, as far as there is time for it here, and what its account does not let pass. `make soak` has more."""

from itertools import product

import msgspec
import pytest
from redis.crc import key_slot

import trajstore
from tests.cluster.nodes import cluster_of
from tests.conftest import cluster_server
from tests.servers import binary_of
from tests.soak.chaos.__main__ import kinds_of
from tests.soak.chaos.account import settle
from tests.soak.chaos.ledger import Journal, TrainedOn
from tests.soak.chaos.moves import Moves
from tests.soak.chaos.processes import RUN, cast, what_all_are_at
from tests.soak.chaos.round import one_round
from tests.soak.chaos.servers import CLUSTERS
from tests.soak.chaos.trainer import Checkpoint
from tests.soak.chaos.turns import Turn, create, play
from tests.soak.chaos.ways import Ways, renamed
from tests.waiting import until
from trajstore.archiver import Archiver

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]


@pytest.mark.parametrize(("server", "ack", "seed"), [("redis", "fsync", 11), ("valkey", "memory", 12)])
def test_every_acknowledged_event_is_there_once_whatever_goes_wrong_at_once(tmp_path, server, ack, seed):
    if binary_of(server) is None:
        pytest.skip(f"backend {server}: no server of that kind on this machine")
    done = one_round(tmp_path / "round", seed=seed, ack=ack, server=server, seconds=8.0, kills=10, pace=0.7)
    assert sum(count for name, count in done.happened.items() if name.startswith("killed")) >= 10
    assert done.account.trajectories > 20
    assert ack == "memory" or done.account.lost == 0


def test_what_the_processes_of_a_failed_round_were_at_is_told_with_their_stacks(own_server, tmp_path):
    with trajstore.open(own_server.url(RUN), archive=tmp_path / "archive", partitions=1) as store:
        processes = cast(tmp_path, own_server.port, seed=1, ack="memory", environment={}, mutant=None)
        archiver = next(process for process in processes if process.kind == "archiver")
        try:
            archiver.in_peace = True
            archiver.start()
            until(lambda: store.wire.call("XPENDING", store.keys.lease(0), "archiver")[0], seconds=60)
            told = what_all_are_at(processes)
        finally:
            for process in processes:
                process.abandon()
    assert "archiver0, life 1, is alive:" in told
    assert "trajstore/archiver.py" in told
    assert "writer0 was not started" in told


# A cluster's nodes, behind proxies and with slots on their way

MOVED = b"*2\r\n+QUEUED\r\n-MOVED 3999 127.0.0.1:41001\r\n"
SLOTS = b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:41001\r\n$2\r\nid\r\n"
OTHER = b"$29\r\n-MOVED :41001 127.0.0.1:41001\r\n:41001\r\n$-1\r\n"


def test_node_is_named_by_its_proxy_wherever_its_answer_was_cut():
    through = {b"41001": b"50001"}
    said = OTHER + MOVED + SLOTS + OTHER
    expected = OTHER + (MOVED + SLOTS).replace(b":41001", b":50001") + OTHER
    for at in range(len(said) + 1):
        assert b"".join(renamed([said[:at], said[at:]], through)) == expected


def test_every_third_round_is_on_a_cluster_with_and_without_replicas_at_both_levels(monkeypatch):
    monkeypatch.setattr("tests.soak.chaos.__main__.binary_of", str)  # on whichever servers this machine has
    kinds = kinds_of(server=None, ack=None, archive=None)
    assert [server in CLUSTERS for server, _, _ in kinds] == [False, False, True] * 4
    assert {(server, ack) for server, ack, _ in kinds[2::3]} == set(product(CLUSTERS, ("fsync", "memory")))


@pytest.fixture
def small_cluster(tmp_path):
    """A cluster that syncs each command."""
    with cluster_of(cluster_server(), tmp_path / "cluster", appendfsync="always") as cluster:
        yield cluster


def test_process_goes_to_a_cluster_by_its_proxies_only_and_slots_arrive_though_their_nodes_die(small_cluster):
    cluster, ways, moves = small_cluster, Ways([node.port for node in small_cluster.nodes]), Moves(small_cluster)
    try:
        with trajstore.open(ways.url(RUN), partitions=4, ack="fsync") as store:
            ids = [store.create().id for _ in range(80)]
            store.flush()
            slot = key_slot(store.keys.feed(0).encode())
            source = moves.owner(slot, cluster.nodes)
            target = next(node for node in cluster.nodes if node is not source)
            moves.begin(slot, source, target)
            for died in (source, target):
                for _ in range(2):
                    moves.go_on(cluster.nodes)
                died.kill()
                moves.go_on([node for node in cluster.nodes if node is not died])
                died.start()
            until(lambda: moves.go_on(cluster.nodes) or not moves.left(), seconds=60)
            assert (moves.owner(slot, cluster.nodes), moves.finished) == (target, 1)
            cluster.until_well()
            moved = [id for id in ids if store.keys.partition(id) == 0]
            with store.get(moved[0]).segment(context=[1]) as segment:
                segment.tokens([2], None)
            store.flush()
            assert {one.id for one in store.list()} == set(ids)
            assert {one.port for one in store.wire.servers()} == {proxy.port for proxy in ways.each}
    finally:
        ways.close()


# What the account finds wrong

TURNS = [
    Turn("w-4", 1, "create", "w/1"),
    Turn("w-4", 2, "segment", "w/2"),
    Turn("w-4", 3, "reward", "w/3"),
    Turn("w-4", 4, "close", "w/4", status="completed"),
]
PLACE = TrainedOn("0:1-0", "w-4", 1, [("w-4", "4-0")])


@pytest.fixture
def durable(tmp_path):
    """An embedded store that acknowledges after the fsync, so that what it holds can be archived at once."""
    with trajstore.open(tmp_path / "store", partitions=1, ack="fsync") as store:
        yield store


def account_of(store, folder, entered, *, checkpoint=(PLACE,), journal=(PLACE,), unacknowledged=()):
    """The account of a trajectory in which `TURNS` are written, for processes that have entered this."""
    handle = create(store, "w-4")
    for turn in TURNS[1:]:
        play(turn, handle, between=lambda: None)
    store.flush()
    Archiver(store, grace_seconds=0.05).run(once=True)
    until(lambda: not store.wire.call("KEYS", "*:w-4"), seconds=20)
    with Journal(folder / "ledger") as ledger, Journal(folder / "trained") as trained:
        for turn in entered:
            ledger.begin(turn)
            if turn not in unacknowledged:
                ledger.acknowledge(turn)
        for one in journal:
            trained.write(one)
    (folder / "checkpoint").write_bytes(msgspec.json.encode(Checkpoint(list(checkpoint))))
    return settle(
        store,
        archive=str(folder / "store"),
        options={},
        ledgers=[folder / "ledger"],
        checkpoints=[folder / "checkpoint"],
        journals=[folder / "trained"],
        losses=[],
        killed=set(),
        durable=True,
    )


def test_account_of_what_was_written_as_it_was_entered(durable, tmp_path):
    account = account_of(durable, tmp_path, TURNS, unacknowledged=TURNS[2:3])
    assert (account.trajectories, account.unsure, account.lost, account.trained_once) == (1, 1, 0, 1)
    assert account.events == account.acknowledged + 1


@pytest.mark.parametrize(
    ("entered", "message"),
    [
        ([*TURNS, Turn("w-4", 5, "reward", "w/5")], "acknowledged and gone"),
        ([*TURNS, Turn("w-5", 1, "create", "w/5")], "acknowledged and gone"),
        ([*TURNS, Turn("w-4", 4, "close", "v/4", status="completed")], "acknowledged and gone"),  # of two that claim it
        ([*TURNS, Turn("w-4", 2, "observe", "w/5", base=1)], "acknowledged and gone"),
        ([TURNS[0], msgspec.structs.replace(TURNS[1], key="w/9"), *TURNS[2:]], "nobody wrote"),
        (TURNS[:3], "nobody wrote"),
        ([], "nobody wrote"),
    ],
)
def test_account_does_not_let_pass_what_is_missing_or_foreign(durable, tmp_path, entered, message):
    with pytest.raises(AssertionError, match=message):
        account_of(durable, tmp_path, entered)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"checkpoint": ()}, "not trained on"),
        ({"journal": ()}, "not trained on"),
        ({"checkpoint": (PLACE, PLACE)}, "more than once by checkpoint"),
        ({"journal": (msgspec.structs.replace(PLACE, place="0:2-0"),)}, "published more than once"),
    ],
)
def test_account_does_not_let_pass_what_was_trained_on_too_often_or_not(durable, tmp_path, trained, message):
    with pytest.raises(AssertionError, match=message):
        account_of(durable, tmp_path, TURNS, **trained)


def test_account_lets_pass_what_was_trained_on_again_by_acknowledgement(durable, tmp_path):
    assert account_of(durable, tmp_path, TURNS, journal=(PLACE, PLACE)).trained_again == 1
