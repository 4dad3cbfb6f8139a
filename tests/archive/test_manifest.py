"""Records and lookup tables: what a fresh reader finds, at any number of records, with any table missing or damaged."""

import contextlib
import hashlib
import shutil
import tracemalloc
import zlib

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from trajstore.archive.arrays.builder import encode_array
from trajstore.archive.index import Line, decode_table, encode_table, make_table, merge_tables, spans
from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import PackedTrajectory, encode_trajectory
from trajstore.archive.pack_arrays import PackArrays
from trajstore.archive.record import FileDigest, PackCounts, Record
from trajstore.archive.storage.local import LocalStorage
from trajstore.archive.storage.protocol import parts_of

INCARNATION = "01M8ZXJ0Q0000000000000000A"


def manifest_of(storage, *, partition=3, incarnation=INCARNATION):
    return Manifest(storage, partition, PackArrays(storage), incarnation=incarnation)


def append(storage, manifest, number, ids, **changes):
    """A record over a pack that has nothing but its list of trajectories."""
    pack = f"03/{number:08}-X"
    lines = [PackedTrajectory(id=id, first=f"{number}-0", last=f"{number}-0") for id in ids]
    data = np.frombuffer(b"".join(map(encode_trajectory, lines)), "u1")
    array = encode_array(data, chunk_bytes=1 << 16)
    bodies = {f"trajectories/{name}": b"".join(parts_of(body)) for name, body in array.files.items()}
    storage.publish(f"packs/{pack}", bodies, lambda _: None)
    files = {name: FileDigest(len(body), hashlib.sha256(body).hexdigest()) for name, body in bodies.items()}
    record = Record(
        format=2, number=number, partition=3, created=0.0, writer="t", pack=pack, files=files, counts=PackCounts()
    )
    manifest.append(msgspec.structs.replace(record, **changes), lines)


