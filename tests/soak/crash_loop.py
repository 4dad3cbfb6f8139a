"""The crash loop: writers and archivers at work on a real server, each killed again and again at random moments.

A server under `everysec` sometimes loses power instead: the end of its log is cut off, as far back as it may have been
away from the disk. What must be there in the end is decided in `check.py`, from the writers' own ledgers.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import msgspec

import trajstore
from tests.servers import RealServer
from tests.soak.ledger import read_ledger
from tests.waiting import until

__all__ = ["Kills", "crash_loop"]

RUN = "soak"
PARTITIONS = 4
LEASE = 0.6
WRITERS = 2
ARCHIVERS = 2

AT_WORK = 30
"""Turns that each writer has had acknowledged before the first kill: on a busy machine the kills could be over before
anybody has written anything."""

CUT = 0.9
"""Seconds that a power cut takes at most. The server promises 2; how late it writes to its log must fit in, too."""


class Kills(msgspec.Struct):
    """What was killed, and where the ledgers are.

    Attributes:
        archivers: killed from outside.
        steps: killed by themselves at a step of a publish.
        servers: killed, with what they had written safe.
        power_cuts: killed, and the end of their log lost.
        writers: killed.
        ledgers: of all writers.
    """

    archivers: int = 0
    steps: int = 0
    servers: int = 0
    power_cuts: int = 0
    writers: int = 0
    ledgers: list[Path] = []

    @property
    def total(self) -> int:
        return self.archivers + self.steps + self.servers + self.power_cuts + self.writers


class Sizes:
    """How long the server's log was at which moment: what a power cut may leave."""

    def __init__(self, server: RealServer) -> None:
        self._aof = server.aof()
        self._seen = deque([(time.monotonic(), self._aof.stat().st_size)], maxlen=1000)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def cut(self, seconds: float) -> None:
        """Cut off what came in the last seconds; what an earlier life wrote stays."""
        now = time.monotonic()
        kept = next((size for at, size in reversed(self._seen) if now - at >= seconds), self._seen[0][1])
        with self._aof.open("rb+") as file:
            file.truncate(min(kept, self._aof.stat().st_size))

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self._seen.append((time.monotonic(), self._aof.stat().st_size))


class CrashLoop:
    """One run of the loop. `crash_loop` is the way in."""

    def __init__(self, folder: Path, server: RealServer, *, seed: int, options: Mapping[str, str]) -> None:
        self.kills = Kills()
        self._folder = folder
        self._server = server
        self._durable = server.options["appendfsync"] == "always"
        self._seed = seed
        self._options = json.dumps(dict(options))
        self._rng = Random(seed)
        self._lives = 0
        self._archivers: list[subprocess.Popen[bytes]] = []
        self._writers: list[subprocess.Popen[bytes]] = []
        self._sizes = Sizes(server)

    def start(self) -> None:
        self._archivers = [self._start_archiver() for _ in range(ARCHIVERS)]
        self._writers = [self._start_writer() for _ in range(WRITERS)]
        until(self._at_work, seconds=120, what="that all writers are at work")

    def stop(self) -> None:
        """Let the writers finish and enter what they are told, then end the archivers as they stand."""
        for writer in self._writers:
            writer.terminate()
        for writer in self._writers:
            ended = writer.wait(
                90
            )  # one that was only just started does not hear the signal yet, and has written nothing
            assert ended in (0, -signal.SIGTERM), f"a writer failed; see {self._folder}"
        for archiver in self._archivers:
            archiver.kill()
            archiver.wait()
        self._sizes.stop()

    def abandon(self) -> None:
        """Kill whatever is left."""
        for process in [*self._writers, *self._archivers]:
            process.kill()
            process.wait()
        self._sizes.stop()

    def kill_one(self) -> None:
        """Wait a random while, and kill something; what has killed itself meanwhile comes back first."""
        long = not self._durable and self._rng.random() < 0.4  # else nothing would ever ripen
        until = time.monotonic() + (self._rng.uniform(3.0, 6.0) if long else self._rng.uniform(0.05, 1.2))
        while time.monotonic() < until:
            self._revive()
            threading.Event().wait(0.02)
        draw = self._rng.random()
        if draw < 0.45:
            self._kill_server()
        elif draw < 0.55 and self._durable:
            which = self._rng.randrange(WRITERS)
            self._end(self._writers[which])
            self._writers[which] = self._start_writer()
            self.kills.writers += 1
        else:
            which = self._rng.randrange(ARCHIVERS)
            self._end(self._archivers[which])
            self._archivers[which] = self._start_archiver()
            self.kills.archivers += 1

    def _kill_server(self) -> None:
        lost = 0.0 if self._durable or self._rng.random() < 0.4 else self._rng.uniform(0.0, CUT)
        away = self._rng.choice([0.0, 0.0, 0.3, 1.5])
        self._server.kill()
        self._sizes.stop()
        if lost:
            self._sizes.cut(lost)
            self.kills.power_cuts += 1
        else:
            self.kills.servers += 1
        threading.Event().wait(away)
        self._server.start()
        self._sizes = Sizes(self._server)

    def _at_work(self) -> bool:
        self._revive()
        told = map(read_ledger, self.kills.ledgers)
        return all(sum(about.acknowledged for about in one.values()) >= AT_WORK for one in told)

    def _revive(self) -> None:
        for which, archiver in enumerate(self._archivers):
            if archiver.poll() is not None:
                assert archiver.returncode == -9, f"an archiver failed; see {self._folder}"
                self.kills.steps += 1
                self._archivers[which] = self._start_archiver()
        assert all(writer.poll() is None for writer in self._writers), f"a writer failed; see {self._folder}"

    def _start_archiver(self) -> "subprocess.Popen[bytes]":
        die_at = self._rng.randint(1, 25) if self._rng.random() < 0.5 else 0
        return self._start("archiver", LEASE, die_at, self._options)

    def _start_writer(self) -> "subprocess.Popen[bytes]":
        name = f"w{self._lives}"
        ledger = self._folder / f"{name}.ledger"
        ledger.touch()
        self.kills.ledgers.append(ledger)
        return self._start("writer", name, self._seed, "fsync" if self._durable else "memory", ledger, self._options)

    def _start(self, what: str, *arguments: Any) -> "subprocess.Popen[bytes]":
        self._lives += 1
        command = [sys.executable, "-m", f"tests.soak.{what}", self._server.url(RUN), *map(str, arguments)]
        with (self._folder / f"{what}-{self._lives}.log").open("wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @staticmethod
    def _end(process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()


def crash_loop(
    folder: Path,
    server: RealServer,
    *,
    seed: int,
    kills: int,
    archive: str,
    options: Mapping[str, str],
    deadline: float = float("inf"),
) -> Kills:
    """Kill writers, archivers and the server, and leave what they wrote behind.

    Args:
        folder: for ledgers and logs.
        server: runs, and is empty.
        seed: of what is written and what is killed when.
        kills: how many, at least.
        archive, options: where to archive.
        deadline: monotonic seconds after which no more is killed.
    """
    url = server.url(RUN)
    trajstore.open(url, archive=archive, archive_options=options, partitions=PARTITIONS).close()
    loop = CrashLoop(folder, server, seed=seed, options=options)
    try:
        loop.start()
        while loop.kills.total < kills and time.monotonic() < deadline:
            loop.kill_one()
        loop.stop()
    except BaseException:
        loop.abandon()
        raise
    return loop.kills
