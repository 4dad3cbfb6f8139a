"""What an archive asks of the place that keeps its files, and what is the same in every place.

Files are written whole, once, and never changed; they may be removed.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from ulid import ULID

from trajstore.entries import Buffer
from trajstore.errors import SchemaError

__all__ = ["STAGING", "Content", "Range", "Storage", "StoredFile", "check_path", "parts_of", "staged_since"]

STAGING = "staging"
"""Folder of what is being written; whoever was killed meanwhile leaves it there."""

Range: TypeAlias = tuple[int, int]
"""Start and length, in bytes."""


Content: TypeAlias = bytes | memoryview | Iterable[Buffer]
"""Of a file: as it is, or the parts that make it up, to be taken once and in order."""


class StoredFile(NamedTuple):
    """A file as it is listed: path relative to the root, size in bytes, time of writing in Unix seconds."""

    path: str
    size: int
    modified: float


class Storage(Protocol):
    """The files of one archive, under paths relative to its root: `packs/07/.../zarr.json`.

    A path that steps out of the archive, or that the place cannot have, is a `SchemaError`. Whatever else keeps a call
    from its work (permissions, a full disk, the network, refused credentials) is `Unavailable`.

    Attributes:
        location: folder or URL, fit for messages and for opening the archive again; holds no secrets.
    """

    location: str

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> list[bytes]:
        """Parts of a file, in the order asked for; what reaches past its end comes back shorter.

        Raises:
            FileNotFoundError: it is not there.
        """

    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: it is not there.
        """

    def create(self, path: str, data: bytes) -> None:
        """Write a new file durably, whole or not at all.

        Raises:
            FileExistsError: somebody else was first; nothing changed.
            Unavailable: it could not be written; where the answer got lost, it may be there all the same.
        """

    def list(self, prefix: str) -> Iterator[StoredFile]:
        """Every file below the folder `prefix` ("" for all), in any order; none if there is no such folder."""

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, and the folders that this empties. Those that are gone already are no error."""

    def publish(self, folder: str, files: Mapping[str, Content], on_step: Callable[[str], None]) -> None:
        """Put a new folder in place durably, with all its files.

        Args:
            folder: that nobody else writes.
            files: content by path below the folder; taken file by file, in order.
            on_step: hears "staged", "synced" and "moved".

        Raises:
            Unavailable: it is not in place, and what was written of it is removed as far as possible.
        """

    def clear_staging(self, *, older_than: float) -> None:
        """Remove what has been in staging for more than so many seconds: its writer was killed."""

    def open_map(self, path: str) -> memoryview | mmap.mmap:
        """A whole file as memory that the system may drop and load again.

        Raises:
            FileNotFoundError: it is not there.
        """


def parts_of(content: Content) -> Iterable[Buffer]:
    """The parts of a file's content."""
    return [content] if isinstance(content, bytes | memoryview) else content


_NO_PARTS = frozenset({"", ".", ".."})


def check_path(path: str) -> str:
    """A path as it may be used below an archive's root.

    Raises:
        SchemaError: it is empty, absolute, or leads out of the archive: nothing of ours is called so.
    """
    if "\0" in path or not _NO_PARTS.isdisjoint(path.split("/")):
        raise SchemaError(f"{path!r:.200} is no path inside an archive; whatever names it is damaged")
    return path


def staged_since(name: str) -> float | None:
    """When something in staging was begun, in Unix seconds; None if it is not ours."""
    try:
        return ULID.from_str(name).timestamp
    except ValueError:
        return None
