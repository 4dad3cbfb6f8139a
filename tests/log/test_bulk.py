"""Large values read while they arrive: however the bytes are cut, whatever becomes of the connection."""

import socket
import threading
from types import SimpleNamespace

import pytest
import redis

import trajstore
from tests.log.proxy import requests_in
from trajstore.errors import Corrupt, Unavailable
from trajstore.log.bulk import Value, fetch

VALUES = [b"", b"\r\n", b"$3\r\nabc\r\n", bytes(range(256)) * 40, None, b"x" * 5000, b"-ERR", b"last"]

WHOLE = Value.read


def in_two_buffers(value):
    first, second = bytearray(value.nbytes // 2), bytearray(value.nbytes)
    assert value.readinto(memoryview(first)) == len(first)
    count = value.readinto(memoryview(second))
    assert value.readinto(memoryview(bytearray(5))) == 0, "no byte of the next value"
    return bytes(first + second[:count])


def as_it_comes(value):
    found = bytearray()
    while len(found) < value.nbytes:
        room = bytearray(700)
        count = value.readinto1(memoryview(room))
        assert 0 < count <= 700
        found += room[:count]
    assert value.readinto1(memoryview(bytearray(5))) == 0, "no byte of the next value"
    return bytes(found)


def reply_to(value):
    return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)


@pytest.fixture
def ends():
    """A connection as redis-py has it, and the socket of its server."""
    client, server = socket.socketpair()
    client.settimeout(20)
    server.settimeout(20)

    def send(parts, check_health=True):
        for part in parts:
            client.sendall(part)

    connection = SimpleNamespace(
        _sock=client,
        send_packed_command=send,
        disconnect=client.close,
    )
    with client, server:
        yield connection, server


def answered(ends, replies, piece, read):
    """What is fetched from a server that sends its replies in pieces."""
    connection, server = ends

    def answer():
        for at in range(0, len(replies), piece):
            server.sendall(replies[at : at + piece])

    thread = threading.Thread(target=answer)
    thread.start()
    found = fetch(connection, [("GET", f"k{i}") for i in range(len(VALUES))], read)
    thread.join(20)
    return found


@pytest.mark.parametrize("read", [WHOLE, in_two_buffers, as_it_comes])
@pytest.mark.parametrize("piece", [1, 3, 4096, 1 << 20])
def test_values_arrive_whole_however_their_bytes_are_cut(ends, piece, read):
    assert answered(ends, b"".join(map(reply_to, VALUES)), piece, read) == VALUES


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_what_a_reader_leaves_of_a_value_is_not_taken_for_the_next(ends, piece):
    found = answered(ends, b"".join(map(reply_to, VALUES)), piece, lambda value: value.read(2))
    assert found == [None if value is None else value[:2] for value in VALUES]


def test_what_has_come_of_a_value_is_given_before_the_rest_arrives(ends):
    connection, server = ends
    server.sendall(b"$200000\r\n" + b"a" * 1000)
    first = []

    def read(value):
        room = bytearray(value.nbytes)
        first.append(value.readinto1(memoryview(room)))
        server.sendall(b"b" * 199_000 + b"\r\n")
        value.readinto(memoryview(room)[first[0] :])
        return bytes(room)

    assert fetch(connection, [("GET", "k")], read) == [b"a" * 1000 + b"b" * 199_000]
    assert first == [1000]


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_each_value_says_which_command_it_answers_whatever_is_missing_before_it(ends, piece):
    found = answered(ends, b"".join(map(reply_to, VALUES)), piece, lambda value: value.command)
    assert found == [None if value is None else ("GET", f"k{i}") for i, value in enumerate(VALUES)]


def test_several_are_asked_for_ahead_and_no_more_than_several(ends):
    """Ahead, so that the way to the server is not waited for; not all, for the server holds what it was asked for."""
    connection, server = ends
    sent = []
    send = connection.send_packed_command

    def counted(parts, **options):
        parts = list(parts)
        sent.extend([b"GET"] * b"".join(parts).count(b"GET"))
        send(parts, **options)

    connection.send_packed_command = counted

    def answer():
        for number, _ in enumerate(requests_in(server)):
            server.sendall(reply_to(b"%d" % number))

    thread = threading.Thread(target=answer)
    thread.start()
    found = fetch(connection, [("GET", f"k{i}") for i in range(12)], lambda value: (value.read(), len(sent)))
    connection.disconnect()
    thread.join(20)
    assert found == [(b"%d" % number, min(12, number + 4)) for number in range(12)]


@pytest.mark.parametrize(
    "replies",
    [
        b"$-5\r\n",
        b"$x\r\n",
        b"$\r\n",
        b"$1_0\r\n",
        b"$" + b"1" * 5000 + b"\r\n",
        b":1\r\n",
        b"*1\r\n$1\r\na\r\n",
        b"$1\r\naXX$1\r\nb\r\n",
        b"$5\r\nabc\r\n$1\r\nb\r\n",
    ],
)
def test_reply_that_get_cannot_have_is_an_error_of_the_server(ends, replies):
    connection, server = ends
    server.sendall(replies)
    with pytest.raises(redis.InvalidResponse):
        fetch(connection, [("GET", "a"), ("GET", "b")], WHOLE)
    assert connection._sock.fileno() == -1, "nobody reads on in the middle of a reply"


