"""Running the command: in this process where speed matters, as a process of its own where signals or pipes do."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from functools import partial

from click.testing import CliRunner, Result

from tests import waiting
from trajstore.cli import main

__all__ = ["in_terminal", "invoke", "run", "started", "until"]

COMMAND = (sys.executable, "-m", "trajstore")


def invoke(*arguments: object, env: dict[str, str | None] | None = None) -> Result:
    """In this process; any exception but a clean exit fails the test."""
    result = CliRunner(env={"TRAJSTORE_URL": None} | (env or {})).invoke(main, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*arguments: object, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """As a process of its own, to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=environment(env)
    )


@contextlib.contextmanager
def started(*arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """As a process of its own, killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def ended(process: "subprocess.Popen[str]", *signals: signal.Signals) -> tuple[int, str, str]:
    """Exit code, stdout and stderr after these signals; a process that does not end within 20 s fails the test."""
    for one in signals:
        process.send_signal(one)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def in_terminal(width: int, *arguments: object) -> bytes:
    """What the command writes to a terminal of `width` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment({"TERM": "xterm-256color"}),
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while data := os.read(ours, 1 << 16):
            written += data
    os.close(ours)
    assert process.wait(20) == 0, written
    return written


until = partial(waiting.until, seconds=30.0)


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Ours without a store, and with nothing that bends the output."""
    unwanted = ("TRAJSTORE_URL", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {name: value for name, value in os.environ.items() if name not in unwanted} | (extra or {})
