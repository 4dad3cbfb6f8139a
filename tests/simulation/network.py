"""Between the library and the server: connections in the place of redis-py's, on which requests and replies get lost.

`trajstore.log.wire.Wire` is given a pool of these, so everything above redis-py's connection is the library's own code.
"""

import io
import random
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import redis

from tests.simulation.scheduler import Scheduler
from tests.simulation.server import Server

__all__ = ["Line", "Network", "Pool"]


class Network:
    """The way to the server.

    Args:
        loss: share of requests that something happens to.

    Attributes:
        calm: nothing gets lost any more.
        up: the server answers.
        loading: it answers that it reads its log.
        late: requests that their sender has given up, and that arrive all the same: when, and what.
        counts: what happened, by kind.
    """

    def __init__(self, server: Server, scheduler: Scheduler, rng: random.Random, *, loss: float) -> None:
        self.server = server
        self.scheduler = scheduler
        self.rng = rng
        self.loss = loss
        self.calm = False
        self.up = True
        self.loading = False
        self.generation = 0
        self.late: list[tuple[float, Line, list[Any]]] = []
        self.counts: dict[str, int] = {}

    def down(self) -> None:
        """The server goes away: every connection ends, and what was on its way is gone."""
        self.up = False
        self.generation += 1
        self.late.clear()

    def fate(self, *, stateful: bool) -> str:
        """What happens to a request."""
        if self.calm or self.rng.random() >= self.loss:
            return ""
        kinds = ["request lost", "reply lost", "cut", "late", "slow"]
        if not stateful:
            kinds.append("twice")
        kind = self.rng.choice(kinds)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return kind

    def deliver_late(self) -> None:
        """Requests whose time has come arrive now, when nobody waits for their replies any more."""
        if not self.late:
            return
        due = [one for one in self.late if one[0] <= self.scheduler.now]
        self.late = [one for one in self.late if one[0] > self.scheduler.now]
        for _, line, commands in due:
            line.deliver(commands)


