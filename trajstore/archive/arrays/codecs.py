"""How one chunk is compressed and found damaged: the codec chains that stand behind `bytes` in a pack's arrays.

    zstd         zstd(level 3, checksum)
    shuffle      blosc(zstd, clevel 3, shuffle) → crc32c
    bitshuffle   blosc(zstd, clevel 3, bitshuffle) → crc32c

Each ends in a checksum: without one, a flipped byte is silent, and Blosc has none of its own. All are codecs that
zarr-python, zarrs and tensorstore read. Which is smallest depends on the dtype (`benchmarks/codecs.py`): a byte of
routing has nothing to shuffle, and bitshuffle doubles it; wider dtypes are tried.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import google_crc32c
import numcodecs.blosc  # type: ignore[import-untyped]
import numpy as np
from numcodecs import Blosc, Zstd

from trajstore.entries import Buffer

__all__ = ["CODECS", "chain_of", "codecs_for", "crc32c", "decode", "encode", "is_checked"]

Chain: TypeAlias = list[dict[str, Any]]
"""Codecs as `zarr.json` names them."""

CODECS = ("zstd", "shuffle", "bitshuffle")
"""Names under which a pack records its choice."""

_LEVEL = 3

numcodecs.blosc.use_threads = False  # as zarr sets it: Blosc's own threads do not survive a fork

_ENCODERS = {
    "zstd": Zstd(level=_LEVEL, checksum=True),
    "shuffle": Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.SHUFFLE),
    "bitshuffle": Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.BITSHUFFLE),
}


def codecs_for(dtype: np.dtype[Any]) -> Sequence[str]:
    """Which codecs are worth a trial."""
    return CODECS[:1] if dtype.itemsize == 1 else CODECS


def chain_of(codec: str, dtype: np.dtype[Any]) -> Chain:
    """The codec of a dtype in the words of Zarr v3, without `bytes` in front."""
    if codec == "zstd":
        return [{"name": "zstd", "configuration": {"level": _LEVEL, "checksum": True}}]
    blosc = {"typesize": dtype.itemsize, "cname": "zstd", "clevel": _LEVEL, "shuffle": codec, "blocksize": 0}
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
    data: bytes = _ENCODERS[codec].encode(chunk)
    return data if codec == "zstd" else data + crc32c(data)


def decode(name: str, data: Buffer, nbytes: int) -> bytes:
    """Decompress a chunk by the first codec of its chain, "zstd" or "blosc". Releases the GIL.

    Raises:
        ValueError: the data is damaged, or holds another number of bytes than `nbytes`.
    """
    encoded = np.frombuffer(data, np.uint8)
    if name == "blosc":
        encoded, stored = encoded[:-4], encoded[-4:].tobytes()
        if crc32c(encoded) != stored:
            raise ValueError("its checksum does not match")
    try:
        chunk: bytes = _ENCODERS["zstd" if name == "zstd" else "shuffle"].decode(encoded)
    except (RuntimeError, MemoryError) as error:  # a damaged length may ask for any amount of memory
        raise ValueError(f"it cannot be decompressed: {error}") from error
    if len(chunk) != nbytes:
        raise ValueError(f"it holds {len(chunk)} bytes instead of {nbytes}")
    return chunk


def crc32c(data: bytes | np.ndarray[Any, Any]) -> bytes:
    """The four bytes that Zarr's `crc32c` puts behind its data."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")
