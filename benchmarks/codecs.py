"""What chunks of routing cost: ratio and speed per codec, chunk size and cut of the layers; and a whole pack of them.

Real routing of a small model (128 experts, 8 layers, top 8) in the engine's order, with sorted ids, as uint16, and as
six of it side by side (48 layers); beside it uniform noise over 128 experts. Then tokens and logprobs of rollouts. MB
are those before compression.

    python -m benchmarks.codecs
"""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from benchmarks.corpora import Corpus
from benchmarks.measure import compare
from trajstore.archive.arrays.builder import CHUNK_BYTES, encode_array
from trajstore.archive.arrays.codecs import CODECS, codecs_for, decode, encode
from trajstore.archive.arrays.shard import ShardReader
from trajstore.archive.storage.local import LocalStorage

ROUTING = Path(__file__).parents[1] / "tests" / "data" / "routing" / "small_moe_e128_l8_k8.npy"
CHUNKS = tuple(kib << 10 for kib in (64, 128, 192, 256, 512, 1024, 1536))
COLUMN_CHUNK = 64 << 10
PACK_BYTES = 64 << 20
READS = (512, 1365, 4096)
"""Rows of one read, at 384 bytes each."""

Array = np.ndarray[Any, Any]


def samples() -> dict[str, Array]:
    """Routing of every kind, `[rows, layers, top_k]`."""
    real = np.load(ROUTING)
    part = len(real) // 6
    wide = np.concatenate([real[i * part : (i + 1) * part] for i in range(6)], axis=1)
    noise = np.random.default_rng(0).integers(0, 128, real.shape, np.uint8)
    return {
        "real": real,
        "sorted": np.sort(real, axis=-1),
        "uint16": real.astype(np.uint16),
        "sorted uint16": np.sort(real, axis=-1).astype(np.uint16),
        "48 layers": wide,
        "48 layers, sorted": np.sort(wide, axis=-1),
        "noise": noise,
    }


def columns() -> dict[str, Array]:
    """Tokens and logprobs of rollouts, `[rows, 1, 1]`."""
    rollouts = Corpus("real").take(PACK_BYTES)
    parts: dict[str, list[Array]] = {
        "tokens": [rollout.tokens for rollout in rollouts],
        "logprobs": [rollout.logprobs for rollout in rollouts],
    }
    return {name: np.concatenate(some)[:, None, None] for name, some in parts.items()}


def report_codec(name: str, data: Array, codec: str, chunk_bytes: int, layer_chunks: int) -> None:
    """Measure chunks of one size and print a line. Only whole chunks count."""
    layers = data.shape[1] // layer_chunks
    rows = chunk_bytes // (layers * data.shape[2] * data.itemsize)
    if rows > len(data):
        return
    chunks = [
        np.ascontiguousarray(data[row : row + rows, layer : layer + layers])
        for row in range(0, len(data) - rows + 1, rows)
        for layer in range(0, data.shape[1], layers)
    ]
    encoded = [encode(codec, chunk) for chunk in chunks]
    total = sum(chunk.nbytes for chunk in chunks)
    way = "zstd" if codec == "zstd" else "blosc"
    found = compare(
        lambda: [encode(codec, chunk) for chunk in chunks],
        lambda: [decode(way, data, chunks[0].nbytes) for data in encoded],
        repeats=3,
    )
    print(
        f"{name:18} {codec:10} chunks of {chunk_bytes >> 10:4} KiB, layers in {layer_chunks}: "
        f"ratio {sum(map(len, encoded)) / total:.3f}, {total / found.ours / 1e6:.0f} MB/s in, "
        f"{total / found.baseline / 1e6:.0f} MB/s out"
    )


def report_pack(name: str, rows: Array, folder: Path) -> None:
    """Write 64 MB with fsync: ours against zarr-python and against a file of zstd frames; then read rows of it."""
    data = np.tile(rows, (-(-PACK_BYTES // rows.nbytes), 1, 1))[: PACK_BYTES // rows[0].nbytes]
    step = CHUNK_BYTES // data[0].nbytes
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def ours() -> None:
            for file, content in encode_array(data, codec="zstd", threads=pool).files.items():
                write(folder / "ours" / file, [content])

        def by_zarr() -> None:
            array = zarr.create_array(
                folder / "zarr",
                shape=data.shape,
                dtype=data.dtype,
                chunks=(step, *data.shape[1:]),
                shards=(-(-len(data) // step) * step, *data.shape[1:]),
                compressors=ZstdCodec(level=3, checksum=True),
                config={"write_empty_chunks": True},
                overwrite=True,
            )
            array[...] = data
            for path in (folder / "zarr").rglob("*"):
                if path.is_file():
                    sync(path)

        def frames() -> None:
            write(
                folder / "frames", pool.map(lambda at: encode("zstd", data[at : at + step]), range(0, len(data), step))
            )

        for other, way in (("zarr-python", by_zarr), ("zstd frames in threads", frames)):
            report(f"{name}: write and fsync {data.nbytes >> 20} MiB", ours, other, way, data.nbytes)
    array = ShardReader(LocalStorage(folder), "ours")
    theirs = zarr.open_array(folder / "zarr", mode="r")
    for count in READS:
        start = len(data) // 3
        wanted = data[start : start + count]
        write(folder / "frame", [encode("zstd", wanted)])

        def ours_read(start: int = start, count: int = count) -> Array:
            return array.read(start, start + count)

        def zarr_read(start: int = start, count: int = count) -> object:
            return theirs[start : start + count]

        def frame_read(nbytes: int = wanted.nbytes) -> bytes:
            return bytes(decode("zstd", (folder / "frame").read_bytes(), nbytes))

        for other, read in (("zarr-python", zarr_read), ("a zstd frame of just these rows", frame_read)):
            report(f"{name}: read {count} rows, {wanted.nbytes >> 10} KiB", ours_read, other, read, wanted.nbytes)


def report(what: str, ours: Callable[[], object], other: str, way: Callable[[], object], nbytes: int) -> None:
    """Compare and print a line."""
    found = compare(ours, way, repeats=7)
    print(
        f"{what}: {nbytes / found.ours / 1e6:.0f} MB/s, {other} {nbytes / found.baseline / 1e6:.0f} MB/s, "
        f"ratio {found.ratio:.2f}"
    )


def write(path: Path, parts: Any) -> None:
    """Write a file durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(parts)
    sync(path)


def sync(path: Path) -> None:
    """Fsync a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    """Print a line per kind of routing, codec and chunk size; then whole packs."""
    kinds = samples()
    for name, data in kinds.items():
        for codec in codecs_for(np.dtype("<u2")):
            for chunk_bytes in CHUNKS:
                report_codec(name, data, codec, chunk_bytes, 1)
    for name, data in columns().items():
        for codec in CODECS:
            report_codec(name, data, codec, COLUMN_CHUNK, 1)
    for name in ("48 layers", "48 layers, sorted"):
        for layer_chunks in (2, 4):
            for chunk_bytes in CHUNKS:
                report_codec(name, kinds[name], "zstd", chunk_bytes, layer_chunks)
    wide_noise = np.random.default_rng(0).integers(0, 128, kinds["48 layers"].shape, np.uint8)
    for name, rows in (("48 layers", kinds["48 layers"]), ("noise", wide_noise)):
        with tempfile.TemporaryDirectory() as folder:
            report_pack(name, rows, Path(folder))


if __name__ == "__main__":
    main()
