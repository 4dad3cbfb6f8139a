"""Commands to a Redis server and their raw replies, over redis-py's connections.

redis-py gives sockets, TLS, authentication and RESP; what it adds on top is left off: its retries send an XADD twice
when a reply is lost (redis-py 8 retries ten times by default), so every retry is the log protocol's own. RESP2 is
pinned. How commands and replies look on the wire is in `resp.py`.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AskError, NoPermissionError
from redis.retry import Retry

from trajstore.errors import Corrupt, SchemaError, StoreFull, TrajstoreError, Unavailable
from trajstore.log.bulk import Value, fetch
from trajstore.log.resp import Argument, Command, ReplyParser, receive, send

__all__ = [
    "FULL_AT",
    "Argument",
    "Command",
    "ServerInfo",
    "Session",
    "Watch",
    "Wire",
    "describe_url",
    "first_refusal",
    "fullest",
    "info_fields",
    "memory_use",
    "receive",
    "reply_fields",
    "send",
    "server_info",
    "split_run",
    "tightest",
]

T = TypeVar("T")

log = logging.getLogger(__name__)

_STARTING = 2.0
"""Seconds that a server between its start and its first `listen` gets; a wrong port is told apart by nothing else."""

_SERVER = r"(?:\[[^\]@]*\]|[^\[\]:/@,]*)(?::[0-9]*)?"
_PLACE = re.compile(rf"{_SERVER}(?:,{_SERVER})*(?:/.*)?")
"""Host and port, of a cluster's servers several, and path. What is none may be half of a password with a special
character in it."""

_REST_OF_PASSWORD = re.compile(r"[^=&]*@")

_NAMED_OPTION = re.compile(r"(?:Invalid value for|unexpected keyword argument) '(\w+)'")

_OBJECTS = (
    "command_packer", "credential_provider", "driver_info", "event_dispatcher", "parser_class", "redis_connect_func",
    "retry", "socket_keepalive_options", "ssl_ocsp_context",
)  # fmt: skip
"""Options of redis-py that are objects, and take any text without a word until they are used."""

_LOST = ("requires the key to exist", "no such key")
"""How a server tells of a stream that every run has, and that is not there."""

FULL_AT = 0.9
"""Share of `maxmemory` at which writing stops, so that what drains the server keeps room to work."""


class Wire:
    """A pool of connections to one server; `ClusterWire` has several. Thread-safe; a fork gets connections of its own.

    Args:
        pool: made by `Wire.to_url`, or by the embedded server for its socket.
        timeout: seconds that connecting, sending and each reply may take.

    Attributes:
        one_server: all keys lie on the same.
    """

    one_server = True

    def __init__(self, pool: redis.ConnectionPool, *, timeout: float) -> None:
        self._pool = pool
        self.timeout = timeout

    @classmethod
    def to_url(cls, url: str, *, timeout: float) -> "Wire":
        """Connect (lazily) to `redis://`, `rediss://` or `unix://`.

        Raises:
            SchemaError: not such a URL, or with options that redis-py does not know.
        """
        try:
            pool = redis.ConnectionPool.from_url(url, **pool_options(timeout))
            pool.make_connection()
            problem = _no_text(pool.connection_kwargs) or _missing_file(pool.connection_kwargs)
            if not problem:
                return cls(pool, timeout=timeout)
        except (ValueError, TypeError, redis.RedisError) as error:
            problem = _problem_of_url(error)
        # Not chained: what redis-py and urllib say repeats parts of the URL, a password among them.
        raise SchemaError(f"{describe_url(url)} is no usable Redis URL: {problem}")

    def beside(self, host: str, port: int) -> "Wire":
        """Connections like these, with the same user, TLS and deadlines, to another server."""
        options = self._pool.connection_kwargs | {"host": host, "port": port}
        pool = redis.ConnectionPool(
            connection_class=self._pool.connection_class, max_connections=self._pool.max_connections, **options
        )
        return Wire(pool, timeout=self.timeout)

    @property
    def host(self) -> str:
        """Where the server runs; "localhost" for a socket."""
        return str(self._pool.connection_kwargs.get("host", "localhost"))

    @property
    def port(self) -> int:
        """Where it listens; a socket has none, whatever this says."""
        return int(self._pool.connection_kwargs.get("port", 6379))

    def at(self, key: str) -> "Wire":
        """The server that has a key."""
        return self

    def servers(self) -> "list[Wire]":
        """Every server that holds keys, each by itself: for what concerns a server, not a key."""
        return [self]

    def call(self, *command: Argument) -> Any:
        """Send one command, return its raw reply.

        Raises:
            Unavailable, StoreFull: see `translate`.
        """
        reply = self.exchange([command])[0]
        if isinstance(reply, redis.RedisError):
            raise translate(reply, str(command[0]))
        return reply

    def call_all(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands together, return their replies; all of them run, whatever becomes of the others.

        Raises:
            Unavailable, StoreFull: the first error reply, see `translate`.
        """
        replies = self.exchange(commands)
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, redis.RedisError):
                raise translate(reply, str(command[0]))
        return replies

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands together, return their replies; an error reply is a value in the list.

        Raises:
            Unavailable: the connection was lost; any of the commands may or may not have run.
        """
        if not commands:
            return []
        with translated(str(commands[0][0])), self.connection() as connection:
            return _exchange(connection, commands)

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """One of redis-py's connections, which goes back to the pool afterwards; its errors are redis-py's."""
        connection: Any = self._pool.get_connection()
        try:
            yield connection
        except BaseException:  # a reply may be on its way, which would be taken for the reply to something else
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def fetch(self, keys: Sequence[str], read: Callable[[Value], T]) -> list[T | None]:
        """Values of keys, each read while it arrives; None for one that is not there.

        Raises:
            Unavailable: the server refused, or the connection was lost.
            Exception: what `read` raises.
        """
        return self.fetch_each([("GET", key) for key in keys], read)

    def fetch_each(self, commands: Sequence[Command], read: Callable[[Value], T]) -> list[T | None]:
        """As `fetch`: the values that commands of the form `GET key` or `HMGET key field` ask for."""
        if not commands:
            return []
        with translated(str(commands[0][0])), self.connection() as connection:
            return fetch(connection, commands, read)

    def transaction(self, commands: Sequence[Command], *, watch: "Watch | None" = None) -> list[Any] | None:
        """Run commands in one MULTI; None if a watched key changed.

        Raises:
            Unavailable, StoreFull: refused as a whole, or the connection was lost.
        """
        if watch is not None:
            replies = watch.session.exchange([("MULTI",), *commands, ("EXEC",)])
            watch.pending = isinstance(replies[-1], redis.RedisError)
        else:
            replies = self.exchange([("MULTI",), *commands, ("EXEC",)])
        refused = first_refusal(replies, commands)
        if refused is not None:
            raise refused
        return None if replies[-1] is None else list(replies[-1])

    @contextmanager
    def watching(self, *keys: str) -> "Iterator[Watch]":
        """Hold one connection with WATCH on `keys`; hand it to `transaction(..., watch=)`.

        Raises:
            Unavailable: no connection, or it was lost.
        """
        with translated("WATCH"):
            connection = self._pool.get_connection()
        session = Session(connection)
        try:
            reply = session.exchange([("WATCH", *keys)])[0]
            if isinstance(reply, redis.RedisError):
                raise translate(reply, "WATCH") from reply
            watch = Watch(session)
            yield watch
            if watch.pending:  # it goes back to the pool; and what an EXEC has done is no failure, whatever comes then
                session.exchange([("UNWATCH",)])
        except BaseException:
            session.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def wait_while_loading(self) -> None:
        """Wait up to the timeout for a server that reads its log after a restart; a moment for one that starts.

        Raises:
            Unavailable: it is loading still, or does not answer.
        """
        begun, told = time.monotonic(), False
        while True:
            try:
                self.exchange([("PING",)])  # what the reply is does not matter: a user may lack the right to PING
                return
            except Unavailable as error:
                waited = time.monotonic() - begun
                # redis-py takes this reply for a lost connection, so it never comes as a value.
                if isinstance(error.__cause__, redis.BusyLoadingError):
                    if waited > self.timeout:
                        raise Unavailable(
                            f"the server is still loading its log after {self.timeout:g} s; try again once it is done, "
                            "or give a longer timeout="
                        ) from error
                    if not told:
                        log.warning(
                            "the server is loading its log; waiting up to %g s for it",
                            self.timeout,
                            extra={"event": "server-loading"},
                        )
                        told = True
                elif not _is_refused(error) or waited > (self.timeout if told else min(self.timeout, _STARTING)):
                    raise
            time.sleep(0.05)

    def session(self, *, timeout: float | None = None, keys: Sequence[str] = ()) -> "Session":
        """A connection of its own, which reconnects only when told.

        Args:
            timeout: as the wire's unless given.
            keys: whose servers it connects to, where there are several.
        """
        # Not by the pool's own make_connection, which counts it among the pool's for ever.
        connection: Any = self._pool.connection_class(**self._pool.connection_kwargs)
        if timeout is not None:
            connection.socket_timeout = timeout
            connection.socket_connect_timeout = min(timeout, connection.socket_connect_timeout or timeout)
        return Session(connection)

    def close(self) -> None:
        """Close idle connections."""
        self._pool.disconnect(inuse_connections=False)


class Session:
    """One connection that its owner connects and disconnects, so that no reconnect goes unseen."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def connected(self) -> bool:
        """False before `connect` and after any failure."""
        return self._connection._sock is not None

    @property
    def line(self) -> Any:
        """redis-py's connection."""
        return self._connection

    def connect(self) -> None:
        """Open the socket and authenticate.

        Raises:
            Unavailable: refused or too slow.
        """
        with translated("connect"):
            self._connection.connect()

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As `Wire.exchange`, on this connection only.

        Raises:
            Unavailable: not connected, or the connection was lost meanwhile.
        """
        if not self.connected:
            raise Unavailable("not connected")
        if not commands:
            return []
        with translated(str(commands[0][0])):
            return _exchange(self._connection, commands)

    def ask_each(self, *command: Argument) -> list[Any]:
        """The reply of each server that it is connected to; an error reply is a value.

        Raises:
            Unavailable: as `exchange`.
        """
        return self.exchange([command])

    def disconnect(self) -> None:
        """Close the socket; safe at any time."""
        self._connection.disconnect()


class Watch:
    """A connection with a WATCH on it.

    Attributes:
        pending: no EXEC has ended it yet.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.pending = True

    def call(self, *command: Argument) -> Any:
        """Read something under the watch."""
        reply = self.session.exchange([command])[0]
        if isinstance(reply, redis.RedisError):
            raise translate(reply, str(command[0]))
        return reply


