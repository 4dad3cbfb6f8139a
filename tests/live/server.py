"""A server process of an engine on a loopback port, and polite waiting for what it says."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import httpx

__all__ = ["eventually", "serving"]

_START = 240.0


@contextmanager
def serving(module: str, flags: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> Iterator[httpx.Client]:
    """Run `python -m module` with these flags until the block ends, and give a client of it.

    Args:
        flags: `{"max_model_len": 8}` is `--max-model-len 8`, True a flag without a value.
        log: where its output goes.

    Raises:
        AssertionError: it ended, or does not answer; with the end of its log.
    """
    port = _free_port()
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**environ, **environment})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as client:

            def answers() -> bool:
                assert process.poll() is None, f"{module} ended:\n{log.read_text(errors='replace')[-4000:]}"
                try:
                    return client.get("/health", timeout=5.0).is_success
                except httpx.TransportError:
                    return False

            eventually(answers, seconds=_START)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def eventually(true: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Ask every tenth of a second until it is true.

    Raises:
        AssertionError: it never was.
    """
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not after {seconds:g} s"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
