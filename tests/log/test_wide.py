"""Several connections for one flush: replies in order, one fate, and a store that fsyncs."""

import pytest

import trajstore
from trajstore.errors import Unavailable
from trajstore.log.wide import WideSession, _dealt
from trajstore.log.wire import info_fields


def transaction(key, value):
    return [("MULTI",), ("SET", key, value), ("GET", key), ("EXEC",)]


def record_rollout(store):
    """Tokens 0 to 7; its id."""
    trajectory = store.create()
    with trajectory.segment(context=range(4)) as segment:
        segment.tokens(range(4, 8))
        segment.close("stop")
    trajectory.close("completed")
    return trajectory.id


@pytest.fixture
def wide(own_server, open_at):
    wire = open_at(own_server).wire
    session = WideSession([wire.session() for _ in range(3)])
    session.connect()
    yield session
    session.disconnect()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_replies_come_in_the_order_of_the_commands(wide, run_name, count):
    commands = [command for i in range(count) for command in transaction(f"{run_name}-{i}", f"{i}")]
    replies = wide.exchange(commands)
    assert [reply for reply in replies if isinstance(reply, list)] == [[b"OK", b"%d" % i] for i in range(count)]
    assert replies.count(b"QUEUED") == 2 * count


def test_what_is_no_transaction_runs_in_its_order(wide, run_name):
    key = f"{run_name}-n"
    assert wide.exchange([("INCR", key)] * 7) == [1, 2, 3, 4, 5, 6, 7]
    mixed = [*transaction(key, "8"), ("INCR", key), *transaction(key, "3"), ("INCR", key)]
    replies = wide.exchange(mixed)
    assert (replies[4], replies[9]) == (9, 4)


def test_only_transactions_are_dealt_to_several_connections():
    one, other = transaction("a", "1"), transaction("b", "2")
    assert _dealt([*one, *other, *one], 2) == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7]]
    assert _dealt([*one, ("INCR", "a"), *other], 2) == [list(range(9))]


def test_refusals_are_values_in_their_place(wide, run_name):
    wide.exchange([("LPUSH", f"{run_name}-1", "x")])
    replies = wide.exchange([command for i in range(3) for command in transaction(f"{run_name}-{i}", "y")])
    results = [reply for reply in replies if isinstance(reply, list)]
    assert results[0] == results[2] == [b"OK", b"y"]


def test_one_lost_connection_is_the_loss_of_all(wide, run_name):
    wide._sessions[1].line._sock.close()
    with pytest.raises(Unavailable):
        wide.exchange([command for i in range(3) for command in transaction(f"{run_name}-{i}", "y")])
    assert not wide.connected
    assert not any(session.connected for session in wide._sessions)
    with pytest.raises(Unavailable, match="not connected"):
        wide.exchange(transaction(run_name, "y") * 2)


def test_connections_that_are_not_all_there_are_none(own_server, own_client, open_at):
    """Else one older than the others would be written over, and what the server lost before them would go unseen."""
    wire = open_at(own_server).wire
    wide = WideSession([wire.session() for _ in range(3)])
    own_client.config_set("maxclients", own_client.info("clients")["connected_clients"] + 2)
    with pytest.raises(Unavailable, match="max number of clients"):
        wide.connect()
    assert not any(session.connected for session in wide._sessions)
    own_client.config_set("maxclients", 100)
    wide.connect()
    wide._sessions[1].disconnect()
    assert not wide.connected
    wide.disconnect()


def test_store_that_fsyncs_writes_over_several_and_reads_back_the_same(tmp_path):
    with trajstore.open(tmp_path / "run", ack="fsync") as store:
        made = [record_rollout(store) for _ in range(40)]
        store.flush()
        connected = info_fields(store.wire.call("INFO", "clients"))["connected_clients"]
        assert int(connected) > 8
        assert [store.load(id).token_ids.tolist() for id in made] == [list(range(8))] * 40
        assert [summary.status for summary in store.list()] == ["completed"] * 40
