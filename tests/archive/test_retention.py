"""What may go for good, by age and by name; and which files `gc` removes, and which it never touches."""

import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest
from click.testing import CliRunner
from ulid import ULID

import trajstore
from tests.archive.test_archiver import everything
from tests.archive.test_compaction import collect, compact_all, compacted, data_files, live
from tests.builders import record_seed_case, rows
from trajstore.archive.arrays.builder import encode_array
from trajstore.archive.index import encode_table, make_table
from trajstore.archive.pack import PackedTrajectory, encode_trajectory
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import FileDigest, PackCounts, Record
from trajstore.archive.root import ArchiveInfo, ArchiveRoot
from trajstore.archive.storage.local import LocalStorage
from trajstore.archive.storage.protocol import parts_of
from trajstore.archive.upkeep.garbage import find_foreign, find_garbage, remove_garbage
from trajstore.archive.upkeep.ledger import Ledger
from trajstore.archive.upkeep.retention import drop, expired, named, nothing_hot, still_hot
from trajstore.archive.writer import PackWriter
from trajstore.archiver import Archiver
from trajstore.cli.upkeep import compact, gc
from trajstore.opening import read_archive
from trajstore.summary import Summary

HOUR = 3600.0


def finished(store):
    trajectory = record_seed_case(store)
    trajectory.close("completed")
    return trajectory.id


def busy(store):
    return still_hot(store.wire, store.keys)


def old(store, *, before=None):
    """Numbers of the records whose packs have expired."""
    at = time.time() + HOUR if before is None else before
    return [record.number for record in expired(Ledger(store.archive.manifest(0)), before=at, busy=busy(store))]


def drop_these(reader, records, *, busy=nothing_hot, lost=()):
    """Drop these packs of partition 0."""
    number = reader.manifest(0).refresh(without=lost) + 1
    return drop(reader, 0, records, number=number, writer="test", busy=busy, lost=lost)


