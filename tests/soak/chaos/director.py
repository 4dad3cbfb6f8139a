"""Who decides what goes wrong: deals faults from a shuffled deck, makes them happen, and takes them back in time.

What happens to servers is in `outages.py`.

A fault that lasts is taken back by itself after a while, whatever happens meanwhile. When it is over, `stop` leaves a
server that answers, and processes that can work in peace.
"""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from tests.log.proxy import FaultyProxy
from tests.soak.chaos.objects import HOWS, ObjectStore
from tests.soak.chaos.outages import Outages
from tests.soak.chaos.processes import LEASE, Process
from tests.soak.chaos.servers import Servers

__all__ = ["Director"]

DECK = (
    ["kill"] * 8 + ["connection"] * 8 + ["pause"] * 2 + ["kill the server"] * 2
    + ["kill the server twice", "stop the server from answering", "fill memory", "fill the disk", "jump clocks"]
)  # fmt: skip
OBJECTS = ["spoil the object store"] * 5 + ["stop the object store from answering"]
"""Also in the deck where the archive is an object store."""

SPOILT = (
    "connections cut",
    "connections refused for a while",
    "reply lost, connection cut",
    "request lost, connection cut",
    "replies swallowed",
    "requests held back",
)
WORDS = (b"XADD", b"XTRIM", b"XACK", b"HSET", b"HDEL", b"XREADGROUP", b"XCLAIM", b"XAUTOCLAIM", b"EXEC", b"XRANGE")
DAY = 86400


class Director:
    """Runs the faults of one round.

    Attributes:
        happened: faults by name.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        servers: Servers,
        objects: ObjectStore | None,
        *,
        slots: Sequence[int],
        seed: int,
    ) -> None:
        self.happened: Counter[str] = Counter()
        self._processes = processes
        self._objects = objects
        self._rng = Random(seed)
        self._deck: list[str] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._outages = Outages(servers, slots=slots, rng=self._rng, later=self._later, happened=self.happened)

    @property
    def losses(self) -> list[float]:
        """Monotonic times at which a server died and may have lost its newest seconds."""
        return self._outages.losses

    @property
    def total(self) -> int:
        """Kills of processes and of the server."""
        return sum(count for name, count in self.happened.items() if name.startswith("killed"))

    def run(self, *, until: float, kills: int, pace: float) -> None:
        """Faults, one in `pace` seconds, until that monotonic second, and until there were so many kills."""
        while time.monotonic() < until or self.total < kills:
            pause = time.monotonic() + self._rng.uniform(0.1, 2 * pace - 0.1)
            self.happen(self.draw())
            while (now := time.monotonic()) < pause:
                self.tend()
                threading.Event().wait(min(0.05, pause - now))

    def draw(self) -> str:
        """The next fault."""
        if not self._deck:
            self._deck = DECK + (OBJECTS if self._objects is not None else [])
            self._deck += self._outages.deck
            self._rng.shuffle(self._deck)
        return self._deck.pop()

    def tend(self) -> None:
        """Take back what is due, and start again what has ended as it should."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        for process in self._processes:
            process.revive()
        self._outages.tend()

    def stop(self) -> None:
        """No more faults, and none that lasts."""
        while self._due:
            heapq.heappop(self._due)[2]()
        for process in self._processes:
            process.go_on()
            process.in_peace = True
            process.ways.make_peace()
        if self._objects is not None:
            self._objects.make_peace()
        self._outages.end()
        self.abandon()

    def abandon(self) -> None:
        """Leave nothing that runs."""
        self._outages.abandon()

    def happen(self, fault: str) -> None:
        """Make it happen."""
        match fault:
            case "kill":
                process = self._someone()
                process.kill()
                process.start()
                self.happened[f"killed: {process.kind}"] += 1
            case "connection":
                self._spoil(self._someone().ways.each)
            case "pause":
                process = self._someone()
                process.pause()
                self._later(self._rng.uniform(0.5, 3 * LEASE), process.go_on)
                self.happened["stopped a process for longer than leases last"] += 1
            case "spoil the object store":
                assert self._objects is not None
                how = self._rng.choice(HOWS)
                self._objects.spoil(how, self._rng.randint(1, 20))
                self.happened[f"object store: {how}"] += 1
            case "stop the object store from answering":
                assert self._objects is not None
                self._objects.pause()
                self._later(self._rng.uniform(0.3, 3.0), self._objects.resume)
                self.happened["object store stood still"] += 1
            case "jump clocks":
                for process in self._processes:
                    if process.has_clock:
                        process.set_clock(self._rng.choice([-DAY, -600, -1, 1, 3600, 400 * DAY]))
                        self.happened["clock jumped"] += 1
            case _:
                self._outages.happen(fault)

    def _someone(self) -> Process:
        """Trainers take seconds to start: they are chosen half as often as others."""
        standing = [process for process in self._processes if not process.paused]
        weights = [1 if process.kind in ("checkpoint", "acknowledge") else 2 for process in standing]
        return self._rng.choices(standing, weights)[0]

    def _spoil(self, proxies: Sequence[FaultyProxy]) -> None:
        """The way to the server; in a cluster, to one node, and now and then to all of them."""
        word = self._rng.choice(WORDS)
        if len(proxies) > 1 and self._rng.random() < 0.7:
            proxies = [self._rng.choice(proxies)]
        how = self._rng.randrange(6)
        seconds = self._rng.uniform(0.2, 2.0 if how == 1 else 4.0) if how in (1, 5) else 0.0
        for proxy in proxies:
            match how:
                case 0:
                    proxy.cut_all()
                case 1:
                    proxy.refuse()
                    self._later(seconds, proxy.accept)
                case 2:
                    proxy.drop_reply(word)
                case 3:
                    proxy.cut_before(word)
                case 4:
                    proxy.swallow_reply(word)
                case 5:
                    self._later(seconds, proxy.hold_before(word).set)
        self.happened[SPOILT[how]] += 1

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._count, call))
