"""Open arrays of packs: the few that were used last, for all who read an archive in this process."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from trajstore.archive.arrays.chunk_cache import ChunkCache
from trajstore.archive.arrays.shard import Job, ShardReader, decode_all
from trajstore.archive.record import FileDigest
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import Corrupt

__all__ = ["PackArrays", "Span"]

_OPEN = 512

_CACHED_BYTES = 32 << 20
"""Of decoded chunks: trajectories that are read one after the other share those at their borders."""


class Span(NamedTuple):
    """Rows `[start, stop)` of an array of a pack."""

    pack: str
    array: str
    start: int
    stop: int


class PackArrays:
    """Reads rows of packs' arrays. Thread-safe.

    Args:
        storage: of the archive.
        files_of: what the record of a pack says of its files, None for a pack without one; asked with every array
            that is opened. Without it packs are taken as they are.
    """

    def __init__(
        self, storage: Storage, files_of: Callable[[str], Mapping[str, FileDigest] | None] = lambda _: None
    ) -> None:
        self._storage = storage
        self._files_of = files_of
        self._open: OrderedDict[tuple[str, str], ShardReader] = OrderedDict()
        self._chunks = ChunkCache(_CACHED_BYTES)
        self._lock = threading.Lock()

    def rows(self, pack: str, array: str, start: int, stop: int, layers: slice | None = None) -> npt.NDArray[Any]:
        """Rows `[start, stop)` of an array, of `routed` only some `layers`.

        Raises:
            Corrupt: the pack is damaged or gone; says where.
        """
        return self.rows_of_all([Span(pack, array, start, stop)], layers)[0]

    def rows_of_all(self, spans: Sequence[Span], layers: slice | None = None) -> list[npt.NDArray[Any]]:
        """Rows of several spans, whose chunks are decoded side by side. Otherwise as `rows`."""
        found, jobs = [], []
        for span in spans:
            try:
                reader = self._reader(span.pack, span.array)
                if span.stop > reader.shape[0]:
                    raise Corrupt(f"it ends at {reader.shape[0]}")
                rows, some = reader.begin(span.start, span.stop, layers)
            except Corrupt as error:
                raise _damaged(span, error) from error
            found.append(rows)
            jobs += [Job(job.nbytes, functools.partial(_run, span, job)) for job in some]
        decode_all(jobs)
        return found

    def text(self, pack: str, array: str, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)` of `events` or `trajectories`."""
        return self.rows(pack, array, start, stop).tobytes()

    def whole(self, pack: str, array: str) -> bytes:
        """All bytes of `events` or `trajectories`."""
        return self.rows(pack, array, 0, self.length(pack, array)).tobytes()

    def length(self, pack: str, array: str) -> int:
        """Rows of an array.

        Raises:
            Corrupt: the pack is damaged or gone.
        """
        return self._about(pack, array).shape[0]

    def chunk_rows(self, pack: str, array: str) -> int:
        """Rows of one chunk of an array: what is decoded together.

        Raises:
            Corrupt: the pack is damaged or gone.
        """
        return self._about(pack, array).chunk_shape[0]

    def bytes_read(self, array: str) -> int:
        """Compressed bytes fetched so far of arrays of this name, of the packs that are open."""
        with self._lock:
            return sum(reader.bytes_read for (_, name), reader in self._open.items() if name == array)

    def forget(self, pack: str) -> None:
        """Close the arrays of a pack that is no longer there."""
        with self._lock:
            for key in [key for key in self._open if key[0] == pack]:
                del self._open[key]

    def _about(self, pack: str, array: str) -> ShardReader:
        try:
            return self._reader(pack, array)
        except Corrupt as error:
            raise Corrupt(f"pack {pack} is damaged: {array} cannot be read: {error}") from error

    def _reader(self, pack: str, array: str) -> ShardReader:
        key = pack, array
        with self._lock:
            reader = self._open.get(key)
            if reader is not None:
                self._open.move_to_end(key)
                return reader
        reader = self._opened(pack, array)
        with self._lock:
            self._open[key] = reader
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return reader

    def _opened(self, pack: str, array: str) -> ShardReader:
        """An array, which must be the one that its pack's record names; that costs no request of its own."""
        path = f"packs/{pack}/{array}"
        files = self._files_of(pack)
        if files is None:
            return ShardReader(self._storage, path, cache=self._chunks)
        document = files.get(f"{array}/zarr.json")
        if document is None:
            raise Corrupt(f"the record of the pack names no file {array}/zarr.json")
        shards = [file.size for name, file in files.items() if name.startswith(f"{array}/c/")]
        return ShardReader(
            self._storage,
            path,
            shard_size=shards[0] if len(shards) == 1 else None,
            sha256=document.sha256,
            cache=self._chunks,
        )


def _run(span: Span, job: Job) -> None:
    try:
        job.run()
    except Corrupt as error:
        raise _damaged(span, error) from error


def _damaged(span: Span, error: Corrupt) -> Corrupt:
    return Corrupt(f"pack {span.pack} is damaged: {span.array}[{span.start}:{span.stop}] cannot be read: {error}")
