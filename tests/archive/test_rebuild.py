"""Rebuild: whatever of manifest, tables, archive.json or server is lost or damaged, what packs hold is there again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ulid import ULID

import trajstore
from tests.archive import sound
from tests.archive.test_stored_once import counts
from tests.archive.test_transfer import folds, packs
from tests.builders import SPEC, record_seed_case, rows
from tests.cli.running import invoke
from tests.core.packs import pack
from tests.servers import binary_of, running
from trajstore.archive.rebuild.rebuild import rebuild_archive
from trajstore.archive.record import Record
from trajstore.archive.root import ArchiveRoot
from trajstore.archive.sealed import seal
from trajstore.archive.upkeep.compaction import compact
from trajstore.archive.upkeep.garbage import find_garbage, remove_garbage
from trajstore.archive.verify.verify import verify
from trajstore.archiver import Archiver
from trajstore.opening import read_archive
from trajstore.recovery import recover

RECORDS = 18
"""One more than a lookup table covers, and then one."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of an archive, ids and folds of its trajectories; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    with trajstore.open(folder / "store", partitions=2, ack="fsync") as store:
        ids = sound.make(store, records=RECORDS)
        store.flush()
        folded = sound.folds(trajstore.open_archive(folder / "store"), ids)
    return folder / "store" / "archive", folded


@pytest.fixture
def root(made, tmp_path):
    """A copy of that archive, to be damaged."""
    return ArchiveRoot.at(shutil.copytree(made[0], tmp_path / "archive"))


