"""Archived arrays that promise far more than they should, read in a process that may not have so much memory.

    python -m tests.security.bombs FOLDER

prints a JSON object: what each reading came to.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import zstandard
from numcodecs import Blosc

import trajstore
from trajstore.archive.arrays.shard import ShardReader
from trajstore.archive.storage.local import LocalStorage

MIB = 1 << 20
GIB = 1 << 30

ROOM = 2 * GIB
"""That reading may ask for beside what is there already: a test that fails must not take the machine with it."""


def crc32c(data: bytes) -> bytes:
    """As Zarr's codec writes it."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def zstd(size: int, *, tells_size: bool) -> bytes:
    """A frame of so many zeros."""
    into = zstandard.ZstdCompressor(write_checksum=True).compressobj(size=size if tells_size else -1)
    return b"".join([*(into.compress(bytes(MIB)) for _ in range(size // MIB)), into.flush()])


def blosc(size: int) -> bytes:
    """A Blosc chunk that says to hold so many bytes, with its checksum."""
    encoded = bytearray(Blosc(cname="zstd").encode(bytes(MIB)))
    encoded[4:8] = size.to_bytes(4, "little")
    return bytes(encoded) + crc32c(bytes(encoded))


def array(
    folder: Path, chunk: bytes, *, rows: int, chunk_rows: int, count: int = 1, codec: str = "zstd"
) -> ShardReader:
    """An array whose `count` chunks are all the same bytes of its shard."""
    chain = [{"name": "zstd", "configuration": {"level": 3, "checksum": True}}]
    if codec == "blosc":
        settings = {"typesize": 1, "cname": "zstd", "clevel": 3, "shuffle": "shuffle", "blocksize": 0}
        chain = [{"name": "blosc", "configuration": settings}, {"name": "crc32c"}]
    inner = {
        "chunk_shape": [chunk_rows],
        "codecs": [{"name": "bytes"}, *chain],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    sharded = [{"name": "sharding_indexed", "configuration": inner}]
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [-(-rows // chunk_rows) * chunk_rows]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": inner["codecs"] if codec == "foreign" else sharded,
    }
    index = np.array([[0, len(chunk)]] * count, "<u8").tobytes()
    (folder / "a" / "c").mkdir(parents=True)
    (folder / "a" / "zarr.json").write_bytes(msgspec.json.encode(document))
    (folder / "a" / "c" / "0").write_bytes(chunk if codec == "foreign" else chunk + index + crc32c(index))
    return ShardReader(LocalStorage(folder), "a")


BOMBS: dict[str, Callable[[Path], Any]] = {
    "one chunk of 512 MiB, and it holds them": lambda folder: array(
        folder, zstd(512 * MIB, tells_size=True), rows=512 * MIB, chunk_rows=512 * MIB
    ),
    "a chunk of 512 MiB where 1 MiB should be": lambda folder: array(
        folder, zstd(512 * MIB, tells_size=True), rows=MIB, chunk_rows=MIB
    ),
    "the same, and does not say so": lambda folder: array(
        folder, zstd(512 * MIB, tells_size=False), rows=MIB, chunk_rows=MIB
    ),
    "512 frames where one should be": lambda folder: array(
        folder, zstd(MIB, tells_size=True) * 512, rows=MIB, chunk_rows=MIB
    ),
    "Blosc of 3 GiB where 1 MiB should be": lambda folder: array(
        folder, blosc(3 * GIB), rows=MIB, chunk_rows=MIB, codec="blosc"
    ),
    "one chunk of 10 GiB": lambda folder: array(folder, zstd(MIB, tells_size=True), rows=10 * GIB, chunk_rows=10 * GIB),
    "10 GiB of rows, and an index of one chunk": lambda folder: array(
        folder, zstd(MIB, tells_size=True), rows=10 * GIB, chunk_rows=MIB
    ),
    "10240 chunks that are the same bytes": lambda folder: array(
        folder, zstd(MIB, tells_size=True), rows=10 * GIB, chunk_rows=MIB, count=10240
    ),
    "2^62 rows": lambda folder: array(folder, zstd(MIB, tells_size=True), rows=1 << 62, chunk_rows=1),
    "one chunk of 10 GiB in an array that is not laid out as ours": lambda folder: array(
        folder, zstd(MIB, tells_size=True), rows=10 * GIB, chunk_rows=10 * GIB, codec="foreign"
    ),
}


def outcomes(folder: Path) -> dict[str, Any]:
    """Error, by name, that reading all rows of each raises; and by how many bytes that has made the process grow."""
    found: dict[str, Any] = {}
    for number, (name, make) in enumerate(BOMBS.items()):
        made = folder / str(number)
        try:
            before = peak()
            reader = make(made)
            before = max(before, peak())  # making it took some, too
            reader.read(0, reader.shape[0])
            what = "read"
        except (trajstore.TrajstoreError, MemoryError, ArithmeticError, LookupError, RuntimeError) as error:
            what = type(error).__name__
        found[name] = [what, peak() - before]
    return found


def peak() -> int:
    """The most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    json.dump(outcomes(Path(sys.argv[1])), sys.stdout)
