"""Who decides what goes wrong: deals faults from a shuffled deck, makes them happen, and takes them back in time.

A fault that lasts is taken back by itself after a while, whatever happens meanwhile. When it is over, `stop` leaves a
server that answers, and processes that can work in peace.
"""

import contextlib
import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import redis

from tests.log.proxy import FaultyProxy
from tests.servers import RealServer
from tests.soak.chaos.disk import Disk
from tests.soak.chaos.objects import HOWS, ObjectStore
from tests.soak.chaos.processes import LEASE, Process
from tests.soak.crash_loop import CUT, Sizes

__all__ = ["Director"]

DECK = (
    ["kill"] * 8 + ["connection"] * 8 + ["pause"] * 2 + ["kill the server"] * 2
    + ["kill the server twice", "stop the server from answering", "fill memory", "fill the disk", "jump clocks"]
)  # fmt: skip
OBJECTS = ["spoil the object store"] * 5 + ["stop the object store from answering"]
"""Also in the deck where the archive is an object store."""

WORDS = (b"XADD", b"XTRIM", b"XACK", b"HSET", b"HDEL", b"XREADGROUP", b"XCLAIM", b"XAUTOCLAIM", b"EXEC", b"XRANGE")
DAY = 86400


class Director:
    """Runs the faults of one round.

    Attributes:
        happened: faults by name.
        losses: monotonic times at which the server died and may have lost its newest seconds.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        server: RealServer,
        disk: Disk,
        objects: ObjectStore | None,
        *,
        seed: int,
    ) -> None:
        self.happened: Counter[str] = Counter()
        self.losses: list[float] = []
        self._processes = processes
        self._server = server
        self._disk = disk
        self._objects = objects
        self._durable = server.options["appendfsync"] == "always"
        self._rng = Random(seed)
        self._deck: list[str] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._full = False
        self._sizes = Sizes(server)

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
            self._rng.shuffle(self._deck)
        return self._deck.pop()

    def tend(self) -> None:
        """Take back what is due, and start again what has ended as it should."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        for process in self._processes:
            process.revive()
        if self._full and not self._alive():  # one that fsyncs each command ends when it cannot
            self._bring_back("the server died of a full disk")

    def stop(self) -> None:
        """No more faults, and none that lasts."""
        while self._due:
            heapq.heappop(self._due)[2]()
        for process in self._processes:
            process.go_on()
            process.in_peace = True
            process.proxy.disarm()
            process.proxy.accept()
            process.proxy.cut_all()  # what a swallowed reply has left silent
        if self._objects is not None:
            self._objects.make_peace()
        if not self._alive():
            self._bring_back("the server died of a full disk")
        self._sizes.stop()

    def abandon(self) -> None:
        """Leave nothing that runs."""
        self._sizes.stop()

    def happen(self, fault: str) -> None:
        """Make it happen."""
        match fault:
            case "kill":
                process = self._someone()
                process.kill()
                process.start()
                self.happened[f"killed: {process.kind}"] += 1
            case "connection":
                self._spoil(self._someone().proxy)
            case "pause":
                process = self._someone()
                process.pause()
                self._later(self._rng.uniform(0.5, 3 * LEASE), process.go_on)
                self.happened["stopped a process for longer than leases last"] += 1
            case "kill the server":
                self._kill_server()
            case "kill the server twice":
                self._kill_server()
                self._kill_server()
            case "stop the server from answering":
                self._server.pause()
                self._later(self._rng.uniform(0.3, 3.0), self._server.resume)
                self.happened["server stood still"] += 1
            case "fill memory":
                self._fill_memory()
            case "fill the disk":
                self._fill_disk()
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

    def _someone(self) -> Process:
        """Trainers take seconds to start: they are chosen half as often as others."""
        standing = [process for process in self._processes if not process.paused]
        weights = [1 if process.kind in ("checkpoint", "acknowledge") else 2 for process in standing]
        return self._rng.choices(standing, weights)[0]

    def _spoil(self, proxy: FaultyProxy) -> None:
        word = self._rng.choice(WORDS)
        match self._rng.randrange(6):
            case 0:
                proxy.cut_all()
                self.happened["connections cut"] += 1
            case 1:
                proxy.refuse()
                self._later(self._rng.uniform(0.2, 2.0), proxy.accept)
                self.happened["connections refused for a while"] += 1
            case 2:
                proxy.drop_reply(word)
                self.happened["reply lost, connection cut"] += 1
            case 3:
                proxy.cut_before(word)
                self.happened["request lost, connection cut"] += 1
            case 4:
                proxy.swallow_reply(word)
                self.happened["replies swallowed"] += 1
            case 5:
                self._later(self._rng.uniform(0.2, 4.0), proxy.hold_before(word).set)
                self.happened["requests held back"] += 1

    def _kill_server(self) -> None:
        if self._full:  # it may not come back before there is room
            return
        lost = 0.0 if self._durable or self._rng.random() < 0.3 else self._rng.uniform(0.0, CUT)
        self._server.kill()
        self._sizes.stop()
        if lost:
            self._sizes.cut(lost)
        self._lost()
        self.happened["killed: server, and the end of its log lost" if lost else "killed: server"] += 1
        threading.Event().wait(self._rng.choice([0.0, 0.0, 0.3, 1.0]))
        self._server.start()
        self._sizes = Sizes(self._server)

    def _fill_memory(self) -> None:
        if self._full or not self._answers():
            return
        with self._server.client() as client:
            client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + self._rng.choice([0, 1 << 20]))
        self._later(self._rng.uniform(1.0, 5.0), self._make_room)
        self.happened["memory full"] += 1

    def _make_room(self) -> None:
        if self._alive():
            self._server.resume()
        with (
            self._server.client() as client,
            contextlib.suppress(redis.ConnectionError),
        ):  # died: its next life has room
            client.config_set("maxmemory", 0)

    def _fill_disk(self) -> None:
        pid = self._pid()
        if self._full or pid is None:
            return
        self._full = True
        self._disk.fill(pid)
        self._later(self._rng.uniform(1.0, 4.0), self._free_disk)
        self.happened["disk full"] += 1

    def _free_disk(self) -> None:
        self._disk.free(self._pid())
        if self._full and not self._alive():
            self._bring_back("the server died of a full disk")
        self._full = False

    def _bring_back(self, why: str) -> None:
        self._disk.free(None)
        self._full = False
        self._server.kill()
        self._sizes.stop()
        self._lost()
        self.happened[why] += 1
        self._server.start()
        self._sizes = Sizes(self._server)

    def _lost(self) -> None:
        if not self._durable:
            self.losses.append(time.monotonic())

    def _answers(self) -> bool:
        """It runs and is not stopped, so a question to it is no wait."""
        return self._alive() and not self._standing_still()

    def _standing_still(self) -> bool:
        status = Path(f"/proc/{self._pid()}/stat").read_text()
        return status.rpartition(")")[2].split()[0] == "T"

    def _pid(self) -> int | None:
        process = self._server._process
        return process.pid if process is not None and process.poll() is None else None

    def _alive(self) -> bool:
        return self._pid() is not None

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._count, call))
