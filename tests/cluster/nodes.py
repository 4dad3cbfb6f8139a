"""A Redis Cluster to test against: real servers on loopback, with slots to move and masters to lose."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from tests.servers import RealServer, free_port
from tests.waiting import until

__all__ = ["Cluster", "Node", "cluster_of"]

_LOST_AFTER = "1000"  # milliseconds of silence after which the others promote a replica


class Node(RealServer):
    """One server of a cluster."""

    def __init__(self, name: str, folder: Path, **options: str) -> None:
        self.bus = free_port()
        self._paused = False
        super().__init__(
            name,
            folder,
            **{
                "cluster-enabled": "yes",
                "cluster-port": str(self.bus),
                "cluster-node-timeout": _LOST_AFTER,
                "cluster-replica-validity-factor": "0",
                "repl-diskless-sync-delay": "0",
            }
            | options,
        )

    def ask(self, *command: str | int) -> str:
        """The reply to a command, as text."""
        with self.client() as client:
            client.response_callbacks.clear()  # else some replies come taken apart
            reply = client.execute_command(*command)
        return reply.decode() if isinstance(reply, bytes) else str(reply)

    @property
    def answers(self) -> bool:
        """It was neither killed nor paused."""
        return self._process is not None and not self._paused

    def pause(self) -> None:
        """Stop it from answering, until `resume`."""
        self._paused = True
        super().pause()

    def resume(self) -> None:
        """Let it answer again."""
        self._paused = False
        super().resume()

    @property
    def id(self) -> str:
        """Its name among the nodes."""
        return self.ask("CLUSTER", "MYID")


class _Client(redis.RedisCluster):
    """Sees the keys of all masters."""

    def keys(self, pattern: str = "*", **options: object) -> list[bytes]:
        found: list[bytes] = super().keys(pattern, target_nodes=self.PRIMARIES)
        return found


class Cluster:
    """Three masters or more, which share the slots evenly. A backend like a single server.

    Args:
        server: "redis" or "valkey".
        masters: how many.
        options: of each server, as of `RealServer`.
    """

    name = "cluster"

    def __init__(self, server: str, folder: Path, *, masters: int = 3, **options: str) -> None:
        self._server = server
        self._folder = folder
        self._options = options
        self.nodes: list[Node] = []
        for number in range(masters):
            node = self._start()
            first = REDIS_CLUSTER_HASH_SLOTS * number // masters
            last = REDIS_CLUSTER_HASH_SLOTS * (number + 1) // masters - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self._meet(node)
        _wait(lambda: all(self._knows_all(node) for node in self.nodes), "for the cluster to agree")

    def url(self, run: str) -> str:
        """Where a store of that run is: one server that answers is enough."""
        one = next(node for node in self.nodes if node.answers)
        return f"redis://127.0.0.1:{one.port}/0?run={run}"

    def client(self) -> redis.RedisCluster:
        """A plain client, for looking and for meddling."""
        return _Client(host="127.0.0.1", port=self.nodes[0].port, protocol=2)

    def owner(self, key: str) -> Node:
        """The master that has a key's slot."""
        slot = key_slot(key.encode())
        one = next(node for node in self.nodes if node.answers)
        with one.client() as client:
            for first, last, master, *_ in client.execute_command("CLUSTER", "SLOTS"):
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == master[1])
        raise AssertionError(f"nobody has slot {slot}")

    def add_replica(self, master: Node) -> Node:
        """One more server, which follows a master and has all that it has."""
        replica = self._start()
        self._meet(replica)
        _wait(lambda: all(self._knows_all(node) for node in self.nodes), "for the replica to be known")
        replica.ask("CLUSTER", "REPLICATE", master.id)
        _wait(lambda: "master_link_status:up" in replica.ask("INFO", "replication"), "for the replica to be in step")
        return replica

    def add_master(self) -> Node:
        """One more server, without slots."""
        node = self._start()
        self._meet(node)
        _wait(lambda: all(self._knows_all(one) for one in self.nodes), "for the new server to be known")
        return node

    def move(self, slot: int, target: Node, *, between: Callable[[], None] = lambda: None) -> None:
        """Move a slot with all its keys, key by key.

        Args:
            between: called before, after each batch of keys, and while all are moved but the slot is not.
        """
        source = self._owner_of(slot)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        between()
        with source.client() as client:
            while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 3):
                client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
                between()
        for node in (target, source, *(one for one in self.nodes if one not in (source, target))):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)

    def until_promoted(self, replica: Node) -> None:
        """Wait until a replica is a master, and every living server says that all is well."""
        _wait(lambda: "role:master" in replica.ask("INFO", "replication"), "for the replica to be promoted")
        self.until_well()

    def until_well(self) -> None:
        """Wait until every living server says that the cluster has all its slots."""
        living = [node for node in self.nodes if node.answers]
        _wait(lambda: all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in living), "for all slots")

    def stop(self) -> None:
        """End all servers."""
        for node in self.nodes:
            node.kill()

    def _start(self) -> Node:
        node = Node(self._server, self._folder / f"node-{len(self.nodes)}", **self._options)
        self.nodes.append(node)
        return node

    def _meet(self, node: Node) -> None:
        """Make the first server and another known to each other; a busy machine may miss the first call."""
        first = self.nodes[0]
        next_call = 0.0

        def met() -> bool:
            nonlocal next_call
            if time.monotonic() >= next_call:
                node.ask("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus)
                next_call = time.monotonic() + 3.0
            return node.id in first.ask("CLUSTER", "NODES") and first.id in node.ask("CLUSTER", "NODES")

        _wait(met, "for two servers to meet")

    def _knows_all(self, node: Node) -> bool:
        told = node.ask("CLUSTER", "INFO")
        known = "cluster_state:ok" in told and f"cluster_known_nodes:{len(self.nodes)}\r" in told
        return known and "handshake" not in node.ask("CLUSTER", "NODES")

    def _owner_of(self, slot: int) -> Node:
        with self.nodes[0].client() as client:
            slots = client.execute_command("CLUSTER", "SLOTS")
        port = next(master[1] for first, last, master, *_ in slots if first <= slot <= last)
        return next(node for node in self.nodes if node.port == port)


@contextlib.contextmanager
def cluster_of(server: str, folder: Path, **options: str) -> Iterator[Cluster]:
    """A cluster for the length of a block."""
    cluster = Cluster(server, folder, **options)
    try:
        yield cluster
    finally:
        cluster.stop()


def _wait(condition: Callable[[], bool], what: str) -> None:
    until(condition, seconds=30, what=what)
