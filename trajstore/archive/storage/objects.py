"""An object store as the place that keeps an archive's files: S3 and what speaks like it, through obstore.

A folder there is only a prefix of names. So a pack is put in place object by object, and nothing reads it before its
record is written, which is one conditional put: the server refuses a second one of the same name.
"""

import contextlib
import functools
import mmap
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import obstore
from obstore import exceptions
from ulid import ULID

from trajstore.archive.storage.object_errors import credentials_advice, is_final, reason, status
from trajstore.archive.storage.object_ranges import PART_BYTES, cut, requests
from trajstore.archive.storage.object_url import FIRST_PAUSE, ObjectUrl, connect
from trajstore.archive.storage.protocol import STAGING, Content, Range, StoredFile, check_path, parts_of, staged_since
from trajstore.errors import Conflict, Corrupt, SchemaError, Unavailable

__all__ = ["ObjectStorage"]

_THREADS = 8
_DELETE_BATCH = 1000

_RUNTIME_OF: list[int] = []
"""The process whose threads obstore's runtime has; in a forked one it waits for them for ever."""


class ObjectStorage:
    """A prefix in a bucket.

    Every call ends within about `timeout` seconds (uploads and long reads: each part of 8 MiB does), retries included.

    Args:
        location: `s3://bucket/prefix`, also `gs://` and `az://`. Options may stand in its query:
            `s3://bucket/exp1?endpoint=http://127.0.0.1:9000&region=us-east-1`.
        options: keys of obstore's configuration (endpoint, region, access_key_id, secret_access_key, session_token,
            skip_signature, virtual_hosted_style_request, ...), of its HTTP client (allow_http, proxy_url, ...), and
            `timeout`, default 30. They go before those of the query; what neither says, the usual environment does
            (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).

    Attributes:
        location: the URL with the options that it takes to find the archive again, without secrets.

    Raises:
        SchemaError: the URL or an option cannot be right.
    """

    def __init__(self, location: str, options: Mapping[str, str] | None = None) -> None:
        self._url = ObjectUrl.parse(location, options)
        self.location = self._url.location
        self._store = connect(self._url, retries=10)
        self._once = connect(self._url, retries=0)
        self._creates_once = False  # the server has shown that it does not replace what is there

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with self._asking(f"read {check_path(path)}"):
            found = obstore.get(self._store, _name(path))
            size = found.meta["size"]
            if size <= PART_BYTES:
                return bytes(found.bytes())
        return self.read_ranges(path, [(0, size)])[0]

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> list[bytes]:
        """See `Storage.read_ranges`: neighbours in one request, several requests at a time."""
        if not any(length for _, length in ranges) or max(length for _, length in ranges) > PART_BYTES:
            size = self.size(path)  # a damaged index may ask for any length
            ranges = [(start, max(0, min(length, size - start))) for start, length in ranges]
        asked = requests(ranges)
        with self._asking(f"read {check_path(path)}"):
            return cut(ranges, asked, self._each(lambda part: self._get(path, part), asked))

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        with self._asking(f"look at {check_path(path)}"):
            return int(obstore.head(self._store, _name(path))["size"])

    def open_map(self, path: str) -> memoryview | mmap.mmap:
        """See `Storage.open_map`: fetched into a temporary file that has no name any more."""
        size = self.size(path)
        if not size:
            return memoryview(b"")
        with self._asking(f"read {path}"), tempfile.TemporaryFile() as file:

            def fetch(part: Range) -> int:
                data = self._get(path, part)
                try:
                    return _write_at(file.fileno(), part[0], data)
                except OSError as error:
                    raise Unavailable(
                        f"{self.location}: {path} finds no place in {tempfile.gettempdir()}: {error}. Free space "
                        "there, or set TMPDIR"
                    ) from error

            if sum(self._each(fetch, requests([(0, size)]))) != size:
                raise Unavailable(f"{self.location}: {path} was cut off on the way; try again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def create(self, path: str, data: bytes) -> None:
        """See `Storage.create`: a conditional put."""
        check_path(path)
        if not self._creates_once:
            self._require_conditional_puts()
            self._creates_once = True
        if not self._create(path, data):
            raise FileExistsError(f"{path} in {self.location} is there already")

    def publish(self, folder: str, files: Mapping[str, Content], on_step: Callable[[str], None]) -> None:
        """See `Storage.publish`: what is uploaded is durable and in its place at once."""
        named = {f"{check_path(folder)}/{check_path(name)}": b"".join(parts_of(files[name])) for name in files}
        on_step("staged")
        try:
            with self._asking(f"write {folder}", "What the archive holds is untouched"):
                self._each(self._put, list(named.items()))
            on_step("synced")
        except BaseException:
            with contextlib.suppress(Unavailable):  # the first error tells more
                self.remove(named)
            raise
        on_step("moved")

    def list(self, prefix: str) -> Iterator[StoredFile]:
        """See `Storage.list`."""
        with self._asking(f"list {prefix or 'its files'}"):
            for batch in obstore.list(self._store, prefix=_name(check_path(prefix)) if prefix else None):
                for found in batch:
                    if found["path"] not in ("", prefix):  # consoles mark a folder with an object of its name
                        yield StoredFile(found["path"], found["size"], found["last_modified"].timestamp())

    def remove(self, paths: Iterable[str]) -> None:
        """See `Storage.remove`."""
        names = [_name(check_path(path)) for path in paths]
        with self._asking("remove files"):
            if self._url.url.startswith("s3://"):
                for start in range(0, len(names), _DELETE_BATCH):
                    obstore.delete(self._store, names[start : start + _DELETE_BATCH])
            else:
                self._each(self._delete, names)

    def clear_staging(self, *, older_than: float) -> None:
        """See `Storage.clear_staging`: only trials of conditional puts can lie there."""
        begun = ((file.path, staged_since(file.path.rpartition("/")[2])) for file in self.list(STAGING))
        old = [path for path, since in begun if since is not None and time.time() - since > older_than]
        if old:
            self.remove(old)

    def __repr__(self) -> str:
        return f"<ObjectStorage {self.location}>"

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="trajstore-objects")

    def _each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Sequence[Any]:
        """Results of a work on items, several at a time; nothing of it is under way any more when it fails."""
        if len(items) < 2:
            return [work(item) for item in items]
        running = [self._pool.submit(work, item) for item in items]
        try:
            return [each.result() for each in running]
        except BaseException:
            for each in running:
                each.cancel()
            wait(running)
            raise

    def _get(self, path: str, part: Range) -> bytes:
        try:
            return bytes(obstore.get_range(self._store, _name(path), start=part[0], length=part[1]))
        except exceptions.GenericError as error:
            if status(error) == 416:  # it begins past the end
                return b""
            raise

    def _put(self, item: tuple[str, bytes]) -> None:
        name, data = item
        obstore.put(self._store, _name(name), data, chunk_size=PART_BYTES, max_concurrency=4)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, name)

    def _create(self, path: str, data: bytes) -> bool:
        """Put what is not there yet; False if it is. Resolves what lost replies leave open.

        "It exists" has two more meanings: our own put whose reply got lost was there first, and (a 409) another put is
        under way and may still fail. So it is read back.
        """
        began, pause, doubtful = time.monotonic(), FIRST_PAUSE, False
        advice = "What the archive holds is untouched"
        while True:
            with self._asking(f"write {path}", advice):
                try:
                    obstore.put(self._once, _name(path), data, mode="create", use_multipart=False)
                    return True
                except exceptions.AlreadyExistsError as error:
                    failure: exceptions.BaseError = error
                    found = self._find(path)
                    if found is not None:
                        return doubtful and found == data
                except exceptions.BaseError as error:
                    failure = error
                    if is_final(error):
                        raise
                    doubtful = True
                if time.monotonic() - began > self._url.timeout / 2:
                    raise failure
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # so that rivals do not keep meeting
            pause *= 2

    def _find(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def _require_conditional_puts(self) -> None:
        """Try it out: a server that takes the second put as well would let two archivers write the same record."""
        trial = f"{STAGING}/{ULID()}"
        try:
            self._create(trial, b"first")
            replaced = self._create(trial, b"second")
        finally:
            with contextlib.suppress(Unavailable):  # it is small, and cleared with staging
                self.remove([trial])
        if replaced:
            raise Unavailable(
                f"{self.location}: the server ignores conditional puts (If-None-Match: *), so two archivers could "
                "overwrite each other's records. Use a server that has them, or archive to a folder"
            )

    @contextlib.contextmanager
    def _asking(
        self, what: str, advice: str = "Check endpoint, network and credentials, then try again"
    ) -> Iterator[None]:
        if not _RUNTIME_OF:
            _RUNTIME_OF.append(os.getpid())
        if _RUNTIME_OF[0] != os.getpid():
            raise Conflict(
                f"{self.location} cannot be used in a forked process: object stores were used before the fork. Start "
                "workers with the method 'spawn', or open it in the child alone"
            )
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or what.startswith("write"):
                raise self._unavailable(what, error, "Make the bucket, or mend the URL") from error
            raise FileNotFoundError(f"cannot {what} in {self.location}: it does not exist") from error
        except exceptions.InvalidPathError as error:
            raise Corrupt(
                f"{self.location} holds an object that no archive can have: {reason(error)}; remove it"
            ) from error
        except exceptions.BaseError as error:
            raise self._unavailable(what, error, advice) from error

    def _unavailable(self, what: str, error: Exception, advice: str) -> Unavailable:
        about_credentials = credentials_advice(error, self._url.url.partition("://")[0])
        if about_credentials is not None:
            advice = about_credentials
        elif what.startswith("write") and (isinstance(error, exceptions.NotSupportedError) or status(error) == 501):
            advice = (
                "Records take conditional puts (If-None-Match: *): use a server that has them, or archive to a folder"
            )
        return Unavailable(f"{self.location}: cannot {what}: {self._url.redact(reason(error))}. {advice}")


def _name(path: str) -> str:
    """A path as obstore takes it."""
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise SchemaError(f"{path!r:.200} cannot be the name of an object; rename it")
    return path


def _write_at(descriptor: int, start: int, data: bytes) -> int:
    """Write all of it: the system may take less in one go."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, memoryview(data)[done:], start + done)
    return done
