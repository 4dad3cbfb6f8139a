"""What goes to which server of a cluster: commands by the slots of their keys, and who has which slots."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError

from trajstore.log.resp import Argument, Command, receive

__all__ = [
    "Address",
    "Unit",
    "block_at",
    "by_slot",
    "having_slots",
    "owners_told",
    "slot_of_key",
    "units_of",
    "urls_of",
]

_KEYLESS = ("PING", "INFO", "CONFIG", "TIME", "SCAN", "EXEC")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


@dataclass(slots=True, eq=False)
class Unit:
    """What one server gets as a whole: a command, or all from `MULTI` to `EXEC`.

    Attributes:
        slot: of its keys, None for a command without.
        asked: server that the slot's owner has sent it to, for this once.
        replies: one for each command.
        lost: why there are none; it may have run or not.
    """

    commands: list[Command]
    slot: int | None
    asked: Address | None = None
    replies: list[Any] = field(default_factory=list)
    lost: redis.RedisError | None = None

    @property
    def sent(self) -> list[Command]:
        """What goes out."""
        return self.commands if self.asked is None else [("ASKING",), *self.commands]

    def redirect(self) -> AskError | None:
        """The reply that sends it to another server: then none of it has run."""
        refused = [reply for reply in self.replies if isinstance(reply, AskError)]
        if not refused or isinstance(self.replies[-1], list):
            return None
        return next((reply for reply in refused if isinstance(reply, MovedError)), refused[0])

    def hear(self, line: Any) -> None:
        """Read the replies."""
        replies = receive(line, len(self.sent))
        self.replies = replies[-len(self.commands) :]
        if self.asked is not None and isinstance(replies[0], redis.RedisError):  # a user may lack the right
            self.replies = [replies[0]] * len(self.commands)


def units_of(commands: Sequence[Command]) -> list[Unit]:
    """Commands as what goes out as a whole, in order."""
    units: list[Unit] = []
    whole: list[Command] = []
    for command in commands:
        if command[0] == "MULTI" or whole:
            whole.append(command)
            if command[0] == "EXEC":
                units.append(Unit(whole, _slot_of(whole[1])))
                whole = []
        else:
            units.append(Unit([command], _slot_of(command)))
    return units


def _slot_of(command: Command) -> int | None:
    """The slot of a command's first key; a server refuses a command whose keys have several."""
    name = str(command[0])
    if name in _KEYLESS:
        return None
    if name in ("XREAD", "XREADGROUP"):
        return slot_of_key(command[_streams_at(command)])
    return slot_of_key(command[2 if name in ("XINFO", "XGROUP") else 1])


def slot_of_key(key: Argument) -> int:
    """The slot of a key: of its hash tag, if it has one."""
    return key_slot(key.encode() if isinstance(key, str) else bytes(key))


def _streams_at(command: Command) -> int:
    """Where the names of the streams begin; a consumer group may be called STREAMS, too."""
    return list(command).index("STREAMS", 4 if command[0] == "XREADGROUP" else 1) + 1


def by_slot(command: Command) -> list[Command]:
    """An XREAD or XREADGROUP as one command for each slot; without BLOCK if that makes several."""
    at = _streams_at(command)
    names = command[at : at + (len(command) - at) // 2]
    slots: dict[int, list[int]] = {}
    for number, name in enumerate(names):
        slots.setdefault(slot_of_key(name), []).append(number)
    if len(slots) == 1:
        return [command]
    options = command[: at - 1]
    if block := block_at(command):
        options = (*command[:block], *command[block + 2 : at - 1])
    return [
        (*options, "STREAMS", *(command[at + n] for n in some), *(command[at + len(names) + n] for n in some))
        for some in slots.values()
    ]


def block_at(command: Command) -> int:
    """Where BLOCK stands; 0 for nowhere."""
    first = 4 if command[0] == "XREADGROUP" else 1
    options = list(command[first : _streams_at(command)])
    return first + options.index("BLOCK") if "BLOCK" in options else 0


def owners_told(slots: Any, host: str) -> tuple[list[Address | None], set[Address]]:
    """Owners by slot, and all servers that have slots or follow one that has, of a CLUSTER SLOTS reply.

    Args:
        host: of the server that said so, which stands for one that it has no name for.
    """
    owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    members: set[Address] = set()
    for first, last, *nodes in slots:
        names = [(node[0] or b"").decode() for node in nodes]
        found = [
            Address(name if name not in ("", "?") else host, int(node[1]))
            for name, node in zip(names, nodes, strict=True)
        ]
        owners[first : last + 1] = found[:1] * (last + 1 - first)
        members.update(found)
    return owners, members


def having_slots(owners: Iterable[Address | None]) -> set[Address]:
    """The servers that have any of the slots."""
    return {owner for owner in owners if owner is not None}


def urls_of(url: str) -> list[str]:
    """A URL for each server that a URL names."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme == "unix":
        return [url]
    place, options = rest.partition("?")[::2]
    user, at, address = place.rpartition("@")
    names, slash, path = address.partition("/")
    tail = slash + path + ("?" + options if options else "")
    return [f"{scheme}://{user}{at}{name}{tail}" for name in names.split(",")]