def files(folder, *, under=""):
    """Content of every file by its path."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / under).rglob("*") if path.is_file()}


def whole(root, made):
    """Everything folds as it did, and verify finds nothing."""
    archive = trajstore.open_archive(root.location)
    assert sound.folds(archive, made[1]) == made[1]
    assert {summary.id for summary in archive.list()} == set(made[1])
    assert [finding for finding in verify(root.location) if finding.severity == "error"] == []


def test_sound_archive_is_not_touched(root, made):
    before = files(root.location)
    done = rebuild_archive(root, digests=True)
    assert files(root.location) == before
    assert done == type(done)()


@pytest.mark.parametrize("index", [True, False], ids=["tables", "no tables"])
@pytest.mark.parametrize("identity", [True, False], ids=["archive.json", "no archive.json"])
def test_lost_manifest_is_made_anew_byte_for_byte(root, made, index, identity):
    before = files(root.location)
    shutil.rmtree(Path(root.location) / "manifest")
    if not index:
        shutil.rmtree(Path(root.location) / "index")
    if not identity:
        (Path(root.location) / "archive.json").unlink()
    done = rebuild_archive(root)
    assert files(root.location, under="manifest") == {k: v for k, v in before.items() if k.startswith("manifest")}
    assert files(root.location).keys() == before.keys()
    assert (Path(root.location) / "archive.json").read_bytes() == before["archive.json"]
    assert done.identity is not identity
    assert not done.gaps
    assert not done.damaged
    whole(root, made)


@pytest.mark.parametrize("number", [1, 7, RECORDS])
@pytest.mark.parametrize("harm", ["remove", "truncate", "flip", "empty", "swap"])
def test_one_lost_or_damaged_record_is_made_anew_and_kept(root, made, number, harm):
    before = files(root.location)
    path = Path(root.location) / "manifest" / "00" / f"{number:08}.json"
    data = path.read_bytes()
    spoiled = {
        "truncate": data[:100],
        "flip": data.replace(b'"pack"', b'"pbck"'),
        "empty": b"",
        "swap": data.replace(b'"number": %d' % number, b'"number": %d' % (number + 1)),
    }
    path.unlink() if harm == "remove" else path.write_bytes(spoiled[harm])
    assert harm == "remove" or spoiled[harm] != data
    done = rebuild_archive(root)
    assert done.records == 1
    after = files(root.location)
    aside = after.pop(f"manifest/00/{number:08}.json.damaged", None)
    assert aside == spoiled.get(harm)
    assert after == before
    whole(root, made)


@pytest.mark.parametrize("field", ["pack", "size", "tokens", "newest", "created"])
def test_record_that_the_pack_belies_is_made_anew(root, made, field):
    before = files(root.location)
    path = Path(root.location) / "manifest" / "00" / "00000003.json"
    record = json.loads(path.read_bytes())
    if field == "pack":
        record["pack"] = f"{record['pack'][:-1]}{'0' if record['pack'][-1] != '0' else '1'}"
    elif field == "size":
        record["files"]["events/c/0"]["size"] += 1
    elif field == "tokens":
        record["counts"]["tokens"] += 1
    else:
        record[field] += 1.0
    path.write_text(json.dumps(record, indent=2))
    rebuild_archive(root)
    after = files(root.location)
    assert after.pop("manifest/00/00000003.json.damaged")
    assert after == before


def test_wrong_digest_in_a_record_is_found_when_asked_for(root, made):
    before = files(root.location)
    path = Path(root.location) / "manifest" / "00" / "00000003.json"
    record = json.loads(path.read_bytes())
    digest = record["files"]["tokens/c/0"]["sha256"]
    record["files"]["tokens/c/0"]["sha256"] = digest[::-1]
    del record["crc32"]
    path.write_bytes(seal(record))
    assert rebuild_archive(root).records == 0
    assert rebuild_archive(root, digests=True).records == 1
    assert files(root.location)["manifest/00/00000003.json"] == before["manifest/00/00000003.json"]


def test_record_of_a_damaged_pack_stays(root, made):
    """The record is right and the pack is wrong: made anew from it, the record would bless the damage."""
    before = files(root.location, under="manifest")
    record = json.loads((Path(root.location) / "manifest" / "00" / "00000003.json").read_bytes())
    shard = Path(root.location) / "packs" / record["pack"] / "tokens" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert rebuild_archive(root, digests=True).records == 0
    assert files(root.location, under="manifest") == before


@pytest.mark.parametrize("harm", ["remove", "flip", "foreign", "stale", "remove the newest"])
def test_lookup_table_is_made_anew(root, made, harm):
    before = files(root.location)
    table = Path(root.location) / "index" / "00" / "00000001-00000016.safetensors"
    other = Path(root.location) / "index" / "01" / "00000001-00000016.safetensors"
    data = bytearray(table.read_bytes())
    if harm == "remove":
        table.unlink()
    elif harm == "remove the newest":
        max(table.parent.iterdir()).unlink()
    elif harm == "flip":
        data[-3] ^= 1
        table.write_bytes(data)
    elif harm == "foreign":
        table.write_bytes(b"hello")
    else:
        table.write_bytes(other.read_bytes())
    assert rebuild_archive(root).tables == 1
    assert files(root.location).keys() == before.keys()
    whole(root, made)
    assert rebuild_archive(root).tables == 0


@pytest.mark.parametrize("harm", ["truncate", "partitions", "run"])
def test_damaged_identity_is_set_aside_and_made_anew(root, made, harm):
    path = Path(root.location) / "archive.json"
    data = path.read_bytes()
    spoiled = {
        "truncate": data[:20],
        "partitions": data.replace(b'"partitions": 2', b'"partitions": 3'),
        "run": data.replace(b'"main"', b'"mbin"'),
    }[harm]
    assert spoiled != data
    path.write_bytes(spoiled)
    assert rebuild_archive(root).identity
    assert path.read_bytes() == data
    assert path.with_name("archive.json.damaged").read_bytes() == spoiled
    whole(root, made)


def test_newer_format_is_refused_and_not_set_aside(root):
    path = Path(root.location) / "manifest" / "00" / "00000003.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 2', b'"format": 3'))
    before = files(root.location)
    with pytest.raises(trajstore.SchemaError, match="upgrade"):
        rebuild_archive(root)
    assert files(root.location) == before


def test_folder_without_packs_is_nothing_to_rebuild(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(trajstore.NotFound):
        rebuild_archive(ArchiveRoot.at(tmp_path))
    assert not (tmp_path / "archive.json").exists()


def test_archive_of_version_1_is_rebuilt(tmp_path):
    sample = Path(__file__).parent.parent / "data" / "stores" / "v1" / "archive"
    archive = shutil.copytree(sample, tmp_path / "archive")
    old = trajstore.open_archive(sample)
    expected = {summary.id: folds(old, summary.id) for summary in old.list()}
    assert expected
    shutil.rmtree(archive / "manifest")
    (archive / "archive.json").unlink()
    with contextlib.suppress(trajstore.Conflict):  # few trajectories may fit more than one number of partitions
        rebuild_archive(ArchiveRoot.at(archive))
    rebuild_archive(ArchiveRoot.at(archive), partitions=read_archive(sample).info.partitions)
    rebuilt = trajstore.open_archive(archive)
    assert {summary.id: folds(rebuilt, summary.id) for summary in rebuilt.list()} == expected
    assert [finding for finding in verify(archive) if finding.severity == "error"] == []


def archived(store):
    store.flush()
    return Archiver(store).run(once=True)


def lose_manifest(store):
    shutil.rmtree(Path(store.archive.root.location) / "manifest")


def leftover(store, id, *, number):
    """A pack that an archiver moved into place and was killed: everything of the trajectory, and no record."""
    entries, notes = store.hot.read(id)

    def die(step):
        if step == "moved":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(store, id, entries=entries, notes=notes, on_step=die)
    (name,) = {path.name for path in packs_folder(store).iterdir()} - {name[3:] for name in packs(store)}
    assert int(name[:8]) == number
    return name


def packs_folder(store):
    return Path(store.archive.root.location) / "packs" / "00"


def test_leftover_of_a_number_that_its_successor_took_is_left_out(durable):
    first = record_seed_case(durable)
    durable.flush()
    name = leftover(durable, first.id, number=1)
    archived(durable)
    expected = folds(durable, first.id)
    before = packs(durable)
    lose_manifest(durable)
    done = rebuild_archive(durable.archive.root)
    assert done.leftovers == [f"00/{name}"]
    assert packs(read_again(durable)) == before
    assert folds(trajstore.open_archive(durable.archive.root.location), first.id) == expected


def read_again(store):
    """As a process sees the archive that opens it now."""

    class Fresh:
        archive = read_archive(store.archive.root.location)
        partitions = store.partitions

    return Fresh


def test_leftover_that_holds_what_no_other_pack_does_is_kept_under_a_number_of_its_own(durable):
    """Its archiver was killed, its successor published something else first, and then the hot log was lost."""
    lost, other = record_seed_case(durable), record_seed_case(durable)
    durable.flush()
    expected = {id: folds(durable, id) for id in (lost.id, other.id)}
    name = leftover(durable, lost.id, number=1)
    pack(durable, other.id, entries=durable.hot.read(other.id)[0])
    for lose in (False, True):
        if lose:
            lose_manifest(durable)
        done = rebuild_archive(durable.archive.root)
        archive = trajstore.open_archive(durable.archive.root.location)
        assert {id: folds(archive, id) for id in expected} == expected
        assert len(done.renumbered) == (not lose)
        assert done.leftovers == ([f"00/{name}"] if lose else [])
        assert [finding for finding in verify(archive_of(durable)) if finding.severity == "error"] == []


def archive_of(store):
    return store.archive.root.location


def test_leftover_above_the_newest_record_is_taken_in(durable):
    kept, lost = record_seed_case(durable), record_seed_case(durable)
    durable.flush()
    pack(durable, kept.id, entries=durable.hot.read(kept.id)[0])
    leftover(durable, lost.id, number=2)
    expected = folds(durable, lost.id)
    assert rebuild_archive(durable.archive.root).records == 1
    assert folds(trajstore.open_archive(archive_of(durable)), lost.id) == expected
    archived(durable)
    assert folds(durable, lost.id) == expected


def test_half_uploaded_pack_is_left_alone(durable):
    """An object store has no rename: who is killed while the files go up leaves some of them."""
    kept, lost = record_seed_case(durable), record_seed_case(durable)
    durable.flush()
    pack(durable, kept.id, entries=durable.hot.read(kept.id)[0])
    folder = packs_folder(durable) / leftover(durable, lost.id, number=2)
    for part in ("events", "tokens", "logprobs", "routed"):
        shutil.rmtree(folder / part)
    before = packs(durable)
    assert rebuild_archive(durable.archive.root).records == 0
    newer = folder.rename(folder.with_name(f"00000001-{ULID()}"))  # the successor's took the number, and is older
    lose_manifest(durable)
    rebuild_archive(durable.archive.root)
    assert packs(read_again(durable)) == before
    folder = newer.rename(folder)
    shutil.rmtree(folder / "trajectories")
    done = rebuild_archive(durable.archive.root)
    assert (done.records, len(done.damaged)) == (0, 1)
    lose_manifest(durable)
    rebuild_archive(durable.archive.root)
    assert packs(read_again(durable)) == before
    archived(durable)
    assert folds(trajstore.open_archive(archive_of(durable)), lost.id) == folds(durable, lost.id)


def test_compaction_stays_one_after_its_manifest_was_lost(durable):
    ids = []
    for _ in range(3):
        ids.append(record_seed_case(durable).id)
        archived(durable)
    expected = {id: folds(durable, id) for id in ids}
    reader = durable.archive
    compact(reader, 0, list(reader.manifest(0).live()), writer="test")
    rows_stored = counts(durable)
    for gone in (False, True):
        if gone:
            remove_garbage(reader, list(find_garbage(reader, now=1e12, grace=0)))
        before = files(archive_of(durable))
        lose_manifest(durable)
        done = rebuild_archive(reader.root)
        assert (done.gaps, done.dropped, done.damaged) == ([], [], [])
        assert files(archive_of(durable)).keys() == before.keys()
        fresh = read_again(durable)
        assert [record.number for record in live(fresh)] == [4]
        assert counts(fresh) == rows_stored
        archive = trajstore.open_archive(archive_of(durable))
        assert {id: folds(archive, id) for id in ids} == expected


def live(store):
    store.archive.manifest(0).refresh()
    return store.archive.manifest(0).live()


def drop(store, numbers):
    """What retention writes."""
    manifest = store.archive.manifest(0)
    number = manifest.refresh() + 1
    manifest.append(Record(format=2, number=number, partition=0, created=0.0, writer="test", drops=numbers), [])


@pytest.mark.parametrize("how", ["tables", "lists"])
def test_dropped_trajectories_stay_dropped_where_tables_or_emptied_packs_tell(durable, how):
    grown = record_seed_case(durable)
    archived(durable)
    with durable.get(grown.id).segment(context=[9]) as segment:
        segment.tokens([1])
    ids = [grown.id]
    for _ in range(14):
        ids.append(record_seed_case(durable).id)
        archived(durable)
    drop(durable, [1])
    assert durable.archive.manifest(0).refresh() == 16
    if how == "lists":
        remove_garbage(durable.archive, list(find_garbage(durable.archive, now=1e12, grace=0)))
        shutil.rmtree(Path(archive_of(durable)) / "index")
    lose_manifest(durable)
    done = rebuild_archive(durable.archive.root)
    assert (done.dropped, done.gaps) == (["00/00000001"], [])
    archive = trajstore.open_archive(archive_of(durable))
    with pytest.raises(trajstore.NotFound, match="dropped"):
        archive.load(grown.id)
    assert {summary.id for summary in archive.list()} == set(ids[1:])


def test_gap_that_nothing_tells_of_is_filled_and_reported(durable):
    ids = []
    for _ in range(3):
        ids.append(record_seed_case(durable).id)
        archived(durable)
    expected = folds(durable, ids[2])
    shutil.rmtree(packs_folder(durable) / packs(durable)[1][3:])
    lose_manifest(durable)
    done = rebuild_archive(durable.archive.root)
    assert done.gaps == ["00/00000002"]
    assert folds(trajstore.open_archive(archive_of(durable)), ids[2]) == expected
    assert rebuild_archive(durable.archive.root) == type(done)()


def test_pack_that_cannot_be_read_keeps_its_partition_from_being_rebuilt(durable):
    """A filled number would hide what the pack holds, and `gc` remove it."""
    ids = []
    for _ in range(3):
        ids.append(record_seed_case(durable).id)
        archived(durable)
    names = packs(durable)
    shard = packs_folder(durable) / names[1][3:] / "trajectories" / "c" / "0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    lose_manifest(durable)
    done = rebuild_archive(durable.archive.root)
    assert (done.records, len(done.unreadable)) == (0, 1)
    assert names[1] in done.unreadable[0]
    result = invoke("rebuild", archive_of(durable))
    assert result.exit_code == 1
    assert names[1] in result.stderr
    result = invoke("rebuild", archive_of(durable), "--without", names[1], "--json")
    assert (result.exit_code, json.loads(result.stdout)["archive"]["gaps"]) == (0, ["00/00000002"])
    archive = trajstore.open_archive(archive_of(durable))
    assert {summary.id for summary in archive.list()} == {ids[0], ids[2]}


def test_damaged_pack_gets_a_record_and_what_it_lost_is_named(durable):
    ids = [record_seed_case(durable).id for _ in range(2)]
    archived(durable)
    (name,) = packs(durable)
    expected = folds(durable, ids[0])
    shard = packs_folder(durable) / name[3:] / "routed" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    lose_manifest(durable)
    done = rebuild_archive(durable.archive.root)
    assert done.records == 1
    assert any(ids[0] in text for text in done.damaged)
    archive = trajstore.open_archive(archive_of(durable))
    with pytest.raises(trajstore.Corrupt):
        archive.load(ids[0])
    assert archive.load(ids[0], until="1-0").at == "1-0"
    assert expected


def test_pack_of_another_run_is_left_alone(durable, tmp_path):
    id = record_seed_case(durable).id
    archived(durable)
    with trajstore.open(tmp_path / "other", partitions=1, ack="fsync") as other:
        stranger = record_seed_case(other).id
        archived(other)
        (name,) = packs(other)
        shutil.copytree(packs_folder(other) / name[3:], packs_folder(durable) / name[3:])
    lose_manifest(durable)
    done = rebuild_archive(durable.archive.root)
    assert done.foreign == [name]
    archive = trajstore.open_archive(archive_of(durable))
    assert [summary.id for summary in archive.list()] == [id] != [stranger]
    (Path(archive_of(durable)) / "archive.json").unlink()
    with pytest.raises(trajstore.Conflict, match="several"):
        rebuild_archive(durable.archive.root)


def test_archiver_that_writes_meanwhile_is_told_of(durable, monkeypatch):
    record_seed_case(durable)
    archived(durable)
    record = Path(archive_of(durable)) / "manifest" / "00" / "00000001.json"
    data = record.read_bytes()
    record.unlink()
    storage = durable.archive.root.storage
    create = storage.create

    def after_the_other(path, content):
        if path.startswith("manifest/"):
            record.write_bytes(data)
        create(path, content)

    monkeypatch.setattr(storage, "create", after_the_other)
    with pytest.raises(trajstore.Conflict, match="stop the archivers"):
        rebuild_archive(durable.archive.root)


REBUILD_AND_DIE = """
import os, signal, sys
from trajstore.archive.rebuild.rebuild import rebuild_archive
from trajstore.archive.root import ArchiveRoot

