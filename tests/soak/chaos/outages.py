"""What goes wrong with the servers of a chaos run: they die, stand still, are full, and change places.

None of it is more than is promised: that the newest seconds of a server go, and no more.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random

import redis

from tests.soak.chaos.moves import Moves
from tests.soak.chaos.servers import FaultyServer, Servers
from tests.soak.crash_loop import CUT

__all__ = ["Outages"]

MOVES = ["move a slot"] * 8
"""Also in the deck where slots may move."""
REPLICAS = ["hand over"] * 6
"""Also in the deck where masters have replicas."""
FAILOVERS = ["kill the server", "stop the server from answering"] * 3
"""Also in the deck where these take the places of masters."""

HAND_OVER = 6.0
"""Seconds after which a node has handed over, or gives it up."""

PROMOTED = 4.0
"""Seconds after which the replica of a silent master has taken its place, about."""

HEARD_AFTER = 1.0
"""Seconds after which a master that was replaced while it stood still knows it."""

SETTLED_WITHIN = 60.0
"""Seconds until every slot has arrived, once nothing goes wrong any more."""


class Outages:
    """The servers' faults of one round.

    Args:
        slots: that may move.
        rng, later, happened: the director's chance, what is to be called so many seconds later, and faults by name.

    Attributes:
        losses: monotonic times at which a server died and may have lost its newest seconds.
        deck: faults beyond those of every round.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        slots: Sequence[int],
        rng: Random,
        later: Callable[[float, Callable[[], None]], None],
        happened: Counter[str],
    ) -> None:
        self.losses: list[float] = []
        self._servers = servers
        self._slots = slots
        self._rng = rng
        self._later = later
        self._happened = happened
        # A failover would leave a slot between two nodes, for an operator to mend.
        self._moves = None if servers.cluster is None or servers.fail_over else Moves(servers.cluster)
        self._handed_over_by = 0.0
        self.deck = ([] if self._moves is None else MOVES) + (REPLICAS if servers.replicated else [])
        self.deck += FAILOVERS if servers.fail_over else []

    def happen(self, fault: str) -> None:
        """Make it happen."""
        match fault:
            case "kill the server":
                self._kill(self._some())
            case "kill the server twice":
                server = self._some()
                self._kill(server)
                self._kill(server)
            case "stop the server from answering":
                self._pause(self._some())
            case "fill memory":
                self._fill_memory(self._some())
            case "fill the disk":
                self._fill_disk(self._some())
            case "move a slot":
                self._move_a_slot()
            case "hand over":
                self._hand_over()
            case _:
                raise AssertionError(f"nobody knows how to {fault}")

    def tend(self) -> None:
        """Bring back what a full disk has ended, and let slots go on."""
        for server in self._servers.each:
            if server.full and not server.alive:  # one that fsyncs each command ends when it cannot
                self._bring_back(server)
        if self._moves is not None:
            self._moves.go_on([one.node for one in self._servers.each if one.answers])

    def end(self) -> None:
        """All servers answer, and every slot is where it was on its way to; what lasts was taken back before."""
        for server in self._servers.each:
            if not server.alive:
                self._bring_back(server)
        self._settle()

    def abandon(self) -> None:
        """Leave nothing that runs."""
        for server in self._servers.each:
            server.abandon()

    def _settle(self) -> None:
        """Every slot is where it was on its way to, and served."""
        if self._moves is not None:
            deadline = time.monotonic() + SETTLED_WITHIN
            while left := self._moves.left():
                assert time.monotonic() < deadline, f"after {SETTLED_WITHIN:g} s: {left}"
                self._moves.go_on([one.node for one in self._servers.each])
                threading.Event().wait(0.01)
            self._happened["slot moved"] = self._moves.finished
        if self._servers.cluster is not None:
            self._servers.cluster.until_well()
        if self._servers.fail_over:
            self.losses.append(time.monotonic())  # whoever went on last has heard by now

    def _some(self) -> FaultyServer:
        """Of a cluster a master, more often than not."""
        each = self._servers.each
        if len(each) == 1:
            return each[0]
        masters = self._masters()
        return self._rng.choice(masters if masters and self._rng.random() < 0.8 else each)

    def _masters(self) -> list[FaultyServer]:
        """Those of a cluster's nodes that answer, and are no replicas."""
        return [one for one in self._servers.each if one.replication().get("role") == "master"]

    def _kill(self, server: FaultyServer) -> None:
        if server.full or self._may_not_be_lost(server):  # a full one may not come back before there is room
            return
        if self._servers.fail_over and not server.alive:
            return
        lost = 0.0 if not server.cuts or self._rng.random() < 0.3 else self._rng.uniform(0.0, CUT)
        with self._replica_behind(server):
            server.kill(lost=lost)
        self._lost(server)
        self._happened["killed: server, and the end of its log lost" if lost else "killed: server"] += 1
        if self._servers.fail_over:  # before its replica is promoted, or afterwards
            self._later(self._rng.uniform(0.0, 2 * PROMOTED), lambda: self._start(server))
            return
        threading.Event().wait(self._rng.choice([0.0, 0.0, 0.3, 1.0]))
        server.start()

    @contextlib.contextmanager
    def _replica_behind(self, server: FaultyServer) -> Iterator[None]:
        """At the end of the block, whoever may be promoted in its place lacks what is newest."""
        if not self._servers.fail_over or not server.answers:
            yield
            return
        port = str(server.real.port)
        replicas = [one.node for one in self._servers.each if one.replication().get("master_port") == port]
        for node in replicas:
            node.ask("CONFIG", "SET", "masterauth", "wrong")
        server.node.ask("CLIENT", "KILL", "TYPE", "replica")
        threading.Event().wait(self._rng.uniform(0.0, CUT))
        yield
        for node in replicas:
            node.ask("CONFIG", "SET", "masterauth", "")
        self._happened["replica behind its master"] += bool(replicas)

    def _start(self, server: FaultyServer) -> None:
        if not server.alive:
            server.start()

    def _pause(self, server: FaultyServer) -> None:
        longest = 3.0
        if self._servers.fail_over:
            if not server.alive or self._may_not_be_lost(server):
                return
            longest = 2 * PROMOTED
        with self._replica_behind(server):
            server.real.pause()
        if self._servers.fail_over:
            self._lost(server)
        self._later(self._rng.uniform(0.3, longest), lambda: self._resume(server))
        self._happened["server stood still"] += 1

    def _resume(self, server: FaultyServer) -> None:
        """A master that was replaced meanwhile takes what waits for it, and hears of it only then."""
        if server.alive:
            server.real.resume()
            if self._servers.fail_over:
                self._lost(server)
                self._later(HEARD_AFTER, lambda: self._lost(server))

    def _hand_over(self) -> None:
        """Make a replica the master, in order: nothing is lost, if what it has got from its master is in its log."""
        by_port = {str(one.real.port): one for one in self._servers.each}
        ready = []
        for one in self._servers.each:
            told = one.replication()
            master = by_port.get(told.get("master_port", ""))
            if (
                master is not None
                and master.answers
                and not (master.full or one.full)
                and not (self._moves is not None and self._moves.touch(master.node))
                and told["master_link_status"] == "up"
                and (told["aof_enabled"], told["aof_rewrite_in_progress"], told["aof_rewrite_scheduled"])
                == ("1", "0", "0")
            ):
                ready.append(one)
        if ready and time.monotonic() > self._handed_over_by:
            with contextlib.suppress(redis.ResponseError):  # it takes its master for failed just now
                self._rng.choice(ready).node.ask("CLUSTER", "FAILOVER")
                self._handed_over_by = time.monotonic() + HAND_OVER
                self._happened["master handed over to its replica"] += 1

    def _fill_memory(self, server: FaultyServer) -> None:
        if server.full or not server.answers:
            return
        server.fill_memory(self._rng.choice([0, 1 << 20]))
        self._later(self._rng.uniform(1.0, 5.0), lambda: self._make_room(server))
        self._happened["memory full"] += 1

    def _make_room(self, server: FaultyServer) -> None:
        self._resume(server)
        server.make_room()

    def _fill_disk(self, server: FaultyServer) -> None:
        if self._servers.replicated:  # who was a replica has written its log anew: docs/log.md, Acknowledgement
            return
        if server.full or not server.alive or self._may_not_be_lost(server):
            return
        server.fill_disk()
        self._later(self._rng.uniform(1.0, 4.0), lambda: self._free_disk(server))
        self._happened["disk full"] += 1

    def _free_disk(self, server: FaultyServer) -> None:
        server.free_disk()
        if server.full and not server.alive:
            self._bring_back(server)
        server.full = False

    def _bring_back(self, server: FaultyServer) -> None:
        self._lost(server)
        server.bring_back()
        self._happened["the server died of a full disk"] += 1

    def _move_a_slot(self) -> None:
        """Of a partition, or of the run's record; to any other node."""
        assert self._moves is not None
        if time.monotonic() < self._handed_over_by:  # who is whose replica just now
            return
        slot = self._rng.choice(self._slots)
        losing = [one for one in self._servers.each if one.full and not one.durable]
        masters = [one.node for one in self._masters() if one not in losing]
        source = self._moves.owner(slot, masters)
        others = [node for node in masters if node is not source]
        if source is not None and others:
            self._moves.begin(slot, source, self._rng.choice(others))

    def _may_not_be_lost(self, server: FaultyServer) -> bool:
        """More than its newest seconds would go with it, of which nothing is promised (docs/cluster.md).

        A slot has come to it that is not synced yet, and that its source has no more; or a replica that is behind would
        be promoted.
        """
        if server.durable:
            return False
        if self._moves is not None:
            return self._moves.touch(server.node)
        others = [one.replication() for one in self._servers.each if one is not server]
        behind = [told for told in others if not told or told.get("master_link_status", "up") != "up"]
        return self._servers.fail_over and bool(behind)

    def _lost(self, server: FaultyServer) -> None:
        if not server.durable:
            self.losses.append(time.monotonic())
