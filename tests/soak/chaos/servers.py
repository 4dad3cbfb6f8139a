"""The servers of a chaos run: one of its own, or the nodes of a cluster; each with its disk, to be killed and filled.

What goes wrong with them, and when, is the director's to decide.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import redis

from tests.cluster.nodes import Cluster, Node, cluster_of
from tests.servers import RealServer, binary_of, running
from tests.soak.chaos.disk import Disk, small_disk
from tests.soak.crash_loop import Sizes

__all__ = ["CLUSTERS", "SINGLE", "FaultyServer", "Servers", "servers_of"]

SINGLE = ("redis", "valkey")
CLUSTERS = {"cluster": 0, "replicas": 1}
"""Clusters, of Redis or Valkey, and how many replicas each of their masters has."""

MASTERS = 3
LOST_AFTER = "2500"
"""Milliseconds of silence: on a busy machine a node that nobody has stopped is silent for a second now and then."""


class FaultyServer:
    """A server that dies, stands still, and runs out of memory and of disk.

    Attributes:
        real: the server.
        full: its disk is, until it is freed.
        durable: it syncs each command.
        cuts: the end of its log may be taken away.
    """

    def __init__(self, real: RealServer, disk: Disk, *, cuts: bool) -> None:
        self.real = real
        self.full = False
        self.durable = real.options["appendfsync"] == "always"
        self._disk = disk
        self.cuts = cuts
        self._sizes = Sizes(real) if cuts else None

    @property
    def node(self) -> Node:
        """As one of a cluster."""
        assert isinstance(self.real, Node)
        return self.real

    @property
    def pid(self) -> int | None:
        """Of its process, None if that has ended."""
        process = self.real._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self.pid is not None

    @property
    def answers(self) -> bool:
        """It runs and is not stopped, so a question to it is no wait."""
        return self.alive and not self._standing_still()

    def replication(self) -> dict[str, str]:
        """What it says of its role, of its master or replicas, and of its log; nothing if it does not answer."""
        if not self.answers:
            return {}
        try:
            told = self.node.ask("INFO", "replication") + self.node.ask("INFO", "persistence")
        except redis.RedisError:  # it reads its log
            return {}
        return dict(line.partition(":")[::2] for line in told.splitlines())

    def kill(self, *, lost: float = 0.0) -> None:
        """End it, and take away what its log has got in so many seconds."""
        self.real.kill()
        self.abandon()
        if lost and self._sizes is not None:
            self._sizes.cut(lost)

    def start(self) -> None:
        """Start it again over its files."""
        self.real.start()
        self._sizes = Sizes(self.real) if self.cuts else None

    def bring_back(self) -> None:
        """Give one that died of its disk room, and start it again."""
        self._disk.free(None)
        self.full = False
        self.kill()
        self.start()

    def fill_memory(self, room: int) -> None:
        """Leave so many bytes of memory."""
        with self.real.client() as client:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + room)

    def make_room(self) -> None:
        """As much memory as it likes; it must not stand still."""
        with (
            self.real.client() as client,
            contextlib.suppress(redis.ConnectionError),  # died: its next life has room
        ):
            client.config_set("maxmemory", 0)

    def fill_disk(self) -> None:
        """Leave no room for what it writes next."""
        assert self.pid is not None
        self.full = True
        self._disk.fill(self.pid)

    def free_disk(self) -> None:
        """Room again."""
        self._disk.free(self.pid)

    def abandon(self) -> None:
        """Leave nothing that runs in this process."""
        if self._sizes is not None:
            self._sizes.stop()

    def _standing_still(self) -> bool:
        status = Path(f"/proc/{self.pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] == "T"


class Servers(NamedTuple):
    """What a run lies on.

    Attributes:
        url: where a store of a run's name is, past all proxies.
        each: the server, or the nodes.
        cluster: that they are.
        fail_over: a replica takes the place of a master that does not answer.
    """

    url: Callable[[str], str]
    each: list[FaultyServer]
    cluster: Cluster | None = None
    fail_over: bool = False

    @property
    def replicated(self) -> bool:
        """Masters have replicas."""
        return len(self.each) > MASTERS

    @property
    def ports(self) -> list[int]:
        """Where they listen."""
        return [one.real.port for one in self.each]

    def copy_logs(self, folder: Path) -> None:
        """Their logs, to where they outlive the disks."""
        for number, one in enumerate(self.each):
            shutil.copy(
                one.real.folder / "server.log", folder / ("server.log" if number == 0 else f"server{number}.log")
            )


@contextlib.contextmanager
def servers_of(name: str, folder: Path, *, seed: int, durable: bool) -> Iterator[Servers]:
    """The servers of a round, each on a small disk, for the length of a block.

    Args:
        name: one of `SINGLE` or `CLUSTERS`; a cluster's kind goes by the seed.
        folder: of the disk, or of the disks of the nodes.
        durable: they sync each command. Then no replica is promoted but in order, for it may lack what its master has
            acknowledged.
    """
    options = {"appendfsync": "always" if durable else "everysec", "auto-aof-rewrite-percentage": "0"}
    with contextlib.ExitStack() as stack:
        if name in SINGLE:
            disk = stack.enter_context(small_disk(folder))
            real = stack.enter_context(running(name, folder, **options))
            yield Servers(real.url, [FaultyServer(real, disk, cuts=not durable)])
            return
        replicas = CLUSTERS[name]
        count = MASTERS * (1 + replicas)
        disks = [stack.enter_context(small_disk(folder / f"node-{number}")) for number in range(count)]
        kind = Random(seed).choice([one for one in SINGLE if binary_of(one) is not None])
        options["cluster-replica-no-failover"] = "yes" if durable else "no"
        options["cluster-node-timeout"] = LOST_AFTER
        cluster = stack.enter_context(cluster_of(kind, folder, masters=MASTERS, **options))
        for number in range(MASTERS * replicas):
            cluster.add_replica(cluster.nodes[number % MASTERS])
        pairs = zip(cluster.nodes, disks, strict=True)
        assert all(node.folder == disk.folder for node, disk in zip(cluster.nodes, disks, strict=True))
        each = [FaultyServer(node, disk, cuts=not durable and not replicas) for node, disk in pairs]
        yield Servers(cluster.url, each, cluster, fail_over=bool(replicas) and not durable)