root = ArchiveRoot.at(sys.argv[1])
left = int(sys.argv[2])

def dying(method):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)
    return call

for name in ("create", "remove", "publish"):
    setattr(root.storage, name, dying(getattr(root.storage, name)))
rebuild_archive(root)
"""


def test_rebuild_killed_before_any_of_its_writes_is_finished_by_the_next(durable, tmp_path):
    lost, other = record_seed_case(durable), record_seed_case(durable)
    durable.flush()
    leftover(durable, lost.id, number=1)
    pack(durable, other.id, entries=durable.hot.read(other.id)[0])
    other = durable.get(other.id)
    other.reward(1.0)
    archived(durable)
    expected = {id: folds(durable, id) for id in (lost.id, other.id)}
    manifest = Path(archive_of(durable)) / "manifest" / "00"
    damaged = (manifest / "00000001.json").read_bytes()[:50]
    (manifest / "00000001.json").write_bytes(damaged)
    (manifest / "00000002.json").unlink()
    (Path(archive_of(durable)) / "archive.json").unlink()
    for step in range(1, 20):
        copy = shutil.copytree(archive_of(durable), tmp_path / f"copy {step}")
        arguments = [sys.executable, "-c", REBUILD_AND_DIE, str(copy), str(step)]
        code = subprocess.run(arguments, timeout=60, check=False).returncode
        rebuild_archive(ArchiveRoot.at(copy))
        archive = trajstore.open_archive(copy)
        assert {id: folds(archive, id) for id in expected} == expected
        assert [path.read_bytes() for path in (copy / "manifest" / "00").glob("*.damaged*")] == [damaged]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert step > 4


def test_lost_manifest_in_an_object_store_is_made_anew(durable, s3, tmp_path, run_name):
    url = s3.url(run_name)
    with trajstore.open(tmp_path / "s3", partitions=1, ack="fsync", archive=url, archive_options=s3.options) as store:
        ids = [record_seed_case(store).id for _ in range(2)]
        archived(store)
        store.get(ids[0]).observe(rows(2), start=0, source="trainer")
        archived(store)
        expected = {id: folds(store, id) for id in ids}
        storage = store.archive.root.storage
        before = {file.path: storage.read(file.path) for file in storage.list("")}
        storage.remove(path for path in before if not path.startswith("packs/"))
        rebuild_archive(ArchiveRoot.at(url, s3.options))
        after = {file.path: storage.read(file.path) for file in storage.list("")}
        assert after.keys() == before.keys()
        assert [path for path in before if after[path] != before[path] and not path.startswith("index/")] == []
    archive = trajstore.open_archive(url, options=s3.options)
    assert {id: folds(archive, id) for id in ids} == expected


def test_run_goes_on_from_its_archive_on_an_empty_server(own_server, run_name, tmp_path):
    url = own_server.url(run_name)
    options = {"archive": tmp_path / "archive", "timeout": 10.0}
    with trajstore.open(url, partitions=3, **options) as store:
        done, aborted = record_seed_case(store), record_seed_case(store)
        done.close("completed")
        aborted.close("aborted")
        store.flush()
        Archiver(store).run(once=True)
        incarnation = store.incarnation
        expected = {id: folds(store, id) for id in (done.id, aborted.id)}
        own_server.client().flushall()
    with pytest.raises(trajstore.Conflict, match="trajstore rebuild"):
        trajstore.open(url, **options)
    result = invoke("rebuild", url, "--archive", tmp_path / "archive", "--json")
    assert result.exit_code == 0, result.stderr
    account = json.loads(result.stdout)
    assert (account["begun"], account["unfinished"]) == (True, 1)
    with trajstore.open(url, timeout=10.0) as store:
        assert (store.incarnation, store.partitions) == (incarnation, 3)
        assert {id: folds(store, id) for id in expected} == expected
        with pytest.raises(trajstore.Conflict, match="already"):
            store.create(id=done.id)
        with store.get(aborted.id).segment(context=[9]) as segment:
            segment.tokens([1, 2])
            segment.routing(rows(12), start=0)
        store.get(aborted.id).reward(0.5)
        new = record_seed_case(store)
        store.flush()
        expected = {id: folds(store, id) for id in (done.id, aborted.id, new.id)}
        Archiver(store).run(once=True)
        assert {id: folds(store, id) for id in expected} == expected
    assert json.loads(invoke("rebuild", url, "--json").stdout)["begun"] is False


def test_embedded_store_whose_server_lost_its_data_goes_on(folder):
    with trajstore.open(folder, partitions=2, ack="fsync", routing_order="sorted") as store:
        trajectory = record_seed_case(store)
        archived(store)
        expected = folds(store, trajectory.id)
    shutil.rmtree(folder / "redis")
    moved = folder.rename(folder.with_name("moved"))
    assert recover(moved).begun
    again = moved.rename(moved.with_name("moved again"))  # the archive is found beside the server
    with trajstore.open(again, ack="fsync") as store:
        assert store.routing_order == "sorted"
        assert folds(store, trajectory.id) == expected
        store.get(trajectory.id).reward(1.0)
        archived(store)
        assert store.load(trajectory.id).reward == 1.0


def test_run_that_the_server_knows_otherwise_is_refused(own_server, run_name, tmp_path):
    url = own_server.url(run_name)
    with trajstore.open(url, archive=tmp_path / "archive") as store:
        record_seed_case(store)
        store.flush()
    own_server.client().delete(f"trajstore:{{{run_name}}}:run")
    with pytest.raises(trajstore.Conflict, match="not an empty server"):
        recover(url, archive=tmp_path / "archive")
    own_server.client().flushall()
    with pytest.raises(trajstore.NotFound, match="--archive"):
        recover(url)
    with pytest.raises(trajstore.Conflict, match=f"run={run_name}"):
        recover(own_server.url("another"), archive=tmp_path / "archive")
    with trajstore.open(url):
        pass
    with pytest.raises(trajstore.Conflict, match="incarnation"):
        recover(url, archive=tmp_path / "archive")


def opened(url):
    """The run, None if it cannot be opened."""
    try:
        return trajstore.open(url, create=False)
    except (trajstore.Conflict, trajstore.NotFound):
        return None


RECOVER_AND_DIE = """
import os, signal, sys
from trajstore.log.wire import Wire
from trajstore.recovery import recover

