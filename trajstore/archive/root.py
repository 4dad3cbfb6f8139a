"""The folder of an archive: its identity, its paths, and the few file operations whose durability matters.

archive.json                       which run this is
manifest/07/00000012.json          numbered records of partition 7; a pack exists once its record does
packs/07/00000012-01ABC.../        a pack: one Zarr v3 group
staging/01ABC.../                  packs being written
"""

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

import msgspec
from ulid import ULID

from trajstore.errors import Conflict, Corrupt, NotFound, SchemaError, Unavailable

__all__ = ["ARCHIVE_FORMAT", "ArchiveInfo", "ArchiveRoot", "write_new"]

ARCHIVE_FORMAT = 1
"""Version of everything below an archive's root; see `docs/format.md`."""


_FOLDERS = ("manifest", "packs", "staging")


class ArchiveInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`archive.json`. The incarnation ties the archive to the one run in Redis that it belongs to."""

    format: int
    run: str
    incarnation: str
    partitions: int


class ArchiveRoot:
    """Paths and durable file operations of one local archive."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> "ArchiveRoot":
        """The root at a folder, which need not exist.

        Raises:
            SchemaError: a URL of a kind that this version cannot archive to.
        """
        text = os.fspath(location)
        if "://" in text and not text.startswith("file://"):
            raise SchemaError(f"{text}: this version archives to a folder; give a path")
        return cls(Path(text.removeprefix("file://")))

    def info(self) -> ArchiveInfo | None:
        """Whose archive this is; None if there is none.

        Raises:
            Corrupt: `archive.json` cannot be read.
            SchemaError: a newer format.
        """
        try:
            data = (self.path / "archive.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            info = msgspec.json.decode(data, type=ArchiveInfo)
        except msgspec.MsgspecError as error:
            raise Corrupt(f"{self.path / 'archive.json'} cannot be read: {error}") from error
        if info.format > ARCHIVE_FORMAT:
            raise SchemaError(
                f"{self.path} is an archive of format {info.format}; this trajstore reads up to {ARCHIVE_FORMAT}, "
                "upgrade it"
            )
        return info

    def require(self) -> ArchiveInfo:
        """As `info`.

        Raises:
            NotFound: there is no archive.
        """
        info = self.info()
        if info is None:
            raise NotFound(f"there is no archive in {self.path} (no archive.json)")
        return info

    def claim(self, info: ArchiveInfo) -> None:
        """Make this the archive of a run, or find that it is already.

        Raises:
            Conflict: it belongs to another run or incarnation, or the folder holds something else.
            Unavailable: the folder cannot be used.
        """
        try:
            self._claim(info)
        except OSError as error:
            raise Unavailable(f"{self.path} cannot be used as an archive: {error}") from error

    def _claim(self, info: ArchiveInfo) -> None:
        found = self.info()
        if found is None:
            if self.path.exists() and any(not _is_ours(path.name) for path in self.path.iterdir()):
                raise Conflict(f"{self.path} is not empty and no archive; archive into a new or an empty folder")
            for folder in _FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            try:
                write_new(self.path / "archive.json", msgspec.json.format(msgspec.json.encode(info)))
                return
            except FileExistsError:
                found = self.require()
        if (found.incarnation, found.run) != (info.incarnation, info.run):
            raise Conflict(
                f"{self.path} archives incarnation {found.incarnation} of run {found.run!r}, but the hot log holds "
                f"incarnation {info.incarnation} of run {info.run!r}. One of them is of another run, or was lost and "
                "begun anew; give the matching archive, or a new folder"
            )

    def manifest_folder(self, partition: int) -> Path:
        """Folder of a partition's records."""
        return self.path / "manifest" / f"{partition:02}"

    def pack_path(self, name: str) -> Path:
        """Where a published pack lies; names read `07/00000012-01ABC...`."""
        return self.path / "packs" / name

    def stage(self, name: str) -> Path:
        """A new folder to write a pack into."""
        path = self.path / "staging" / name
        path.mkdir(parents=True)
        return path

    def clear_staging(self, *, older_than: float) -> None:
        """Remove what has lain in staging for more than `older_than` seconds: its archiver was killed."""
        for path in (self.path / "staging").glob("*"):
            with contextlib.suppress(ValueError):  # not ours
                if time.time() - ULID.from_str(path.name).timestamp > older_than:
                    shutil.rmtree(path, ignore_errors=True)

    def publish(self, staged: Path, name: str) -> None:
        """Move a staged and fsynced pack to its place, durably. Nobody knows it until its record is written."""
        target = self.pack_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(target)
        sync_folder(target.parent)
        sync_folder(target.parent.parent)


def _is_ours(name: str) -> bool:
    """What somebody makes who claims the archive at this moment, or left half made in a crash."""
    return name in (*_FOLDERS, "archive.json") or name.startswith(".archive.json.")


def write_new(path: Path, data: bytes) -> None:
    """Create a file with its content in one durable step.

    Raises:
        FileExistsError: somebody else was first; nothing changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # unlike a rename, it refuses to replace
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    sync_folder(path.parent.parent)


def sync_tree(folder: Path) -> None:
    """Fsync every file and folder below, and the folder itself."""
    for current, _, files in os.walk(folder, topdown=False):
        for name in files:
            descriptor = os.open(os.path.join(current, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(current))


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
