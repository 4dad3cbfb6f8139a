"""Commands as frames and bytes as replies: what a server reads is what was meant, however its answer is cut."""

import signal
import socket
import threading
import time
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.connection import PythonRespSerializer

from trajstore.log.resp import ReplyParser, pack, receive, send

LARGE = bytes(range(256)) * 1024
WIRE = b"+OK\r\n$5\r\nhe\r\no\r\n$-1\r\n*-1\r\n:-12\r\n*3\r\n$0\r\n\r\n*1\r\n+QUEUED\r\n-ERR no\r\n$%d\r\n%b\r\n" % (
    len(LARGE),
    LARGE,
)
REPLIES = [b"OK", b"he\r\no", None, None, -12, [b"", [b"QUEUED"], "no"], LARGE]

ARGUMENTS = st.one_of(st.text(max_size=6), st.binary(max_size=6), st.integers(), st.sampled_from(["MULTI", "XADD"]))


def plain(reply):
    """Errors by their words."""
    if isinstance(reply, list):
        return [plain(one) for one in reply]
    return str(reply) if isinstance(reply, redis.ResponseError) else reply


@pytest.fixture
def ends():
    """A connection as redis-py has it, and the socket of its server."""
    client, server = socket.socketpair()
    client.settimeout(20)
    connection = SimpleNamespace(_sock=client, socket_timeout=20, disconnect=client.close, _parser=ReplyParser(0))
    connection._parser.on_connect(connection)
    with client, server:
        yield connection, server


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(ARGUMENTS, min_size=1, max_size=5), min_size=1, max_size=5))
def test_frames_are_what_redis_py_makes_of_the_commands(commands):
    plainly = PythonRespSerializer(6000, lambda one: one if isinstance(one, bytes) else str(one).encode())
    named = [["SET", *arguments] for arguments in commands]  # redis-py splits the first argument at spaces
    assert b"".join(pack(named)) == b"".join(b"".join(plainly.pack(*command)) for command in named)


def test_large_arguments_go_out_without_a_copy():
    data = memoryview(bytearray(LARGE))
    pieces = pack([("SET", "a", data), ("SET", "b", b"small"), ("SET", "c", data)])
    assert [piece is data for piece in pieces] == [False, True, False, True, False]
    assert b"".join(pieces).count(b"$%d\r\n%b\r\n" % (len(LARGE), LARGE)) == 2


def test_small_commands_go_out_together_up_to_a_limit():
    pieces = pack([("SET", "a", b"x" * 1000)] * 1000)
    assert 1 < len(pieces) < 10
    assert all(pieces)


@pytest.mark.parametrize("piece", [1, 2, 7, 65_536, 1 << 20])
def test_replies_arrive_whole_however_their_bytes_are_cut(ends, piece):
    connection, server = ends

    def answer():
        for at in range(0, 2 * len(WIRE), piece):
            server.sendall((WIRE * 2)[at : at + piece])

    thread = threading.Thread(target=answer)
    thread.start()
    first, second = receive(connection, len(REPLIES)), receive(connection, len(REPLIES))
    thread.join(20)
    assert plain(first) == plain(second) == REPLIES
    assert not connection._parser.can_read()


def test_what_nobody_asked_for_is_seen(ends):
    connection, server = ends
    assert not connection._parser.can_read()
    server.sendall(b"+late\r\n")
    assert connection._parser.can_read()
    server.close()
    receive(connection, 1)
    with pytest.raises(redis.ConnectionError, match="closed"):
        connection._parser.can_read()


@pytest.mark.parametrize(
    "reply",
    [
        b"?\r\n",
        b"\r\n",
        b"$x\r\n",
        b":1.5\r\n",
        b": 1\r\n",
        b"$1_0\r\n0123456789\r\n",
        b"$-5\r\n",
        b"$1\r\nabc\r\n",
        b"$200000\r\n" + b"a" * 200_002,
        b"*y\r\n",
        b"$9999999999\r\n",
        b"*1\r\n" * 20_000,
        b"-LOADING soon\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
    ],
)
def test_no_reply_closes_the_connection(ends, reply):
    connection, server = ends
    server.sendall(reply)
    with pytest.raises((redis.InvalidResponse, redis.ConnectionError, redis.ReadOnlyError)):
        receive(connection, 1)
    assert connection._sock.fileno() == -1, "nobody reads on in the middle of a reply"


