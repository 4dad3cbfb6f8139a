"""Python processes that a test drives line by line over pipes, and a look at the server processes of a folder."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests import waiting

__all__ = ["Child", "has_ended", "record_of", "servers_of", "until"]

_MAIN = """
import json, os, signal, sys
import trajstore

def answer(**reply):
    sys.stdout.write(json.dumps(reply) + "\\n")
    sys.stdout.flush()

names = {"trajstore": trajstore, "os": os, "sys": sys, "signal": signal}
answer(value="ready")
for line in sys.stdin:
    mode, code = json.loads(line)
    if mode == "last":
        exec(code, names)
        break
    try:
        answer(value=eval(code, names) if mode == "ask" else exec(code, names))
    except trajstore.TrajstoreError as error:
        answer(error=type(error).__name__, message=str(error))
"""


class Child:
    """A Python process that has imported trajstore and does what it is told.

    Attributes:
        pid: of the process.
        errors: its standard error so far goes to this file.
    """

    def __init__(self, errors: Path, *, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.errors = errors
        with errors.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", _MAIN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=cwd,
                env=os.environ | (env or {}),
            )
        self.pid = self._process.pid
        self._read = b""
        self._begun = False

    def begin(self, mode: str, code: str) -> None:
        """Tell it something, and do not wait."""
        if not self._begun:
            self._begun = True
            self.finish()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([mode, code]).encode() + b"\n")
        self._process.stdin.flush()

    def finish(self, seconds: float = 60.0) -> Any:
        """The answer to what was begun."""
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"child {self.pid} did not answer within {seconds:g} s: {self.words()}"
            data = os.read(descriptor, 1 << 16)
            assert data, f"child {self.pid} ended instead of answering: {self.words()}"
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        reply = json.loads(line)
        if "error" in reply:
            raise ChildError(reply["error"], reply["message"])
        return reply["value"]

    def do(self, code: str) -> None:
        """Run statements."""
        self.begin("do", code)
        self.finish()

    def ask(self, code: str) -> Any:
        """Value of an expression."""
        self.begin("ask", code)
        return self.finish()

    def last(self, code: str = "", *, seconds: float = 60.0) -> int:
        """Run statements after which the process ends, whatever they raise; its exit status."""
        self.begin("last", code)
        return self._process.wait(seconds)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def words(self) -> str:
        """What it wrote to standard error."""
        return self.errors.read_text()

    def dispose(self) -> None:
        """Make sure that it is gone, and close the pipes."""
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class ChildError(AssertionError):
    """A trajstore error in the child: name of its class, and its message."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def servers_of(folder: Path) -> list[int]:
    """Process ids of the servers of an embedded store's folder; one that ends counts until its last thread has."""
    home = folder.resolve() / "redis"
    found = {int(path.parts[2]) for path in Path("/proc").glob("[0-9]*/task/*/cwd") if _leads_to(path, home)}
    return sorted(found - {os.getpid()})


def _leads_to(link: Path, target: Path) -> bool:
    try:
        return link.readlink() == target
    except OSError:  # it has ended, or its first thread has
        return False


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or only waits for its parent to look; its other threads end after its first."""
    try:
        first = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return first == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def record_of(folder: Path) -> dict[str, Any]:
    """`server.json`."""
    return dict(json.loads((folder / "redis" / "server.json").read_text()))


until = partial(waiting.until, seconds=30.0)
