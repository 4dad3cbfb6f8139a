"""How one chunk is compressed and found damaged: the codec chains that stand behind `bytes` in a pack's arrays.

    zstd            zstd(level 3, checksum)
    shuffle         blosc(zstd, clevel 3, shuffle) → crc32c
    bitshuffle      blosc(zstd, clevel 3, bitshuffle) → crc32c
    shuffle-quick   blosc(zstd, clevel 1, shuffle) → crc32c
    shuffle-lz4     blosc(lz4, clevel 5, shuffle) → crc32c

Each ends in a checksum: without one, a flipped byte is silent, and Blosc has none of its own. All are codecs that
zarr-python, zarrs and tensorstore read. Which is smallest depends on the dtype (`benchmarks/codecs.py`): a byte of
routing has nothing to shuffle, and bitshuffle doubles it; wider dtypes are tried. The last two are for tokens and
logprobs: "shuffle" takes two to ten times as long to write, and saves 0.3 bytes per token.
"""

import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import google_crc32c
import numcodecs.blosc  # type: ignore[import-untyped]
import numpy as np
import zstandard
from numcodecs import Blosc, Zstd

from trajstore.entries import Buffer

__all__ = ["CODECS", "chain_of", "codecs_for", "crc32c", "decode", "decode_into", "encode", "is_checked"]

Chain: TypeAlias = list[dict[str, Any]]
"""Codecs as `zarr.json` names them."""

_LEVEL = 3

numcodecs.blosc.use_threads = False  # as zarr sets it: Blosc's own threads do not survive a fork

_ENCODERS = {
    "zstd": Zstd(level=_LEVEL, checksum=True),
    "shuffle": Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.SHUFFLE),
    "bitshuffle": Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.BITSHUFFLE),
    "shuffle-quick": Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE),
    "shuffle-lz4": Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE),
}

CODECS = tuple(_ENCODERS)
"""Names under which a pack records its choice."""

_TRIED = ("zstd", "shuffle", "bitshuffle")

_OF_THREAD = threading.local()


def codecs_for(dtype: np.dtype[Any]) -> Sequence[str]:
    """Which codecs are worth a trial."""
    return _TRIED[:1] if dtype.itemsize == 1 else _TRIED


def chain_of(codec: str, dtype: np.dtype[Any]) -> Chain:
    """The codec of a dtype in the words of Zarr v3, without `bytes` in front."""
    if codec == "zstd":
        return [{"name": "zstd", "configuration": {"level": _LEVEL, "checksum": True}}]
    encoder = _ENCODERS[codec]
    blosc = {
        "typesize": dtype.itemsize,
        "cname": encoder.cname,
        "clevel": encoder.clevel,
        "shuffle": "bitshuffle" if encoder.shuffle == Blosc.BITSHUFFLE else "shuffle",
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]


def is_checked(chain: Chain) -> bool:
    """Whether `decode` reads this chain, whoever wrote it. One that ends in no checksum is none of ours."""
    match chain:
        case [{"name": "zstd", "configuration": {"checksum": True}}]:
            return True
        case [{"name": "blosc"}, {"name": "crc32c"}]:
            return True
    return False


def encode(codec: str, chunk: np.ndarray[Any, Any]) -> bytes:
    """Compress a C-contiguous chunk. Releases the GIL."""
    if codec == "zstd":
        return _compressor().compress(chunk.reshape(-1).view(np.uint8).data)
    data: bytes = _ENCODERS[codec].encode(chunk)
    return data + crc32c(data)


def _compressor() -> zstandard.ZstdCompressor:
    """Of this thread. Kept, for a new context takes a sixth of the time of a chunk; and none may be shared."""
    found: zstandard.ZstdCompressor | None = getattr(_OF_THREAD, "compressor", None)
    if found is None:
        found = _OF_THREAD.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    return found


def decode(name: str, data: Buffer, nbytes: int) -> memoryview:
    """Decompress a chunk by the first codec of its chain, "zstd" or "blosc". Releases the GIL.

    No more than `nbytes` are ever written or allocated, whatever the data holds.

    Raises:
        ValueError: the data is damaged, or holds another number of bytes than `nbytes`.
    """
    chunk = np.empty(nbytes, np.uint8)
    decode_into(name, data, chunk)
    return chunk.data


def decode_into(name: str, data: Buffer, out: np.ndarray[Any, Any]) -> None:
    """Decompress a chunk to where it is wanted, a C-contiguous array of exactly its size. Otherwise as `decode`."""
    encoded = np.frombuffer(data, np.uint8)
    if name == "blosc":
        encoded, stored = encoded[:-4], encoded[-4:].tobytes()
        if crc32c(encoded) != stored:
            raise ValueError("its checksum does not match")
        size: int | None = int.from_bytes(encoded[4:8].tobytes(), "little")  # of Blosc's header
    else:
        size = _content_size(data)
    if size not in (None, out.nbytes):
        raise ValueError(f"it holds {size} bytes instead of {out.nbytes}")
    try:
        if size is None:
            flat = out.reshape(-1).view(np.uint8)
            flat[:] = np.frombuffer(_decompressor().decompress(encoded.data, max_output_size=out.nbytes), np.uint8)
        else:
            _ENCODERS["zstd" if name == "zstd" else "shuffle"].decode(encoded, out)
    except (RuntimeError, MemoryError, zstandard.ZstdError) as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error


def _decompressor() -> zstandard.ZstdDecompressor:
    """As `_compressor`."""
    found: zstandard.ZstdDecompressor | None = getattr(_OF_THREAD, "decompressor", None)
    if found is None:
        found = _OF_THREAD.decompressor = zstandard.ZstdDecompressor()
    return found


def _content_size(frame: Buffer) -> int | None:
    """Bytes that a Zstandard frame says to hold, None where it does not say.

    Source: https://datatracker.ietf.org/doc/html/rfc8878#name-frame-header
    """
    head = bytes(frame[4:18])
    if not head:
        return None
    flags, is_single = head[0] >> 6, head[0] >> 5 & 1
    width = (is_single, 2, 4, 8)[flags]
    at = 2 - is_single + (0, 1, 2, 4)[head[0] & 3]
    return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0) if width else None


def crc32c(data: bytes | np.ndarray[Any, Any]) -> bytes:
    """The four bytes that Zarr's `crc32c` puts behind its data."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")
