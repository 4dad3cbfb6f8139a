"""Lock files: kernel locks that end with the process that holds them, and that no fork's child keeps by accident."""

import fcntl
import os
import threading
from pathlib import Path

__all__ = ["LockFile"]


class LockFile:
    """An open lock file. A fork's child closes its copies at once, for they would hold the lock after the parent."""

    def __init__(self, path: Path) -> None:
        with _no_fork:
            self._path = path.absolute()
            self._file = path.open("ab", buffering=0)
            _open_locks.add(self)

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def removed(self) -> bool:
        """Its name leads elsewhere or nowhere, so whoever comes there now holds another lock."""
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True

    def fileno(self) -> int:
        return self._file.fileno()

    def share(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def try_exclusive(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Unlock, also where a child between fork and exec has a copy; then close."""
        if not self.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Close, and leave the lock to whoever inherited it."""
        with _no_fork:
            _open_locks.discard(self)
            self._file.close()


_open_locks: set[LockFile] = set()
_no_fork = threading.RLock()  # a fork waits until `_open_locks` tells the truth


def _close_locks() -> None:
    for lock in list(_open_locks):
        lock.close()
    _no_fork.release()


os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_close_locks)
