"""Whatever befalls a file of an archive, `verify` finds it and `load` raises or is right; all else stays readable.

Zarr: a flipped byte without a checksum is silent, a missing chunk reads as zeros -> checksums on every chunk, digests
and counts in the record, and absence is damage.
"""

import random
import shutil

import pytest

import trajstore
from tests.archive.sound import POLICIES, folds, make
from trajstore.archive.record import Record
from trajstore.archive.verify.verify import verify
from trajstore.opening import read_archive

ARRAYS = ("tokens", "logprobs", "routed", "events", "trajectories")


class Sample:
    """An archive, what loads from it, and which pack arrays each trajectory's folds need."""

    def __init__(self, folder, store, ids):
        self.folder = folder / "archive"
        self.ids = ids
        archive = trajstore.open_archive(folder)
        self.folds = folds(archive, ids)
        self.needs = {id: needs(archive, id) for id in ids}
        self.partition = {id: store.keys.partition(id) for id in ids}


def needs(archive, id):
    """(pack, array) pairs that the folds of a trajectory read."""
    found = {(event.stored, array) for event in archive.events(id) for array in ("events", "trajectories")}
    found |= {(note.stored, array) for note in archive.notes(id) for array in ("events", "trajectories")}
    for policy in POLICIES:
        for event in archive.plan(id, policy=policy).needed():
            tokens = ("tokens", "logprobs") if getattr(event.header, "logprobs", False) else ("tokens",)
            arrays = ("routed",) if event.type in ("Routing", "LateRouting") else tokens
            found |= {(extent.pack, array) for extent in event.extents for array in arrays}
    return found


def build(folder, records):
    with trajstore.open(folder, partitions=2, ack="fsync") as store:
        return Sample(folder, store, make(store, records=records))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """17 records in a partition, so that there is one lookup table of the first 16; never written to."""
    return build(tmp_path_factory.mktemp("large"), 17)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """3 records in a partition; tests put back what they change."""
    return build(tmp_path_factory.mktemp("small"), 3)


@pytest.fixture
def folder(large, tmp_path):
    """A copy of the large one, to be damaged."""
    return shutil.copytree(large.folder, tmp_path / "archive")


def a_pack(sample, *, table):
    """A pack of partition 0 that folds need rows of: one that the lookup table covers, or one that it does not."""
    found = sorted({pack for id in sample.ids for pack, array in sample.needs[id] if array == "routed"})
    inside = [pack for pack in found if pack.startswith("00/") and (int(pack[3:11]) <= 16) == table]
    return inside[0]


def faults(folder):
    return [finding for finding in verify(folder) if finding.severity != "information"]


def errors_of_loads(folder, sample):
    """By id what its load raises; every other load must be what was recorded."""
    errors = {}
    for id in sample.ids:
        try:
            found = folds(trajstore.open_archive(folder), [id])
        except trajstore.TrajstoreError as error:
            errors[id] = error
        else:
            assert found[id] == sample.folds[id], f"{id} loads, and is not what was recorded"
    return errors


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def shard(pack, array):
    return next(path for path in (pack / array / "c").rglob("*") if path.is_file())


def assert_only_the_concerned_fail(folder, sample, name, array):
    """Loads that need the array raise Corrupt and name the pack and the trajectory; all others are as ever."""
    errors = errors_of_loads(folder, sample)
    for id in sample.ids:
        if (name, array) in sample.needs[id]:
            error = errors.pop(id)
            assert isinstance(error, trajstore.Corrupt)
            assert name in str(error)
            assert id in str(error)
    assert errors == {}


def test_the_samples_are_sound(large, small):
    for sample in (large, small):
        assert faults(sample.folder) == []
        assert errors_of_loads(sample.folder, sample) == {}
    assert (large.folder / "index" / "00" / "00000001-00000016.safetensors").exists()
    assert len({pack for pack, array in large.needs[large.ids[0]] if array == "routed"}) > 1, "it has references"


