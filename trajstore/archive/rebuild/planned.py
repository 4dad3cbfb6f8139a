"""An archive as it would be with other records: its storage, but for manifest and lookup tables. Read only."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from mmap import mmap

from trajstore.archive.record import Record, encode_record, record_path
from trajstore.archive.storage.protocol import Content, Range, Storage, StoredFile
from trajstore.entries import Buffer
from trajstore.errors import Conflict

__all__ = ["PlannedStorage"]


class PlannedStorage:
    """A storage in which just these records are there, and no lookup table.

    Args:
        storage: where the packs lie.
        records: of one partition.
    """

    def __init__(self, storage: Storage, records: Iterable[Record]) -> None:
        self.location = storage.location
        self._storage = storage
        self._records = {record_path(record.partition, record.number): record for record in records}

    def read(self, path: str) -> bytes:
        """See `Storage`."""
        if not path.startswith("manifest/"):
            return self._storage.read(path)
        if path not in self._records:
            raise FileNotFoundError(path)
        return encode_record(self._records[path])

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `Storage`."""
        return self._storage.read_ranges(path, ranges)

    def size(self, path: str) -> int:
        """See `Storage`."""
        return self._storage.size(path)

    def list(self, prefix: str) -> Iterator[StoredFile]:
        """See `Storage`."""
        return self._storage.list(prefix)

    def open_map(self, path: str) -> memoryview | mmap:
        """See `Storage`."""
        if path.startswith("index/"):
            raise FileNotFoundError(path)
        return self._storage.open_map(path)

    def create(self, path: str, data: Buffer) -> None:
        """Refused."""
        raise _read_only(path)

    def remove(self, paths: Iterable[str]) -> None:
        """Refused."""
        raise _read_only(", ".join(paths))

    def publish(self, folder: str, files: Mapping[str, Content], on_step: Callable[[str], None]) -> None:
        """Refused."""
        raise _read_only(folder)

    def clear_staging(self, *, older_than: float) -> None:
        """Refused."""
        raise _read_only("staging")


def _read_only(path: str) -> Conflict:
    return Conflict(f"{path} cannot be written through a planned manifest")
