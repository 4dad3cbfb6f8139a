"""Where fakeredis answers otherwise than servers do, as far as trajstore meets it: each test shows both answers.

docs/testing.md lists them. Once a release of fakeredis mends one, its test says so.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from fakeredis._clients._tcp_server import TCPFakeRequestHandler

import trajstore
from tests.log.looking import until
from tests.servers import BACKENDS, FakeServer, RealServer, binary_of, running
from trajstore.log.wire import ServerInfo, Wire, server_info, split_run

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()

RELEASE = tuple(map(int, fakeredis.__version__.split(".")[:2]))

LONG = 100_000
"""Milliseconds for which an entry counts as idle, of which nobody had the time to wait for the half."""


@pytest.fixture(scope="module", params=BACKENDS)
def server(request, tmp_path_factory) -> Iterator[FakeServer | RealServer]:
    """Each backend in turn, for these tests alone: they change its settings and drop its keys."""
    if request.param == "fakeredis":
        fake = FakeServer()
        yield fake
        fake.stop()
        return
    if binary_of(request.param) is None:
        pytest.skip(f"backend {request.param}: no server of that kind on this machine")
    with running(request.param, tmp_path_factory.mktemp("server")) as real:
        yield real


@pytest.fixture
def wire(server) -> Iterator[Wire]:
    """Connections to a server without keys."""
    wire = connect(server)
    wire.call("FLUSHALL")
    yield wire
    wire.close()


@pytest.fixture
def as_it_comes(server) -> Iterator[FakeServer | RealServer]:
    """The fake behind the TCP server that comes with it, in whose place other tests have ours; a real one as it is."""
    if server.name != "fakeredis":
        yield server
        return
    stock = FakeServer()
    stock._server.RequestHandlerClass = TCPFakeRequestHandler
    yield stock
    stock.stop()


def connect(server, *, user: str = "") -> Wire:
    """Connections, as a user with the password `x` if given."""
    url, _ = split_run(server.url("none"))
    return Wire.to_url(url.replace("//", f"//{user}:x@") if user else url, timeout=20.0)


def pending_entries(wire, count: int) -> None:
    """Entries of the stream `s` that the consumer `one` of the group `g` has read."""
    wire.call_all([("XADD", "s", f"{number}-0", "e", "1") for number in range(1, count + 1)])
    wire.call("XGROUP", "CREATE", "s", "g", "0")
    wire.call("XREADGROUP", "GROUP", "g", "one", "COUNT", count, "STREAMS", "s", ">")


def differs(server, seen: Any, *, real: Any, fake: Any, mended: tuple[int, int] | None = None) -> None:
    """Servers answer the one, fakeredis the other.

    Args:
        mended: the release of fakeredis from which on it answers as servers do; None if there is none yet.
    """
    if server.name != "fakeredis" or (mended is not None and mended <= RELEASE):
        assert seen == real
    else:
        assert seen != real, f"fakeredis {fakeredis.__version__} has mended this; say so here and in docs/testing.md"
        assert seen == fake


def test_the_page_lists_these_differences_and_no_others():
    here = {name for name in globals() if name.startswith("test_")} - {
        test_the_page_lists_these_differences_and_no_others.__name__
    }
    assert set(re.findall(r"`test_fakeredis_differences\.py::(\w+)`", PAGE)) == here


def test_reading_a_pending_entry_again_does_not_end_its_being_idle(server, wire):
    pending_entries(wire, 1)
    wire.call("XCLAIM", "s", "g", "one", 0, "1-0", "IDLE", LONG, "JUSTID")
    wire.call("XREADGROUP", "GROUP", "g", "one", "COUNT", 1, "STREAMS", "s", "0")
    ((_, _, idle, _),) = wire.call("XPENDING", "s", "g", "-", "+", 1)
    differs(server, idle >= LONG, real=False, fake=True)


def test_consumer_at_work_is_taken_for_silent_once_anybody_acknowledges(server, wire):
    pending_entries(wire, 1)
    for at in ("2-0", "3-0"):
        wire.call("XADD", "s", at, "e", "1")
    wire.call("XCLAIM", "s", "g", "one", 0, "1-0", "IDLE", LONG, "JUSTID")
    for consumer in ("one", "two"):
        wire.call("XREADGROUP", "GROUP", "g", consumer, "COUNT", 1, "STREAMS", "s", ">")
    wire.call("XACK", "s", "g", "3-0")
    idle = {name: idle for _, name, _, _, _, idle, *_ in wire.call("XINFO", "CONSUMERS", "s", "g")}
    differs(server, idle[b"one"] >= LONG, real=False, fake=True)


def test_entry_that_was_read_within_the_same_millisecond_is_not_pending_for_an_idle_time_of_zero(server, wire):
    wire.call("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
    found = set()
    for number in range(1, 51):  # a clock may tick between two commands, but not each time
        at = f"{number}-0"
        commands = [
            ("XADD", "s", at, "e", "1"),
            ("XREADGROUP", "GROUP", "g", "one", "COUNT", 1, "STREAMS", "s", ">"),
            ("XPENDING", "s", "g", "IDLE", 0, at, at, 1, "one"),
        ]
        found.add(len(wire.transaction(commands)[-1]))
    differs(server, 0 in found, real=False, fake=True)


def test_page_of_claims_without_any_is_the_last_one(server, wire):
    """A server looks at ten times as many entries as it may claim, and then says where to go on."""
    pending_entries(wire, 50)
    cursor, claimed, *_ = wire.call("XAUTOCLAIM", "s", "g", "two", LONG, "0-0", "COUNT", 3)
    assert claimed == []
    differs(server, cursor, real=b"31-0", fake=b"0-0")


def test_blocking_read_of_a_group_waits_for_nothing(server, wire):
    wire.call("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
    command = ("XREADGROUP", "GROUP", "g", "one", "COUNT", 1, "BLOCK", 15_000, "STREAMS", "s", ">")

    def has_begun():
        """Of a consumer that waits a server has heard; Redis 7.0 makes a note of it only once it has got something."""
        info, consumers = wire.exchange([("INFO", "clients"), ("XINFO", "CONSUMERS", "s", "g")])
        return consumers or (isinstance(info, bytes) and b"blocked_clients:1" in info)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(wire.call, *command)
        until(has_begun, what="the read has begun")
        wire.call("XADD", "s", "1-0", "e", "1")
        seen = reading.result(20)
    differs(server, seen, real=[[b"s", [[b"1-0", [b"e", b"1"]]]]], fake=None, mended=(2, 41))


def test_read_that_finds_nothing_answers_with_an_empty_list(server, wire):
    wire.call("XADD", "s", "1-0", "e", "1")
    differs(server, wire.call("XREAD", "COUNT", 1, "STREAMS", "s", "1-0"), real=None, fake=[])


def test_transaction_passes_although_what_it_watches_has_expired(server, wire):
    wire.call("HSET", "h", "a", "1")
    with wire.watching("unrelated") as watch:
        was_there = watch.session.exchange([("PEXPIRE", "h", 300), ("WATCH", "h"), ("EXISTS", "h")])[-1]
        assert was_there
        until(lambda: not wire.call("EXISTS", "h"), what="it has expired")
        seen = wire.transaction([("HSET", "h", "b", "2")], watch=watch)
    differs(server, seen, real=None, fake=[1])


def test_server_tells_nothing_of_itself(server, wire):
    """Not whether it restarted, how full it is, whether it fsyncs, nor whether another has taken its place."""
    asked = [("INFO", "server"), ("INFO", "memory"), ("INFO", "replication"), ("CONFIG", "GET", "appendfsync")]
    refused = [isinstance(reply, redis.ResponseError) for reply in wire.exchange(asked)]
    differs(server, refused, real=[False] * 4, fake=[True] * 4)
    differs(server, server_info(wire) == ServerInfo("", False), real=False, fake=True)


def test_newest_id_of_a_stream_cannot_be_raised(server, wire):
    wire.call("XADD", "s", "1-0", "e", "1")
    reply = wire.exchange([("XSETID", "s", "5-0")])[0]
    differs(server, "unknown command" in str(reply), real=False, fake=True)


def test_lost_partition_is_told_in_other_words(server, wire):
    with pytest.raises(trajstore.Unavailable, match="trajstore rebuild") as refused:
        wire.call("XREADGROUP", "GROUP", "g", "one", "COUNT", 1, "STREAMS", "lost", ">")
    differs(server, "NOGROUP" in str(refused.value), real=True, fake=False)


@pytest.mark.parametrize("command", [("XREAD",), ("XREADGROUP", "GROUP", "g", "one")])
def test_read_of_what_is_no_stream_loses_the_connection(server, wire, command):
    wire.call("SET", "foreign", "text")
    with pytest.raises(trajstore.TrajstoreError) as told:
        wire.call(*command, "COUNT", 1, "STREAMS", "foreign", "0")
    differs(server, type(told.value), real=trajstore.Corrupt, fake=trajstore.Unavailable)


def test_memory_limit_is_no_limit(server, wire):
    wire.call("CONFIG", "SET", "maxmemory", "1")
    try:
        reply = wire.exchange([("SET", "text", "more")])[0]
    finally:
        wire.call("CONFIG", "SET", "maxmemory", "0")
    differs(server, reply if reply == b"OK" else type(reply), real=redis.OutOfMemoryError, fake=b"OK")


@pytest.mark.parametrize(
    ("rules", "command"),
    [
        (("~*", "-get"), ("GET", "mine")),
        (("%R~*",), ("SET", "mine", "1")),
        (("~mine",), ("XREAD", "STREAMS", "foreign", "0")),
        (("~mine",), ("XREADGROUP", "GROUP", "g", "one", "STREAMS", "foreign", ">")),
        (("~mine",), ("XINFO", "STREAM", "foreign")),
        (("~mine",), ("XGROUP", "DELCONSUMER", "foreign", "g", "one")),
        (("~mine",), ("UNLINK", "mine", "foreign")),
    ],
)
def test_user_may_do_what_the_access_rules_forbid(server, wire, rules, command):
    wire.call("SET", "mine", "1")
    wire.call("XADD", "foreign", "1-0", "e", "1")
    wire.call("XGROUP", "CREATE", "foreign", "g", "0")
    wire.call("ACL", "SETUSER", "bob", "reset", "on", ">x", "+@all", *rules)
    user = connect(server, user="bob")
    reply = user.exchange([command])[0]
    user.close()
    differs(server, isinstance(reply, redis.exceptions.NoPermissionError), real=True, fake=False)


def test_short_value_comes_as_a_simple_string(server, wire):
    wire.call("SET", "text", "abc")
    with wire.connection() as connection:
        connection.send_command("GET", "text")
        seen = connection._sock.recv(1)
        connection.disconnect()
    differs(server, seen, real=b"$", fake=b"+")


def test_stock_tcp_server_closes_the_connection_at_an_error(as_it_comes):
    with connection_to(as_it_comes) as connection:
        connection.send_command("NOSUCH")
        with pytest.raises(redis.ResponseError, match="unknown command"):
            connection.read_response()
        differs(as_it_comes, answer(connection, "PING"), real=b"PONG", fake="closed", mended=(2, 41))


def test_stock_tcp_server_closes_the_connection_at_a_large_reply(as_it_comes):
    size = 1 << 25
    with connection_to(as_it_comes) as connection:
        answer(connection, "SETRANGE", "text", size - 1, "x")
        connection.send_command("GET", "text")
        if as_it_comes.name == "fakeredis":  # nobody reads, so that its socket fills up
            here = connection._sock.getsockname()
            until(lambda: here not in as_it_comes._server.clients, what="the connection is closed")
        reply = answer(connection)
        differs(as_it_comes, reply if reply == "closed" else len(reply), real=size, fake="closed")


@contextmanager
def connection_to(server) -> Iterator[Any]:
    """One of redis-py's connections, with its own parser."""
    with server.client() as client:
        connection = client.connection_pool.get_connection()
        yield connection
        connection.disconnect()


def answer(connection, *command: Any) -> Any:
    """The reply to a command, or to what was sent before; "closed" for none."""
    try:
        if command:
            connection.send_command(*command)
        return connection.read_response()
    except redis.ConnectionError:
        return "closed"
