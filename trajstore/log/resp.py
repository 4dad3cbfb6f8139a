"""RESP2 for redis-py's connections: commands → frames, bytes → replies.

redis-py has both, for requests one at a time. A flush sends thousands of small commands and hears thousands of small
replies, and redis-py's packer and parser took as much time for them as all else together (benchmarks/hotpath.py).
Errors are redis-py's own.
"""

import os
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import redis
from redis._parsers import BaseParser

from trajstore.entries import Buffer

__all__ = ["Argument", "Command", "ReplyParser", "pack", "receive", "send"]

Argument: TypeAlias = str | bytes | bytearray | memoryview | int
"""Of a request. A view is of contiguous bytes."""

Command: TypeAlias = Sequence[Argument]

_APART = 1 << 16
"""Bytes of an argument that goes out by itself, without a copy. What is smaller goes out together: each `send` lets
another thread have the interpreter, which comes back only after a while."""

_TOGETHER = 1 << 18

_CALL = 512
"""Pieces that the kernel is handed at once; it takes 1024 at most."""

_STEP = 1 << 22
"""Bytes that go out in one call at most, unless one piece has more. They have the socket's timeout to themselves, so
that a line is given up for being stuck, and not for being slow."""

_WORDS = {
    word: b"$%d\r\n%b\r\n" % (len(word), word.encode()) for word in ("MULTI", "EXEC", "XADD", "HSET", "NOMKSTREAM")
}
"""What every flush says again and again."""

_READ = 1 << 16

_MOST = 1 << 29
"""Bytes that a value can have; a server stores none larger unless it is told to (proto-max-bulk-len)."""

_CLOSED = "the server closed the connection"


def send(connection: Any, commands: Sequence[Command], *, check_health: bool = True) -> None:
    """Send commands over a connection of redis-py, which connects if need be; its errors are redis-py's.

    Raises:
        redis.RedisError: some of it (4 MiB, or one larger argument) did not go out within the socket's timeout, or the
            connection was lost; it is closed then.
    """
    pieces = pack(commands)
    if len(pieces) < 2 or type(connection._sock) is not socket.socket:  # small, or TLS, which sends by itself
        connection.send_packed_command(pieces, check_health=check_health)
        return
    if check_health:
        connection.check_health()
    with _closing(connection, "the server did not take all in time"):
        sock = connection._sock
        if sock is None:  # closed by another thread
            raise redis.ConnectionError(_CLOSED)
        _send_together(sock, pieces)


def receive(connection: Any, count: int) -> list[Any]:
    """The next `count` replies on a connection of redis-py; an error reply is a value.

    Raises:
        redis.RedisError: the connection was lost, or the server refused it as a whole, or what came is no RESP2; it is
            closed then.
    """
    with _closing(connection, "no answer in time"):
        replies: list[Any] = connection._parser.replies(count)
    return replies


@contextmanager
def _closing(connection: Any, late: str) -> Iterator[None]:
    """A failure half way closes the connection: what is still to come would be taken for something else."""
    try:
        yield
    except BaseException as error:
        connection.disconnect()
        if isinstance(error, TimeoutError):
            raise redis.TimeoutError(late) from error
        if isinstance(error, OSError):
            raise redis.ConnectionError(f"the connection was lost: {error}") from error
        raise


def _send_together(sock: socket.socket, pieces: Sequence[Buffer]) -> None:
    """Send pieces in few calls, each of which blocks until the kernel has taken all of it.

    A Python socket with a timeout asks before every 200 kB whether there is room, and its thread competes for Python's
    lock after each answer; so the kernel keeps the time within a call (benchmarks/hotpath.py: a tenth of the
    throughput). Python asks once before each call all the same, which is as well: a call that has sent nothing when a
    signal comes is begun anew, and with it the kernel's time, but not Python's. Over a unix socket the kernel's time
    also begins anew whenever the server has taken something.
    """
    timeout = sock.gettimeout()
    left = [memoryview(piece) for piece in pieces]
    left.reverse()
    if timeout is not None:
        os.set_blocking(sock.fileno(), True)
    try:
        while left:
            step = [left.pop()]
            size = len(step[0])
            while left and len(step) < _CALL and size + len(left[-1]) <= _STEP:
                step.append(left.pop())
                size += len(step[-1])
            _send_step(sock, step, timeout)
    finally:
        if timeout is not None and sock.fileno() >= 0:  # -1: somebody has closed it
            os.set_blocking(sock.fileno(), False)