def pool_options(timeout: float) -> dict[str, Any]:
    """Keyword arguments for redis-py connection pools, as the protocol wants them."""
    return {
        "max_connections": 1 << 16,  # as many as threads ask at once; redis-py 8 stops at 100
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout,
        "socket_connect_timeout": min(timeout, 10.0),
        "parser_class": ReplyParser,
    }


def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    send(connection, commands)
    return receive(connection, len(commands))


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn redis-py's errors into ours."""
    try:
        yield
    except redis.RedisError as error:
        raise translate(error, what) from error


def first_refusal(replies: Sequence[Any], commands: Sequence[Command]) -> TrajstoreError | None:
    """Our error for the first command of a transaction that was refused, None if none was.

    Args:
        replies: to MULTI, the commands, and EXEC.
        commands: those between the two.
    """
    begun, *queued, result = replies
    if isinstance(result, list) and not any(isinstance(reply, redis.RedisError) for reply in result):
        return None  # EXEC has run them, so none was refused before
    heard = [begun, *queued, *(result if isinstance(result, list) else [result])]
    names = ["MULTI", *(str(command[0]) for command in commands)]
    names += names[1:] if isinstance(result, list) else ["EXEC"]
    for name, reply in zip(names, heard, strict=True):
        if isinstance(reply, redis.RedisError):
            return translate(reply, name)
    return None


