"""The processes of a chaos run: what each is started with, its way to the server, its lives, and how these ended."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.chaos.clock import CLOCK
from tests.soak.chaos.stacks import ASK, MARK
from tests.soak.chaos.trainer import FENCED
from tests.soak.chaos.ways import Ways
from tests.soak.chaos.worker import STEPS

__all__ = ["LEASE", "RUN", "Process", "cast", "what_all_are_at"]

RUN = "chaos"
LEASE = 1.5

WRITERS = 3
ARCHIVERS = 2
MATERIALIZERS = 2
RANKS = 2

LAST_PUBLISH = {"archiver": 25, "materializer": 200}
"""A worker that kills itself does so before it has made so many; most do after a few."""

TOLD = 60
"""Lines of a log that are told when a round has failed."""


class Process:
    """One of the cast: started again after each end, by way of its own proxies.

    Attributes:
        name, kind: e.g. "writer0", "writer".
        ways: to the servers.
        killed: names of the lives that were ended by `kill`.
        fenced: lives that ended by themselves, told that others have what they had.
        steps: lives of a worker that killed themselves at a step of a publish.
        files: ledgers or journals of all lives.
        paused: stands still.
        in_peace: the next lives do not kill themselves, but for those of `last_steps`.
        last_steps: of a worker: its next lives each kill themselves at one of these steps of their first publish.
        peak: largest resident memory seen, in MiB.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        folder: Path,
        ports: Sequence[int],
        *arguments: Any,
        has_clock: bool,
        environment: Mapping[str, str],
        mutant: str | None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.ways = Ways(ports)
        self.killed: list[str] = []
        self.fenced = 0
        self.steps = 0
        self.files: list[Path] = []
        self.paused = False
        self.in_peace = False
        self.last_steps: list[str] = []
        self.peak = 0
        self._folder = folder
        self._arguments = arguments
        self._extra = environment
        self._mutant = mutant
        self._lives = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._clock = folder / f"{name}.clock" if has_clock else None
        if self._clock is not None:
            self._clock.write_text("0")

    @property
    def has_clock(self) -> bool:
        """Its wall clock can be moved."""
        return self._clock is not None

    def start(self) -> None:
        """A new life."""
        self._lives += 1
        with self._log().open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._broken(), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment(),
            )

    def kill(self) -> None:
        """`kill -9`, whatever it is at."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.paused = False
        self.killed.append(f"{self.name}.{self._lives}")

    def pause(self) -> None:
        """Stop it, until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self.paused = True

    def go_on(self) -> None:
        """Let it run again, if it stands still."""
        if self.paused and self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self.paused = False

    def set_clock(self, offset: int) -> None:
        """Move its wall clock by so many seconds against the true one."""
        assert self._clock is not None
        fresh = self._clock.with_suffix(".new")
        fresh.write_text(str(offset))
        fresh.rename(self._clock)

    def revive(self) -> None:
        """Start it again if it ended because it was fenced, or at a step that it was to die at.

        Raises:
            AssertionError: it has ended by itself in another way.
        """
        assert self._process is not None
        if self._process.poll() is None:
            self.peak = max(self.peak, _resident(self._process.pid))
            return
        ended = self._process.returncode
        assert ended in (FENCED, self._dies_with()), f"{self.name} ended with {ended}: {self._log()}"
        self.fenced += ended == FENCED
        self.steps += ended != FENCED
        self.start()

    def ask_to_end(self) -> None:
        """SIGTERM."""
        assert self._process is not None
        self._process.terminate()

    def end(self, *, seconds: float) -> None:
        """Wait for its end.

        Raises:
            AssertionError: it failed, or has not come to an end by then.
        """
        assert self._process is not None
        try:
            ended = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended within {seconds:g} s: {self._log()}") from None
        # One that was only just started does not hear the signal yet, and has done nothing.
        expected = (0, -signal.SIGTERM, FENCED, self._dies_with())
        assert ended in expected, f"{self.name} ended with {ended}: {self._log()}"

    def abandon(self) -> None:
        """Kill it, if it lives, and close its proxies."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.ways.close()

    def ask_what_it_is_at(self) -> None:
        """The stacks of its threads are to be in its log, if it lives."""
        if self.is_alive():
            self.go_on()
            assert self._process is not None
            self._process.send_signal(ASK)

    def has_told(self) -> bool:
        """They are there, or will never be."""
        return not self.is_alive() or MARK in self._log().read_bytes()

    def is_alive(self) -> bool:
        """It was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def what_it_was_at(self) -> str:
        """The end of its log, which ends with what it was asked for."""
        if self._process is None:
            return f"{self.name} was not started"
        code = self._process.poll()
        lines = self._log().read_text(errors="replace").splitlines()[-TOLD:]
        stands = "is alive" if code is None else f"has ended with {code}"
        return "\n    ".join([f"{self.name}, life {self._lives}, {stands}:", *lines])

    def tracebacks(self) -> list[Path]:
        """Logs of lives that met an error which nobody expected."""
        logs = [self._folder / f"{self.name}.{life}.log" for life in range(1, self._lives + 1)]
        return [log for log in logs if b"Traceback" in log.read_bytes()]

    def _command(self) -> list[str]:
        url = self.ways.url(RUN)
        match self.kind:
            case "writer":
                name = f"{self.name}.{self._lives}"
                self.files.append(self._folder / f"{name}.ledger")
                self.files[-1].touch()
                seed, ack = self._arguments
                return ["tests.soak.chaos.writer", url, name, str(seed), ack, str(self.files[-1])]
            case "archiver" | "materializer":
                return ["tests.soak.chaos.worker", self.kind, url, str(LEASE), self._die_at()]
            case "checkpoint" | "acknowledge":
                # A checkpoint is one file of all lives; a journal each life's own, for a kill cuts its last line short.
                name = self.name if self.kind == "checkpoint" else f"{self.name}.{self._lives}"
                path = self._folder / f"{name}.trained"
                self.files = [*self.files, path] if path not in self.files else self.files
                (rank,) = self._arguments
                return ["tests.soak.chaos.trainer", self.kind, url, str(rank), str(RANKS), str(path), str(LEASE)]
        raise AssertionError(f"nothing runs a {self.kind}")

    def _die_at(self) -> str:
        """Where the next life of a worker kills itself, "" for nowhere."""
        if self.last_steps:
            return f"{self.last_steps.pop(0)}:1"
        (rng,) = self._arguments
        step, publish = rng.choice(STEPS[self.kind]), int(LAST_PUBLISH[self.kind] ** rng.random())
        return f"{step}:{publish}" if rng.random() < 0.85 and not self.in_peace else ""

    def _dies_with(self) -> int:
        """What it may end with of its own accord: workers kill themselves."""
        return -signal.SIGKILL if self.kind in ("archiver", "materializer") else FENCED

    def _broken(self) -> list[str]:
        return [] if self._mutant is None else ["tests.soak.chaos.broken", self._mutant]

    def _environment(self) -> dict[str, str]:
        return dict(self._extra) | ({} if self._clock is None else {CLOCK: str(self._clock)})

    def _log(self) -> Path:
        return self._folder / f"{self.name}.{self._lives}.log"