def drop_old(store):
    records = expired(Ledger(store.archive.manifest(0)), before=time.time() + HOUR, busy=busy(store))
    return drop_these(store.archive, records, busy=busy(store))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(which, *arguments):
    """(document on stdout, exit code) of a command with `--json`."""
    result = CliRunner().invoke(which, [*map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def test_pack_expires_with_its_newest_trajectory(durable, archive):
    finished(durable)
    archive()
    between = time.time()
    finished(durable)
    archive()
    assert old(durable) == [1, 2]
    assert old(durable, before=between) == [1]
    assert old(durable, before=between - HOUR) == []


def test_pack_stays_while_a_trajectory_in_it_goes_on_elsewhere(durable, archive):
    trajectory = record_seed_case(durable)
    finished(durable)
    archive()
    between = time.time()
    durable.get(trajectory.id).close("completed")
    archive()
    assert old(durable, before=between) == []
    assert old(durable) == [1, 2]


def test_open_trajectory_keeps_its_pack_however_old_it_is(durable, archive, folder, caplog):
    """A rollout may wait for days between two turns; whoever has given it up closes or deletes it."""
    trajectory = record_seed_case(durable)
    finished(durable)
    archive()
    for reader in (durable.archive, read_archive(folder)):
        caplog.clear()
        assert expired(Ledger(reader.manifest(0)), before=time.time() + HOUR, busy=nothing_hot) == []
        assert trajectory.id in caplog.text
    durable.get(trajectory.id).close("aborted")
    archive()
    assert old(durable) == [1, 2], "an aborted one goes by its age"


def test_pack_stays_while_the_hot_log_holds_something_of_it(durable, archive):
    trajectory = record_seed_case(durable)
    trajectory.close("aborted")
    archive()
    assert old(durable) == [1]
    segment = durable.get(trajectory.id).segment(context=[1])
    segment.tokens([2])
    durable.flush()
    assert old(durable) == []
    segment.close("stop")
    durable.get(trajectory.id).close("completed")
    archive()
    assert old(durable) == [1, 2]
    durable.get(trajectory.id).observe(rows(3), start=0, source="trainer")
    durable.flush()
    assert old(durable) == []


def test_pack_to_which_lookup_tables_do_not_lead_is_not_dropped(durable, archive, folder):
    """Whoever cannot be told the state of its trajectories does not know that they have come to their end."""
    ids = []
    for _ in range(2):
        ids.append(finished(durable))
        archive()
    table = folder / "archive" / "index" / "00" / "00000002-00000002.safetensors"
    table.write_bytes(encode_table(make_table(2, []), incarnation=durable.archive.info.incarnation, partition=0))
    reader = read_archive(folder)
    heard = []
    at = time.time() + HOUR
    found = expired(Ledger(reader.manifest(0)), before=at, busy=nothing_hot, on_corrupt=heard.append)
    assert [one.number for one in found] == [1]
    assert ids[1] in str(heard)
    pack = live(reader)[1].pack
    with pytest.raises(trajstore.Corrupt, match=ids[1]):
        named(reader, [pack], whole=False, busy=nothing_hot)


def test_what_retention_dropped_is_not_found_and_its_id_stays_taken(durable, archive, folder):
    id = finished(durable)
    archive(grace_seconds=0.001)
    dropped = drop_old(durable)
    assert (dropped.drops, dropped.pack) == ([1], "")
    kept = finished(durable)
    archive()
    for collected in (False, True):
        if collected:
            collect(durable.archive)
            assert data_files(durable.archive) == {record.pack for record in live(durable.archive)}
        for store in (durable, trajstore.open_archive(folder)):
            with pytest.raises(trajstore.NotFound, match="dropped by retention"):
                store.load(id)
            assert [summary.id for summary in store.list()] == [kept]
        with pytest.raises(trajstore.Conflict, match="never reused"):
            durable.create(id=id)
    assert everything(trajstore.open_archive(folder), kept) == everything(durable, kept)


def test_ids_stay_taken_when_lookup_tables_are_lost(durable, archive, folder):
    id = finished(durable)
    archive(grace_seconds=0.001)
    drop_old(durable)
    for _ in range(15):
        finished(durable)
        archive()
    collect(durable.archive)
    compacted(durable.archive)
    collect(durable.archive)
    for table in (folder / "archive" / "index" / "00").iterdir():
        table.unlink()
    offline = trajstore.open_archive(folder)
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        offline.load(id)
    assert len(offline.list()) == 15


def test_named_pack_is_refused_where_its_trajectories_go_on_in_another(durable, archive):
    trajectory = record_seed_case(durable)
    archive()
    durable.get(trajectory.id).close("completed")
    archive()
    first, second = [record.pack for record in live(durable.archive)]
    reader = durable.archive
    with pytest.raises(trajstore.Conflict, match=trajectory.id) as caught:
        named(reader, [first], whole=False, busy=busy(durable))
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert [record.pack for record in named(reader, [second, first], whole=False, busy=busy(durable))] == [
        first,
        second,
    ]
    assert [record.pack for record in named(reader, [first], whole=True, busy=busy(durable))] == [first]
    durable.get(trajectory.id).observe(rows(3), start=0, source="trainer")
    durable.flush()
    with pytest.raises(trajstore.Conflict, match="hot log"):
        named(reader, [first, second], whole=False, busy=busy(durable))


@pytest.mark.parametrize("name", ["00/00000009-01ARZ3NDEKTSV4RRFFQ69G5FAV", "7/1-X", "nonsense", "", "00/-1", "../x"])
def test_there_is_no_such_pack(durable, archive, name):
    finished(durable)
    archive()
    with pytest.raises(trajstore.NotFound, match="no live pack"):
        named(durable.archive, [name], whole=False, busy=nothing_hot)


def test_rest_of_a_whole_trajectory_goes_with_the_next_compaction(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    durable.get(trajectory.id).close("completed")
    kept = finished(durable)
    archive()
    before = everything(durable, kept)
    first = live(durable.archive)[0]
    drop_these(durable.archive, [first])
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        durable.load(trajectory.id)
    assert compact_all(durable.archive) == 1
    (record,) = live(durable.archive)
    assert record.counts.trajectories == 1
    collect(durable.archive)
    offline = trajstore.open_archive(folder)
    assert everything(offline, kept) == before
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        offline.load(trajectory.id)


def test_drop_that_another_record_overtook_is_fenced(durable, archive, folder):
    finished(durable)
    archive()
    records = live(durable.archive)
    number = durable.archive.manifest(0).refresh() + 1
    other = read_archive(folder)
    compacted(other)
    with pytest.raises(trajstore.Fenced):
        drop(durable.archive, 0, records, number=number, writer="test", busy=nothing_hot)
    assert [record.number for record in live(other)] == [2]


class _Counting(LocalStorage):
    """Local files whose writing calls are counted."""

    def __init__(self, path):
        super().__init__(path)
        self.calls = []

    def create(self, path, data):
        self.calls.append(("create", path))
        super().create(path, data)

    def remove(self, paths):
        self.calls.append(("remove", len(paths := list(paths))))
        super().remove(paths)


def many(folder, *, packs, each):
    """An archive of packs, of 1970, that have nothing but a list of `each` trajectories."""
    storage = _Counting(folder)
    root = ArchiveRoot(storage)
    root.claim(ArchiveInfo(format=2, run="r", incarnation="I", partitions=1))
    reader = ArchiveReader(root, root.require())
    for number in range(1, packs + 1):
        lines = []
        for i in range(each):
            summary = Summary(id=f"t{number}-{i}", status="completed", updated=1.0, last="1-0")
            lines.append(PackedTrajectory(id=summary.id, first="1-0", last="1-0", summary=summary))
        data = b"".join(map(encode_trajectory, lines))
        files = {}
        for array in ("trajectories", "events"):
            encoded = encode_array(np.frombuffer(data, "u1"), chunk_bytes=1 << 16).files
            files |= {f"{array}/{name}": b"".join(parts_of(body)) for name, body in encoded.items()}
        pack = f"00/{number:08}-{ULID()}"
        storage.publish(f"packs/{pack}", files, lambda _: None)
        record = Record(
            format=2,
            number=number,
            partition=0,
            created=1.0,
            newest=1.0,
            writer="t",
            pack=pack,
            counts=PackCounts(trajectories=each),
            files={name: FileDigest(len(body), hashlib.sha256(body).hexdigest()) for name, body in files.items()},
        )
        reader.manifest(0).append(record, lines)
    storage.calls.clear()
    return reader, storage


@pytest.mark.parametrize("each", [10, 1000])
def test_dropping_takes_as_many_operations_however_many_trajectories_there_are(tmp_path, each):
    """FastDeploy #6604: clearing its routing store key by key, a million keys took hours."""
    reader, storage = many(tmp_path, packs=4, each=each)
    asked = []

    def busy(ids):
        asked.append(len(ids))
        return set()

    records = expired(Ledger(reader.manifest(0)), before=2.0, busy=busy)
    drop_these(reader, records, busy=busy)
    found = list(find_garbage(reader, now=time.time() + 1, grace=0.0))
    remove_garbage(reader, found)
    assert asked == [each] * 8, "asked for each pack when it is chosen, and right before the record"
    assert [kind for kind, _ in storage.calls] == ["create", "create", "remove"], "a record, its table, the files"
    assert storage.calls[2] == ("remove", 4 * 2), "two files of `events` in each pack"


def test_hot_log_is_asked_for_a_thousand_trajectories_at_once(durable):
    sent = []
    exchange = durable.wire.exchange

    def listen(commands):
        sent.append(len(commands))
        return exchange(commands)

    durable.wire.exchange = listen
    try:
        assert busy(durable)([f"t{i}" for i in range(2500)]) == set()
    finally:
        durable.wire.exchange = exchange
    assert sent == [2000, 2000, 1000]


def test_replaced_files_stay_for_the_grace_and_live_ones_for_ever(durable, archive, folder):
    for _ in range(2):
        finished(durable)
        archive()
    compacted(durable.archive)
    now = time.time()
    assert list(find_garbage(durable.archive, now=now, grace=600.0)) == []
    found = list(find_garbage(durable.archive, now=now + 601, grace=600.0))
    assert {garbage.reason for garbage in found} == {"replaced or dropped"}
    (record,) = live(durable.archive)
    named_by_live = {f"packs/{record.pack}/{name}" for name in record.files}
    assert not named_by_live & {path for garbage in found for path in garbage.files}
    remove_garbage(durable.archive, found)
    assert data_files(durable.archive) == {record.pack}
    remove_garbage(durable.archive, found)
    assert list(find_garbage(durable.archive, now=now + 10**6, grace=0.0)) == []


def orphan(folder, number, *, age):
    """A pack that no record names, as a crash leaves it: what is in it was archived again."""
    packs = folder / "archive" / "packs" / "00"
    home = packs / f"{number:08}-{ULID()}"
    shutil.copytree(min(packs.iterdir()), home)
    for path in home.rglob("*"):
        os.utime(path, (time.time() - age,) * 2)
    return home


def test_a_crashs_pack_goes_once_no_record_can_name_it_any_more(durable, archive, folder):
    """An archiver that was paused before its record is still there: while its number is free, it may go on."""
    finished(durable)
    archive()
    lost, fresh, pending = orphan(folder, 1, age=7200), orphan(folder, 1, age=60), orphan(folder, 2, age=7200)
    (found,) = collect(durable.archive)
    assert found.path.endswith(lost.name), found
    assert (lost.exists(), fresh.exists(), pending.exists()) == (False, True, True)
    finished(durable)
    archive()
    (found,) = collect(durable.archive)
    assert found.path.endswith(pending.name)


def test_what_killed_processes_staged_goes_after_an_hour(durable, archive, folder):
    finished(durable)
    archive()
    place = folder / "archive"
    staged = place / "staging" / str(ULID.from_timestamp(time.time() - 7200)) / "tokens" / "zarr.json"
    at_work = place / "staging" / str(ULID()) / "zarr.json"
    temporary = place / "manifest" / "00" / ".00000002.json.123-456"
    for path, age in ((staged, 7200), (at_work, 0), (temporary, 7200)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    assert len(collect(durable.archive)) == 2
    assert (staged.exists(), at_work.exists(), temporary.exists()) == (False, True, False)


FOREIGN = (
    "notes.txt",
    "packs/readme",
    "packs/00/notes/x",
    "packs/99/00000001-01ARZ3NDEKTSV4RRFFQ69G5FAV/zarr.json",
    "manifest/00/copy.json",
    "index/00/x",
    "staging/mine/x",
)


def test_foreign_files_are_told_and_never_removed(durable, archive, folder):
    finished(durable)
    archive()
    inside = f"packs/{live(durable.archive)[0].pack}/tokens/.DS_Store"
    compacted(durable.archive)
    for name in (*FOREIGN, inside):
        path = folder / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        os.utime(path, (1, 1))
    collect(durable.archive)
    assert sorted(file.path for file in find_foreign(durable.archive)) == sorted((*FOREIGN, inside))
    assert all((folder / "archive" / name).read_bytes() == b"mine" for name in (*FOREIGN, inside))


def test_dry_run_tells_the_same_and_changes_nothing(durable, archive, folder):
    for _ in range(3):
        finished(durable)
        archive()
    compacted(durable.archive, live(durable.archive)[:2])
    lost = orphan(folder, 1, age=7200)
    before = tree(folder / "archive")
    arguments = (folder, "--older-than", "0s", "--grace", "0s")
    told = command(gc, *arguments, "--dry-run")
    assert tree(folder / "archive") == before
    assert (told.pop("dry_run"), len(told["dropped"]), told["foreign"]) == (True, 2, [])
    assert {part["path"].rpartition("/")[2] for part in told["removed"]} > {lost.name}
    done = command(gc, *arguments)
    assert done.pop("dry_run") is False
    assert done == told
    gone = sum(len(data) for data in before.values()) - sum(
        len(data) for path, data in tree(folder / "archive").items() if path in before
    )
    assert done["bytes"] == gone
    assert durable.list() == []


def test_gc_without_a_server_goes_by_age_and_name(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    durable.get(trajectory.id).close("completed")
    archive()
    place = folder / "archive"
    first, second = [record.pack for record in live(durable.archive)]
    assert command(gc, place, "--older-than", "1h")["dropped"] == []
    with pytest.raises(trajstore.Conflict, match="whole-trajectories"):
        command(gc, place, "--pack", first)
    told = command(gc, place, "--pack", second, "--whole-trajectories")
    assert [pack["pack"] for pack in told["dropped"]] == [second]
    with pytest.raises(trajstore.NotFound, match="dropped"):
        durable.load(trajectory.id)


def test_gc_of_nothing_named_drops_nothing(durable, archive, folder):
    id = finished(durable)
    archive()
    told = command(gc, folder)
    assert (told["dropped"], told["removed"]) == ([], [])
    durable.load(id)


@pytest.mark.parametrize("bad", ["soon", "-3d", "3 y", "", "nan", "1e3"])
def test_bad_durations_are_refused(folder, bad):
    result = CliRunner().invoke(gc, [str(folder), "--older-than", bad])
    assert result.exit_code == 2
    assert "duration" in result.output


def test_compact_command_works_with_and_without_the_server(durable, archive, folder):
    ids, before = [], {}
    for place in (folder, folder / "archive"):
        for _ in range(8):
            ids.append(finished(durable))
            archive()
        before = {id: everything(durable, id) for id in ids}
        told = command(compact, place)
        assert (told["compactions"], told["packs"]) == (1, 8 if place == folder else 9)
        assert {id: everything(durable, id) for id in ids} == before
    assert len(live(durable.archive)) == 1


def test_compact_command_tells_of_damage_and_goes_on(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=2, ack="fsync") as store:
        ids = {0: [], 1: []}
        while min(map(len, ids.values())) < 8:
            id = finished(store)
            ids[store.keys.partition(id)].append(id)
            store.flush()
            Archiver(store).run(once=True)
        packs = {partition: live(store.archive, partition) for partition in ids}
        path = tmp_path / "store" / "archive" / "packs" / packs[0][0].pack / "events" / "c" / "0"
        path.write_bytes(b"")
        result = CliRunner().invoke(compact, [str(tmp_path / "store")])
        assert (result.exit_code, packs[0][0].pack in result.stderr) == (1, True)
        assert len(live(store.archive, 0)) == len(packs[0])
        assert len(live(store.archive, 1)) == 1


def test_retention_on_an_object_store(s3, tmp_path):
    where = s3.url(f"retention-{tmp_path.name}")
    with trajstore.open(
        tmp_path / "store", archive=where, archive_options=s3.options, partitions=1, ack="fsync"
    ) as store:
        ids = []
        for _ in range(2):
            ids.append(finished(store))
            store.flush()
            Archiver(store).run(once=True)
        kept = everything(store, ids[1])
        drop_these(store.archive, live(store.archive)[:1])
        assert [file.path for file in find_foreign(store.archive)] == []
        collect(store.archive)
        offline = trajstore.open_archive(where, options=s3.options)
        with pytest.raises(trajstore.NotFound, match="dropped"):
            offline.load(ids[0])
        assert everything(offline, ids[1]) == kept
        assert data_files(store.archive) == {record.pack for record in live(store.archive)}


def test_pack_whose_record_was_lost_is_kept_where_it_is_the_only_copy(durable, archive, folder):
    """A manifest restored from an older copy, and written on: the number is another pack's now."""
    lost = record_seed_case(durable)
    archive(grace_seconds=0.001)
    place = folder / "archive"
    shutil.rmtree(place / "manifest")
    shutil.rmtree(place / "index")
    other = trajstore.open_archive(place)._view._archive()
    kept = {path.relative_to(place) for path in (place / "packs").rglob("*") if path.is_file()}
    (pack,) = (path.name for path in (place / "packs" / "00").iterdir())
    writer = PackWriter(other.root, other.info, 0, None)
    writer.add("new", [], summary=None)
    writer.publish(other.manifest(0), 1, writer="t")
    found = list(find_garbage(other, now=time.time() + 10**6, grace=0.0))
    assert not any(pack in garbage.path for garbage in found), f"only there is {lost.id}"
    remove_garbage(other, found)
    assert all((place / path).exists() for path in kept)
