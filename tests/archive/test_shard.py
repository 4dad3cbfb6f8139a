"""One array as one shard: others read what we write, we read what others write, and no damage passes for data."""

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from trajstore.archive.arrays.builder import EncodedArray, encode_array, layer_chunks_for
from trajstore.archive.arrays.chunk_cache import ChunkCache
from trajstore.archive.arrays.codecs import CODECS, codecs_for, crc32c, encode
from trajstore.archive.arrays.shard import ShardReader
from trajstore.archive.storage.local import LocalStorage, open_storage
from trajstore.errors import Corrupt, SchemaError

DTYPES = ("uint8", "uint16", "int32", "float32")
CHECKED = ZstdCodec(level=3, checksum=True)
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}


def rows_like(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype.startswith("float"):
        data = -rng.exponential(size=shape).astype(dtype)
        data[rng.random(shape) < 0.2] = np.nan
        return data
    return rng.integers(0, 128, shape).astype(dtype)


def put(folder: Path, encoded: EncodedArray) -> Path:
    for name, data in encoded.files.items():
        path = folder / "array" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "array"


def reader(folder: Path, **options: object) -> ShardReader:
    return ShardReader(LocalStorage(folder), "array", **options)


def shard_of(folder: Path) -> Path:
    return next(path for path in (folder / "array" / "c").rglob("*") if path.is_file())


def forget_checksums(folder: Path) -> None:
    """Let the array be one of a version that wrote no checksums of chunks."""
    path = folder / "array" / "zarr.json"
    document = json.loads(path.read_bytes())
    del document["attributes"]["chunk_checksums"]
    path.write_text(json.dumps(document))


each_codec = pytest.mark.parametrize("codec", CODECS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_shape = pytest.mark.parametrize("shape", [(1000, 7, 4), (5000,), (3, 9), (1, 2, 2), (0, 2, 2), (0,)], ids=str)


@each_codec
@each_dtype
@each_shape
def test_zarr_python_reads_what_we_write(tmp_path, codec, dtype, shape):
    data = rows_like(dtype, shape)
    path = put(tmp_path, encode_array(data, chunk_bytes=2000, layer_chunks=3, codec=codec))
    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[...], data)


@each_codec
@each_dtype
@each_shape
def test_zarrs_reads_what_we_write(tmp_path, codec, dtype, shape):
    data = rows_like(dtype, shape)
    path = put(tmp_path, encode_array(data, chunk_bytes=2000, layer_chunks=3, codec=codec))
    with zarr.config.set(ZARRS):
        array = zarr.open_array(path, mode="r")
        np.testing.assert_array_equal(array[...], data)
        np.testing.assert_array_equal(array[len(data) // 3 : len(data) // 2], data[len(data) // 3 : len(data) // 2])


@each_codec
@each_dtype
@each_shape
def test_tensorstore_reads_what_we_write(tmp_path, codec, dtype, shape):
    data = rows_like(dtype, shape)
    path = put(tmp_path, encode_array(data, chunk_bytes=2000, layer_chunks=3, codec=codec))
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, open=True, read=True
    ).result()
    np.testing.assert_array_equal(array.read().result(), data)


@given(
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from([None, *CODECS]),
    shape=st.lists(st.integers(1, 9), max_size=2).flatmap(
        lambda rest: st.tuples(st.integers(0, 300), *map(st.just, rest))
    ),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    chunk_bytes=st.integers(1, 3000),
    layer_chunks=st.integers(1, 5),
    slices=st.lists(st.tuples(*[st.integers(0, 300)] * 4), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_any_rows_and_layers_of_any_array_come_back(dtype, codec, shape, cuts, chunk_bytes, layer_chunks, slices):
    data = rows_like(dtype, shape)
    parts = np.split(data, sorted(cut % (len(data) + 1) for cut in cuts))
    encoded = encode_array(parts, chunk_bytes=chunk_bytes, layer_chunks=layer_chunks, codec=codec)
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), encoded)
        np.testing.assert_array_equal(zarr.open_array(path, mode="r")[...], data)
        array = reader(Path(folder))
        assert (array.shape, array.dtype) == (data.shape, data.dtype)
        for a, b, c, d in slices:
            start, stop = sorted((a % (len(data) + 1), b % (len(data) + 1)))
            np.testing.assert_array_equal(array.read(start, stop), data[start:stop])
            if data.ndim > 1:
                first, last = sorted((c % (shape[1] + 1), d % (shape[1] + 1)))
                found = array.read(start, stop, slice(first, last))
                np.testing.assert_array_equal(found, data[start:stop, first:last])
                assert found.flags.owndata


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("layers", [7, 4], ids=["one group", "two groups"])
@pytest.mark.parametrize(
    "compressors",
    [ZstdCodec(level=5, checksum=True), [BloscCodec(cname="lz4", clevel=1), Crc32cCodec()]],
    ids=["zstd", "blosc"],
)
def test_shards_of_zarr_python_are_decoded_directly(tmp_path, dtype, layers, compressors):
    data = rows_like(dtype, (1000, 7, 4))
    array = zarr.create_array(
        tmp_path / "array",
        shape=data.shape,
        dtype=dtype,
        chunks=(300, layers, 4),
        shards=(1200, -(-7 // layers) * layers, 4),
        compressors=compressors,
        config={"write_empty_chunks": True},
    )
    array[...] = data
    ours = reader(tmp_path)
    np.testing.assert_array_equal(ours.read(0, 1000), data)
    np.testing.assert_array_equal(ours.read(299, 601, slice(3, 6)), data[299:601, 3:6])
    assert ours.bytes_read > 0


@pytest.mark.parametrize(
    "layout",
    [
        {"chunks": (300, 7, 4), "compressors": CHECKED},
        {"chunks": (300, 7, 4), "shards": (600, 7, 4), "compressors": CHECKED},
        {"chunks": (300, 7, 4), "shards": (1500, 7, 4), "compressors": CHECKED},
        {"chunks": (300, 7, 2), "shards": (1200, 7, 4), "compressors": CHECKED},
        {"chunks": (300, 7, 2), "shards": (1200, 7, 2), "compressors": CHECKED},
        {"chunks": (300, 7, 4), "shards": (1200, 7, 4), "compressors": GzipCodec()},
        {"chunks": (300, 7, 4), "shards": (1200, 7, 4), "compressors": ZstdCodec(level=3)},
        {
            "chunks": (300, 7, 4),
            "shards": {"shape": (1200, 7, 4), "index_location": "start"},
            "compressors": CHECKED,
        },
        {
            "chunks": (300, 7, 4),
            "shards": (1200, 7, 4),
            "compressors": CHECKED,
            "serializer": BytesCodec(endian="big"),
        },
    ],
    ids=[
        "unsharded",
        "shards",
        "roomy shard",
        "cut experts",
        "cut apart",
        "gzip",
        "no checksum",
        "index first",
        "big-endian",
    ],
)
def test_other_layouts_are_read_through_zarr_python(tmp_path, layout):
    data = rows_like("uint16", (1000, 7, 4))
    array = zarr.create_array(tmp_path / "array", shape=data.shape, dtype="uint16", **layout)
    array[...] = data
    ours = reader(tmp_path)
    np.testing.assert_array_equal(ours.read(299, 601, slice(3, 6)), data[299:601, 3:6])
    assert ours.bytes_read == 0
    shard_of(tmp_path).unlink()
    with pytest.raises(Corrupt, match=r"array in .*missing"):
        reader(tmp_path)


def test_a_pipeline_that_the_user_chose_reads_local_arrays(tmp_path):
    data = rows_like("uint8", (1000, 16, 8))
    put(tmp_path, encode_array(data, chunk_bytes=4000, layer_chunks=2))
    with zarr.config.set(ZARRS):
        theirs = reader(tmp_path)
        np.testing.assert_array_equal(theirs.read(100, 900, slice(3, 12)), data[100:900, 3:12])
    ours = reader(tmp_path)
    ours.read(100, 900)
    assert theirs.bytes_read < ours.bytes_read / 4  # the index only


def test_a_missing_chunk_is_not_read_as_zeros_by_any_pipeline(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (1000, 16, 8)), chunk_bytes=4000))
    rewrite_index(shard_of(tmp_path), lambda index: index.__setitem__(3, 2**64 - 1))
    for settings_ in ({}, ZARRS):
        with zarr.config.set(settings_), pytest.raises(Corrupt, match=r"array array in .*chunk 3 of .*missing"):
            reader(tmp_path).read(0, 1000)


def rewrite_index(path: Path, change) -> None:
    """Change a shard's index, with a right checksum over it."""
    data = path.read_bytes()
    document = json.loads((path.parents[3] / "zarr.json").read_text())
    outer = document["chunk_grid"]["configuration"]["chunk_shape"]
    inner = document["codecs"][0]["configuration"]["chunk_shape"]
    chunks = int(np.prod([a // b for a, b in zip(outer, inner, strict=True)]))
    index = np.frombuffer(data[-4 - 16 * chunks : -4], "<u8").reshape(-1, 2).copy()
    change(index)
    path.write_bytes(data[: -4 - 16 * chunks] + index.tobytes() + crc32c(index.tobytes()))


def harmless_flips(folder: Path, file: Path, data: np.ndarray) -> list[int]:
    """Flips every bit of a file in turn: positions where no error came. The rows were right then, or this fails."""
    good = file.read_bytes()
    found = []
    for at, bit in product(range(len(good)), range(8)):
        bad = bytearray(good)
        bad[at] ^= 1 << bit
        file.write_bytes(bad)
        with contextlib.suppress(Corrupt):
            np.testing.assert_array_equal(reader(folder).read(0, len(data)), data)
            found.append(at)
    file.write_bytes(good)
    return found


@each_codec
def test_no_flipped_bit_in_a_shard_passes_for_data(tmp_path, codec):
    data = rows_like("uint16", (40, 2, 2))
    put(tmp_path, encode_array(data, chunk_bytes=80, layer_chunks=2, codec=codec))
    shard = shard_of(tmp_path)
    size = shard.stat().st_size
    harmless = harmless_flips(tmp_path, shard, data)
    if codec == "zstd":  # a frame has some bits of no meaning; the checksum is over what comes out
        assert len(harmless) < 0.03 * 8 * size
        assert all(at < size - 4 * 16 - 4 for at in harmless)
    else:
        assert not harmless


def test_no_flipped_bit_in_zarr_json_passes_for_data(tmp_path):
    data = rows_like("uint16", (41, 2, 2))
    path = put(tmp_path, encode_array(data, chunk_bytes=160, layer_chunks=2)) / "zarr.json"
    text = path.read_bytes()
    harmless = harmless_flips(tmp_path, path, data)
    meaning = [at for at in harmless if not text[at : at + 1].isspace()]
    assert all(text.rindex(b"attributes") - 1 <= at for at in meaning), [text[at : at + 9] for at in meaning]


@each_codec
def test_a_shard_cut_off_anywhere_is_corrupt(tmp_path, codec):
    data = rows_like("uint16", (40, 2, 2))
    put(tmp_path, encode_array(data, chunk_bytes=160, codec=codec))
    shard = shard_of(tmp_path)
    good = shard.read_bytes()
    for length in range(len(good)):
        shard.write_bytes(good[:length])
        with pytest.raises(Corrupt, match="array array in"):
            reader(tmp_path).read(0, 40)
        with pytest.raises(Corrupt, match="array array in"):
            reader(tmp_path, shard_size=len(good)).read(0, 40)


def test_a_shard_of_another_size_than_known_is_corrupt(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4))))
    size = shard_of(tmp_path).stat().st_size
    for wrong in (size - 1, size + 1):
        with pytest.raises(Corrupt, match=f"array array in .* it has {size} bytes, not the {wrong} that were written"):
            reader(tmp_path, shard_size=wrong).read(0, 10)


def test_a_shard_of_another_array_is_corrupt_though_all_its_checksums_are_right(tmp_path):
    some, other = np.random.default_rng(0).integers(0, 256, (2, 1000, 4, 4), np.uint8)
    put(tmp_path, encode_array(other, chunk_bytes=4000))
    shard = shard_of(tmp_path).read_bytes()
    put(tmp_path, encode_array(some, chunk_bytes=4000))
    assert shard_of(tmp_path).stat().st_size == len(shard)
    shard_of(tmp_path).write_bytes(shard)
    for at in (0, 990):
        with pytest.raises(Corrupt, match=f"chunk {at // 250} of .* its checksum is not the one in zarr.json"):
            reader(tmp_path).read(at, at + 1)
    forget_checksums(tmp_path)
    np.testing.assert_array_equal(reader(tmp_path).read(0, 1000), other)


@pytest.mark.parametrize("text", ["", "00" * 3, "00" * 8, "zz" * 4])
def test_checksums_that_cannot_be_are_corrupt(tmp_path, text):
    path = put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4)))) / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["chunk_checksums"] = text
    path.write_text(json.dumps(document))
    with pytest.raises(Corrupt, match=r"array array in .* does not tell the checksums of its chunks"):
        reader(tmp_path)


