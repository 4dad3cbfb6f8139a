"""Commands to a Redis Cluster: each goes to the server that has its slot, and replies come back in the order sent.

A partition's keys share a slot, so what belongs together (a `MULTI`, a `WATCH`) lies on one server. redis-py's cluster
client is not used, for it sends commands again whose reply was lost. Here a command, or a `MULTI` as a whole, is sent
again only where a server has said that it did not run it: MOVED (the slot is another's) and ASK (the key is on its way
there). All else is an error, and the log protocol reads back what became of a write.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import product
from typing import Any, TypeVar

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import AskError, ClusterError, MovedError, TryAgainError

from trajstore.errors import SchemaError, Unavailable
from trajstore.log.bulk import Value, whole_value
from trajstore.log.resp import Argument, Command, send
from trajstore.log.slots import (
    Address,
    Unit,
    block_at,
    by_slot,
    having_slots,
    owners_told,
    slot_of_key,
    units_of,
    urls_of,
)
from trajstore.log.wire import Session, Watch, Wire, describe_url, info_fields, translate

__all__ = ["ClusterSession", "ClusterWire", "connect"]

T = TypeVar("T")

_REDIRECTS = 5
"""How often a command follows a slot that moves; then its caller tries later."""

_PAUSE = 0.05
"""Seconds between two looks at several slots. A server blocks on keys of one slot only."""

_QUIET = 1.0
"""Seconds of silence after which a session looks whether its servers are what they were: two failovers take longer."""

_PATIENCE = 2.0
"""Seconds that a server gets to say who has which slots, before the next one is asked."""

_UNSETTLED = (AskError, ClusterError, TryAgainError)  # MOVED is an ASK, CLUSTERDOWN and MASTERDOWN are ClusterErrors


class _NoLine(redis.ConnectionError):
    """A session has no connection to a server yet."""


_At = tuple[Unit, Address]

Lines = Callable[[Address], AbstractContextManager[Any]]
"""Gives a connection of redis-py to a server for the length of a block; raises redis-py's errors."""


def connect(url: str, *, timeout: float) -> Wire:
    """Connections to the server of a URL, or to all of its cluster if it is part of one.

    Args:
        url: `redis://`, `rediss://` or `unix://`. Of a cluster it names one server or several,
            `redis://HOST:PORT,HOST:PORT`: one that answers tells of the others.

    Raises:
        SchemaError: no such URL.
        Unavailable: no server answers; one that loads its log is waited for. Or it is a cluster's, and the user may not
            ask for INFO.
    """
    seeds = [Wire.to_url(one, timeout=timeout) for one in urls_of(url)]
    trouble: Unavailable | None = None
    for patient, seed in product((False, True) if len(seeds) > 1 else (True,), seeds):
        try:
            if patient:
                seed.wait_while_loading()
            told = seed.exchange([("INFO", "cluster")])[0]
        except Unavailable as error:
            trouble = error
            continue
        if isinstance(told, redis.ResponseError) and isinstance(seed.exchange([("CLUSTER", "SLOTS")])[0], list):
            raise translate(told, "INFO")  # what a session looks at to know a server that was replaced meanwhile
        if isinstance(told, bytes) and info_fields(told).get("cluster_enabled") == "1":
            if url.startswith("unix:"):
                raise SchemaError(f"{describe_url(url)} belongs to a cluster, which is reached by redis://HOST:PORT")
            return ClusterWire(seeds, timeout=timeout)
        if len(seeds) > 1:
            raise SchemaError(f"{describe_url(url)} names several servers that are no cluster; name the one to use")
        return seed
    assert trouble is not None
    raise trouble


