"""The place that keeps an archive's files: which one a location means, and a folder of a local disk as one.

Object stores are in `objects.py`.
"""

import contextlib
import math
import mmap
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ulid import ULID

from trajstore.archive.storage.durable import make_folder, sync_folder, sync_tree, write_file, write_parts
from trajstore.archive.storage.protocol import (
    STAGING,
    Content,
    Range,
    Storage,
    StoredFile,
    check_path,
    parts_of,
    staged_since,
)
from trajstore.errors import SchemaError, TrajstoreError, Unavailable

__all__ = ["LocalStorage", "open_storage"]

_ATTEMPTS = 10
"""A folder may be pruned between its making and its use, but not time after time."""


def open_storage(location: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> Storage:
    """The files at a folder (also `file://`) or at a URL of an object store; nothing need be there yet.

    Args:
        options: of an object store, see `objects.ObjectStorage`; a folder has none, and ignores them.

    Raises:
        SchemaError: it cannot name an archive.
        Unavailable: the package for object stores is not installed.
    """
    text = os.fspath(location)
    if not isinstance(text, str):
        raise SchemaError(f"an archive's location is text, not {text!r:.80}")
    if "://" in text and not text.startswith("file://"):
        try:
            from trajstore.archive.storage.objects import (
                ObjectStorage,  # what needs no object store need not have obstore
            )
        except ModuleNotFoundError as error:
            if error.name != "obstore":
                raise
            raise Unavailable(
                "object stores are reached through the package obstore, which is not installed; "
                "pip install 'trajstore[s3]'"
            ) from error
        return ObjectStorage(text, options)
    path = text.removeprefix("file://")
    if not path or "\0" in path:
        raise SchemaError(f"{path!r:.80} cannot be an archive's folder; give a path or a URL")
    if re.match(r"[a-z][a-z0-9]+:/(?!/)", path):
        raise SchemaError(f"{path} was a URL before it was made a path; give the URL as it is, as text")
    return LocalStorage(path)


class LocalStorage:
    """A folder. What a call has written is durable when it returns: files are fsynced, and the folders that name them.

    Attributes:
        path: of the folder, absolute: a later chdir must not matter.
        location: the same as text.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.location = str(self.path)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with self._opened(path) as (descriptor, size):
            return _pread(descriptor, 0, size)

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `Storage.read_ranges`."""
        with self._opened(path) as (descriptor, size):
            return [_pread(descriptor, start, min(length, size - start)) for start, length in ranges]

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        with self._opened(path) as (_, size):
            return size

    def open_map(self, path: str) -> memoryview | mmap.mmap:
        """See `Storage.open_map`; the map outlives a removal of the file."""
        with self._opened(path) as (descriptor, size):
            if not size:
                return memoryview(b"")  # the system maps no empty files
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def create(self, path: str, data: bytes) -> None:
        """See `Storage.create`: written into staging, then linked, which unlike a rename refuses to replace."""
        target = self._target(path)
        temporary = self.path / STAGING / str(ULID())
        with self._writing(path):
            try:
                make_folder(temporary.parent)
                write_file(temporary, data)
                if self._place(lambda: _link(temporary, target), target):
                    return
            finally:
                with contextlib.suppress(OSError):  # the first error tells more
                    temporary.unlink()
        raise FileExistsError(f"{target} is there already")

    def publish(self, folder: str, files: Mapping[str, Content], on_step: Callable[[str], None]) -> None:
        """See `Storage.publish`: written into staging, fsynced, then moved."""
        target = self._target(folder)
        home = self.path / STAGING / str(ULID())
        with self._writing(folder):
            try:
                for name, content in files.items():
                    path = home / check_path(name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_parts(path, parts_of(content))
                on_step("staged")
                sync_tree(home)
                on_step("synced")
                self._place(lambda: _move(home, target), target)
            except BaseException:
                shutil.rmtree(home, ignore_errors=True)
                raise
        on_step("moved")

    def list(self, prefix: str) -> Iterator[StoredFile]:
        """See `Storage.list`."""
        top = self._target(prefix) if prefix else self.path
        with self._working(f"cannot list {prefix or 'its files'}", "mend the folder"):
            for folder, names in self._folders(top):
                for name in names:
                    path = os.path.join(folder, name)
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        found = os.stat(path)
                        yield StoredFile(os.path.relpath(path, self.path), found.st_size, found.st_mtime)

    def remove(self, paths: Iterable[str]) -> None:
        """See `Storage.remove`; the removal survives a power loss, too."""
        folders = set()
        with self._working("cannot remove files", "mend the folder"):
            for path in paths:
                target = self._target(path)
                self._refuse_link(path)
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    target.unlink()
                    folders.add(target.parent)
            for folder in {self._prune(folder) for folder in folders}:
                with contextlib.suppress(FileNotFoundError):  # another process has pruned it
                    sync_folder(folder)

    def clear_staging(self, *, older_than: float) -> None:
        """See `Storage.clear_staging`; what resists is left to the next one.

        Its writer may be at work on another host with another clock. So it must not have been written to for so long,
        either, by the clock of the file system.
        """
        staging = self.path / STAGING
        try:
            os.utime(staging)
            before = staging.stat().st_mtime - older_than
        except OSError:  # there is none, or it is not ours to clear
            return
        for path in staging.glob("*"):
            since = staged_since(path.name)
            if since is not None and since < before and _last_written(path) < before:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def __repr__(self) -> str:
        return f"<LocalStorage {self.location}>"

    def _target(self, path: str) -> Path:
        return self.path / check_path(path)

    def _folders(self, top: Path) -> Iterator[tuple[str, Sequence[str]]]:
        """Folders from `top` down, and the names in each. Links are followed at the archive's top only.

        `packs` may lie on another disk. A link below could lead in a circle, or to what is no archive's.
        """
        for folder, folders, names in os.walk(top, onerror=_raise_unless_absent):
            yield folder, names
            if folder == self.location:
                for name in folders:
                    if os.path.islink(os.path.join(folder, name)):
                        below = os.walk(os.path.join(folder, name), onerror=_raise_unless_absent)
                        yield from ((one, some) for one, _, some in below)

    def _refuse_link(self, path: str) -> None:
        """Nothing is removed that a link below the archive's top leads to.

        Raises:
            SchemaError: there is such a link.
        """
        first, *rest = path.split("/")
        place = (self.path / first).resolve() if rest else self.path.resolve()
        if (self.path / path).parent.resolve() != place.joinpath(*rest[:-1]):
            raise SchemaError(
                f"{self.location}/{path} lies behind a symbolic link, and is left there; only the folders at the top "
                "of an archive may be links. Remove the link"
            )

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[tuple[int, int]]:
        """Descriptor and size of a file."""
        target = f"{self.location}/{check_path(path)}"
        try:
            descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if stat.S_ISDIR(status.st_mode):
                    raise FileNotFoundError(f"{target} is a folder")
                yield descriptor, status.st_size
            finally:
                os.close(descriptor)
        except NotADirectoryError as error:
            raise FileNotFoundError(f"{target} does not exist") from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unavailable(f"cannot read {path}", error, "mend the folder or its permissions") from error

    def _place(self, put: Callable[[], bool], target: Path) -> bool:
        """Put something at its place, durably; False if something is there already."""
        for attempt in range(_ATTEMPTS):
            try:
                make_folder(target.parent)
                placed = put()
                break
            except (FileNotFoundError, FileExistsError):  # the folder was empty, and somebody has just pruned it
                if attempt + 1 == _ATTEMPTS:
                    raise
        for folder in target.parents:
            with contextlib.suppress(FileNotFoundError):  # somebody has removed it all again
                sync_folder(folder)
            if folder == self.path:
                break
        return placed

    def _prune(self, folder: Path) -> Path:
        """Remove a folder if it is empty, and those above that this empties; returns the first that stays."""
        while folder != self.path:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                break
            folder = folder.parent
        return folder

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        advice = "What the archive holds is untouched; free space or mend the folder"
        try:
            with self._working(f"cannot write {path}", advice):
                yield
        except (FileNotFoundError, FileExistsError) as error:  # of a folder on the way, say
            raise Unavailable(f"{self.location}: cannot write {path}: {error}. {advice}") from error

    @contextlib.contextmanager
    def _working(self, what: str, advice: str) -> Iterator[None]:
        try:
            yield
        except (TrajstoreError, FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            raise self._unavailable(what, error, advice) from error

    def _unavailable(self, what: str, error: OSError, advice: str) -> Unavailable:
        return Unavailable(f"{self.location}: {what}: {error}. {advice}")


def _last_written(path: Path) -> float:
    """When a file, or anything in a folder, was written last, Unix seconds; infinity while that changes."""
    try:
        return max([path.stat().st_mtime, *(below.stat().st_mtime for below in path.rglob("*"))])
    except OSError:  # it is moved to its place, say
        return math.inf


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Up to `length` bytes; the system hands out 2 GiB at most in one go."""
    data = os.pread(descriptor, max(0, length), start)
    if len(data) >= length:
        return data
    blocks = [data]
    while blocks[-1] and (have := sum(map(len, blocks))) < length:
        blocks.append(os.pread(descriptor, length - have, start + have))
    return b"".join(blocks)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:  # also from NFS, where the reply to a first try was lost
        return os.path.samefile(source, target)
    return True


def _move(source: Path, target: Path) -> bool:
    source.rename(target)
    return True


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