def test_a_document_of_another_digest_than_known_is_corrupt(tmp_path):
    """Another array's has a right `crc32`, too."""
    document = put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4)))) / "zarr.json"
    known = hashlib.sha256(document.read_bytes()).hexdigest()
    reader(tmp_path, sha256=known).read(0, 10)
    put(tmp_path, encode_array(rows_like("uint8", (11, 4, 4))))
    reader(tmp_path).read(0, 10)
    with pytest.raises(Corrupt, match=r"array array in .* its zarr\.json is not the one that was written"):
        reader(tmp_path, sha256=known)


def test_a_shard_cut_off_after_its_index_was_read_is_corrupt(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (1000, 4, 4)), chunk_bytes=4000))
    array = reader(tmp_path)
    array.read(0, 10)
    shard_of(tmp_path).write_bytes(shard_of(tmp_path).read_bytes()[:5000])
    with pytest.raises(Corrupt, match=r"chunk 3 of .*\(rows 750 to 1000\).*file ends"):
        array.read(800, 801)


@pytest.mark.parametrize("name", ["zarr.json", "c/0/0/0"])
def test_a_missing_file_is_corrupt_and_named(tmp_path, name):
    put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4))))
    (tmp_path / "array" / name).unlink()
    with pytest.raises(Corrupt, match=f"file array/{name} is missing"):
        reader(tmp_path).read(0, 10)