left = int(sys.argv[3])
call, exchange = Wire.call, Wire.exchange

def counted(method):
    def run(self, *arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *arguments)
    return run

Wire.exchange = counted(exchange)
recover(sys.argv[1], archive=sys.argv[2])
"""


@pytest.fixture
def one_server(tmp_path):
    """A real server of whichever kind there is."""
    name = next(name for name in ("redis", "valkey") if binary_of(name) is not None)
    with running(name, tmp_path / "server") as server:
        yield server


def test_recovery_killed_before_any_of_its_commands_is_finished_by_the_next(one_server, run_name, tmp_path):
    url, archive = one_server.url(run_name), tmp_path / "archive"
    with trajstore.open(url, partitions=1, archive=archive) as store:
        trajectory = record_seed_case(store)
        store.flush()
        Archiver(store).run(once=True)
        expected = folds(store, trajectory.id)
    for step in range(1, 30):
        one_server.client().flushall()
        arguments = [sys.executable, "-c", RECOVER_AND_DIE, url, str(archive), str(step)]
        code = subprocess.run(arguments, timeout=60, check=False).returncode
        store = opened(url)
        if store is not None:  # never as a run that has lost its archive
            with store:
                assert folds(store, trajectory.id) == expected
        recover(url, archive=archive)
        with trajstore.open(url, create=False) as store:
            assert folds(store, trajectory.id) == expected
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert step > 5


def test_lost_summaries_are_made_anew(durable, folder):
    trajectory = durable.create(routing=SPEC)
    durable.flush()
    durable.wire.call("DEL", durable.keys.summaries(0))
    assert durable.list() == []
    account = json.loads(invoke("rebuild", folder, "--json").stdout)
    assert account["summaries"] == 1
    assert [summary.id for summary in durable.list()] == [trajectory.id]


def test_rebuild_command_says_what_it_did(root, made):
    shutil.rmtree(Path(root.location) / "manifest")
    result = invoke("rebuild", root.location, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["archive"]["records"] > RECORDS
    assert "records" in result.stderr
    assert invoke("rebuild", f"{root.location}/nowhere").exit_code == 1


def test_list_of_another_pack_is_not_believed_and_makes_no_table(made, tmp_path):
    """Two packs in each other's place: what was `Corrupt` must not become a shorter fold, nor the exit code 0."""
    folder = tmp_path / "archive"
    shutil.copytree(made[0], folder)
    one, other = sorted(path for path in (folder / "packs" / "00").iterdir())[:2]
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    for table in (folder / "index" / "00").iterdir():
        table.unlink()
    root = ArchiveRoot.at(folder)
    with pytest.raises(trajstore.Corrupt, match="not what record"):
        trajstore.open_archive(folder).list()
    done = rebuild_archive(root)
    assert {one.name, other.name} <= {name for text in done.damaged for name in (one.name, other.name) if name in text}
    with pytest.raises(trajstore.Corrupt, match="not what record"):
        trajstore.open_archive(folder).list()