def test_connection_is_looked_after_only_while_nothing_is_pending(own_server, own_client, run_name):
    """A health check sends PING, and would take the next value for its answer."""
    own_client.mset({f"k{i}": b"%d" % i * 100_000 for i in range(12)})
    with trajstore.open(f"{own_server.url(run_name)}&health_check_interval=3600", timeout=10.0) as store:
        keys = [f"k{i}" for i in range(12)]
        connection = store.wire._pool.get_connection()
        store.wire._pool.release(connection)

        def read(value):
            connection.next_health_check = 0.0  # it is due
            return value.read()

        assert store.wire.fetch(keys, read) == [own_client.get(key) for key in keys]
        assert store.wire.fetch(keys, WHOLE) == [own_client.get(key) for key in keys]


def test_refusal_names_the_acl_as_for_any_command(own_server, own_client, run_name):
    own_client.execute_command("ACL", "SETUSER", "writer", "on", ">secret", "~*", "&*", "+@all")
    port = own_server.port
    with trajstore.open(f"redis://writer:secret@127.0.0.1:{port}/0?run={run_name}", timeout=10.0) as store:
        own_client.execute_command("ACL", "SETUSER", "writer", "-get")
        with pytest.raises(Unavailable, match="ACL"):
            store.wire.fetch(["a"], WHOLE)


@pytest.mark.parametrize("fault", ["drop_reply", "cut_before"])
def test_lost_connection_is_unavailable_and_the_next_one_is_a_new_one(own_server, own_client, proxy, open_at, fault):
    store = open_at(proxy)
    own_client.mset({"a": b"1" * 100_000, "b": b"2"})
    getattr(proxy, fault)(b"GET")
    with pytest.raises(Unavailable):
        store.wire.fetch(["a", "b"], WHOLE)
    assert store.wire.fetch(["a", "b", "c"], WHOLE) == [b"1" * 100_000, b"2", None]


def test_silent_server_is_unavailable_at_the_deadline(own_server, own_client, proxy, open_at):
    store = open_at(proxy, timeout=2.0)
    own_client.set("a", b"1")
    proxy.swallow_reply(b"GET")
    with pytest.raises(Unavailable, match="in time"):
        store.wire.fetch(["a"], WHOLE)
    assert store.wire.fetch(["a"], WHOLE) == [b"1"]


def test_refusal_and_a_failing_reader_leave_no_reply_behind(store, client, run_name):
    key = f"{run_name}-a"
    client.set(key, b"1" * 10_000)
    client.rpush(f"{key}-list", b"x")
    with pytest.raises(Corrupt, match="WRONGTYPE"):
        store.wire.fetch([key, f"{key}-list", key], WHOLE)
    with pytest.raises(ZeroDivisionError):
        store.wire.fetch([key, key], lambda value: 1 // 0)
    assert store.wire.fetch([key], WHOLE) == [b"1" * 10_000]
    assert store.wire.call("GET", key) == b"1" * 10_000


def test_large_payload_takes_no_other_rights_than_a_small_one(own_server, own_client, run_name):
    """Rules that are in use name HMGET; both arrive whole, and one that is damaged is told."""
    spec = trajstore.RoutingSpec(layer_ids=(0, 1), top_k=2, num_experts=8, num_hidden_layers=2)
    own_client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "&*", "+@all", "-hget")
    with (
        trajstore.open(own_server.url(run_name), timeout=10.0) as writer,
        trajstore.open(f"redis://reader:secret@127.0.0.1:{own_server.port}/0?run={run_name}", timeout=10.0) as reader,
    ):
        trajectory = writer.create(routing=spec)
        with trajectory.segment(context=[0] * 30_000) as segment:
            segment.routing([[[0, 1], [2, 3]]] * 500, start=0)
            segment.routing([[[4, 5], [6, 7]]] * 20_000, start=500)
        writer.flush()
        found = reader.load_routing(trajectory.id)
        assert found.routed_experts[[0, 499, 500, 20_499, 20_500], 0, 0].tolist() == [0, 0, 4, 4, 0]
        assert found.routing_mask.sum() == 20_500
        assert (reader.load(trajectory.id).routed_experts == found.routed_experts).all()
        key = writer.keys.payloads(trajectory.id)
        (field,) = (field for field, data in own_client.hgetall(key).items() if len(data) == 80_000)
        own_client.hset(key, field, b"x" * 80_000)
        for read in (reader.load, reader.load_routing):
            with pytest.raises(Corrupt, match="in the hot log does not match its header"):
                read(trajectory.id)
