"""CRC-32 of payloads: the one of zlib, computed by the fastest library that is here.

Reading 1.5 MB from the hot log takes about twice as long with zlib's as with isal's (benchmarks/hotpath.py).
"""

try:
    from isal.isal_zlib import crc32
except ImportError:  # there is no wheel for every platform
    from zlib import crc32

__all__ = ["crc32"]