def translate(error: redis.RedisError, what: str) -> TrajstoreError:
    """Our error for redis-py's: `StoreFull` for a full server, `Corrupt` for a foreign key, else `Unavailable`."""
    if isinstance(error, redis.OutOfMemoryError):
        return StoreFull(
            f"the server refused {what}: memory is full. Start an archiver (`trajstore archive STORE`) to drain it, "
            "or raise maxmemory"
        )
    if isinstance(error, NoPermissionError):
        return Unavailable(
            f"the server refused {what}: {error}; the URL's user lacks this right (ACL). docs/security.md has the "
            "rules that each role needs"
        )
    if isinstance(error, redis.AuthenticationError):
        return Unavailable(f"the server refused {what}: {error}; check the user and password of the URL")
    if isinstance(error, AskError):
        return Unavailable(f"the server refused {what}: the key's slot of the cluster is on its way to another server")
    if str(error).startswith("NOGROUP") or any(words in str(error) for words in _LOST):
        return Unavailable(
            f"the server refused {what}: {error}. Somebody has removed the consumer group (`trajstore consumers STORE` "
            "lists them), or the server has lost a partition of the run: then stop what works on it, and make it whole "
            "by `trajstore rebuild STORE`"
        )
    if str(error).startswith("WRONGTYPE"):
        return Corrupt(f"the server refused {what}: a key of trajstore's holds something else ({error})")
    if isinstance(error, redis.ResponseError) and not isinstance(error, redis.BusyLoadingError | redis.ReadOnlyError):
        return Unavailable(f"the server refused {what}: {error}")
    hint = ""
    if "_ssl.c" in str(error):
        hint = (
            " See whether this is a TLS port, whether ssl_ca_certs= of the URL has the CA of its certificate, which is "
            "for this host name, and whether it asks for a client's (ssl_certfile=, ssl_keyfile=)"
        )
    return Unavailable(f"the server did not answer {what}: {error}{hint}")


