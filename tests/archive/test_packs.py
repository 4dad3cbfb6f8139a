"""What a pack is on disk: plain Zarr v3 that needs no code of ours, and damage that never passes for data."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

import trajstore
from tests.builders import SPEC, record_seed_case, rows, seed_rows


def the_pack(folder: Path) -> Path:
    (pack,) = (folder / "archive" / "packs" / "00").iterdir()
    return pack


def test_pack_is_read_with_plain_zarr_and_numpy(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    group = zarr.open_group(the_pack(folder), mode="r", zarr_format=3)
    (line,) = bytes(group["trajectories"][:]).splitlines()
    place = json.loads(line)
    assert place["id"] == trajectory.id
    text = bytes(group["events"][place["offset"] : place["offset"] + place["length"]])
    entries = [json.loads(line) for line in text.splitlines()]
    events = [
        (header, extents)
        for entry in entries
        for header, extents in zip(entry["events"], entry["extents"], strict=True)
    ]
    tokens = [
        group["tokens"][row : row + count]
        for header, extents in events
        if header["type"] in ("SegmentOpened", "Tokens")
        for row, count in extents
    ]
    np.testing.assert_array_equal(np.concatenate(tokens), [1, 2, 3, 4, 5, 10, 11, 12, 13, 14])
    routed = [
        group["routed"][row : row + count]
        for header, extents in events
        if header["type"] == "Routing"
        for row, count in extents
    ]
    np.testing.assert_array_equal(routed[0], seed_rows(0, 7))
    np.testing.assert_array_equal(routed[1], seed_rows(1, 9))
    (logprobs,) = (
        group["logprobs"][row : row + count]
        for header, extents in events
        if header["type"] == "Tokens" and header["start"] == 8
        for row, count in extents
    )
    np.testing.assert_array_equal(logprobs, np.float32([-1.0, -2.0]))


def test_each_array_is_one_shard_with_a_checksum(durable, archive, folder):
    record_seed_case(durable)
    archive()
    for name in ("tokens", "logprobs", "routed", "events", "trajectories"):
        about = json.loads((the_pack(folder) / name / "zarr.json").read_bytes())
        assert about["codecs"][0]["name"] == "sharding_indexed"
        inner = about["codecs"][0]["configuration"]["codecs"]
        if name in ("tokens", "logprobs"):
            assert [codec["name"] for codec in inner] == ["bytes", "blosc", "crc32c"]
        else:
            assert inner[-1] == {"name": "zstd", "configuration": {"level": 3, "checksum": True}}
        assert len(list((the_pack(folder) / name / "c").rglob("*"))) == len(about["shape"]), "one shard file"


def test_large_recording_spans_chunks_and_reads_back(durable, archive):
    spec = trajstore.RoutingSpec(layer_ids=tuple(range(48)), top_k=8, num_experts=128, num_hidden_layers=48)
    recorded = rows(9000, seed=3, spec=spec)
    trajectory = durable.create(routing=spec)
    with trajectory.segment(context=np.arange(9001)) as segment:
        segment.routing(recorded, start=0)
        segment.close("stop")
    archive()
    loaded = durable.load(trajectory.id)
    assert all(event.stored != "hot" for event in durable.events(trajectory.id))
    np.testing.assert_array_equal(loaded.routed_experts[:9000], recorded)


@pytest.mark.parametrize("array", ["tokens", "routed", "events"])
def test_flipped_byte_is_corrupt_and_names_the_pack(durable, archive, folder, array):
    trajectory = record_seed_case(durable)
    archive()
    shard = next(path for path in (the_pack(folder) / array / "c").rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[10] ^= 0x40
    shard.write_bytes(data)
    with pytest.raises(trajstore.Corrupt, match=the_pack(folder).name):
        trajstore.open_archive(folder).load(trajectory.id)


@pytest.mark.parametrize("array", ["tokens", "routed", "events"])
def test_missing_shard_is_corrupt_and_never_zeros(durable, archive, folder, array):
    trajectory = record_seed_case(durable)
    archive()
    next(path for path in (the_pack(folder) / array / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(trajstore.Corrupt, match=trajectory.id):
        trajstore.open_archive(folder).load(trajectory.id)


def test_missing_pack_is_corrupt(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    pack = the_pack(folder)
    pack.rename(pack.with_name("elsewhere"))
    with pytest.raises(trajstore.Corrupt, match=pack.name):
        trajstore.open_archive(folder).load(trajectory.id)


def test_unreadable_manifest_record_is_corrupt_and_names_the_file(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    record = folder / "archive" / "manifest" / "00" / "00000001.json"
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(trajstore.Corrupt, match=r"00000001\.json"):
        trajstore.open_archive(folder).load(trajectory.id)


def test_record_of_a_newer_format_is_refused(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    record = folder / "archive" / "manifest" / "00" / "00000001.json"
    record.write_text(record.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(trajstore.SchemaError, match="upgrade"):
        trajstore.open_archive(folder).load(trajectory.id)


def test_manifest_digests_are_those_of_the_files(durable, archive, folder):
    import hashlib

    record_seed_case(durable)
    archive()
    record = json.loads((folder / "archive" / "manifest" / "00" / "00000001.json").read_bytes())
    assert set(record["files"]) == {
        str(path.relative_to(the_pack(folder))) for path in the_pack(folder).rglob("*") if path.is_file()
    }
    for name, digest in record["files"].items():
        data = (the_pack(folder) / name).read_bytes()
        assert digest == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_shapes_of_different_models_go_into_packs_of_their_own(durable, archive, folder):
    other = trajstore.RoutingSpec(layer_ids=(1,), top_k=4, num_experts=300, num_hidden_layers=2)
    ids = []
    for spec in (SPEC, other, None):
        trajectory = durable.create(routing=spec)
        with trajectory.segment(context=[1, 2, 3]) as segment:
            segment.tokens([4])
            if spec is not None:
                segment.routing(rows(3, seed=len(ids), spec=spec), start=0)
        ids.append(trajectory.id)
    before = [durable.load(id) for id in ids]
    archive()
    assert len(list((folder / "archive" / "packs" / "00").iterdir())) == 2
    for old, id in zip(before, ids, strict=True):
        new = trajstore.open_archive(folder).load(id)
        np.testing.assert_array_equal(new.token_ids, old.token_ids)
        if old.routed_experts is None:
            assert new.routed_experts is None
        else:
            assert new.routed_experts.dtype == old.routed_experts.dtype
            np.testing.assert_array_equal(new.routed_experts, old.routed_experts)


def test_arrays_are_compressed_as_the_record_and_the_format_say(durable, archive, folder):
    record_seed_case(durable)
    archive()
    record = json.loads((folder / "archive" / "manifest" / "00" / "00000001.json").read_bytes())
    assert record["codecs"] == {
        "tokens": "shuffle-quick",
        "logprobs": "shuffle-lz4",
        "events": "zstd",
        "trajectories": "zstd",
        "routed": "zstd",
    }
    for array, compressor, level in (("tokens", "zstd", 1), ("logprobs", "lz4", 5)):
        document = json.loads((the_pack(folder) / array / "zarr.json").read_bytes())
        blosc = document["codecs"][0]["configuration"]["codecs"][1]["configuration"]
        assert (blosc["cname"], blosc["clevel"], blosc["shuffle"]) == (compressor, level, "shuffle")
