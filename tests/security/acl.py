"""The access rules of `docs/security.md` as tests need them: read from the page, loaded, asked what they allow."""

import re
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from ulid import ULID

from tests.servers import RealServer

__all__ = ["RULES", "allows", "denials", "load", "recorded", "url_as"]

PAGE = Path(__file__).parents[2] / "docs" / "security.md"

Command = Sequence[bytes]


def _of_page() -> dict[str, list[str]]:
    """Rights by role: rules that add keys or commands."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("redis-cli ACL SETUSER exp1-"):
            _, _, _, user, reset, on, password, *rights = shlex.split(line)
            assert (reset, on, password[0]) == ("reset", "on", ">")
            found[user.removeprefix("exp1-")] = rights
    return found


RULES = _of_page()


def load(client: "redis.Redis[bytes]", run: str, role: str, *, rights: Sequence[str] | None = None) -> str:
    """Make the user of a role, whose name this returns; with some rights only, where they are given."""
    user, given = f"{run}-{role}", RULES[role] if rights is None else rights
    rules = [right.replace("{exp1", f"{{{run}") for right in given]
    client.execute_command("ACL", "SETUSER", user, "reset", "on", f">{role}-pw", *rules)
    return user


def url_as(server: RealServer, run: str, role: str) -> str:
    """The URL by which a role opens a run."""
    return server.url(run).replace("redis://", f"redis://{run}-{role}:{role}-pw@")


def denials(client: "redis.Redis[bytes]", user: str) -> list[str]:
    """What the server has refused a user, newest first, but for CLIENT SETINFO, by which redis-py introduces itself."""
    log = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in _raw(client, "ACL", "LOG", 128)]
    refused = [entry[b"object"].decode() for entry in log if entry[b"username"].decode() == user]
    return [one for one in refused if one != "client|setinfo"]


def allows(client: "redis.Redis[bytes]", user: str, command: Command) -> bool:
    """Whether the server would let a user run a command."""
    return bool(_raw(client, "ACL", "DRYRUN", user, *command) == b"OK")


def _raw(client: "redis.Redis[bytes]", *command: Any) -> Any:
    """A reply as the server sends it."""
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        client.connection_pool.release(connection)


@contextmanager
def recorded(server: RealServer) -> "Iterator[Callable[[], list[list[bytes]]]]":
    """Has the server tell each command that it runs; what is yielded gives those since the beginning."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as monitor, server.client() as client:
        file = monitor.makefile("rwb")
        file.write(b"MONITOR\r\n")
        file.flush()
        assert file.readline() == b"+OK\r\n"

        def commands() -> list[list[bytes]]:
            end = str(ULID()).encode()
            client.execute_command("ECHO", end)
            found = []
            for line in file:
                arguments = _arguments(line)
                if arguments[-1:] == [end]:
                    return found
                found.append(arguments)
            raise AssertionError("the server ended")

        commands()  # the first are how its own connection introduces itself
        yield commands


_ARGUMENT = re.compile(rb'"((?:[^"\\]|\\.)*)"')


def _arguments(line: bytes) -> list[bytes]:
    """Of `+1700000000.123456 [0 127.0.0.1:50000] "SET" "key" "value\\x00"`."""
    return [
        text.decode("latin-1").encode("latin-1").decode("unicode_escape").encode("latin-1")
        for text in _ARGUMENT.findall(line.partition(b"] ")[2])
    ]
