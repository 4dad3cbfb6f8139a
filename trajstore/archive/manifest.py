"""The manifest of a partition: numbered records, each written once. The truth about which packs exist.

Record *n + 1* can be created by one archiver only, so the number is also the fence: a zombie's record is refused. A
reader that has seen *n* records asks for *n + 1* and never lists a folder.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveRoot, write_new
from trajstore.errors import Corrupt, Fenced, SchemaError
from trajstore.events import EventId
from trajstore.summary import Summary

__all__ = ["FileDigest", "Manifest", "PackedTrajectory", "Record"]


class FileDigest(msgspec.Struct, frozen=True):
    """Size in bytes and SHA-256 (hex) of one file of a pack."""

    size: int
    sha256: str


class PackedTrajectory(msgspec.Struct, frozen=True, kw_only=True):
    """What a pack holds of one trajectory. The same lines stand in the pack's array `trajectories`.

    Attributes:
        id: of the trajectory.
        first, last: ids of its first and last entry in this pack; "" where it holds notes only.
        last_note: number of its newest note in this pack, 0 for none.
        offset, length: its bytes in the pack's array `events`.
        summary: of the trajectory as of `last`.
    """

    id: str
    first: str = ""
    last: str = ""
    last_note: int = 0
    offset: int = 0
    length: int = 0
    summary: Summary | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a partition's archive.

    Attributes:
        format: of the archive.
        number: 1, 2, 3, ... without gap.
        partition: whose.
        pack: name of the pack that this step adds.
        created: Unix seconds.
        writer: which archiver.
        files: every file of the pack by its path in it.
        trajectories: what is in it.
    """

    format: int
    number: int
    partition: int
    pack: str
    created: float
    writer: str
    files: dict[str, FileDigest]
    trajectories: Sequence[PackedTrajectory]


class Manifest:
    """The records of one partition, read incrementally and kept. Thread-safe."""

    def __init__(self, root: ArchiveRoot, partition: int) -> None:
        self._folder = root.manifest_folder(partition)
        self._lock = threading.Lock()
        self._newest = 0
        self._packs: dict[str, list[tuple[str, PackedTrajectory]]] = {}
        self._files: dict[str, dict[str, FileDigest]] = {}

    def refresh(self) -> int:
        """Read records written since; returns the number of the newest.

        Raises:
            Corrupt: a record cannot be read.
            SchemaError: a record of a newer format.
        """
        with self._lock:
            while (record := self._load(self._newest + 1)) is not None:
                self._take(record)
            return self._newest

    def append(self, record: Record) -> None:
        """Publish a record durably.

        Its number is one above the newest that the archiver knew when it decided what to archive: a record written
        since by another makes that decision stale, and has taken the number.

        Raises:
            Fenced: another archiver has written this number.
        """
        try:
            write_new(self._path(record.number), msgspec.json.format(msgspec.json.encode(record)))
        except FileExistsError as error:
            raise Fenced(
                f"record {record.number} of partition {record.partition} was written by another archiver; this one's "
                "lease is over, and its pack stays unpublished"
            ) from error
        with self._lock:
            if record.number == self._newest + 1:  # a reader of this process may have read it meanwhile
                self._take(record)

    def packs_of(self, id: str) -> list[tuple[str, PackedTrajectory]]:
        """(pack name, what it holds) of a trajectory, oldest first, as of the last refresh."""
        with self._lock:
            return list(self._packs.get(id, ()))

    def last_entry(self, id: str) -> EventId | None:
        """Newest archived entry of a trajectory, as of the last refresh."""
        found = [packed.last for _, packed in self.packs_of(id) if packed.last]
        return EventId.parse(found[-1]) if found else None

    def last_note(self, id: str) -> int:
        """Number of its newest archived note, 0 for none, as of the last refresh."""
        return max((packed.last_note for _, packed in self.packs_of(id)), default=0)

    def summary(self, id: str) -> Summary | None:
        """The newest archived summary of a trajectory, as of the last refresh."""
        return next((packed.summary for _, packed in reversed(self.packs_of(id)) if packed.summary is not None), None)

    def summaries(self) -> list[Summary]:
        """The newest archived summary of every trajectory, as of the last refresh."""
        with self._lock:
            ids = list(self._packs)
        return [summary for summary in map(self.summary, ids) if summary is not None]

    def packs(self) -> dict[str, dict[str, FileDigest]]:
        """Files of every pack by the pack's name, as of the last refresh."""
        with self._lock:
            return dict(self._files)

    def _take(self, record: Record) -> None:
        self._newest = record.number
        self._files[record.pack] = record.files
        for packed in record.trajectories:
            self._packs.setdefault(packed.id, []).append((record.pack, packed))

    def _load(self, number: int) -> Record | None:
        path = self._path(number)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            record = msgspec.json.decode(data, type=Record)
        except msgspec.MsgspecError as error:
            raise Corrupt(f"the manifest record {path} cannot be read: {error}") from error
        if record.format > ARCHIVE_FORMAT:
            raise SchemaError(f"the manifest record {path} has format {record.format}; upgrade trajstore to read it")
        return record

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08}.json"