def test_a_whole_chunk_of_another_length_is_corrupt(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (100, 4, 4)), chunk_bytes=800))
    shard = shard_of(tmp_path)
    forget_checksums(tmp_path)
    foreign = encode("zstd", np.zeros(801, np.uint8))
    data = shard.read_bytes()
    shard.write_bytes(foreign + data)
    rewrite_index(shard, lambda index: index.__setitem__(1, (0, len(foreign))))
    with pytest.raises(Corrupt, match=r"chunk 1 .*801 bytes instead of 800"):
        reader(tmp_path).read(60, 61)


def test_an_index_that_points_outside_is_corrupt(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (100, 4, 4)), chunk_bytes=800))
    for entry in ((2**63, 2**63), (10**9, 10), (0, 10**9)):
        rewrite_index(shard_of(tmp_path), lambda index, entry=entry: index.__setitem__(1, entry))
        with pytest.raises(Corrupt, match=r"chunk 1 .*outside"):
            reader(tmp_path).read(0, 1)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"zarr_format": 3}', b"\xff\xfe", b'{"zarr_format":3,"node_type":"array"}']
)
def test_a_zarr_json_that_is_none_is_corrupt(tmp_path, text):
    put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4))))
    (tmp_path / "array" / "zarr.json").write_bytes(text)
    with pytest.raises(Corrupt, match="array array in"):
        reader(tmp_path)