def test_trajectories_are_found_at_any_number_of_records(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    follower = manifest_of(storage)
    for number in range(1, 301):
        append(storage, writer, number, [f"t{number}", f"u{number % 7}"])
        if number % 13 == 0:
            assert follower.refresh() == number
    fresh = manifest_of(storage)
    assert fresh.refresh() == follower.refresh() == 300
    for reader in (writer, follower, fresh):
        assert [record.number for record, _ in reader.find("t299").parts] == [299]
        assert [record.number for record, _ in reader.find("u3").parts] == [
            number for number in range(1, 301) if number % 7 == 3
        ]
        assert reader.find("nobody").parts == []
    tables = {path.name for path in (tmp_path / "index" / "03").iterdir()}
    assert "00000001-00000256.safetensors" in tables
    assert "00000273-00000288.safetensors" in tables
    assert len(tables) == 1 + 2 + 12, "a larger one takes the place of those it covers"


@pytest.mark.parametrize("harm", ["remove", "flip", "truncate", "foreign"])
def test_missing_or_damaged_tables_are_made_up_for(tmp_path, harm, caplog):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    for number in range(1, 20):
        append(storage, writer, number, [f"t{number}"])
    table = tmp_path / "index" / "03" / "00000001-00000016.safetensors"
    data = bytearray(table.read_bytes())
    if harm == "remove":
        table.unlink()
    elif harm == "flip":
        data[-5] ^= 1
        table.write_bytes(data)
    elif harm == "truncate":
        table.write_bytes(data[:40])
    else:
        table.write_bytes(b"hello")
    fresh = manifest_of(storage)
    fresh.refresh()
    assert [record.number for record, _ in fresh.find("t7").parts] == [7]
    assert (harm == "remove") or "damaged" in caplog.text


def test_next_archiver_writes_the_tables_that_a_killed_one_did_not(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    for number in range(1, 17):
        append(storage, writer, number, [f"t{number}"])
    table = tmp_path / "index" / "03" / "00000001-00000016.safetensors"
    table.unlink()
    successor = manifest_of(storage)
    successor.refresh()
    append(storage, successor, 17, ["t17"])
    assert table.exists()


def tables_of(folder, *, partition=3, incarnation=INCARNATION):
    """Names of the lookup tables that can be used."""
    found = set()
    for path in (folder / "index" / f"{partition:02}").iterdir():
        with contextlib.suppress(trajstore.Corrupt, trajstore.SchemaError):
            decode_table(memoryview(path.read_bytes()), incarnation=incarnation, partition=partition, path=path.name)
            found.add(path.name)
    return found


def as_format_1(data):
    """A lookup table as it was written before tables said whose they are."""
    size = int.from_bytes(data[:8], "little")
    about = msgspec.json.decode(data[8 : 8 + size])["__metadata__"]
    about = {"format": "1"} | {name: about[name] for name in ("first", "last", "replaced", "dropped")}
    columns = safetensors.numpy.load(bytes(data))
    crc = 0
    for name in sorted(about):
        crc = zlib.crc32(about[name].encode(), crc)
    for name in ("hashes", "numbers", "offsets", "lengths"):
        crc = zlib.crc32(columns[name].tobytes(), crc)
    return safetensors.numpy.save(columns, metadata={**about, "crc": str(crc)})


def spoil(table, harm):
    """Make a table that cannot be used of one that can."""
    data = table.read_bytes()
    if harm == "remove":
        table.unlink()
    elif harm == "format 1":
        table.write_bytes(as_format_1(data))
    else:
        table.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


@pytest.mark.parametrize("harm", ["remove", "format 1", "flip"])
def test_next_archiver_writes_every_table_anew_that_cannot_be_used(tmp_path, harm, caplog):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    for number in range(1, 20):
        append(storage, writer, number, [f"t{number}"])
    there = tables_of(tmp_path)
    for name in there:
        spoil(tmp_path / "index" / "03" / name, harm)
    assert tables_of(tmp_path) == set()
    reader, successor = manifest_of(storage), manifest_of(storage)
    for manifest in (reader, successor):
        assert manifest.refresh() == 19
        assert [[record.number for record, _ in manifest.find(f"t{n}").parts] for n in (7, 18)] == [[7], [18]]
    assert ("damaged" in caplog.text) == (harm == "flip")
    assert tables_of(tmp_path) == set(), "who only reads changes nothing"
    append(storage, successor, 20, ["t20"])
    assert tables_of(tmp_path) == there | {"00000020-00000020.safetensors"}
    fresh = manifest_of(storage)
    fresh.refresh()
    assert [[record.number for record, _ in fresh.find(f"t{n}").parts] for n in (7, 18, 20)] == [[7], [18], [20]]


@pytest.mark.parametrize("whose", [{"partition": 4}, {"incarnation": "01M8ZXJ0Q0000000000000000B"}])
def test_tables_of_another_partition_or_incarnation_are_damaged_ones(tmp_path, whose, caplog):
    """Every one of them is sound by itself, and would say of each trajectory that it was never archived."""
    storage = LocalStorage(tmp_path / "here")
    writer = manifest_of(storage)
    for number in range(1, 20):
        append(storage, writer, number, [f"t{number}"])
    for table in (tmp_path / "here" / "index" / "03").iterdir():
        data = table.read_bytes()
        own = decode_table(memoryview(data), incarnation=INCARNATION, partition=3, path="x")
        lines = [Line(f"x{number}", 0, 5) for number in range(own.first, own.last + 1)]
        others = [make_table(own.first + at, [line]) for at, line in enumerate(lines)]
        table.write_bytes(encode_table(merge_tables(others), **({"incarnation": INCARNATION, "partition": 3} | whose)))
    fresh = manifest_of(storage)
    assert fresh.refresh() == 19
    for number in range(1, 20):
        assert [record.number for record, _ in fresh.find(f"t{number}").parts] == [number]
    assert "somebody has copied it" in caplog.text


def test_replaced_packs_are_left_out_and_dropped_ones_are_known_as_gone(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    append(storage, writer, 1, ["a", "b"])
    append(storage, writer, 2, ["c"])
    append(storage, writer, 3, ["a"], replaces=[1])
    append(storage, writer, 4, ["d"], drops=[2])
    for reader in (writer, manifest_of(storage)):
        reader.refresh()
        assert [record.number for record, _ in reader.find("a").parts] == [3]
        assert reader.find("b").parts == []
        assert reader.find("c").dropped
        assert not reader.find("d").dropped
        assert [record.number for record in reader.live()] == [3, 4]


def test_number_that_another_has_taken_is_fenced(tmp_path):
    storage = LocalStorage(tmp_path)
    one, other = manifest_of(storage), manifest_of(storage)
    append(storage, one, 1, ["a"])
    with pytest.raises(trajstore.Fenced):
        other.append(Record(format=2, number=1, partition=3, created=0.0, writer="z", pack="03/00000001-Z"), [])


def test_record_that_is_there_with_the_same_bytes_is_the_archivers_own(tmp_path):
    """As where a proxy has sent a conditional put twice: the answer to the second is that there is one."""

    class Twice(LocalStorage):
        def create(self, path, data):
            super().create(path, data)
            if path.startswith("manifest/"):
                super().create(path, data)

    storage = Twice(tmp_path)
    writer = manifest_of(storage)
    for number in (1, 2):
        append(storage, writer, number, [f"t{number}"])
    for manifest in (writer, manifest_of(storage)):
        assert manifest.refresh() == 2
        assert manifest.find("t1").parts
        assert manifest.find("t2").parts


def test_line_of_another_trajectory_is_no_collision(tmp_path):
    """The list of another pack, where no table has to be made: what was archived must not seem to be nowhere."""
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    append(storage, writer, 1, ["a"])
    append(storage, writer, 2, ["b"])
    append(storage, writer, 3, ["c"], drops=[1])
    packs = tmp_path / "packs" / "03"
    for one, other in (("00000002-X", "00000003-X"), ("00000001-X", "00000003-X")):
        shutil.rmtree(packs / one / "trajectories")
        shutil.copytree(packs / other / "trajectories", packs / one / "trajectories")
    fresh = manifest_of(storage)
    fresh.refresh()
    with pytest.raises(trajstore.Corrupt, match="lists trajectory c where"):
        fresh.find("b")
    assert fresh.find("a").dropped, "where the list of a dropped pack is damaged, the hash says so"
    assert [record.number for record, _ in fresh.find("c").parts] == [3]


def test_list_of_another_pack_is_believed_by_nobody(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    append(storage, writer, 1, ["a"])
    append(storage, writer, 2, ["b"])
    packs = tmp_path / "packs" / "03"
    shutil.rmtree(packs / "00000001-X" / "trajectories")
    shutil.copytree(packs / "00000002-X" / "trajectories", packs / "00000001-X" / "trajectories")
    fresh = manifest_of(storage)
    fresh.refresh()
    with pytest.raises(trajstore.Corrupt, match="not what record 1 says"):
        fresh.lines(fresh.record(1))
    heard = []
    assert fresh.summaries(on_corrupt=heard.append) == []
    assert "not what record 1 says" in str(heard)
    assert [line.id for line in fresh.lines(fresh.record(2))] == ["b"]


def test_table_that_does_not_lead_to_a_pack_that_lists_the_trajectory_is_corrupt(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    append(storage, writer, 1, ["a"])
    append(storage, writer, 2, ["a"])
    append(storage, writer, 3, ["b"], replaces=[1])
    table = tmp_path / "index" / "03" / "00000002-00000002.safetensors"
    table.write_bytes(encode_table(make_table(2, []), incarnation=INCARNATION, partition=3))
    fresh = manifest_of(storage)
    fresh.refresh()
    assert fresh.find("a", listed=[1]).parts == [], "one that was replaced need not be found"
    with pytest.raises(trajstore.Corrupt, match=r"record 2 .*trajstore rebuild"):
        fresh.find("a", listed=[2])


def test_record_that_was_renamed_is_corrupt(tmp_path):
    storage = LocalStorage(tmp_path)
    append(storage, manifest_of(storage), 1, ["a"])
    folder = tmp_path / "manifest" / "03"
    (folder / "00000002.json").write_bytes((folder / "00000001.json").read_bytes())
    with pytest.raises(trajstore.Corrupt, match="renamed"):
        manifest_of(storage).refresh()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=8))
def test_merged_table_finds_what_the_single_ones_find(names):
    tables = [
        make_table(i + 1, [Line(f"t{name}", at, 5) for at, name in enumerate(some)]) for i, some in enumerate(names)
    ]
    whose = {"incarnation": INCARNATION, "partition": 3}
    merged = decode_table(memoryview(encode_table(merge_tables(tables), **whose)), **whose, path="x")
    for name in range(31):
        assert merged.find(f"t{name}") == [hit for table in tables for hit in sorted(table.find(f"t{name}"))]


def test_spans_begin_where_tables_of_a_level_begin():
    assert spans(16) == [(17, 32), (17, 17)]
    assert spans(256)[0] == (257, 512)
    assert spans(3) == [(4, 4)]


def test_lost_newest_record_is_noticed_by_its_table(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    for number in range(1, 4):
        append(storage, writer, number, [f"t{number}"])
    (tmp_path / "manifest" / "03" / "00000003.json").unlink()
    with pytest.raises(trajstore.Corrupt, match="00000003"):
        manifest_of(storage).refresh()


def test_records_lost_below_a_table_of_sixteen_are_noticed(tmp_path):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    for number in range(1, 34):
        append(storage, writer, number, [f"t{number}"])
    for number in (17, 18):
        (tmp_path / "manifest" / "03" / f"{number:08}.json").unlink()
    with pytest.raises(trajstore.Corrupt, match="00000017"):
        manifest_of(storage).refresh()


def test_table_is_written_though_a_reader_of_the_process_takes_the_record_first(tmp_path):
    """As a store that reads beside its archiver does, between the record and what follows it."""

    class Watched(LocalStorage):
        def create(self, path, data):
            super().create(path, data)
            if path.startswith("manifest/"):
                manifest.refresh()

    storage = Watched(tmp_path)
    manifest = manifest_of(storage)
    for number in range(1, 18):
        append(storage, manifest, number, [f"t{number}"])
    tables = {path.name for path in (tmp_path / "index" / "03").iterdir()}
    assert tables == {"00000001-00000016.safetensors", "00000017-00000017.safetensors"}
    assert [record.number for record, _ in manifest.find("t17").parts] == [17]


@pytest.mark.parametrize("number", [1, 2, 17, 18])
def test_damaged_record_that_a_table_covers_concerns_only_what_is_in_its_pack(tmp_path, number):
    storage = LocalStorage(tmp_path)
    writer = manifest_of(storage)
    for each in range(1, 19):
        append(storage, writer, each, [f"t{each}"], replaces=[each - 1] if each == 18 else [])
    path = tmp_path / "manifest" / "03" / f"{number:08}.json"
    path.write_bytes(path.read_bytes()[:-9])
    fresh = manifest_of(storage)
    assert fresh.refresh() == 18
    assert not fresh.is_live(17), "the table tells what a damaged record replaced"
    for other in range(1, 17):
        if other != number:
            assert [record.number for record, _ in fresh.find(f"t{other}").parts] == [other]
    if number != 17:
        with pytest.raises(trajstore.Corrupt, match=path.name):
            fresh.find(f"t{number}")
    append(storage, fresh, 19, ["t19"])
    assert fresh.find("t19").parts


def test_merging_holds_one_column_at_a_time(tmp_path):
    tables = [make_table(number, [Line(f"t{number}-{i}", i, 1) for i in range(20_000)]) for number in range(1, 17)]
    nbytes = sum(column.nbytes for table in tables for column in table.columns)
    tracemalloc.start()
    merged = merge_tables(tables)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(merged) == 16 * 20_000
    assert peak < 2.2 * nbytes
