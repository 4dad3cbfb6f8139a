"""Several connections to one server, over which the transactions of a flush go out at the same time.

A server that fsyncs before it replies does so once for all that it has read, and from each connection it reads 16 KiB
at a time: over one connection a flush of many small batches waits for dozens of fsyncs, over eight for a few
(benchmarks/hotpath.py). Batches of one flush belong to different trajectories, so their order means nothing.
"""

from collections.abc import Sequence
from typing import Any

from trajstore.errors import TrajstoreError, Unavailable
from trajstore.log.resp import Argument, Command, receive, send
from trajstore.log.wire import Session, translated

__all__ = ["WideSession"]


class WideSession(Session):
    """Connections that their owner connects and disconnects together, so that no reconnect of one goes unseen.

    Args:
        sessions: one for each connection, at least one.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        super().__init__(sessions[0].line)
        self._sessions = sessions

    @property
    def connected(self) -> bool:
        """False before `connect` and after any failure."""
        return all(session.connected for session in self._sessions)

    def connect(self) -> None:
        """Open the sockets and authenticate.

        Raises:
            Unavailable: refused or too slow.
        """
        try:
            for session in self._sessions:
                if not session.connected:
                    session.connect()
        except TrajstoreError:
            self.disconnect()
            raise

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As `Session.exchange`; what is from `MULTI` to `EXEC` may run before what stands before it.

        Raises:
            Unavailable: not connected, or a connection was lost meanwhile; then none is connected any more.
        """
        parts = _dealt(commands, len(self._sessions))
        if len(parts) < 2:
            return super().exchange(commands)
        if not self.connected:
            raise Unavailable("not connected")
        replies: list[Any] = [None] * len(commands)
        try:
            with translated("MULTI"):
                lines = [session.line for session in self._sessions[: len(parts)]]
                for line, numbers in zip(lines, parts, strict=True):
                    send(line, [commands[number] for number in numbers])
                for line, numbers in zip(lines, parts, strict=True):
                    for number, reply in zip(numbers, receive(line, len(numbers)), strict=True):
                        replies[number] = reply
        except BaseException:  # what the others have to say is on its way, and nobody will read it
            self.disconnect()
            raise
        return replies

    def ask_each(self, *command: Argument) -> list[Any]:
        """The reply of the server; an error reply is a value."""
        return super().exchange([command])

    def disconnect(self) -> None:
        """Close the sockets; safe at any time."""
        for session in self._sessions:
            session.disconnect()


def _dealt(commands: Sequence[Command], hands: int) -> list[list[int]]:
    """Places of the commands that go over each connection, transactions in turn; one part if there is anything else."""
    parts: list[list[int]] = [[] for _ in range(hands)]
    hand = 0
    inside = False
    for number, command in enumerate(commands):
        inside = inside or command[0] == "MULTI"
        if not inside:
            return [list(range(len(commands)))]
        parts[hand].append(number)
        if command[0] == "EXEC":
            inside, hand = False, (hand + 1) % hands
    return [part for part in parts if part]
