"""Asking a worker over HTTP."""

import json
import subprocess
import urllib.error
import urllib.request
from typing import NamedTuple

__all__ = ["Page", "get", "said_address"]


class Page(NamedTuple):
    """What was answered."""

    status: int
    body: str


def get(url: str) -> Page:
    """A page, whatever its status."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return Page(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Page(error.code, error.read().decode())


def said_address(process: "subprocess.Popen[str]") -> str:
    """Where a process that was started with `--listen 0 --log-format json` says that it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        found = json.loads(line)
        if found["event"] == "listening":
            return str(found["address"])
    raise AssertionError("it ended")