def cast(
    folder: Path, *ports: int, seed: int, ack: str, environment: Mapping[str, str], mutant: str | None
) -> list[Process]:
    """Who takes part; one writer, one archiver and one materializer have clocks that can be moved.

    Args:
        ports: of the server, or of a cluster's nodes.
        environment: of each, beside this process's.
        mutant: a bug made on purpose, in each.
    """

    def process(name: str, kind: str, *arguments: Any, has_clock: bool = False) -> Process:
        return Process(
            name, kind, folder, ports, *arguments, has_clock=has_clock, environment=environment, mutant=mutant
        )

    return [
        *(process(f"writer{i}", "writer", seed, ack, has_clock=i == 0) for i in range(WRITERS)),
        *(process(f"archiver{i}", "archiver", Random(f"{seed} a{i}"), has_clock=i == 0) for i in range(ARCHIVERS)),
        *(
            process(f"materializer{i}", "materializer", Random(f"{seed} m{i}"), has_clock=i == 0)
            for i in range(MATERIALIZERS)
        ),
        *(process(f"rank{i}", "checkpoint", i) for i in range(RANKS)),
        *(process(f"other{i}", "acknowledge", i) for i in range(RANKS)),
    ]


def what_all_are_at(processes: Iterable[Process], *, seconds: float = 5.0) -> str:
    """The end of each one's log, with the stacks of its threads if it lives; asked for, and waited for so long."""
    asked = list(processes)
    for process in asked:
        process.ask_what_it_is_at()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(process.has_told() for process in asked):
        threading.Event().wait(0.05)
    return "\n".join(process.what_it_was_at() for process in asked)


def _resident(pid: int) -> int:
    """Resident memory in MiB; 0 for a process that is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s*([0-9]+) kB", status)
    return int(found[1]) // 1024 if found else 0
