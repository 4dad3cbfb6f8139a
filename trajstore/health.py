"""Health over HTTP: `/healthz` (it is alive), `/readyz` (server and archive answer) and `/metrics`, for probes.

A request is a few hundred bytes, and is answered within seconds or not at all: more than so many bytes, seconds or
callers at a time are refused. Nothing is changed by any of them, and nothing is told but to GET and HEAD.
"""

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from trajstore.asking import Question
from trajstore.errors import SchemaError, TrajstoreError, Unavailable
from trajstore.pulse import Pulse
from trajstore.store import Store

__all__ = ["Answer", "HealthServer", "alive", "parse_address", "ready"]

log = logging.getLogger(__name__)

_HEAD_BYTES = 8192
_HEAD_SECONDS = 5.0
_CALLERS = 16
_READY_SECONDS = 5.0

_PHRASES = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 431: "Too Large"}
_TEXT = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """What a probe is told: an HTTP status, a body, and of which type it is."""

    status: int
    body: bytes
    kind: str = _TEXT

    @classmethod
    def text(cls, status: int, text: str) -> "Answer":
        """A line."""
        return cls(status, f"{text}\n".encode())


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[::1]:PORT`, `:PORT` or `PORT`; without a host it is the loopback.

    Raises:
        SchemaError: it is none.
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SchemaError(f"{text!r} is no address to listen on; write an IPv6 host in brackets, [::1]:9464")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise SchemaError(f"{text!r} is no address to listen on; give HOST:PORT, or a port alone for 127.0.0.1")
    return host or "127.0.0.1", int(port)


def alive(pulse: Pulse, *, within: float) -> Callable[[], Answer]:
    """Whether a worker's loop has turned lately."""

    def answer() -> Answer:
        silent = pulse.silent
        if silent > within:
            return Answer.text(503, f"the loop has not turned for {silent:.0f} s")
        return Answer.text(200, "alive")

    return answer


def ready(store: Store, pulse: Pulse | None = None, *, seconds: float = _READY_SECONDS) -> Callable[[], Answer]:
    """Whether server and archive answer in time, and the worker is not kept from its work.

    One question is under way at a time, however many ask: a server that hangs holds one thread, not one per probe.
    """
    question = Question(lambda: _problem(store), name="trajstore-ready")

    def answer() -> Answer:
        asked = question.ask(seconds)
        if not asked.done():
            return Answer.text(503, f"server or archive did not answer within {seconds:g} s")
        problem = asked.result()
        trouble = pulse.trouble if pulse is not None else None
        if problem or trouble is not None:
            return Answer.text(503, problem or f"it pauses: {trouble}")
        return Answer.text(200, "ready")

    return answer


def _problem(store: Store) -> str:
    try:
        for server in store.wire.servers():
            server.call("PING")
        archive = store.archive
        if archive is not None:
            archive.root.require()
    except (TrajstoreError, OSError) as error:
        return str(error)
    return ""


class HealthServer:
    """Answers at an address until it is closed. A context manager.

    Args:
        address: host and port, see `parse_address`; port 0: one that is free.
        pages: what is told, by path. Called in threads of their own, several at a time.

    Attributes:
        url: where it listens.

    Raises:
        Unavailable: the address cannot be had.
    """

    def __init__(self, address: tuple[str, int], pages: dict[str, Callable[[], Answer]]) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        server = type("_Server", (_Server,), {"address_family": family})
        try:
            self._server: _Server = server(address, _Request)
        except OSError as error:
            raise Unavailable(f"cannot listen on {address[0]}:{address[1]}: {error}") from error
        self._server.pages = pages
        host, port = self._server.server_address[:2]
        self.url = f"http://[{host!s}]:{port}" if family == socket.AF_INET6 else f"http://{host!s}:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="trajstore-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more. Answers under way end by themselves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * _CALLERS
    pages: dict[str, Callable[[], Answer]]

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(_CALLERS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):  # as many as may be are served; the next one comes again
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a health request failed", exc_info=True, extra={"event": "health-request-failed"})


class _Request(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        try:
            head = self._head()
            answer = self._answer(head)
            lines = [
                f"HTTP/1.1 {answer.status} {_PHRASES.get(answer.status, 'Unavailable')}",
                f"Content-Type: {answer.kind}",
                f"Content-Length: {len(answer.body)}",
                "Cache-Control: no-store",
                "Connection: close",
            ]
            body = b"" if head.startswith(b"HEAD ") else answer.body
            self.request.settimeout(_HEAD_SECONDS)
            self.request.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        except OSError:  # it went away, or does not read
            return

    def _head(self) -> bytes:
        """All up to the empty line; less if it is too long or too slow."""
        head, deadline = b"", time.monotonic() + _HEAD_SECONDS
        while b"\r\n\r\n" not in head and len(head) <= _HEAD_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self.request.settimeout(left)
            try:
                data = self.request.recv(_HEAD_BYTES)
            except TimeoutError:
                break
            if not data:
                break
            head += data
        return head

    def _answer(self, head: bytes) -> Answer:
        if b"\r\n\r\n" not in head:
            return Answer.text(*((431, "too long") if len(head) > _HEAD_BYTES else (408, "too slow")))
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return Answer.text(405, "GET it")
        page = self.server.pages.get(rest.partition(b" ")[0].partition(b"?")[0].decode("latin-1"))
        return page() if page is not None else Answer.text(404, f"there are {', '.join(self.server.pages)}")
