"""How much `benchmarks/hotpath.py` measures, and the plain means that it is measured with: clients, and raw frames."""

import gc
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis

import trajstore
from trajstore.entries import Buffer
from trajstore.log.resp import pack
from trajstore.log.wire import info_fields

__all__ = ["FULL", "QUICK", "HotScale", "RawClient", "bare_client", "opened", "socket_path", "tidy", "uncollected"]

_REWRITING = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")


class HotScale(NamedTuple):
    """How much is measured.

    Attributes:
        repeats: rounds of what is timed whole.
        payloads: of 1.5 MB, a round.
        together: of these, in one trajectory.
        events: of 500 bytes, a round.
        trajectories: small ones, a round; fewer where each is fsynced.
        fsynced: the same at `fsync` level.
        many: how many trajectories the log holds, ascending, when the next ones are timed.
        waiting: how many trajectories wait for who follows the log, ascending, when its memory is measured.
    """

    repeats: int
    payloads: int
    together: int
    events: int
    trajectories: int
    fsynced: int
    many: Sequence[int]
    waiting: Sequence[int]


FULL = HotScale(
    repeats=5,
    payloads=160,
    together=20,
    events=40_000,
    trajectories=4_000,
    fsynced=1_000,
    many=(100, 1_000, 10_000, 100_000, 1_000_000),
    waiting=(2_000, 20_000),
)
QUICK = HotScale(
    repeats=1, payloads=8, together=4, events=2_000, trajectories=100, fsynced=20, many=(50, 100), waiting=(50, 100)
)


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[trajstore.Store]:
    """A new embedded store, whose server rewrites its append-only file only when told."""
    with trajstore.open(folder / "store", timeout=120, **options) as store:
        store.wire.call("CONFIG", "SET", "auto-aof-rewrite-percentage", 0)
        yield store


def tidy(store: trajstore.Store) -> None:
    """Bring the server's append-only file down to what it holds, and its memory too; wait until all that is over.

    FLUSHDB gives freed memory back to the system; UNLINK leaves it to whoever writes next, and saves it page faults.
    """
    store.wire.call("MEMORY", "PURGE")
    store.wire.call("BGREWRITEAOF")
    while any(info_fields(store.wire.call("INFO", "persistence"))[name] != "0" for name in _REWRITING):
        time.sleep(0.02)


@contextmanager
def uncollected() -> Iterator[None]:
    """What lives now is left alone by Python's collector: a benchmark's own objects cost those that it measures."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def bare_client(store: trajstore.Store) -> redis.Redis:
    """redis-py as it is commonly used, on a database of its own of the store's server."""
    return redis.Redis(unix_socket_path=socket_path(store), db=1, single_connection_client=True)


def socket_path(store: trajstore.Store) -> str:
    """Of the embedded server."""
    return str(store.wire.session().line.path)


class RawClient:
    """A socket to the same server and nothing else: ready-made frames out, replies in."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self.send([pack([("SELECT", 1)])])
        self._buffer = memoryview(bytearray(1 << 20))

    def send(self, frames: Iterable[Sequence[Buffer]]) -> None:
        """One after the other, each in its pieces; each has a reply of one line."""
        for pieces in frames:
            for piece in pieces:
                self._socket.sendall(piece)
            while not self._socket.recv(256).endswith(b"\r\n"):
                pass

    def receive(self, frames: Iterable[Sequence[Buffer]], nbytes: int) -> None:
        """One after the other; each is answered by a value of so many bytes."""
        whole = len(b"$%d\r\n" % nbytes) + nbytes + 2
        for pieces in frames:
            for piece in pieces:
                self._socket.sendall(piece)
            left = whole
            while left:
                left -= self._socket.recv_into(self._buffer)

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()