class ClusterWire(Wire):
    """Pools of connections to the servers of a cluster. Thread-safe.

    Args:
        seeds: servers to ask for the others first.
        timeout: seconds that connecting, sending and each reply may take.
    """

    one_server = False

    def __init__(self, seeds: Sequence[Wire], *, timeout: float) -> None:
        self.timeout = timeout
        self._seeds = {Address(seed.host, seed.port): seed for seed in seeds}
        self._lock = threading.Lock()  # never held while a server is asked
        self._nodes: dict[Address, Wire] = {}
        self._owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._asking = threading.Lock()  # one thread looks who has what
        self._begun = self._learned = 0  # numbers of the newest look, and of the newest that was answered
        self._teller: Address | None = None  # answered that one
        self._suspects: dict[Address, int] = {}  # by the look that their slots need

    # Who has what

    def owner(self, slot: int) -> Address:
        """The server that has a slot, as far as is known.

        Raises:
            Unavailable: none has it, or no server tells.
        """
        with self._lock:
            owner = self._owners[slot]
            needed = self._begun + 1 if owner is None else self._suspects.get(owner, 0)
        if self._learned < needed:
            self._learn(needed)
            owner = self._owners[slot]
        if owner is None:
            raise Unavailable(f"no server of the cluster has slot {slot}; assign it, or bring its server back")
        return owner

    def node(self, address: Address) -> Wire:
        """Connections to one server."""
        with self._lock:
            if address not in self._nodes:
                self._nodes[address] = self._beside(address)
            return self._nodes[address]

    def at(self, key: str) -> Wire:
        """The server that has a key."""
        return self.node(self.owner(slot_of_key(key)))

    def servers(self) -> list[Wire]:
        """Every server that has slots, by a fresh look.

        Raises:
            Unavailable: no server tells.
        """
        self._learn(self._begun + 1)
        return [self.node(address) for address in sorted(having_slots(self._owners))]

    def suspect(self, address: Address) -> None:
        """A server does not answer: before a command goes to one of its slots, another is asked who has them now."""
        with self._lock:
            self._suspects[address] = self._begun + 1

    def _follow(self, moved: MovedError, said_by: Address) -> None:
        """The slot is another's. Whoever says so knows better than what was learned before."""
        with self._lock:
            self._owners[moved.slot_id] = Address(moved.host or said_by.host, moved.port)

    def _beside(self, address: Address) -> Wire:
        return next(iter(self._seeds.values())).beside(*address)

    def _learn(self, needed: int) -> None:
        """Look who has what, unless another thread has done so meanwhile.

        Args:
            needed: number of the look that will do; a later one, too.

        Raises:
            Unavailable: no server tells, or another thread is still asking.
        """
        if not self._asking.acquire(timeout=self.timeout):
            raise Unavailable(f"no server of the cluster has told within {self.timeout:g} s who has its slots")
        try:
            if self._learned >= needed:
                return
            with self._lock:
                self._begun += 1
            owners, teller = self._ask()
            with self._lock:
                self._owners, self._teller, self._learned = owners, teller, self._begun
                self._suspects.pop(teller, None)
                gone = [self._nodes.pop(address) for address in self._nodes.keys() - having_slots(owners)]
                for address in self._suspects.keys() - having_slots(owners) - self._seeds.keys():
                    del self._suspects[address]
            for node in gone:
                node.close()
        finally:
            self._asking.release()

    def _ask(self) -> tuple[list[Address | None], Address]:
        """Owners by slot, and who told: the one that told last, else another that has slots, else one of the URL.

        Those that did not answer lately come last, the latest at the very end. A server that has left the cluster knows
        of no slots, or has a picture of its own: one is believed whose picture has a place for itself, others only
        where there is no such one.
        """
        known = having_slots(self._owners)
        order = sorted(known, key=lambda address: (address != self._teller, address))
        order += [seed for seed in self._seeds if seed not in known]
        order.sort(key=lambda address: self._suspects.get(address, 0))
        believed: tuple[list[Address | None], Address] | None = None
        trouble = Unavailable("no server of the cluster has slots; assign them, or bring its servers back")
        for number, address in enumerate(order, 1):
            last = number == len(order) and believed is None
            try:
                told = self._told_by(address, timeout=self.timeout if last else min(self.timeout, _PATIENCE))
            except Unavailable as error:
                trouble = error
                with self._lock:
                    self._suspects[address] = max(self._begun, self._suspects.get(address, 0))
                continue
            owners, members = owners_told(told, address.host)
            if members and (not known or address in members):
                return owners, address
            if members and believed is None:
                believed = owners, address
        if believed is None:
            raise trouble
        return believed

    def _told_by(self, address: Address, *, timeout: float) -> Any:
        """The reply to CLUSTER SLOTS, over a connection that is not waited for as long as for a command."""
        session = (self._seeds.get(address) or self._beside(address)).session(timeout=timeout)
        try:
            session.connect()
            told = session.exchange([("CLUSTER", "SLOTS")])[0]
        finally:
            session.disconnect()
        if isinstance(told, redis.RedisError):
            raise translate(told, "CLUSTER")
        return told

    # Sending

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As `Wire.exchange`. Those of one slot run in their order, but for a slot on its way to another server."""
        units = units_of(commands)
        self.converse(units, self._pooled)
        _raise_lost(units)
        return [reply for unit in units for reply in unit.replies]

    def converse(self, units: Sequence[Unit], lines: Lines) -> None:
        """Send units to their servers, follow redirections, and fill in what they said or why they are lost."""
        left = list(units)
        for hop in range(1 + _REDIRECTS):
            heard, unsent = self._once(left, lines)
            if hop == _REDIRECTS:
                return
            left = []
            for unit, address in unsent:
                missed = not isinstance(unit.lost, _NoLine)
                if missed and unit.slot is not None and self.owner(unit.slot) != address:  # a replica has taken over
                    unit.lost = unit.asked = None
                    left.append(unit)
            for unit, address in heard:
                redirect = unit.redirect()
                if isinstance(redirect, MovedError):
                    unit.asked = None
                    self._follow(redirect, address)
                elif redirect is not None:
                    unit.asked = Address(redirect.host or address.host, redirect.port)
                if redirect is not None:
                    left.append(unit)
            if not left:
                return

    def _once(self, units: Sequence[Unit], lines: Lines) -> tuple[list[_At], list[_At]]:
        """All servers at the same time; returns the units that were answered, and those that never left, with where."""
        by_address: dict[Address, list[Unit]] = {}
        keyed = next((unit.slot for unit in units if unit.slot is not None), 0)
        for unit in units:
            address = unit.asked or self.owner(keyed if unit.slot is None else unit.slot)
            by_address.setdefault(address, []).append(unit)
        heard: list[_At] = []
        unsent: list[_At] = []
        with ExitStack() as held:
            sent: dict[Address, Any] = {}
            for address, some in by_address.items():
                try:
                    sent[address] = held.enter_context(lines(address))
                except redis.RedisError as error:
                    self._lose(address, some, error)
                    unsent += [(unit, address) for unit in some]
            held.push(_hang_up_unless_done(sent.values()))
            for address, line in sent.items():
                try:
                    send(line, [command for unit in by_address[address] for command in unit.sent])
                except redis.RedisError as error:
                    self._lose(address, by_address[address], error)
            for address, line in sent.items():
                waiting = deque(unit for unit in by_address[address] if unit.lost is None)
                try:
                    while waiting:
                        waiting[0].hear(line)
                        heard.append((waiting.popleft(), address))
                except redis.RedisError as error:
                    line.disconnect()
                    self._lose(address, waiting, error)
        return heard, unsent

    def _lose(self, address: Address, units: Iterable[Unit], error: redis.RedisError) -> None:
        if not isinstance(error, _NoLine):
            self.suspect(address)
        for unit in units:
            unit.lost = error

    @contextmanager
    def _pooled(self, address: Address) -> Iterator[Any]:
        with self.node(address).connection() as connection:
            yield connection

    def call(self, *command: Argument) -> Any:
        """As `Wire.call`. XREAD and XREADGROUP may name streams of several slots."""
        parts = by_slot(command) if command[0] in ("XREAD", "XREADGROUP") else ()
        if len(parts) > 1:
            return self._read_streams(command, parts)
        return super().call(*command)

    def _read_streams(self, command: Command, parts: Sequence[Command]) -> list[Any] | None:
        """One command for each slot, again and again until one of them brings something or the time is up.

        What is new is taken from the servers that give it, for it counts as given out, whatever becomes of the others;
        they are heard of once there is nothing else. A consumer's own claims (XREADGROUP with ids) are all told, or
        none.
        """
        whole = command[0] == "XREADGROUP" and any(part[-1] != ">" for part in parts)
        block = block_at(command)
        deadline = time.monotonic() + (int(command[block + 1]) / 1000 if block else 0.0)
        while True:
            units = units_of(parts)
            self.converse(units, self._pooled)
            found: list[Any] = []
            away: redis.RedisError | None = None
            refused: redis.RedisError | None = None
            for unit in units:
                reply = unit.lost or unit.replies[0]
                if unit.lost is not None or isinstance(reply, _UNSETTLED):
                    away = reply
                elif isinstance(reply, redis.RedisError):
                    refused = reply
                else:
                    found += reply or []
            trouble = refused or away
            if trouble is not None and (whole or not found):
                raise translate(trouble, str(command[0])) from trouble
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found or None
            time.sleep(min(_PAUSE, left))

    def fetch_each(self, commands: Sequence[Command], read: Callable[[Value], T]) -> list[T | None]:
        """As `Wire.fetch_each`; `read` may be called twice for a value whose slot is on its way to another server."""
        by_address: dict[Address, list[int]] = {}
        for number, command in enumerate(commands):
            by_address.setdefault(self.owner(slot_of_key(command[1])), []).append(number)
        found: dict[int, T | None] = {}
        for address, numbers in by_address.items():
            some = [commands[number] for number in numbers]
            try:
                values = self.node(address).fetch_each(some, read)
            except Unavailable as error:
                if not isinstance(error.__cause__, AskError):
                    self.suspect(address)
                    raise
                held = [reply[0] if isinstance(reply, list) else reply for reply in self.call_all(some)]
                pairs = zip(some, held, strict=True)
                values = [None if data is None else read(whole_value(data, command)) for command, data in pairs]
            found.update(zip(numbers, values, strict=True))
        return [found[number] for number in range(len(commands))]

    @contextmanager
    def watching(self, *keys: str) -> Iterator[Watch]:
        """As `Wire.watching`; the keys share a slot.

        Raises:
            Unavailable: also while the slot is on its way to another server.
        """
        slot = slot_of_key(keys[0])
        with ExitStack() as stack:
            watch: Watch | None = None
            for _ in range(1 + _REDIRECTS):
                address = self.owner(slot)
                try:
                    watch = stack.enter_context(self.node(address).watching(*keys))
                    break
                except Unavailable as error:
                    if isinstance(error.__cause__, MovedError):
                        self._follow(error.__cause__, address)
                        continue
                    if not isinstance(error.__cause__, redis.ResponseError):
                        self.suspect(address)
                    raise
            if watch is None:
                raise Unavailable(f"slot {slot} of the cluster moves on and on; try again")
            yield watch

    def wait_while_loading(self) -> None:
        """As `Wire.wait_while_loading`, for every server that has slots."""
        for one in self.servers():
            one.wait_while_loading()

    def session(self, *, timeout: float | None = None, keys: Sequence[str] = ()) -> "ClusterSession":
        """A connection to each server that has some of the keys."""
        return ClusterSession(self, sorted(set(map(slot_of_key, keys))), timeout=timeout)

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            for node in (*self._seeds.values(), *self._nodes.values()):
                node.close()


class ClusterSession(Session):
    """One connection to each server that has some of the slots, and to servers that a slot on its way has sent it to.

    It is connected while all of them are, and nothing goes to a server that it was not connected to before. So whoever
    looks at each connect what has become of its writes (a failover may have lost some) does so in time.

    Args:
        slots: whose servers it connects to.
    """

    def __init__(self, wire: ClusterWire, slots: Sequence[int], *, timeout: float | None) -> None:
        self._wire = wire
        self._slots = slots
        self._timeout = timeout
        self._lines: dict[Address, Session] = {}
        self._asked: set[Address] = set()  # slots were on their way to these: they stay, for more may follow
        self._histories: dict[Address, str] = {}
        self._heard = 0.0

    @property
    def connected(self) -> bool:
        """False before `connect` and after any failure."""
        lines = list(self._lines.values())
        return bool(lines) and all(line.connected for line in lines)

    def connect(self) -> None:
        """Connect to every server that is needed now, and to no other."""
        wanted = {self._wire.owner(slot) for slot in self._slots} | self._asked
        for address in [one for one in self._lines if one not in wanted]:
            self._lines.pop(address).disconnect()
        for address in wanted:
            line = self._lines.get(address) or self._wire.node(address).session(timeout=self._timeout)
            self._lines[address] = line
            if not line.connected:
                try:
                    line.connect()
                except Unavailable:
                    self._wire.suspect(address)
                    self._asked.discard(address)
                    self.disconnect()
                    raise
        self._histories = self._look()
        self._heard = time.monotonic()

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As `ClusterWire.exchange`, over these connections only.

        Raises:
            Unavailable: also where a slot has gone to a server that it is not connected to, or a server cannot tell yet
                who has one: connect anew.
        """
        self._require_connected()
        units = units_of(commands)
        self._wire.converse(units, self._own)
        _raise_lost(units)
        for unit in units:
            if len(unit.commands) == 1 and isinstance(unit.replies[0], _UNSETTLED):
                raise translate(unit.replies[0], str(unit.commands[0][0])) from unit.replies[0]
        self._heard = time.monotonic()
        return [reply for unit in units for reply in unit.replies]

    def ask_each(self, *command: Argument) -> list[Any]:
        """The reply of each server; an error reply is a value."""
        self._require_connected()
        return [reply for line in list(self._lines.values()) for reply in line.exchange([command])]

    def disconnect(self) -> None:
        """Close the sockets; safe at any time."""
        for line in list(self._lines.values()):
            line.disconnect()

    def _require_connected(self) -> None:
        if not self.connected:
            raise Unavailable("not connected")
        if time.monotonic() - self._heard > _QUIET:
            if self._look() != self._histories:
                self.disconnect()
                raise Unavailable("a server of the cluster was replaced and has come back meanwhile")
            self._heard = time.monotonic()

    def _look(self) -> dict[Address, str]:
        """The replication history that each server follows. A server that was replaced for a while has another one."""
        told = {}
        for address, line in list(self._lines.items()):
            info = line.exchange([("INFO", "replication")])[0]
            told[address] = info_fields(info).get("master_replid", "") if isinstance(info, bytes) else ""
        return told

    @contextmanager
    def _own(self, address: Address) -> Iterator[Any]:
        line = self._lines.get(address)
        if line is None or not line.connected:
            self._asked.add(address)
            raise _NoLine(f"not connected to {address.host}:{address.port} yet")
        yield line.line


def _hang_up_unless_done(lines: Collection[Any]) -> Callable[..., None]:
    """For an `ExitStack`: after an exception, replies are on their way that nobody will read."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for line in lines:
                line.disconnect()

    return leave


def _raise_lost(units: Sequence[Unit]) -> None:
    for unit in units:
        if unit.lost is not None:
            raise translate(unit.lost, str(unit.commands[0][0])) from unit.lost