class Line:
    """The server's end of one connection: transactions and watches."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._queued: list[Any] | None = None
        self._refused = False
        self._watched: dict[bytes, int] = {}

    @property
    def stateful(self) -> bool:
        return self._queued is not None or bool(self._watched)

    def deliver(self, commands: Sequence[Any]) -> list[Any]:
        """Run commands, as a server does that reads them from a socket."""
        return [self._one(command) for command in commands]

    def _one(self, command: Any) -> Any:
        server, name = self._network.server, command[0].upper()
        if name == b"MULTI":
            self._queued, self._refused = [], False
            return b"OK"
        if name == b"WATCH":
            self._watched |= {key: server.versions.get(key, 0) for key in command[1:]}
            return b"OK"
        if name == b"UNWATCH":
            self._watched = {}
            return b"OK"
        if name == b"EXEC":
            queued, self._queued = self._queued or [], None
            watched, self._watched = self._watched, {}
            if self._refused:
                return redis.exceptions.ExecAbortError("Transaction discarded because of previous errors.")
            if any(server.versions.get(key, 0) != version for key, version in watched.items()):
                return None
            return server.execute(queued)
        full = server.full
        if self._queued is not None:
            if full:  # Redis 7.0 refuses even what makes room, inside MULTI
                self._refused = True
                return _oom()
            self._queued.append(command)
            return b"QUEUED"
        if full and server.refused_when_full(command):
            return _oom()
        return server.execute([command])[0]


class Connection:
    """What `Wire` and `Session` need of a redis-py connection."""

    def __init__(self, network: Network, timeout: float) -> None:
        self._network = network
        self.socket_timeout: float | None = timeout
        self.socket_connect_timeout: float | None = timeout
        self._sock: Any = None
        self._line = Line(network)
        self._generation = -1
        self._replies: deque[Any] = deque()
        self._broken: redis.ConnectionError | redis.TimeoutError | None = None
        self._parser = self

    def connect(self) -> None:
        if self._sock is not None:
            return
        self._network.scheduler.pause()
        if not self._network.up:
            raise redis.ConnectionError("Connection refused")
        self._generation = self._network.generation
        self._line = Line(self._network)
        self._replies.clear()
        self._broken = None
        self._sock = _Socket(self)

    def disconnect(self, *_: Any) -> None:
        self._sock = None
        self._replies.clear()

    def send_packed_command(self, frames: Sequence[Any], check_health: bool = True) -> None:
        commands = list(_commands(frames))
        network, scheduler = self._network, self._network.scheduler
        self.connect()
        scheduler.pause()
        self._require_up()
        if network.loading:
            self.disconnect()
            raise redis.BusyLoadingError("Redis is loading the dataset in memory")
        block = _block_of(commands)
        fate = network.fate(stateful=self._line.stateful)
        timeout = self.socket_timeout or 10.0
        match fate:
            case "request lost":
                self._broken = redis.ConnectionError("the connection was lost")
                return
            case "late":
                rest = scheduler.rng.choice([0.05, 0.5, 2.0, timeout * 2])
                network.late.append((scheduler.now + timeout * scheduler.rng.random() + rest, self._line, commands))
                self._broken = redis.TimeoutError("no answer in time")
                return
            case "cut":
                self._line.deliver(commands[: scheduler.rng.randrange(len(commands) + 1)])
                self._broken = redis.ConnectionError("the connection was lost")
                return
            case "slow":
                scheduler.sleep(scheduler.rng.random() * timeout * 0.9)
                self._require_up()
            case "twice":
                again = scheduler.now + scheduler.rng.choice([0.0, 0.01, 1.0, 4.0])
                network.late.append((again, Line(network), commands))
        replies = self._line.deliver(commands)
        if block is not None and replies == [None]:
            replies = self._wait(commands, block)
        if fate in ("reply lost", "twice"):
            self._broken = redis.ConnectionError("the connection was lost")
            return
        tardy = scheduler.current.tardy if scheduler.current is not None else 0.0
        if tardy and scheduler.rng.random() < tardy:
            scheduler.sleep(scheduler.rng.random() * timeout * 0.9)
        else:
            scheduler.pause()
        self._require_up()
        self._replies += replies

    def read_response(self, *_: Any, **__: Any) -> Any:
        if self._broken is not None:
            error, self._broken = self._broken, None
            if isinstance(error, redis.TimeoutError):
                self._network.scheduler.sleep(self.socket_timeout or 10.0)
            self.disconnect()
            raise error
        reply = self._replies.popleft()
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def replies(self, count: int) -> list[Any]:
        """In the place of `trajstore.log.resp.ReplyParser`."""
        found: list[Any] = []
        for _ in range(count):
            try:
                found.append(self.read_response())
            except redis.ResponseError as error:
                found.append(error.with_traceback(None))
        return found

    def _wait(self, commands: list[list[bytes]], seconds: float) -> list[Any]:
        """A blocking read: again with every change, until it brings something or its time is over."""
        network, scheduler = self._network, self._network.scheduler
        until = scheduler.now + seconds
        while True:
            seen = network.server.changes
            scheduler.wait(partial(self._news, seen), until - scheduler.now)
            self._require_up()
            replies = self._line.deliver(commands)
            if replies != [None] or scheduler.now >= until:
                return replies

    def _news(self, seen: int) -> bool:
        return self._network.server.changes != seen or not self._network.up

    def _require_up(self) -> None:
        if not self._network.up or self._generation != self._network.generation:
            self.disconnect()
            raise redis.ConnectionError("the connection was lost")


class _Socket:
    """The bytes of the replies, for who reads them without redis-py's parser."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bytes = b""

    def recv_into(self, room: memoryview) -> int:
        while not self._bytes:
            try:
                reply = self._connection.read_response()
            except redis.TimeoutError as error:
                raise TimeoutError from error
            except redis.ConnectionError as error:
                raise OSError(str(error)) from error
            self._bytes = b"$-1\r\n" if reply is None else b"$%d\r\n%b\r\n" % (len(reply), reply)
        count = min(len(room), len(self._bytes))
        room[:count] = self._bytes[:count]
        self._bytes = self._bytes[count:]
        return count


class Pool:
    """What `Wire` needs of a redis-py connection pool."""

    def __init__(self, network: Network, timeout: float) -> None:
        self.connection_class = Connection
        self.connection_kwargs = {"network": network, "timeout": timeout}
        self._idle: list[Connection] = []

    def get_connection(self) -> Connection:
        connection = self._idle.pop() if self._idle else Connection(**self.connection_kwargs)  # type: ignore[arg-type]
        if connection._sock is not None and connection._generation != connection._network.generation:
            connection.disconnect()
        connection.connect()
        return connection

    def release(self, connection: Connection) -> None:
        connection._replies.clear()
        self._idle.append(connection)

    def disconnect(self, inuse_connections: bool = True) -> None:
        self._idle.clear()


def _oom() -> redis.ResponseError:
    return redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")


def _commands(frames: Sequence[Any]) -> Iterator[list[bytes]]:
    """The commands of RESP frames."""
    data = io.BytesIO(b"".join(frames))
    while line := data.readline():
        yield [data.read(int(data.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]


def _block_of(commands: list[list[bytes]]) -> float | None:
    command = commands[0]
    return int(command[command.index(b"BLOCK") + 1]) / 1000 if b"BLOCK" in command[:8] else None