def test_rows_that_the_array_does_not_hold_are_corrupt(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4))))
    for start, stop in ((0, 11), (-1, 3), (5, 4), (11, 11)):
        with pytest.raises(Corrupt, match="holds 10 rows"):
            reader(tmp_path).read(start, stop)


def test_layers_are_one_run_of_an_array_that_has_layers(tmp_path):
    put(tmp_path, encode_array(rows_like("uint8", (10, 4, 4))))
    with pytest.raises(SchemaError, match="layers"):
        reader(tmp_path).read(0, 10, slice(0, 4, 2))
    put(tmp_path / "flat", encode_array(rows_like("uint8", (10,))))
    with pytest.raises(SchemaError, match="layers"):
        reader(tmp_path / "flat").read(0, 10, slice(0, 1))


@pytest.mark.parametrize("dtype", [">i4", "complex64", "bool", "float16", "S3"])
def test_only_plain_little_endian_numbers_are_archived(dtype):
    with pytest.raises(SchemaError, match="not archived"):
        encode_array(np.zeros(3, dtype))


def test_parts_of_different_rows_are_refused():
    for other in (np.zeros((3, 2, 2), np.uint16), np.zeros((3, 2, 3), np.uint8)):
        with pytest.raises(SchemaError, match="do not fit"):
            encode_array([np.zeros((3, 2, 2), np.uint8), other])


