"""Servers to test against: a real redis-server and Valkey as processes of their own, and fakeredis behind a socket.

Real servers listen on a loopback port that the kernel chose, keep an append-only file like a production one, and can be
killed and brought back over the same files.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import fakeredis
import redis
from fakeredis._clients import _tcp_server

from trajstore.server import find_bundled_server

__all__ = ["BACKENDS", "FAKEREDIS_CANNOT_SHOW", "Backend", "FakeServer", "RealServer", "binary_of", "free_port"]

BACKENDS = ("fakeredis", "valkey", "redis")
"""Every backend that the log suite runs on."""

FAKEREDIS_CANNOT_SHOW = "AOF, restart, memory limits, connection faults, access rules, idle times (docs/testing.md)"


class Backend(Protocol):
    """What a test needs to know of a server."""

    name: str

    def url(self, run: str) -> str: ...


class RealServer:
    """A server process over one directory.

    Args:
        name: "redis" or "valkey".
        folder: for its files.
        options: configuration beyond the defaults, e.g. `{"maxmemory": "32mb"}`.
    """

    def __init__(self, name: str, folder: Path, **options: str) -> None:
        binary = binary_of(name)
        assert binary is not None, f"no {name} server on this machine"
        self.name = name
        self.folder = folder
        self.port = free_port()
        self.options = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
        self.options |= {"aof-use-rdb-preamble": "no"} | options
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def url(self, run: str) -> str:
        """Where a store of that run is."""
        return f"redis://127.0.0.1:{self.port}/0?run={run}"

    def client(self) -> "redis.Redis[bytes]":
        """A plain client, for looking and for meddling."""
        return redis.Redis(port=self.port, protocol=2)

    def start(self) -> None:
        """Start over what the folder holds, and wait until it answers."""
        arguments = [part for name, value in self.options.items() for part in (f"--{name}", value)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with self.client() as client:
            try:
                _until(client.ping, what=f"{self.name} on port {self.port}")
            except TimeoutError as error:  # pytest keeps no folder of a test whose fixture failed
                error.add_note((self.folder / "server.log").read_text(errors="replace")[-2000:])
                raise

    def kill(self) -> None:
        """End it as a power cut would end the process."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stop it from answering, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def aof(self) -> Path:
        """The file that grows with each command."""
        return max((self.folder / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.name)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(how)
            process.wait(30)


class FakeServer:
    """fakeredis behind a real socket, so that the code under test is the same."""

    name = "fakeredis"

    def __init__(self) -> None:
        self._server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
        self._server.RequestHandlerClass = _Handler
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def url(self, run: str) -> str:
        """Where a store of that run is."""
        return f"redis://127.0.0.1:{self._server.server_address[1]}/0?run={run}"

    def client(self) -> "redis.Redis[bytes]":
        """A plain client, for looking and for meddling."""
        return redis.Redis(port=self._server.server_address[1], protocol=2)

    def stop(self) -> None:
        """Close the socket; connections end by themselves."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(_tcp_server.TCPFakeRequestHandler):
    """Serves one connection like a server: one thread that blocks, and an error reply closes nothing.

    fakeredis polls a socket that does not block. It drops the connection at an error reply (2.40), at a reply larger
    than the socket's buffer, and now and then under load (tests/log/test_fakeredis_differences.py).
    """

    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        os.set_blocking(self.connection.fileno(), True)

    def handle(self) -> None:
        client = self.current_client
        with contextlib.suppress(ConnectionError):  # a peer that went away
            while data := self.connection.recv(1 << 16):
                client.get_socket().sendall(data)
                while client.can_read():
                    try:
                        reply = client.read_response()
                    except redis.ResponseError as error:
                        reply = error
                    self.writer.dump(reply)


def binary_of(name: str) -> str | None:
    """Path of a backend's server, None if this machine has none."""
    if name == "redis":
        return shutil.which("redis-server")
    return shutil.which("valkey-server") or find_bundled_server()


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(name: str, folder: Path, **options: str) -> Iterator[RealServer]:
    """A real server for the length of a block."""
    server = RealServer(name, folder, **options)
    try:
        yield server
    finally:
        server.kill()


def _until(ask: Callable[[], Any], *, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask()
            return
        except redis.RedisError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not answer within {seconds:g} s") from None
            threading.Event().wait(0.01)