def test_file_that_is_cut_off_is_told(made, tmp_path):
    folder = tmp_path / "archive"
    shutil.copytree(made[0], folder)
    pack = max((folder / "packs" / "00").iterdir())
    os.truncate(pack / "tokens" / "c" / "0", 10)
    done = rebuild_archive(ArchiveRoot.at(folder))
    assert any(pack.name in text and "tokens/c/0" in text for text in done.damaged)


def test_pack_to_be_given_up_that_is_none_is_refused_before_anything_is_written(durable):
    """A typo must not look like a decision."""
    for _ in range(2):
        record_seed_case(durable)
        archived(durable)
    place, names = archive_of(durable), packs(durable)
    record = Path(place) / "manifest" / "00" / "00000002.json"
    record.unlink()
    before = files(place)
    for name, said in (
        (names[1][:-1] + "?", "no pack"),
        ("09/00000001-01ARZ3NDEKTSV4RRFFQ69G5FAV", "no pack"),
        ("nonsense", "no pack"),
        (names[0], f"--pack {names[0]} --lost"),
        (names[1], "can be read"),
    ):
        result = invoke("rebuild", place, "--without", name)
        assert (result.exit_code, said in result.stderr, files(place)) == (1, True, before), name
    assert invoke("rebuild", place).exit_code == 0
    assert record.exists()


