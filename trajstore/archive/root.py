"""An archive's identity: `archive.json`, and who may call a place its archive. Its files are `storage/`'s.

archive.json                       which run this is
manifest/07/00000012.json          numbered records of partition 7; a pack exists once its record does
index/07/00000001-00000016.safetensors   lookup tables
packs/07/00000012-01ABC.../        a pack: one Zarr v3 group
staging/01ABC.../                  packs being written to a local disk
"""

import os
from collections.abc import Mapping

import msgspec

from trajstore.archive.sealed import seal, unseal
from trajstore.archive.storage.local import LocalStorage, open_storage
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import UNREADABLE, Conflict, Corrupt, NotFound, SchemaError
from trajstore.limits import Label, Partitions

__all__ = ["ARCHIVE_FORMAT", "ArchiveInfo", "ArchiveRoot", "check_options"]

ARCHIVE_FORMAT = 2
"""Version of the archives that this version begins; it reads older ones. See `docs/format.md`."""

_INFO = "archive.json"
_FOLDERS = ("manifest", "index", "packs", "staging")


class ArchiveInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`archive.json`. The incarnation ties the archive to the one run in Redis that it belongs to."""

    format: int
    run: Label
    incarnation: Label
    partitions: Partitions


class ArchiveRoot:
    """One archive.

    Attributes:
        storage: its files.
        location: folder or URL, fit for messages and for the run's record: no secrets.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.location = storage.location

    @classmethod
    def at(cls, location: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> "ArchiveRoot":
        """The root at a folder or URL, which need not hold anything yet.

        Args:
            options: of an object store; a folder has none.

        Raises:
            SchemaError: it cannot name an archive, or options are given that cannot be right or with a folder.
        """
        if not isinstance(location, str | os.PathLike):
            raise SchemaError(f"an archive's location is a folder or a URL, not {location!r:.80}")
        check_options(options)
        root = cls(open_storage(location, options))
        if options and root.is_local:
            raise SchemaError(
                f"the options {', '.join(sorted(options))} are an object store's, but {root.location} is a folder; "
                "leave archive_options out, or give the URL of the archive: s3://bucket/name"
            )
        return root

    @property
    def is_local(self) -> bool:
        """It is a folder of this machine."""
        return isinstance(self.storage, LocalStorage)

    def is_at(self, other: "ArchiveRoot") -> bool:
        """Both are the same place, also where one way to it leads over a symbolic link."""
        if self.is_local and other.is_local:
            return os.path.realpath(self.location) == os.path.realpath(other.location)
        return self.location == other.location

    def info(self) -> ArchiveInfo | None:
        """Whose archive this is; None if there is none.

        Raises:
            Corrupt: `archive.json` cannot be read.
            SchemaError: a newer format.
        """
        try:
            data = self.storage.read(_INFO)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            info = msgspec.convert(unseal(data, newest=ARCHIVE_FORMAT, what=f"{_INFO} in {self.location}"), ArchiveInfo)
        except (Corrupt, *UNREADABLE) as error:
            raise Corrupt(f"{error}; `trajstore rebuild {self.location}` makes it anew from the packs") from error
        return info

    def require(self) -> ArchiveInfo:
        """As `info`.

        Raises:
            NotFound: there is no archive.
        """
        info = self.info()
        if info is None:
            raise NotFound(f"there is no archive in {self.location} (no archive.json)")
        return info

    def claim(self, info: ArchiveInfo) -> None:
        """Make this the archive of a run, or find that it is already.

        Raises:
            Conflict: it belongs to another run or incarnation, or the folder holds something else.
            Unavailable: the folder cannot be used.
        """
        found = self.info()
        if found is None:
            foreign = next((file.path for file in self.storage.list("") if not _is_ours(file.path)), None)
            if foreign is not None:
                raise Conflict(
                    f"{self.location} is not empty and no archive (it holds {foreign}); archive into a new or an empty "
                    "folder"
                )
            try:
                self.storage.create(_INFO, seal(info))
                return
            except FileExistsError:
                found = self.require()
        if (found.incarnation, found.run) != (info.incarnation, info.run):
            raise Conflict(
                f"{self.location} archives incarnation {found.incarnation} of run {found.run!r}, but the hot log holds "
                f"incarnation {info.incarnation} of run {info.run!r}. One of them is of another run, or was lost and "
                "begun anew; give the matching archive, or a new folder"
            )

    def __repr__(self) -> str:
        return f"<ArchiveRoot {self.location}>"


def check_options(options: Mapping[str, str] | None) -> None:
    """Make sure that options are names with values; what they mean is the object store's to say.

    Raises:
        SchemaError: they are not.
    """
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
        kind = type(options).__name__
        raise SchemaError(
            f"the options of an object store are a mapping of names to text, {{'region': 'us-east-1'}}, not {kind}"
            + (" with other keys" if isinstance(options, Mapping) else "")
        )


def _is_ours(path: str) -> bool:
    """What somebody makes who claims the archive at this moment, or left half made in a crash."""
    top = path.partition("/")[0]
    return top in (*_FOLDERS, _INFO) or top.startswith(f".{_INFO}.")
