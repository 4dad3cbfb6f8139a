"""Writes to a local disk that survive a power loss: files, and the folders that name them."""

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from trajstore.entries import Buffer

__all__ = ["make_folder", "sync_folder", "sync_tree", "write_file", "write_new", "write_parts"]

_AT_ONCE = 8
"""Files that are fsynced side by side."""


_AHEAD_BYTES = 4 << 20
"""Of a file that is being written: once so much more is there, the disk is told to begin."""


def write_new(path: Path, data: bytes) -> None:
    """Create a file with its content in one durable step.

    Raises:
        FileExistsError: somebody else was first; nothing changed.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        write_file(temporary, data)
        os.link(temporary, path)  # unlike a rename, it refuses to replace
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file and fsync it; its name is not durable before its folder is."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_parts(path: Path, parts: Iterable[Buffer]) -> None:
    """Write a file part by part. It is not durable yet, but the disk has been kept busy meanwhile."""
    with path.open("wb") as file, ThreadPoolExecutor(1) as aside:
        begun: list[Future[None]] = []
        ahead = 0
        for part in parts:
            file.write(part)
            ahead += len(part)
            if ahead >= _AHEAD_BYTES and all(sync.done() for sync in begun):
                begun.append(aside.submit(os.fdatasync, file.fileno()))
                ahead = 0
        for sync in begun:
            sync.result()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, and fsync the names of those made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_tree(folder: Path) -> None:
    """Fsync every file and folder below, and the folder itself, several at a time: a disk takes them together."""
    walked = list(os.walk(folder))
    files = [os.path.join(current, name) for current, _, names in walked for name in names]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(_sync, files):
            pass
        for _ in pool.map(_sync, [current for current, _, _ in walked]):
            pass


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power loss."""
    _sync(folder)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