def test_pack_that_was_given_up_is_a_leftover_from_then_on(durable):
    ids = []
    for _ in range(3):
        ids.append(record_seed_case(durable).id)
        archived(durable)
    name = packs(durable)[1]
    shard = packs_folder(durable) / name[3:] / "trajectories" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    lose_manifest(durable)
    assert invoke("rebuild", archive_of(durable), "--without", name).exit_code == 0
    again = invoke("rebuild", archive_of(durable), "--json")
    assert (again.exit_code, json.loads(again.stdout)["archive"]["leftovers"]) == (0, [name])
    for command in ("ls", "verify"):
        assert invoke(command, archive_of(durable)).exit_code == 0


def test_number_of_partitions_that_the_archive_belies_is_refused(root):
    before = files(root.location)
    for harm in (None, "archive.json"):
        if harm:
            (Path(root.location) / harm).unlink()
            before = files(root.location)
        result = invoke("rebuild", root.location, "--partitions", "3")
        assert (result.exit_code, "--partitions" in result.stderr, files(root.location)) == (1, True, before)
    assert invoke("rebuild", root.location, "--partitions", "2").exit_code == 0


def test_number_of_partitions_that_packs_of_version_1_belie_is_refused(tmp_path):
    sample = Path(__file__).parent.parent / "data" / "stores" / "v1" / "archive"
    archive = shutil.copytree(sample, tmp_path / "archive")
    (archive / "archive.json").unlink()
    right = read_archive(sample).info.partitions
    with pytest.raises(trajstore.Conflict, match="--partitions"):
        rebuild_archive(ArchiveRoot.at(archive), partitions=right + 7)
    rebuild_archive(ArchiveRoot.at(archive), partitions=right)


