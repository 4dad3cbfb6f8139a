"""The command in a terminal of its own, read while it runs."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

from tests.cli.running import COMMAND, environment

__all__ = ["Terminal", "terminal"]


class Terminal:
    """A running command and what it has written so far.

    Attributes:
        written: bytes, control sequences and all.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", file: int) -> None:
        self.written = b""
        self._process = process
        self._file = file

    def wait_for(self, text: str, *, after: int = 0, seconds: float = 20.0) -> None:
        """Until it has written this, behind so many bytes."""
        deadline = time.monotonic() + seconds
        while text not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.written[after:].decode(errors="replace")):
            assert time.monotonic() < deadline, self.written[-3000:]
            self._read(0.1)

    def ended(self, how: signal.Signals) -> int:
        """Exit code after this signal."""
        self._process.send_signal(how)
        deadline = time.monotonic() + 20
        while self._process.poll() is None:
            assert time.monotonic() < deadline
            self._read(0.05)
        while self._read(0.05):
            pass
        return self._process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._file], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            data = os.read(self._file, 1 << 16)
            self.written += data
            return bool(data)
        return False


@contextlib.contextmanager
def terminal(width: int, *arguments: object, height: int = 40) -> Iterator[Terminal]:
    """Killed at the end of the block if it still runs."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment({"TERM": "xterm-256color"}),
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
