"""A run's identity in Redis: incarnation and what is fixed with it, written once by the first open; what it sets up."""

import time

import msgspec
import redis
from ulid import ULID

from trajstore.errors import UNREADABLE, Conflict, NotFound, SchemaError, Unavailable
from trajstore.limits import MAX_PARTITIONS, Label, Partitions
from trajstore.log.feed import FEED_GROUPS
from trajstore.log.keys import Keys
from trajstore.log.lease import lease_setup
from trajstore.log.wire import Command, Wire, translate
from trajstore.routing import RoutingOrder

__all__ = ["DEFAULT_PARTITIONS", "TRAINER_GROUP", "RunInfo", "begin_run", "open_run", "require_fsync", "set_up"]

DEFAULT_PARTITIONS = 16
TRAINER_GROUP = "trainer"
"""Consumer group of the ready streams that every run has from the start."""

_FORMAT = 1


class _Format(msgspec.Struct):
    format: int


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The run record.

    Attributes:
        format: of the record.
        incarnation: ULID of the run's beginning.
        partitions: P.
        created: Unix seconds.
        routing_order: order of the routing specs that are recorded in it; records from before there was a choice have
            none.
    """

    format: int
    incarnation: Label
    partitions: Partitions
    created: float
    routing_order: RoutingOrder = "engine"


def read_run(wire: Wire, run: str) -> RunInfo | None:
    """The record of a run, None if it has none yet.

    Raises:
        SchemaError: of a newer format, or no run record at all.
    """
    data = wire.call("GET", Keys.run_record(run))
    if data is None:
        return None
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found > _FORMAT:
            raise SchemaError(f"run {run!r} has format {found}; this trajstore reads up to {_FORMAT}, upgrade it")
        return msgspec.json.decode(data, type=RunInfo)
    except UNREADABLE as error:
        raise SchemaError(f"the record of run {run!r} cannot be read: {error}; is it trajstore's?") from error


def open_run(
    wire: Wire, run: str, *, partitions: int | None, routing_order: RoutingOrder | None, create: bool
) -> RunInfo:
    """Find the run, or begin it.

    Args:
        partitions: P for a new run, default 16; an existing run must have it, if given.
        routing_order: of a new run, default "engine"; an existing run must have it, if given.
        create: begin the run if there is none.

    Raises:
        NotFound: there is no such run, and `create` is False.
        Conflict: the run has another number of partitions or another routing order.
    """
    info = read_run(wire, run)
    if info is None:
        if not create:
            raise NotFound(f"there is no run {run!r} on this server")
        wanted = partitions or DEFAULT_PARTITIONS
        if not 1 <= wanted <= MAX_PARTITIONS:
            raise SchemaError(f"partitions must lie in [1, {MAX_PARTITIONS}], not {wanted}")
        info = begin_run(wire, run, incarnation=str(ULID()), partitions=wanted, routing_order=routing_order or "engine")
    if partitions is not None and partitions != info.partitions:
        raise Conflict(f"run {run!r} has {info.partitions} partitions, which are fixed; {partitions} were asked for")
    if routing_order is not None and routing_order != info.routing_order:
        raise Conflict(
            f"run {run!r} records routing in the order {info.routing_order!r}, which is fixed; {routing_order!r} was "
            "asked for. Leave routing_order out, or begin a new run"
        )
    return info


def begin_run(wire: Wire, run: str, *, incarnation: str, partitions: int, routing_order: RoutingOrder) -> RunInfo:
    """Write a run's record, unless somebody else is first; returns what it says then."""
    # Groups first: a run whose record exists has them, and a full server would refuse to make them later.
    set_up(wire, Keys(run, partitions))
    fresh = RunInfo(
        format=_FORMAT,
        incarnation=incarnation,
        partitions=partitions,
        created=time.time(),
        routing_order=routing_order,
    )
    wire.call("SET", Keys.run_record(run), msgspec.json.encode(fresh), "NX")
    info = read_run(wire, run)
    if info is None:
        raise Unavailable(f"run {run!r} vanished while it was being opened")
    return info


def set_up(wire: Wire, keys: Keys) -> None:
    """Make the leases and consumer groups of a run, where they are not there.

    Raises:
        StoreFull, Unavailable: refused.
    """
    commands: list[Command] = []
    for partition in range(keys.partitions):
        commands += lease_setup(keys, partition)
        commands += [("XGROUP", "CREATE", keys.feed(partition), group, "0", "MKSTREAM") for group in FEED_GROUPS]
        commands.append(("XGROUP", "CREATE", keys.ready(partition), TRAINER_GROUP, "0", "MKSTREAM"))
    for reply in wire.exchange(commands):
        repeated = isinstance(reply, redis.ResponseError) and (
            "BUSYGROUP" in str(reply) or "equal or smaller" in str(reply) or "already exists" in str(reply)
        )
        if isinstance(reply, redis.RedisError) and not repeated:
            raise translate(reply, "setting up the run")


def require_fsync(wire: Wire) -> None:
    """Make sure that the server, each of a cluster, writes to disk before it acknowledges.

    Raises:
        Conflict: it does not, or does not say.
    """
    for server in wire.servers():
        _require_fsync(server)


def _require_fsync(wire: Wire) -> None:
    reply = wire.exchange([("CONFIG", "GET", "appendonly"), ("CONFIG", "GET", "appendfsync")])
    values = [part[1].decode() if isinstance(part, list) and len(part) == 2 else None for part in reply]
    if values != ["yes", "always"]:
        shown = "its configuration cannot be read" if None in values else f"it has appendonly {values[0]}, "
        shown += "" if None in values else f"appendfsync {values[1]}"
        raise Conflict(
            f"ack='fsync' needs a server with appendonly yes and appendfsync always, but {shown}. Configure it so, "
            "allow CONFIG GET, or use ack='memory'"
        )
