"""A TCP proxy between a store and its server that loses things on purpose.

A fault is told by the command that triggers it: the proxy parses the requests that pass (RESP arrays) and acts on the
first one that contains the word. Threads and sockets only; a fault happens once, unless armed again.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

__all__ = ["FaultyProxy", "requests_in"]


class FaultyProxy:
    """Listens on a loopback port and forwards to `port`.

    Attributes:
        port: where to connect instead.
        connections: made so far.
        refused: turned away so far.
        fired: set once the armed fault has happened.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.refused = 0
        self.fired = threading.Event()
        self._lock = threading.Lock()
        self._armed: tuple[str, bytes, threading.Event | None] | None = None
        self._gates: list[threading.Event] = []
        self._refusing = False
        self._links: list[_Link] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def url(self, run: str) -> str:
        """Where a store of that run is, by way of the proxy."""
        return f"redis://127.0.0.1:{self.port}/0?run={run}"

    def drop_reply(self, word: bytes) -> None:
        """The next request with this word reaches the server; its connection is cut before any reply to it."""
        self._arm("reply", word)

    def cut_before(self, word: bytes) -> None:
        """The next request with this word never reaches the server: the connection is cut before it."""
        self._arm("before", word)

    def swallow_reply(self, word: bytes) -> None:
        """The next request with this word reaches the server; its replies vanish and the connection stays open."""
        self._arm("swallow", word)

    def hold_before(self, word: bytes) -> threading.Event:
        """The next request with this word, and all after it on its connection, wait until the returned event is set."""
        gate = threading.Event()
        self._gates.append(gate)
        self._arm("hold", word, gate)
        return gate

    def disarm(self) -> None:
        """What was armed and has not happened yet will not."""
        with self._lock:
            self._armed = None

    def cut_all(self) -> None:
        """Cut every connection there is."""
        with self._lock:
            links = list(self._links)
        for link in links:
            _shut(link.client)
            _shut(link.server)

    def refuse(self) -> None:
        """Turn connections away, and cut those there are, until `accept`."""
        with self._lock:  # what is being connected just now is turned away, or is there to be cut
            self._refusing = True
        self.cut_all()

    def accept(self) -> None:
        """Let connections through again."""
        self._refusing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for gate in self._gates:
            gate.set()
        _shut(self._listener)
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(10)
        for link in self._links:
            link.client.close()
            link.server.close()

    def _arm(self, how: str, word: bytes, gate: threading.Event | None = None) -> None:
        with self._lock:
            self.fired.clear()
            self._armed = (how, word, gate)

    def _trigger(self, request: bytes) -> tuple[str | None, threading.Event | None]:
        with self._lock:
            if self._armed is None or self._armed[1] not in request:
                return None, None
            (how, _, gate), self._armed = self._armed, None
            return how, gate

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = None if self._refusing else socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is down
                server = None
            with self._lock:
                link = None if server is None or self._refusing else _Link(client, server)
                if link is not None:
                    self._links.append(link)
            if link is None:
                self.refused += 1
                for one in (client, server):
                    if one is not None:
                        one.close()
                continue
            self.connections += 1
            for work in (self._requests, self._replies):
                thread = threading.Thread(target=work, args=(link,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _requests(self, link: "_Link") -> None:
        how: str | None = None
        with contextlib.suppress(OSError):
            for request in requests_in(link.client):
                how, gate = self._trigger(request)
                if how in ("reply", "swallow"):
                    link.silent.set()
                if how == "before":
                    break
                if gate is not None:
                    self.fired.set()
                    gate.wait(60)
                link.server.sendall(request)
                if how == "reply":  # a server executes what it has read before it sees the end of it
                    link.server.shutdown(socket.SHUT_WR)
                    link.ended.wait(10)
                    break
                if how == "swallow":
                    self.fired.set()
        _shut(link.client)
        _shut(link.server)
        if how in ("before", "reply"):
            self.fired.set()

    def _replies(self, link: "_Link") -> None:
        with contextlib.suppress(OSError):
            for data in self._heard(link.server):
                if not link.silent.is_set():
                    link.client.sendall(data)
        link.ended.set()
        if not link.silent.is_set():
            _shut(link.client)

    def _heard(self, server: socket.socket) -> Iterator[bytes]:
        """What a server says on a connection, as it is to be passed on."""
        while data := server.recv(1 << 16):
            yield data


class _Link:
    """A connection and its continuation.

    Attributes:
        client, server: the two sockets.
        silent: no reply passes any more.
        ended: the server has closed its side.
    """

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.silent = threading.Event()
        self.ended = threading.Event()


def requests_in(client: socket.socket) -> Iterator[bytes]:
    """Whole requests (RESP arrays of bulk strings) as they arrive on a socket, a MULTI ... EXEC as one."""
    transaction = b""
    with client.makefile("rb") as buffer:
        while line := buffer.readline():
            request = [line]
            for _ in range(int(line[1:])):
                size = buffer.readline()
                request += [size, buffer.read(int(size[1:]) + 2)]
            word = request[2]
            transaction += b"".join(request)
            if not (word == b"MULTI\r\n" or (transaction.startswith(b"*1\r\n$5\r\nMULTI") and word != b"EXEC\r\n")):
                yield transaction
                transaction = b""


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
