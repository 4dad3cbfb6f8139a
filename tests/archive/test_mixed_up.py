"""Files of one pack in the place of another's: partial reads, which no CRC of a payload covers, find them out."""

import json
import shutil

import numpy as np
import pytest

import trajstore
from tests.archive.sound import WIDE
from tests.builders import rows
from trajstore.archive.rebuild.rebuild import rebuild_archive
from trajstore.archive.root import ArchiveRoot
from trajstore.archiver import Archiver

NOISE = trajstore.RoutingSpec(layer_ids=(0, 1), top_k=32, num_experts=256, num_hidden_layers=2)
"""Rows that no codec makes smaller: as many of them always take the same bytes."""


def archived(folder, spec, counts):
    """An archive in which each trajectory, `t0` with `counts[0]` rows and so on, has a pack of its own."""
    with trajstore.open(folder, partitions=1, ack="fsync") as store:
        for number, count in enumerate(counts):
            longer = {"note": np.random.default_rng(number).bytes(300 * number).hex()}  # so that events differ in size
            trajectory = store.create(id=f"t{number}", routing=spec, metadata=longer)
            with trajectory.segment(context=np.arange(count)) as segment:
                segment.routing(rows(count, seed=number, spec=spec), start=0)
                segment.close("stop")
            trajectory.close("completed")
            store.flush()
            assert Archiver(store).run(once=True).packs == 1
    return folder / "archive"


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Two packs whose arrays differ in size, though not in chunks; not to be changed."""
    return archived(tmp_path_factory.mktemp("unlike") / "store", WIDE, (3100, 3110))


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Two packs of the same sizes; not to be changed."""
    return archived(tmp_path_factory.mktemp("alike") / "store", NOISE, (300, 300))


def swap(place, file):
    """Exchange a file or folder of the two packs; returns their names."""
    one, two = sorted((place / "packs" / "00").iterdir())
    (one / file).rename(place / "aside")
    (two / file).rename(one / file)
    (place / "aside").rename(two / file)
    return f"00/{one.name}", f"00/{two.name}"


def sizes_of_routed(place):
    """Of the shards, each size once, ascending."""
    return sorted({path.stat().st_size for path in place.glob("packs/00/*/routed/c/0/0/0")})


def forget_checksums(place):
    """Make it an archive of a version that wrote no checksums of chunks."""
    for path in place.glob("packs/00/*/*/zarr.json"):
        document = json.loads(path.read_bytes())
        del document["attributes"]["chunk_checksums"]
        path.write_text(json.dumps(document))
    for folder in ("manifest", "index"):
        shutil.rmtree(place / folder)
    rebuild_archive(ArchiveRoot.at(place))


@pytest.mark.parametrize("file", ["routed", "routed/zarr.json", "routed/c", "events", "events/zarr.json", "events/c"])
def test_partial_read_finds_the_array_of_another_pack(unlike, tmp_path, file):
    place = shutil.copytree(unlike, tmp_path / "archive")
    for id, pack in zip(("t0", "t1"), swap(place, file), strict=True):
        with pytest.raises(trajstore.Corrupt, match=f"trajectory {id}: .*{pack}"):
            trajstore.open_archive(place).load_routing(id, rows=(5, 15), layers=(2,))


def test_shard_of_another_size_is_said_to_be_another(unlike, tmp_path):
    place = shutil.copytree(unlike, tmp_path / "archive")
    swap(place, "routed/c")
    sizes = sizes_of_routed(place)
    with pytest.raises(trajstore.Corrupt, match=f"another one: it has {sizes[1]} bytes, not the {sizes[0]}"):
        trajstore.open_archive(place).load_routing("t0", rows=(5, 15))


@pytest.mark.parametrize(
    ("file", "found"), [("routed/c", "its checksum is not the one"), ("routed", "zarr.json is not the one")]
)
def test_partial_read_finds_a_shard_of_the_same_size(alike, tmp_path, file, found):
    place = shutil.copytree(alike, tmp_path / "archive")
    packs = swap(place, file)
    assert len(sizes_of_routed(place)) == 1
    for id, pack in zip(("t0", "t1"), packs, strict=True):
        with pytest.raises(trajstore.Corrupt, match=f"trajectory {id}: .*{pack}.* {found}"):
            trajstore.open_archive(place).load_routing(id, rows=(5, 15), layers=(1,))


@pytest.mark.parametrize("layers", [None, (1, 0)])
def test_reading_all_rows_and_layers_finds_it_where_no_checksums_of_chunks_were_written(alike, tmp_path, layers):
    place = shutil.copytree(alike, tmp_path / "archive")
    forget_checksums(place)
    np.testing.assert_array_equal(
        trajstore.open_archive(place).load_routing("t0", layers=layers).routed_experts,
        rows(300, seed=0, spec=NOISE)[:, list(layers or (0, 1))],
    )
    _, pack = swap(place, "routed/c")
    with pytest.raises(trajstore.Corrupt, match=f"t1: .*{pack} does not match its header"):
        trajstore.open_archive(place).load_routing("t1", layers=layers)