def test_a_stage_reads_only_its_layers(tmp_path):
    data = rows_like("uint8", (4000, 48, 8))
    assert layer_chunks_for(48) == 4
    put(tmp_path, encode_array(data, chunk_bytes=1 << 16, layer_chunks=layer_chunks_for(48)))
    array = reader(tmp_path)
    array.read(0, 0)
    array.read(0, 1)
    before = array.bytes_read
    np.testing.assert_array_equal(array.read(0, 4000, slice(12, 24)), data[:, 12:24])
    assert array.bytes_read - before < shard_of(tmp_path).stat().st_size * 0.27


def test_one_row_reads_one_chunk_and_the_index_once(tmp_path):
    data = rows_like("uint8", (100_000, 8))
    put(tmp_path, encode_array(data, chunk_bytes=1 << 14))
    size = shard_of(tmp_path).stat().st_size
    array = reader(tmp_path, shard_size=size)
    array.read(50_000, 50_001)
    first = array.bytes_read
    array.read(50_000, 50_001)
    assert 0 < array.bytes_read - first < first < size / 25


def test_bytes_need_no_trial_and_wider_numbers_take_what_is_smallest():
    routed = rows_like("uint8", (4000, 4, 4))
    assert encode_array(routed).codec == "zstd"
    wide = routed.astype(np.uint16)
    wide += 256 * (wide % 2)
    for data in (wide, np.arange(30_000, dtype=np.int32), rows_like("float32", (9000,)), np.zeros(9000, np.int32)):
        sizes = {
            codec: len(encode_array(data, codec=codec).files[shard_name(data)]) for codec in codecs_for(data.dtype)
        }
        encoded = encode_array(data)
        assert len(encoded.files[shard_name(data)]) == min(sizes.values()), sizes
        assert sizes[encoded.codec] == min(sizes.values())
    assert {encode_array(np.arange(30_000, dtype=np.int32)).codec, encode_array(routed).codec} != {"zstd"}


def shard_name(data: np.ndarray) -> str:
    return "/".join(["c", *("0" * data.ndim)])


def test_the_same_rows_give_the_same_files():
    data = rows_like("uint16", (3000, 9, 4))
    one = encode_array(data, chunk_bytes=5000, layer_chunks=2)
    other = encode_array(np.split(data, [7, 7, 1000]), chunk_bytes=5000, layer_chunks=2)
    assert one == other


def test_a_strided_view_is_written_as_what_it_shows(tmp_path):
    data = rows_like("uint8", (500, 10, 8))
    put(tmp_path, encode_array(data[::2, 1:9, ::-1], chunk_bytes=1000))
    np.testing.assert_array_equal(reader(tmp_path).read(0, 250), data[::2, 1:9, ::-1])


def test_many_threads_share_a_reader(tmp_path):
    data = rows_like("uint8", (20_000, 16, 8))
    put(tmp_path, encode_array(data, chunk_bytes=1 << 17, layer_chunks=2))
    array = reader(tmp_path)

    def check(seed: int) -> None:
        start, stop = np.sort(np.random.default_rng(seed).integers(0, 20_001, 2))
        np.testing.assert_array_equal(array.read(int(start), int(stop)), data[start:stop])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(64)))