NESTED = st.recursive(
    st.one_of(st.none(), st.integers(-(1 << 63), (1 << 63) - 1), st.binary(max_size=9), st.just(LARGE[:100_000])),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=9,
)


def reply_of(value):
    """As a server says it."""
    match value:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % value
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n" % len(value) + b"".join(map(reply_of, value))


class _Pieces:
    """A socket on which bytes arrive in pieces of these sizes, then nothing."""

    def __init__(self, data, sizes):
        ends = [0, *accumulate(sizes), len(data)]
        self._left = [data[at:end] for at, end in pairwise(ends) if data[at:end]]

    def recv(self, count):
        if not self._left:
            raise TimeoutError
        piece, self._left[0] = self._left[0][:count], self._left[0][count:]
        if not self._left[0]:
            del self._left[0]
        return piece

    def recv_into(self, buffer):
        piece = self.recv(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def heard(data, sizes, count):
    """What a connection makes of the bytes; `redis.TimeoutError` if it waits for more."""
    connection = SimpleNamespace(
        _sock=_Pieces(data, sizes), socket_timeout=1, disconnect=lambda: None, _parser=ReplyParser(0)
    )
    connection._parser.on_connect(connection)
    return receive(connection, count)


@settings(max_examples=200, deadline=None)
@given(st.lists(NESTED, min_size=1, max_size=4), st.lists(st.integers(1, 70_000) | st.integers(1, 5), max_size=20))
def test_replies_are_what_was_said_and_one_byte_less_is_waited_for(values, sizes):
    data = b"".join(map(reply_of, values))
    assert heard(data, sizes, len(values)) == values
    with pytest.raises(redis.TimeoutError):
        heard(data[:-1], sizes, len(values))


def test_server_that_ends_or_says_nothing_is_told_by_redis_py_s_errors(ends):
    connection, server = ends
    server.sendall(b"+OK\r\n$100000\r\nabc")
    server.close()
    with pytest.raises(redis.ConnectionError, match="closed"):
        receive(connection, 2)


def test_silent_server_is_a_timeout(ends):
    connection, _ = ends
    connection._sock.settimeout(0.01)
    with pytest.raises(redis.TimeoutError, match="in time"):
        receive(connection, 1)
    assert connection._sock.fileno() == -1


def draining(server, size, *, pause=0.0, most=1 << 17):
    """A thread that reads so much from a socket, and the bytes."""
    found = bytearray()

    def drain():
        while len(found) < size and (some := server.recv(most)):
            found.extend(some)
            time.sleep(pause)

    thread = threading.Thread(target=drain)
    thread.start()
    return thread, found


@pytest.mark.parametrize("count", [16, 1000], ids=["few pieces", "more than the kernel takes at once"])
def test_large_commands_arrive_whole_through_signals_and_a_full_socket(ends, count):
    """A signal ends a call of the kernel's half way; it says how far it has come."""
    connection, server = ends
    commands = [("SET", f"key-{i}", LARGE[i : i + (1 << 17)]) for i in range(count)]
    whole = b"".join(pack(commands))
    handled = []
    before = signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        thread, found = draining(server, len(whole), pause=0.005 if count == 16 else 0.0)
        send(connection, commands, check_health=False)
        thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found == whole
    assert connection._sock.gettimeout() == 20
    assert handled


def test_slow_line_is_waited_for_although_all_of_it_takes_longer_than_the_timeout():
    """A flush may be 32 MiB: over a slow line that takes a while, and giving it up would lose what had arrived."""
    commands = [("SET", "a", LARGE)] * 80
    whole = b"".join(pack(commands))
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        server, _ = listening.accept()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        client.settimeout(3.0)
        connection = SimpleNamespace(_sock=client, disconnect=client.close)
        begun = time.monotonic()
        with server:
            thread, found = draining(server, len(whole), pause=0.0125, most=1 << 16)
            send(connection, commands, check_health=False)
            assert time.monotonic() - begun > 3.0, "it has to take longer than the timeout, or this shows nothing"
            thread.join()
    assert found == whole


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_signals_do_not_lengthen_the_wait_for_a_server_that_takes_nothing(kind):
    """What sends nothing before a signal comes is begun anew by Python, and the kernel's time with it."""
    if kind == "unix":
        client, server = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            client = socket.create_connection(listening.getsockname())
            server, _ = listening.accept()
    client.settimeout(0.5)
    connection = SimpleNamespace(_sock=client, disconnect=client.close)
    over = threading.Event()

    def signals():
        for _ in range(300):  # the server is gone then, and what is raised is another error
            if over.wait(0.05):
                return
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        server.close()

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    thread = threading.Thread(target=signals)
    with client, server:
        thread.start()
        try:
            with pytest.raises(redis.TimeoutError, match="did not take all in time"):
                send(connection, [("SET", "a", LARGE)] * 40, check_health=False)
        finally:
            over.set()
            thread.join()
            signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_stays_ctrl_c_where_its_handler_closes_the_connection(ends):
    connection, _ = ends

    def close(*_):
        connection._sock.close()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, close)
    timer = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            send(connection, [("SET", "a", LARGE)] * 8, check_health=False)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_connection_that_another_thread_has_closed_is_a_lost_one(ends):
    connection, _ = ends

    def close():
        connection._sock = None

    connection.check_health = close
    with pytest.raises(redis.ConnectionError, match="closed"):
        send(connection, [("SET", "a", LARGE)])


