"""The checksum of payloads is zlib's, whichever library computes it: what one writes, every other reads."""

import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajstore.crc import crc32


@given(st.binary(max_size=300), st.integers(1, 40), st.integers(0, 15), st.integers(0, (1 << 32) - 1))
def test_it_is_that_of_zlib_at_any_length_and_place_and_from_any_start(data, times, shift, start):
    part = memoryview(data * times)[shift:]
    assert crc32(part) == zlib.crc32(part)
    assert crc32(part, start) == zlib.crc32(part, start)


@given(st.binary(max_size=5000), st.lists(st.integers(0, 5000), max_size=5))
def test_pieces_one_after_the_other_give_that_of_the_whole(data, cuts):
    crc, at = 0, 0
    for cut in [*sorted(cuts), len(data)]:
        crc, at = crc32(data[at:cut], crc), max(at, cut)
    assert crc == zlib.crc32(data)


def test_it_is_not_zlib_that_computes_it_where_isal_is_installed():
    assert crc32 is pytest.importorskip("isal.isal_zlib").crc32


def test_zlib_computes_it_where_isal_is_missing():
    program = (
        "import sys, zlib; sys.modules['isal'] = sys.modules['isal.isal_zlib'] = None\n"
        "import trajstore; from trajstore.crc import crc32; from trajstore.events import PayloadInfo\n"
        "assert crc32 is zlib.crc32; print(PayloadInfo.of(b'123456789').crc)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) == 0xCBF43926, "the check value of CRC-32"