def _send_step(sock: socket.socket, step: list[memoryview], timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    while step:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            seconds, rest = divmod(max(left, 0.001), 1)  # the kernel takes 0 for ever
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
        sent = sock.sendmsg(step)
        through = 0
        while through < len(step) and sent >= len(step[through]):
            sent -= len(step[through])
            through += 1
        del step[:through]
        if sent:  # a signal came between, or the time was up
            step[0] = step[0][sent:]


def pack(commands: Iterable[Command]) -> list[Buffer]:
    """Frames of commands, in pieces to send one after the other."""
    pieces: list[Buffer] = []
    small: list[Buffer] = []
    size = 0
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for argument in command:
            if isinstance(argument, str):
                word = _WORDS.get(argument)
                if word is not None:
                    small.append(word)
                    continue
                argument = argument.encode()
            elif isinstance(argument, int):
                argument = b"%d" % argument
            length = len(argument)
            if length < _APART:
                small += (b"$%d\r\n" % length, argument, b"\r\n")
                size += length
            else:
                small.append(b"$%d\r\n" % length)
                pieces += (b"".join(small), argument)
                small, size = [b"\r\n"], 0
        if size > _TOGETHER:
            pieces.append(b"".join(small))
            small, size = [], 0
    pieces.append(b"".join(small))
    return pieces


class ReplyParser(BaseParser):
    """The replies of one connection, in the place of redis-py's own parser; values are bytes."""

    def __init__(self, socket_read_size: int) -> None:
        self._sock: Any = None
        self._timeout: float | None = None
        self._data = b""
        self._at = 0

    def on_connect(self, connection: Any) -> None:
        """A new socket; nothing of an old one is left."""
        self._sock = connection._sock
        self._timeout = connection.socket_timeout
        self._data, self._at = b"", 0

    def on_disconnect(self) -> None:
        """The socket is closed."""
        self._sock = None
        self._data, self._at = b"", 0

    def can_read(self, timeout: float = 0) -> bool:
        """Something has come that nobody asked for.

        Raises:
            redis.ConnectionError: the server has closed the connection.
        """
        if self._at < len(self._data):
            return True
        if self._sock is None:
            return False
        self._sock.settimeout(timeout)
        try:
            self._more()
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return False
        finally:
            self._sock.settimeout(self._timeout)
        return True

    def read_response(self, disable_decoding: bool = False, timeout: object = None) -> Any:
        """The next reply, for redis-py itself; an error reply is a value."""
        return self.replies(1)[0]

    def replies(self, count: int) -> list[Any]:
        """The next replies; an error reply is a value. Waits for each read as long as the socket does.

        Raises:
            redis.RedisError: the connection was lost, the server refused it as a whole, or what came is no RESP2.
            OSError: of the socket.
        """
        try:
            return [self._reply() for _ in range(count)]
        except (ValueError, RecursionError) as error:
            raise redis.InvalidResponse(f"what the server answered is no RESP2: {error}") from error

    def _reply(self) -> Any:
        line = self._line()
        match line[:1]:
            case b"+":
                return line[1:]
            case b"$":
                return self._value(_size(line))
            case b":":
                return _number(line)
            case b"*":
                count = _size(line)
                return None if count < 0 else [self._reply() for _ in range(count)]
            case b"-":
                error = self.parse_error(line[1:].decode(errors="replace"))  # type: ignore[no-untyped-call]
                # READONLY: a master that was made a replica. Its address may lead to the new one by now.
                if isinstance(error, redis.ConnectionError | redis.ReadOnlyError):
                    raise error
                return error
        raise _unknown(line)

    def _line(self) -> bytes:
        while (end := self._data.find(b"\r\n", self._at)) < 0:
            self._more()
        line = self._data[self._at : end]
        self._at = end + 2
        return line

    def _value(self, size: int) -> bytes | None:
        if size < 0:
            return None
        if size > _MOST:
            raise redis.InvalidResponse(f"a value of {size} bytes")
        left = size + 2 - (len(self._data) - self._at)
        if left > _READ:
            return self._large(size)
        while left > 0:
            left -= self._more()
        value, end = self._data[self._at : self._at + size], self._data[self._at + size : self._at + size + 2]
        self._at += size + 2
        _require_end(end)
        return value

    def _large(self, size: int) -> bytes:
        """A value that comes from the socket into the memory where it stays, not through the buffer."""
        value = bytearray(size + 2)
        view = memoryview(value)
        at = len(self._data) - self._at
        view[:at] = self._data[self._at :]
        self._data, self._at = b"", 0
        while at < len(view):
            received = self._sock.recv_into(view[at:])
            if not received:
                raise redis.ConnectionError(_CLOSED)
            at += received
        _require_end(bytes(view[size:]))
        return bytes(view[:size])

    def _more(self) -> int:
        if self._sock is None:
            raise redis.ConnectionError(_CLOSED)
        chunk = self._sock.recv(_READ)
        if not chunk:
            raise redis.ConnectionError(_CLOSED)
        self._data = self._data[self._at :] + chunk if self._at < len(self._data) else chunk
        self._at = 0
        return len(chunk)


def _number(line: bytes) -> int:
    digits = line[1:]
    if not digits.isdigit() and not digits.removeprefix(b"-").isdigit():  # int() takes spaces and underscores, too
        raise _unknown(line)
    return int(digits)


def _size(line: bytes) -> int:
    """Of a value or a list; -1 for none."""
    size = _number(line)
    if size < -1:
        raise _unknown(line)
    return size


def _require_end(end: bytes) -> None:
    if end != b"\r\n":
        raise redis.InvalidResponse(f"a value goes on with {end!r}")


def _unknown(line: bytes) -> redis.InvalidResponse:
    return redis.InvalidResponse(f"a reply begins with {line[:100]!r}")
