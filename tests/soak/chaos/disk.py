"""The disk of a chaos run's server: small where a tmpfs can be mounted, so that it can be filled and freed.

Where none can be (no root), a limit on the size of the server's files takes its place; the server then dies of it.
"""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Disk", "small_disk"]

SIZE = 512 << 20


class Disk:
    """A folder for a server's files that can be full.

    Attributes:
        is_small: a file system of its own.
    """

    def __init__(self, folder: Path, *, is_small: bool) -> None:
        self.folder = folder
        self.is_small = is_small

    def fill(self, pid: int) -> None:
        """Leave no room for what the server of that process id writes next."""
        if not self.is_small:
            newest = max(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (newest + 4096, resource.RLIM_INFINITY))
            return
        with (self.folder / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self, pid: int | None) -> None:
        """Room again."""
        if self.is_small:
            (self.folder / "ballast").unlink(missing_ok=True)
        elif pid is not None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A disk of 512 MB at a new folder, for the length of a block."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield Disk(folder, is_small=mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