@pytest.mark.parametrize("file", ["zarr.json", *(f"{array}/{part}" for array in ARRAYS for part in ("zarr.json", "c"))])
def test_flipped_byte_in_any_file_of_a_pack(large, folder, file):
    name = a_pack(large, table=True)
    pack = folder / "packs" / name
    array = file.partition("/")[0]
    path = shard(pack, array) if file.endswith("/c") else pack / file
    flip(path, path.stat().st_size // 2)
    found = faults(folder)
    inside = str(path.relative_to(pack))
    assert any(fault.kind == "digest" and fault.pack == name and inside in fault.what for fault in found)
    if file == "zarr.json":
        assert errors_of_loads(folder, large) == {}, "nothing that is read stands there"
    else:
        assert_only_the_concerned_fail(folder, large, name, array)
        concerned = {id for id in large.ids if (name, array) in large.needs[id]}
        assert array in ("trajectories",) or concerned <= {fault.trajectory for fault in found}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("harm", ["cut by one byte", "cut in half", "emptied", "deleted", "array deleted"])
def test_shard_that_is_cut_or_gone(large, folder, array, harm):
    name = a_pack(large, table=True)
    path = shard(folder / "packs" / name, array)
    data = path.read_bytes()
    if harm == "deleted":
        path.unlink()
    elif harm == "array deleted":
        shutil.rmtree(folder / "packs" / name / array)
    else:
        path.write_bytes(data[: {"cut by one byte": -1, "cut in half": len(data) // 2, "emptied": 0}[harm]])
    kinds = {fault.kind for fault in faults(folder) if fault.pack == name}
    assert ("missing-file" if "deleted" in harm else "size") in kinds
    assert_only_the_concerned_fail(folder, large, name, array)


def test_deleted_pack(large, folder):
    name = a_pack(large, table=True)
    shutil.rmtree(folder / "packs" / name)
    found = faults(folder)
    assert any(fault.kind == "missing-file" and fault.pack == name for fault in found)
    errors = errors_of_loads(folder, large)
    concerned = {id for id in large.ids if any(pack == name for pack, _ in large.needs[id])}
    assert errors.keys() == concerned
    assert all(name in str(error) and id in str(error) for id, error in errors.items())
    assert all(isinstance(error, trajstore.Corrupt) for error in errors.values())


@pytest.mark.parametrize("array", ["trajectories", "pack"])
def test_list_of_a_pack_that_no_table_covers(large, folder, array):
    """Whether a trajectory of its partition has a part in it cannot be told: none is loaded as if it had none."""
    name = a_pack(large, table=False)
    (folder / "index" / "00" / f"{name[3:11]}-{name[3:11]}.safetensors").unlink()
    pack = folder / "packs" / name
    shutil.rmtree(pack if array == "pack" else pack / array)
    assert any(fault.pack == name for fault in faults(folder))
    errors = errors_of_loads(folder, large)
    assert {id for id in large.ids if (name, "trajectories") in large.needs[id]} <= errors.keys()
    assert all(large.partition[id] == 0 for id in errors)
    assert all(isinstance(error, trajstore.Corrupt) and name in str(error) for error in errors.values())


@pytest.mark.parametrize("number", [1, 9, 17])
def test_record_that_cannot_be_read(large, folder, number):
    path = folder / "manifest" / "00" / f"{number:08}.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert any(fault.kind == "record" and path.name in fault.what for fault in faults(folder))
    errors = errors_of_loads(folder, large)
    assert all(large.partition[id] == 0 and isinstance(error, trajstore.Corrupt) for id, error in errors.items())
    concerned = {id for id in large.ids if any(pack.startswith(f"00/{number:08}-") for pack, _ in large.needs[id])}
    assert concerned <= errors.keys()


@pytest.mark.parametrize("number", [1, 9, 16, 17])
def test_deleted_record_is_found(large, folder, number):
    path = folder / "manifest" / "00" / f"{number:08}.json"
    path.unlink()
    assert any(path.name in fault.what or f"{number:08}-" in fault.pack for fault in faults(folder))


@pytest.mark.parametrize("number", [1, 9, 16])
def test_deleted_record_below_others_is_never_an_older_state(large, folder, number):
    (folder / "manifest" / "00" / f"{number:08}.json").unlink()
    errors = errors_of_loads(folder, large)
    concerned = {id for id in large.ids if any(pack.startswith(f"00/{number:08}-") for pack, _ in large.needs[id])}
    assert concerned <= errors.keys()
    assert all(large.partition[id] == 0 for id in errors)


@pytest.mark.parametrize("number", [1, 2])
def test_gap_in_the_newest_records_is_never_an_older_state(small, tmp_path, number):
    """No table of sixteen covers them yet."""
    folder = shutil.copytree(small.folder, tmp_path / "archive")
    (folder / "manifest" / "00" / f"{number:08}.json").unlink()
    assert any(fault.kind == "record" for fault in faults(folder))
    errors = errors_of_loads(folder, small)
    assert errors.keys() == {id for id in small.ids if small.partition[id] == 0}
    assert all(isinstance(error, trajstore.Corrupt) for error in errors.values())


@pytest.mark.parametrize(
    "place",
    ["notes.txt", "packs/00/notes.txt", "manifest/00/old.json", "index/00/x", "manifest/07/00000001.json", "PACK/x"],
)
def test_foreign_file_is_found_and_harms_nothing(large, folder, place):
    name = a_pack(large, table=True)
    path = folder / place.replace("PACK", f"packs/{name}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("hello")
    (found,) = faults(folder)
    assert found.kind == "foreign-file"
    assert path.name in found.what
    assert errors_of_loads(folder, large) == {}


def test_deleted_archive_json(large, folder):
    (folder / "archive.json").unlink()
    (found,) = faults(folder)
    assert found.kind == "identity"
    with pytest.raises(trajstore.NotFound):
        trajstore.open_archive(folder)


def test_damage_in_one_partition_leaves_the_other_readable(large, folder):
    shutil.rmtree(folder / "packs" / "00")
    shutil.rmtree(folder / "manifest" / "00")
    assert faults(folder)
    errors = errors_of_loads(folder, large)
    assert all(large.partition[id] == 0 for id in errors)
    assert any(large.partition[id] == 1 for id in large.ids)


def flips(paths, count, seed):
    """Random (path, byte, bit), each file about as often as any other."""
    source = random.Random(seed)
    for _ in range(count):
        path = source.choice(paths)
        yield path, source.randrange(path.stat().st_size), source.randrange(8)


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_of_a_pack_is_found_and_never_loaded(small, seed):
    paths = sorted(path for path in (small.folder / "packs").rglob("*") if path.is_file())
    for path, at, bit in flips(paths, 100, seed):
        flip(path, at, bit)
        try:
            assert any(fault.kind == "digest" for fault in faults(small.folder)), (path, at, bit)
            for error in errors_of_loads(small.folder, small).values():
                assert isinstance(error, trajstore.Corrupt)
        finally:
            flip(path, at, bit)


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_of_records_and_tables_is_found_or_harmless(large, folder, seed):
    paths = [
        folder / "archive.json",
        *sorted((folder / "manifest").rglob("*.json")),
        *sorted((folder / "index").rglob("*.s*")),
    ]
    for path, at, bit in flips(paths, 60, seed):
        flip(path, at, bit)
        found = faults(folder)
        try:
            errors = errors_of_loads(folder, large)
            assert found or errors == {}, f"bit {bit} of byte {at} of {path} is not found"
            if path.suffix == ".safetensors":
                assert errors == {}, "what a table says is read from the packs"
        finally:
            flip(path, at, bit)


def test_any_flipped_bit_of_a_record_that_drops_a_pack_hides_nothing_else(small, tmp_path):
    """It names no pack whose attribute could contradict it."""
    folder = shutil.copytree(small.folder, tmp_path / "archive")
    reader = read_archive(folder)
    manifest = reader.manifest(0)
    number = manifest.refresh() + 1
    manifest.append(Record(format=2, number=number, partition=0, created=1.0, writer="w", drops=[2]), [])
    path = folder / "manifest" / "00" / f"{number:08}.json"
    dropped = {id for id in small.ids if reader.find(id).dropped}
    assert dropped
    for at in range(path.stat().st_size):
        for bit in range(8):
            flip(path, at, bit)
            damaged = read_archive(folder)
            try:
                damaged.manifest(0).refresh()
                assert {id for id in small.ids if damaged.find(id).dropped} == dropped, (at, bit)
            except (trajstore.Corrupt, trajstore.SchemaError):
                assert list(verify(folder, packs=[manifest.record(1).pack])), (at, bit)
            finally:
                flip(path, at, bit)
