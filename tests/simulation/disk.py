"""The archive's files as a model: written whole and once, by processes that die meanwhile, in a place that fails.

A pack's files appear one after the other, as in an object store; a folder that is moved into place whole is the milder
case. What a call has returned is durable.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tests.simulation.scheduler import Scheduler
from trajstore.archive.storage.protocol import Content, Range, StoredFile, check_path, parts_of
from trajstore.errors import Unavailable

__all__ = ["Disk", "Files"]


class Disk:
    """What is stored.

    Args:
        loss: share of the calls that write and fail, before or after they have had an effect.

    Attributes:
        calm: nothing fails any more.
        away: it answers nobody.
    """

    def __init__(self, scheduler: Scheduler, rng: random.Random, *, loss: float) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.loss = loss
        self.calm = False
        self.away = False
        self.files: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self.on_create: Callable[[str], None] = lambda path: None

    def fails(self, kind: str) -> bool:
        if self.away and not self.calm:
            return True
        if self.calm or self.rng.random() >= self.loss:
            return False
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return True


class Files:
    """One process's view of the disk: a `trajstore.archive.storage.protocol.Storage`."""

    def __init__(self, disk: Disk, location: str, *, fails: bool = True) -> None:
        self._disk = disk
        self._fails = fails
        self.location = location

    def read(self, path: str) -> bytes:
        self._meet("read")
        return self._file(path)

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> list[bytes]:
        self._meet("read")
        data = self._file(path)
        return [data[start : start + length] for start, length in ranges]

    def size(self, path: str) -> int:
        self._meet("read")
        return len(self._file(path))

    def open_map(self, path: str) -> memoryview:
        self._meet("read")
        return memoryview(self._file(path))

    def create(self, path: str, data: bytes) -> None:
        self._disk.scheduler.pause()
        if self._disk.fails("create lost"):
            raise Unavailable(f"{self.location}: cannot write {path}: no answer")
        if check_path(path) in self._disk.files:
            raise FileExistsError(path)
        self._disk.files[path] = bytes(data)
        self._disk.on_create(path)
        self._disk.scheduler.pause()
        if self._disk.fails("create answer lost"):
            raise Unavailable(f"{self.location}: cannot write {path}: no answer")

    def list(self, prefix: str) -> Iterator[StoredFile]:
        self._disk.scheduler.pause()
        top = prefix and f"{prefix}/"
        for path in sorted(self._disk.files):
            if path.startswith(top):
                yield StoredFile(path, len(self._disk.files[path]), 0.0)

    def remove(self, paths: Iterable[str]) -> None:
        self._disk.scheduler.pause()
        for path in paths:
            self._disk.files.pop(path, None)

    def publish(self, folder: str, files: Mapping[str, Content], on_step: Callable[[str], None]) -> None:
        for name, content in files.items():
            data = b"".join(map(bytes, parts_of(content)))
            self._disk.scheduler.pause()
            if self._disk.fails("pack lost"):
                raise Unavailable(f"{self.location}: cannot write {folder}: no answer")
            self._disk.files[f"{folder}/{check_path(name)}"] = data
        for step in ("staged", "synced", "moved"):
            on_step(step)

    def clear_staging(self, *, older_than: float) -> None:
        pass

    def _meet(self, kind: str) -> None:
        if not self._fails:
            return
        self._disk.scheduler.maybe_pause()
        if (self._disk.away or self._disk.rng.random() < 0.1) and self._disk.fails(kind):
            raise Unavailable(f"{self.location}: no answer")

    def _file(self, path: str) -> bytes:
        try:
            return self._disk.files[check_path(path)]
        except KeyError:
            raise FileNotFoundError(path) from None