def test_a_cache_spares_neighbours_the_same_chunk_within_its_bounds(tmp_path):
    data = rows_like("uint8", (3000, 4, 8))
    put(tmp_path, encode_array(data, chunk_bytes=3200))
    cache = ChunkCache(3 * 3200)
    array = reader(tmp_path, cache=cache)
    for start in range(0, 3000, 25):
        np.testing.assert_array_equal(array.read(start, start + 25, slice(1, 3)), data[start : start + 25, 1:3])
    assert array.bytes_read == shard_of(tmp_path).stat().st_size  # each chunk once, and the index
    again = array.bytes_read
    for row in (2999, 2899, 2799):
        np.testing.assert_array_equal(array.read(row, row + 1), data[row : row + 1])
    assert array.bytes_read == again
    array.read(2600, 2601)
    assert array.bytes_read > again


def test_arrays_that_share_a_cache_are_not_mixed_up(tmp_path):
    cache = ChunkCache(1 << 20)
    for place, seed in ((tmp_path / "a", 1), (tmp_path / "b", 2), (tmp_path / "a", 1)):
        data = rows_like("uint8", (100, 4, 4), seed)
        put(place, encode_array(data))
        np.testing.assert_array_equal(reader(place, cache=cache).read(3, 50), data[3:50])


def test_the_result_of_a_cached_read_is_the_callers_own(tmp_path):
    data = rows_like("uint8", (100, 4, 4))
    put(tmp_path, encode_array(data))
    array = reader(tmp_path, cache=ChunkCache(1 << 20))
    for _ in range(2):
        found = array.read(3, 50)
        np.testing.assert_array_equal(found, data[3:50])
        found[...] = 0


@pytest.mark.parametrize("sharding", [{}, {"shards": (1200, 7, 4)}], ids=["foreign", "ours"])
def test_arrays_in_an_object_store_are_read_like_local_ones(tmp_path, s3, sharding):
    data = rows_like("uint16", (1000, 7, 4))
    array = zarr.create_array(
        tmp_path / "array",
        shape=data.shape,
        dtype="uint16",
        chunks=(300, 7, 4),
        compressors=CHECKED,
        **sharding,
    )
    array[...] = data
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    storage = open_storage(s3.url(f"shard-{len(sharding)}"), s3.options)
    storage.publish("pack", files, lambda step: None)
    found = ShardReader(storage, "pack/array")
    np.testing.assert_array_equal(found.read(299, 601, slice(3, 6)), data[299:601, 3:6])
    assert (found.bytes_read > 0) == bool(sharding)
    chunk = next(name for name in files if "/c/" in name)
    storage.remove([f"pack/{chunk}"])
    with pytest.raises(Corrupt, match=r"array pack/array in .*missing"):
        ShardReader(storage, "pack/array").read(0, 1)


FORK = """
    import os, signal, sys, threading
    import numpy as np, zarr
    from pathlib import Path
    from trajstore.archive.arrays.chunk_cache import ChunkCache
    from trajstore.archive.arrays.builder import encode_array
    from trajstore.archive.arrays.shard import ShardReader
    from trajstore.archive.storage.local import LocalStorage
    from trajstore.errors import Conflict

    folder, pipeline = sys.argv[1:]
    data = np.random.default_rng(0).integers(0, 99, (40_000, 16, 8)).astype(np.uint8)
    for name, content in encode_array(data, layer_chunks=2).files.items():
        path = Path(folder, "array", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if pipeline:
        zarr.config.set({"codec_pipeline.path": pipeline})
    cache = ChunkCache(1 << 20)
    array = ShardReader(LocalStorage(folder), "array", cache=cache)
    assert (array.read(1, 40_000) == data[1:]).all()
    held = threading.Event()
    threading.Thread(target=lambda: (cache._lock.acquire(), held.set(), threading.Event().wait()), daemon=True).start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            for again in (array, ShardReader(LocalStorage(folder), "array")):
                assert (again.read(5, 39_000) == data[5:39_000]).all()
            encode_array(data)
            status = 0
        except Conflict as error:
            status = 3 if "spawn" in str(error) else 1
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(("pipeline", "status"), [("", 0), ("zarrs.ZarrsCodecPipeline", 3)], ids=["ours", "zarrs"])
def test_a_forked_child_reads_directly_and_is_refused_another_pipeline(tmp_path, pipeline, status):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK), str(tmp_path), pipeline],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.stdout.strip() == str(status), run.stderr
