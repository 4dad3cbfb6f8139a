"""Health over HTTP: what each path says, and that nobody can hold it up."""

import socket
import threading
from contextlib import ExitStack

import pytest

import trajstore
from tests.operations.http import get
from tests.waiting import until
from trajstore import health
from trajstore.errors import SchemaError, Unavailable
from trajstore.health import Answer, HealthServer, alive, parse_address, ready
from trajstore.pulse import Pulse


@pytest.fixture
def served():
    """An address with a page that works and one that fails."""

    def fail() -> Answer:
        raise ZeroDivisionError

    with HealthServer(("127.0.0.1", 0), {"/healthz": alive(Pulse(), within=60.0), "/fails": fail}) as server:
        yield server


def asked(server: HealthServer, request: bytes) -> bytes:
    """The whole answer to these bytes."""
    with connected(server) as connection:
        connection.sendall(request)
        return rest(connection)


def connected(server: HealthServer) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), 20)


def rest(connection: socket.socket) -> bytes:
    answer = b""
    while data := connection.recv(1 << 16):
        answer += data
    return answer


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:80", ("::1", 80)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_an_address_without_a_host_is_the_loopback(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "::1:80", "h:65536", "h:-1", "h:८०", "h:0x10"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(SchemaError, match="no address to listen on"):
        parse_address(text)


def test_an_address_that_is_taken_is_an_error_of_ours(served):
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    with pytest.raises(Unavailable, match="cannot listen on"):
        HealthServer((host, int(port)), {})


def test_a_page_its_head_and_what_is_none(served):
    assert get(f"{served.url}/healthz") == (200, "alive\n")
    assert get(f"{served.url}/healthz?x=1").status == 200
    missing = get(f"{served.url}/secret")
    assert (missing.status, missing.body) == (404, "there are /healthz, /fails\n")
    head = asked(served, b"HEAD /healthz HTTP/1.1\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 6" in head
    assert head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"get", b"\x00\xff", b""])
def test_nothing_but_get_and_head_is_answered(served, method):
    assert asked(served, method + b" /healthz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")


def test_a_request_without_end_is_refused_at_its_limit(served, monkeypatch):
    monkeypatch.setattr(health, "_HEAD_SECONDS", 60.0)
    assert asked(served, b"GET /" + b"a" * 9000).startswith(b"HTTP/1.1 431 ")


def test_a_slow_request_is_ended_however_often_it_sends(served, monkeypatch):
    monkeypatch.setattr(health, "_HEAD_SECONDS", 0.2)
    with connected(served) as connection:
        sending = threading.Event()

        def drip() -> None:
            try:
                while not sending.wait(0.02):
                    connection.sendall(b"a")
            except OSError:
                return

        thread = threading.Thread(target=drip)
        thread.start()
        answer = rest_until_reset(connection)
        sending.set()
        thread.join(20)
    assert answer.startswith(b"HTTP/1.1 408 ")


def rest_until_reset(connection: socket.socket) -> bytes:
    """A peer that ends while more comes resets the connection, behind what it has sent."""
    answer = b""
    try:
        while data := connection.recv(1 << 16):
            answer += data
    except ConnectionResetError:
        return answer
    return answer


def test_so_many_callers_that_say_nothing_are_let_in_and_no_more(served, monkeypatch):
    monkeypatch.setattr(health, "_HEAD_SECONDS", 60.0)
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(health._CALLERS):
            stack.enter_context(connected(served))
        until(lambda: threading.active_count() == before + health._CALLERS, seconds=20)
        for _ in range(3):
            assert rest_until_reset(stack.enter_context(connected(served))) == b""
        assert threading.active_count() == before + health._CALLERS
    until(lambda: threading.active_count() <= before, seconds=20)
    assert get(f"{served.url}/healthz").status == 200


def test_a_page_that_fails_ends_its_own_request_only(served, caplog):
    assert asked(served, b"GET /fails HTTP/1.1\r\n\r\n") == b""
    assert get(f"{served.url}/healthz").status == 200
    assert caplog.records[0].event == "health-request-failed"


def test_a_loop_that_does_not_turn_is_dead():
    pulse = Pulse()
    assert alive(pulse, within=60.0)().status == 200
    answer = alive(pulse, within=-1.0)()
    assert answer.status == 503
    assert b"has not turned for 0 s" in answer.body


def test_ready_says_what_does_not_answer(own_server, run_name, tmp_path):
    with trajstore.open(own_server.url(run_name), partitions=1, archive=tmp_path / "archive", timeout=1.0) as store:
        pulse = Pulse()
        ask = ready(store, pulse)
        assert ask() == Answer.text(200, "ready")
        pulse.trouble = OSError(28, "No space left on device")
        assert ask() == Answer.text(503, "it pauses: [Errno 28] No space left on device")
        pulse.trouble = None
        (tmp_path / "archive").rename(tmp_path / "elsewhere")
        assert (ask().status, b"no archive in" in ask().body) == (503, True)
        (tmp_path / "elsewhere").rename(tmp_path / "archive")
        own_server.kill()
        assert (ask().status, b"did not answer PING" in ask().body) == (503, True)
        own_server.start()
        assert ask().status == 200


def test_a_server_that_hangs_holds_one_question_however_many_ask(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1, timeout=20.0) as store:
        ask = ready(store, seconds=0.05)
        own_server.pause()
        before = threading.active_count()
        assert [ask().status for _ in range(5)] == [503] * 5
        assert threading.active_count() == before + 1
        own_server.resume()
        until(lambda: ask().status == 200, seconds=20)
