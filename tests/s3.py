"""An S3 server to test against: moto's, as a process of its own on a loopback port, and a proxy that spoils replies.

`python -m tests.s3` is the process. It ends when its standard input does, so not even a killed test run leaves one
behind. Puts are taken one at a time: moto looks and then writes, and between the two a second conditional put would
get in, which no S3 server allows.
"""

import io
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

__all__ = ["BUCKET", "Answer", "Proxy", "Request", "S3Server"]

BUCKET = "trajstore"

_REGION = "us-east-1"
_SECRET = "not-much-of-a-secret"
_AUTHORIZATION = (
    f"AWS4-HMAC-SHA256 Credential=tester/20260101/{_REGION}/s3/aws4_request, SignedHeaders=host, Signature=0"
)
_ROOT = Path(__file__).parent.parent


class S3Server:
    """A server process with one bucket, which lives in its memory.

    Attributes:
        endpoint: `http://127.0.0.1:PORT`.
        options: for `open_storage`, `trajstore.open(archive_options=...)` and the like.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3"], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # written once it listens
        assert line, f"the S3 server did not start: exit code {self._process.wait(30)}"
        self.port = int(line)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.options = options(self.endpoint)

    def url(self, name: str) -> str:
        """Where an archive of that name is."""
        return f"s3://{BUCKET}/{name}"

    def put(self, key: str, data: bytes) -> None:
        """Write an object as another program might: `dir/` for a folder that a console shows."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("PUT", f"/{BUCKET}/{quote(key)}", data, {"Authorization": _AUTHORIZATION})
        assert connection.getresponse().status == 200
        connection.close()

    def pause(self) -> None:
        """Stop it from answering, until `resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it; what it held is gone."""
        self._process.kill()
        self._process.wait(30)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


def options(endpoint: str) -> dict[str, str]:
    """Options that lead to an endpoint with the credentials of these tests."""
    return {
        "endpoint": endpoint,
        "region": _REGION,
        "access_key_id": "tester",
        "secret_access_key": _SECRET,
    }


class Request:
    """What arrived at a proxy: `method`, `path` with the query, `headers` in lower case, `body`."""

    def __init__(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        self.method = method
        self.path = path
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body


class Answer:
    """What a proxy replies: status, headers and body; `lost` closes the connection instead."""

    def __init__(
        self, status: int = 200, body: bytes = b"", headers: Mapping[str, str] | None = None, *, lost: bool = False
    ) -> None:
        self.status = status
        self.headers = dict(headers or {})
        self.body = body
        self.lost = lost

    @classmethod
    def error(cls, status: int, code: str) -> "Answer":
        """An error as S3 words it."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        return cls(status, body, {"Content-Type": "application/xml"})


Rule: TypeAlias = Callable[[Request, Callable[[Request], Answer]], Answer]
"""Answers a request; its second argument asks the real server."""


class Proxy(AbstractContextManager["Proxy"]):
    """Stands before the server and answers by a rule, so that a test can lose a reply or change one.

    Attributes:
        requests: what has arrived so far.
    """

    def __init__(self, server: S3Server, rule: Rule) -> None:
        self.requests: list[Request] = []
        self._server = _Listener(("127.0.0.1", 0), _handler(server.port, rule, self.requests))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.options = options(self.endpoint)

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed is no news
            super().handle_error(request, client_address)


def _handler(port: int, rule: Rule, requests: list[Request]) -> type[BaseHTTPRequestHandler]:
    def ask(request: Request) -> Answer:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(request.method, request.path, request.body, dict(request.headers))
            reply = connection.getresponse()
            headers = {name: value for name, value in reply.getheaders() if name.lower() not in _HOP_BY_HOP}
            return Answer(reply.status, reply.read(), headers)
        finally:
            connection.close()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, dict(self.headers.items()), body)
            requests.append(request)
            answer = rule(request, ask)
            if answer.lost:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(answer.status)
            length = answer.headers.pop("Content-Length", None) if self.command == "HEAD" else None
            for name, value in answer.headers.items():
                if name.lower() != "content-length":
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(answer.body)))
            self.end_headers()
            with suppress(OSError):  # the client has given up
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


_HOP_BY_HOP = ("connection", "transfer-encoding", "date", "server")


def _one_put_at_a_time(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    turn = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("PUT", "POST"):
            return app(environ, start_response)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))  # a slow sender holds nobody up
        with turn:
            return list(app(environ, start_response))

    return serve


def _serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        protocol_version = "HTTP/1.1"

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, _REGION)
    app = _one_put_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()  # until whoever started it is gone


if __name__ == "__main__":
    _serve()