def _is_refused(error: Unavailable) -> bool:
    """Nobody listens at the address, or there is no such socket."""
    cause = error.__cause__
    return cause is not None and isinstance(cause.__context__, ConnectionRefusedError | FileNotFoundError)


class ServerInfo(NamedTuple):
    """What INFO and CONFIG tell, as far as they are allowed.

    Attributes:
        run_id: changes when the server restarts; "" where it is not told.
        fsyncs_always: every command is on disk before its reply.
    """

    run_id: str
    fsyncs_always: bool


def server_info(wire: Wire) -> ServerInfo:
    """Ask the server about itself; what it does not tell counts as the careful answer."""
    info, *settings = wire.exchange(
        [("INFO", "server"), ("CONFIG", "GET", "appendonly"), ("CONFIG", "GET", "appendfsync")]
    )
    run_id = info_fields(info).get("run_id", "") if isinstance(info, bytes) else ""
    values = [reply[1] if isinstance(reply, list) and len(reply) == 2 else None for reply in settings]
    return ServerInfo(run_id, values == [b"yes", b"always"])


def reply_fields(reply: Sequence[Any]) -> dict[Any, Any]:
    """Names and values that stand in turn in a reply, as HGETALL and XINFO give them."""
    return dict(zip(reply[::2], reply[1::2], strict=True))


def info_fields(info: bytes) -> dict[str, str]:
    """The fields of an INFO reply."""
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())  # it tells paths, too
    return {name: value for name, colon, value in lines if colon}


def tightest(infos: Sequence[Any]) -> bytes | None:
    """The INFO reply of the server with the least room; None if none tells.

    Args:
        infos: replies of several servers; errors count for nothing.
    """

    def full(info: bytes) -> float:
        used, limit = memory_use(info)
        return used / limit if limit else 0.0

    return max((info for info in infos if isinstance(info, bytes)), key=full, default=None)


def fullest(infos: Sequence[Any]) -> tuple[int, int]:
    """`used_memory` and `maxmemory` in bytes of the server with the least room; 0 for no limit, or where none tells."""
    info = tightest(infos)
    return (0, 0) if info is None else memory_use(info)


def memory_use(info: bytes) -> tuple[int, int]:
    """`used_memory` and `maxmemory` of an INFO reply, in bytes; 0 for no limit."""
    fields = info_fields(info)
    return int(fields.get("used_memory", "0")), int(fields.get("maxmemory", "0"))


def split_run(url: str) -> tuple[str, str | None]:
    """Take `run=` out of a Redis URL's query.

    Returns:
        The URL as redis-py wants it, and the run's name, None if it names none.
    """
    address, _, options = url.partition("?")  # `urlunsplit` would drop the empty host of unix:///path
    query = parse_qsl(options, keep_blank_values=True)
    runs = [value for key, value in query if key == "run"]
    rest = urlencode([(key, value) for key, value in query if key != "run"])
    return f"{address}?{rest}" if rest else address, runs[-1] if runs else None


def describe_url(url: str) -> str:
    """A URL fit for messages: without user, password and options; a path as it is."""
    if "://" not in url:
        return url
    address, _, options = url.partition("?")
    scheme, mark, rest = address.partition("://")
    shown = rest.rpartition("@")[2]  # a password may hold an unescaped / or #
    if _PLACE.fullmatch(shown) is None or _REST_OF_PASSWORD.match(options):
        shown = "***"
    return scheme + mark + shown


def _no_text(options: Mapping[str, Any]) -> str:
    """What is wrong with options that are no text; "" if none was given."""
    given = sorted(name for name in _OBJECTS if isinstance(options.get(name), str))
    return f"its option {given[0]!r} can be given in code only" if given else ""


def _missing_file(options: Mapping[str, Any]) -> str:
    """What is wrong with the files of TLS: the first that is not there; "" if they are."""
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if options.get(name) and not os.path.isfile(options[name]):
            return f"its option {name!r} names no file"
    return ""


def _problem_of_url(error: Exception) -> str:
    """What is wrong, in words that hold nothing of the URL but names of options."""
    named = _NAMED_OPTION.search(str(error))
    if named is not None:
        return f"redis-py does not know its option {named[1]!r}, or not that value"
    if isinstance(error, redis.RedisError):
        return "one of its options has a value that redis-py does not know"
    return (
        "it is redis://[USER:PASSWORD@]HOST:PORT/DB, also rediss:// and unix://; in USER and PASSWORD, write what is "
        "no letter and no digit as %XX (/ as %2F, ? as %3F, # as %23, @ as %40)"
    )
