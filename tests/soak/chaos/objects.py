"""The object store of a chaos run: a server of the S3 protocol, and a proxy that spoils requests on demand."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from tests.s3 import Answer, Proxy, Request, S3Server

__all__ = ["HOWS", "How", "ObjectStore", "object_store"]

TIMEOUT = 10.0
"""Seconds that a call to the archive may take, tried again meanwhile."""

How: TypeAlias = Literal["reply lost", "request lost", "refused"]
HOWS: tuple[How, ...] = ("reply lost", "request lost", "refused")


class ObjectStore:
    """A server with an empty bucket, by way of a proxy.

    Attributes:
        location: of an archive in it.
        options: for `trajstore.open(archive_options=...)`.
        environment: for a process that opens a run whose archive this is: what the run's record of it leaves out.
    """

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._proxy = Proxy(server, self._answer)
        self._lock = threading.Lock()
        self._spoilt: tuple[How, int] = ("refused", 0)
        self.location = server.url("chaos")
        self.options = self._proxy.options | {"timeout": f"{TIMEOUT:g}"}
        self.environment = {f"AWS_{name.upper()}": value for name, value in self.options.items() if "key" in name}

    def spoil(self, how: How, requests: int) -> None:
        """What becomes of so many requests from now on."""
        with self._lock:
            self._spoilt = how, requests

    def pause(self) -> None:
        """Stop it from answering, until `resume`."""
        self._server.pause()

    def resume(self) -> None:
        """Let it answer again."""
        self._server.resume()

    def make_peace(self) -> None:
        """It answers, whatever is asked."""
        self.spoil("refused", 0)
        self.resume()

    def close(self) -> None:
        """End the proxy."""
        self._proxy.__exit__(None, None, None)

    def _answer(self, request: Request, ask: Callable[[Request], Answer]) -> Answer:
        with self._lock:
            how, left = self._spoilt
            self._spoilt = how, max(0, left - 1)
        if not left:
            return ask(request)
        if how == "refused":
            return Answer.error(503, "SlowDown")
        if how == "reply lost":
            ask(request)
        return Answer(lost=True)


@contextlib.contextmanager
def object_store(*, wanted: bool) -> Iterator[ObjectStore | None]:
    """One for the length of a block, if it is wanted."""
    if not wanted:
        yield None
        return
    server = S3Server()
    try:
        store = ObjectStore(server)
        try:
            yield store
        finally:
            server.resume()
            store.close()
    finally:
        server.stop()