def test_server_that_trickles_over_tcp_is_given_up_all_the_same():
    """It takes something all the time, and would take minutes for a few MB; these may only take the timeout."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        server, _ = listening.accept()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.settimeout(1.0)
        connection = SimpleNamespace(_sock=client, disconnect=client.close)
        over = threading.Event()

        def trickle():
            while not over.wait(0.02):
                server.recv(1 << 14)

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with pytest.raises(redis.TimeoutError, match="did not take all in time"):
                send(connection, [("SET", "a", LARGE)] * 400, check_health=False)
        finally:
            over.set()
            thread.join()
            server.close()
    assert client.fileno() == -1


@pytest.mark.parametrize("timeout", [0.05, 1e-9], ids=["a while", "below the kernel's clock"])
def test_server_that_takes_no_more_is_a_timeout_and_the_connection_is_closed(ends, timeout):
    connection, _ = ends
    connection._sock.settimeout(timeout)
    with pytest.raises(redis.TimeoutError, match="did not take all in time"):
        send(connection, [("SET", "a", LARGE)] * 8, check_health=False)
    assert connection._sock.fileno() == -1


def test_server_that_goes_half_way_is_a_lost_connection(ends):
    connection, server = ends
    threading.Timer(0.05, server.shutdown, [socket.SHUT_RDWR]).start()
    with pytest.raises(redis.ConnectionError, match="lost"):
        send(connection, [("SET", "a", LARGE)] * 8, check_health=False)
    assert connection._sock.fileno() == -1


def test_server_stores_what_was_sent(own_client, own_server):
    connection = redis.Connection(port=own_server.port, protocol=2, parser_class=ReplyParser)
    connection.connect()
    send(
        connection, [("MULTI",), ("SET", "a", LARGE), ("HSET", "h", "f", 5), ("EXEC",), ("GET", "a"), ("LPUSH", "a", 1)]
    )
    *replies, refused = receive(connection, 6)
    connection.disconnect()
    assert replies == [b"OK", b"QUEUED", b"QUEUED", [b"OK", 1], LARGE]
    assert isinstance(refused, redis.ResponseError)
    assert own_client.get("a") == LARGE