def test_options_of_a_run_and_of_an_archive_are_not_mixed(root, folder):
    assert invoke("rebuild", root.location, "--archive", folder).exit_code == 2
    assert invoke("rebuild", root.location, "--routing-order", "sorted").exit_code == 2
    trajstore.open(folder).close()
    assert invoke("rebuild", folder, "--partitions", "2").exit_code == 2


def test_restored_older_manifest_shows_older_states_until_it_is_rebuilt(durable, tmp_path):
    """As `docs/transfer.md` says of a copy of `manifest/` and `index/` that is older than `packs/`."""
    grown, deleted = record_seed_case(durable), record_seed_case(durable)
    archived(durable)
    place = Path(archive_of(durable))
    for part in ("manifest", "index"):
        shutil.copytree(place / part, tmp_path / part)
    durable.get(grown.id).close("completed")
    durable.delete(deleted.id)
    archived(durable)
    for part in ("manifest", "index"):
        shutil.rmtree(place / part)
        shutil.copytree(tmp_path / part, place / part)
    found = {summary.id: summary.status for summary in trajstore.open_archive(place).list()}
    assert found == {grown.id: "open", deleted.id: "open"}
    assert any(finding.kind == "leftover" and finding.severity == "warning" for finding in verify(place))
    assert rebuild_archive(ArchiveRoot.at(place)).records == 1
    assert [(one.id, one.status) for one in trajstore.open_archive(place).list()] == [(grown.id, "completed")]
