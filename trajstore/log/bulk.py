"""Large values on their way from the socket into memory that their reader gives, with no copy in between.

redis-py gathers every reply of a pipeline in a growing buffer and cuts the values out of it: three copies, and most of
the time that a batch takes (benchmarks/reader.py). Here a value is read like a file while it arrives.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
from redis._parsers import BaseParser

from trajstore.log.resp import Command, send

__all__ = ["Value", "fetch", "whole_value"]

T = TypeVar("T")

_AHEAD = 4
"""Values asked for before the first has come: they hide the way to the server, which holds each of them meanwhile."""

_BUFFER = 1 << 16

_LENGTH = re.compile(rb"\$(\d{1,18})")


class Value:
    """One value on its way in, to be read once from its beginning; what is left over is thrown away.

    Attributes:
        nbytes: its size.
        command: that asked for it; empty for one that was not asked for.
    """

    def __init__(self, stream: "_Stream | _Held", nbytes: int, command: Command = ()) -> None:
        self.nbytes = nbytes
        self.command = command
        self._stream = stream
        self._left = nbytes

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer of bytes, as far as the value goes; how many that were."""
        count = min(len(buffer), self._left)
        self._stream.fill(buffer[:count])
        self._left -= count
        return count

    def readinto1(self, buffer: memoryview) -> int:
        """As `readinto`, but waits only for the first of these bytes, and goes on with what has come."""
        room = buffer[: self._left]
        count = self._stream.take(room) if room else 0
        self._left -= count
        return count

    def read(self, count: int = -1) -> bytes:
        """The next `count` bytes, or all that are left."""
        data = bytearray(self._left if count < 0 else min(count, self._left))
        self.readinto(memoryview(data))
        return bytes(data)


class _Held:
    """The bytes of a value that has come already."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def fill(self, buffer: memoryview) -> None:
        """The next bytes, as many as there is room."""
        self.take(buffer)

    def take(self, buffer: memoryview) -> int:
        """As `fill`; how many that were."""
        buffer[:] = self._data[: len(buffer)]
        self._data = self._data[len(buffer) :]
        return len(buffer)


def whole_value(data: bytes, command: Command = ()) -> Value:
    """A value that has come already, to be read like one on its way."""
    return Value(_Held(data), len(data), command)


def fetch(connection: Any, commands: Sequence[Command], read: Callable[[Value], T]) -> list[T | None]:
    """One value for each command over a connection of redis-py on which nothing is pending; None for one not there.

    Args:
        commands: `GET key`, or `HMGET key field`.
        read: called with each value as it arrives. What it raises leaves the connection closed.

    Raises:
        redis.RedisError: the server refused, what came is no reply to GET, or the connection was lost.
    """
    stream, line_end = _Stream(connection._sock), bytearray(2)
    found: list[T | None] = []
    try:
        send(connection, commands[:_AHEAD])
        for number, command in enumerate(commands):
            nbytes = stream.length(in_list=command[0] == "HMGET")
            if nbytes is None:
                found.append(None)
            else:
                value = Value(stream, nbytes, command)
                found.append(read(value))
                value.read()
                stream.fill(memoryview(line_end))
                if line_end != b"\r\n":
                    raise redis.InvalidResponse(f"a value of {nbytes} bytes goes on with {bytes(line_end)!r}")
            following = commands[number + _AHEAD : number + _AHEAD + 1]
            if following:
                send(connection, following, check_health=False)  # a PING's reply would come behind values
    except BaseException:
        connection.disconnect()
        raise
    return found


class _Stream:
    """The bytes of RESP2 replies. What is small comes through a buffer, what is large goes by it."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0

    def length(self, *, in_list: bool) -> int | None:
        """Size of the value that comes next, None for no value.

        Args:
            in_list: it is the only one of a list.

        Raises:
            redis.RedisError: an error reply, as redis-py raises it, or none that GET may have.
        """
        line = self._line()
        if in_list and line == b"*1":
            line = self._line()
        if line[:1] == b"-":
            text = line[1:].decode(errors="replace")
            raise BaseParser.parse_error(text)  # type: ignore[no-untyped-call]
        if line[:1] == b"+":  # what a server may do with a short value: fakeredis does
            self._start -= len(line) + 1  # it begins behind the sign
            return len(line) - 1
        if line == b"$-1":
            return None
        length = _LENGTH.fullmatch(line)
        if length is None:
            raise redis.InvalidResponse(f"GET was answered with {line[:100]!r}")
        return int(length[1])

    def fill(self, buffer: memoryview) -> None:
        """The next bytes, as many as there is room."""
        at = 0
        while at < len(buffer):
            at += self.take(buffer[at:])

    def take(self, buffer: memoryview) -> int:
        """What has come of the next bytes, at least one; how many that were."""
        if self._start == self._stop:
            if len(buffer) >= _BUFFER // 2:
                return self._receive(buffer)
            self._start, self._stop = 0, self._receive(self._view)
        count = min(len(buffer), self._stop - self._start)
        buffer[:count] = self._view[self._start : self._start + count]
        self._start += count
        return count

    def _line(self) -> bytes:
        """Up to the next line end, which is left out."""
        while (end := self._buffer.find(b"\r\n", self._start, self._stop)) < 0:
            left = self._stop - self._start
            self._view[:left] = self._view[self._start : self._stop]
            self._start, self._stop = 0, left + self._receive(self._view[left:])
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _receive(self, room: memoryview) -> int:
        try:
            received: int = self._socket.recv_into(room)
        except TimeoutError as error:
            raise redis.TimeoutError("no answer in time") from error
        except OSError as error:
            raise redis.ConnectionError(f"the connection was lost: {error}") from error
        if not received:
            raise redis.ConnectionError("the server closed the connection")
        return received
