"""Looking at the places that keep an archive's files, and at them from another process."""

import os
import subprocess
import sys
import time

__all__ = ["age", "contents", "paths", "run"]


def paths(storage, prefix=""):
    return sorted(file.path for file in storage.list(prefix))


def contents(storage):
    """Content of every file by its path."""
    return {path: storage.read(path) for path in paths(storage)}


def age(path, seconds=7200.0):
    """Let a file, or a folder with all that is in it, have been written so long ago."""
    then = time.time() - seconds
    for found in (*path.rglob("*"), path):
        os.utime(found, (then, then))


def run(script, *arguments):
    """A script in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
