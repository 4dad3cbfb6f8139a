"""Export and import: copies fold as their source does, nothing is added twice, conflicts are named before all else."""

import json
import math
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.cli.running import invoke
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.root import ArchiveInfo, ArchiveRoot
from trajstore.archive.transfer.copies import not_held
from trajstore.archive.transfer.source import Source, payload_bytes
from trajstore.archive.upkeep.compaction import compact
from trajstore.archive.upkeep.garbage import find_garbage, remove_garbage
from trajstore.archive.writer import PackWriter, StagedEntry
from trajstore.archiver import Archiver
from trajstore.blob import to_blob
from trajstore.entries import partition_of
from trajstore.events import EventId, LateRouting, PayloadInfo
from trajstore.exchange import export, import_archive
from trajstore.opening import read_archive

POLICIES = ("last_segment_wins", "as_sampled")


def folds(store, id):
    """Every fold at every event, as bytes, and every recording's rows."""
    found = {
        (policy, event.id): to_blob(store.load(id, policy=policy, until=event.id))
        for policy in POLICIES
        for event in store.events(id)
    }
    found |= {f"now {policy}": to_blob(store.load(id, policy=policy)) for policy in POLICIES}
    return found | {
        (note.id,): note.payload and (note.payload.nbytes, note.payload.crc, note.nonce) for note in store.notes(id)
    }


def copied(event):
    """What a copy of an event keeps."""
    return event.id, event.nonce, event.time, event.type


def populate(store, archive):
    """Archived, half archived, hot and open trajectories, with and without routing, with notes; by what they are."""
    ids = {}
    done = record_seed_case(store, group="g")
    done.reward(1.0)
    done.close("completed")
    ids["archived"] = done.id
    half = record_seed_case(store, group="g")
    ids["half"] = half.id
    archive()
    with store.get(half.id).segment(context=[7]) as segment:
        segment.tokens([8, 9])
        segment.routing(rows(12), start=0)
    late = store.get(half.id)
    late.observe(rows(3), start=2, source="trainer", weight_version="v9")
    late.late_routing(segment=0, rows=rows(4, seed=3), start=1)
    plain = store.create(group="h")
    with plain.segment(context=np.arange(300)) as segment:
        segment.tokens(np.arange(200), np.full(200, math.nan))
    plain.close("aborted")
    ids["plain"] = plain.id
    growing = store.create(routing=SPEC)
    segment = growing.segment(context=[1, 2])
    segment.tokens([3])
    segment.routing(rows(2), start=0)
    ids["open"] = growing.id
    store.flush()
    return ids


@pytest.fixture
def other(tmp_path):
    """Another run with an archive, of another number of partitions."""
    with trajstore.open(tmp_path / "other", partitions=3, ack="fsync") as store:
        yield store


def archive_here(store):
    store.flush()
    return Archiver(store).run(once=True)


def packs(store):
    return [
        record.pack
        for partition in range(store.partitions)
        for manifest in [store.archive.manifest(partition)]
        if manifest.refresh() is not None
        for record in manifest.records()
    ]


@pytest.mark.parametrize("source", ["store", "archive"])
def test_export_folds_as_its_source_at_every_event(durable, archive, tmp_path, source):
    ids = populate(durable, archive)
    if source == "archive":
        archive()
        del ids["open"]  # an unfinished epoch stays in the hot log
    reading = durable if source == "store" else trajstore.open_archive(durable.archive.root.location)
    done = export(durable if source == "store" else durable.archive, tmp_path / "copy")
    exported = trajstore.open_archive(tmp_path / "copy")
    expected = {id: folds(reading, id) for id in (s.id for s in reading.list())}
    assert set(ids.values()) <= set(expected)
    assert {summary.id: folds(exported, summary.id) for summary in exported.list()} == expected
    assert exported.list() == reading.list()
    for id in expected:
        assert list(map(copied, exported.events(id))) == list(map(copied, reading.events(id)))
        assert list(map(copied, exported.notes(id))) == list(map(copied, reading.notes(id)))
    assert done.trajectories == done.checked == len(expected)
    assert done.notes == 2


def test_export_is_an_archive_of_its_own(durable, archive, tmp_path):
    populate(durable, archive)
    export(durable, tmp_path / "copy")
    info = read_archive(tmp_path / "copy").info
    assert (info.run, info.partitions) == (durable.run, durable.partitions)
    assert info.incarnation != durable.incarnation


def test_export_selects_by_id_group_and_status(durable, archive, tmp_path):
    ids = populate(durable, archive)

    def selected(name, **options):
        export(durable, tmp_path / name, **options)
        return {summary.id for summary in trajstore.open_archive(tmp_path / name).list()}

    assert selected("ids", ids=[ids["open"], ids["plain"]]) == {ids["open"], ids["plain"]}
    assert selected("groups", groups=["h"]) == {ids["plain"]}
    assert selected("statuses", statuses=["completed", "aborted"]) == {ids["archived"], ids["plain"]}
    assert selected("both", groups=["g"], statuses=["open"]) == {ids["half"]}
    for wrong, message in (
        ({"statuses": ["done"]}, "status"),
        ({"ids": "one"}, "ids are several"),
        ({"groups": "h"}, "groups are several"),
        ({"options": {"region": "x"}}, "is a folder"),
    ):
        with pytest.raises(trajstore.SchemaError, match=message):
            export(durable, tmp_path / "wrong", **wrong)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"ids": ["nobody"]}, "nobody"),
        ({"groups": ["nobody"]}, "no trajectory of group nobody; nothing was written"),
        ({"groups": ["h", "nobody", "noone"]}, "group nobody, noone"),
        ({"statuses": ["failed"]}, "none that the selection means; nothing was written"),
        ({"groups": ["h"], "statuses": ["completed"]}, "none that the selection means"),
    ],
)
def test_export_of_what_is_not_there_writes_nothing(durable, archive, tmp_path, selection, message):
    ids = populate(durable, archive)
    archive()
    if "ids" in selection:
        selection = {"ids": [ids["archived"], ids["half"], *selection["ids"]]}
    for source in (durable, durable.archive):
        with pytest.raises(trajstore.NotFound, match=message):
            export(source, tmp_path / "copy", **selection)
    assert not (tmp_path / "copy").exists()


def test_export_of_an_empty_run_and_import_of_an_empty_archive_write_nothing(durable, tmp_path, other):
    with pytest.raises(trajstore.NotFound, match="no trajectory to export"):
        export(durable, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(trajstore.NotFound, match="no trajectory to import"):
        import_archive(other, read_archive(durable.archive.root.location))
    assert packs(other) == []


def test_export_of_nothing_is_an_error_of_the_command(durable, archive, folder, tmp_path):
    populate(durable, archive)
    result = invoke("export", folder, tmp_path / "copy", "--group", "nobody")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no trajectory of group nobody; nothing was written" in result.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("archived", [False, True])
def test_deleted_trajectories_are_left_out_of_an_export(durable, archive, tmp_path, archived):
    ids = populate(durable, archive)
    durable.delete(ids["archived"])
    if archived:
        archive()
    export(durable, tmp_path / "copy")
    exported = {summary.id for summary in trajstore.open_archive(tmp_path / "copy").list()}
    assert exported == {ids["half"], ids["plain"], ids["open"]}
    with pytest.raises(trajstore.NotFound):
        export(durable, tmp_path / "named", ids=[ids["archived"]])


def test_export_stores_rows_once_and_bounds_its_packs(durable, archive, tmp_path):
    recorded = rows(2000)
    trajectory = durable.create(routing=SPEC)
    for index in range(4):
        with durable.get(trajectory.id).segment(context=[1] if index == 0 else []) as segment:
            segment.tokens(np.arange(400))
            segment.routing(recorded[: 400 * (index + 1)], start=0)
            segment.close("stop" if index == 3 else "abort")
    durable.flush()
    export(durable, tmp_path / "one")
    one = read_archive(tmp_path / "one")
    assert one.manifest(0).refresh() == 1
    assert one.manifest(0).record(1).counts.rows == 1600
    export(durable, tmp_path / "many", pack_bytes=4000)
    many = read_archive(tmp_path / "many")
    assert many.manifest(0).refresh() > 2
    assert sum(record.counts.rows for record in many.manifest(0).live()) == 1600
    assert folds(trajstore.open_archive(tmp_path / "many"), trajectory.id) == folds(durable, trajectory.id)


def test_export_wants_an_empty_place_and_an_interrupted_one_is_no_archive(durable, archive, tmp_path):
    populate(durable, archive)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    with pytest.raises(trajstore.Conflict, match=r"mine\.txt"):
        export(durable, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(durable, tmp_path / "copy", pack_bytes=1, on_progress=stop)
    with pytest.raises(trajstore.NotFound):
        read_archive(tmp_path / "copy")


@pytest.mark.parametrize("how", ["archived", "compacted"])
def test_payloads_that_are_moved_while_they_are_copied_are_found_again(durable, archive, how):
    done = record_seed_case(durable)
    with durable.get(done.id).segment(context=np.arange(400)) as segment:
        segment.tokens(np.arange(300), np.full(300, -1.0))
        segment.routing(rows(709), start=0)
    durable.flush()
    if how == "compacted":
        archive()
    source = Source(durable.hot, durable.archive)
    whole = source.read(done.id)
    before = list(source.stage(done.id, whole.entries))
    if how == "archived":
        archive()
    else:
        manifest = durable.archive.manifest(0)
        manifest.refresh()
        compact(durable.archive, 0, list(manifest.live()), writer="test")
        remove_garbage(durable.archive, list(find_garbage(durable.archive, now=1e12, grace=0)))
    after = list(source.stage(done.id, whole.entries))
    assert [(e.at, e.nonce, e.digest, e.payloads) for e in after] == [
        (e.at, e.nonce, e.digest, e.payloads) for e in before
    ]
    assert sum(len(data) for entry in after for data in entry.payloads) == payload_bytes(whole.entries)


def meddle(location, id):
    """Somebody else's late recording in a copy that is being written, under the number that its writer wants."""
    root = ArchiveRoot.at(location)
    info = ArchiveInfo(format=2, run="main", incarnation="somebody", partitions=1)
    manifest = ArchiveReader(root, info).manifest(0)
    data = rows(4, seed=9).tobytes()
    late = LateRouting(segment=0, start=0, rows=4, payload=PayloadInfo(nbytes=len(data), crc=zlib.crc32(data)))
    writer = PackWriter(root, info, 0, SPEC)
    writer.add(id, [StagedEntry(EventId(1, 0), True, 7, "0" * 32, 0.0, [late], [data])], summary=None)
    writer.publish(manifest, manifest.refresh() + 1, writer="somebody")


def test_export_finds_a_copy_that_folds_otherwise(durable, archive, tmp_path):
    ids = populate(durable, archive)

    def on_progress(done):
        if done.trajectories == 4 and not done.checked:
            meddle(tmp_path / "copy", ids["archived"])

    with pytest.raises(trajstore.Corrupt, match=f"{ids['archived']} does not fold"):
        export(durable, tmp_path / "copy", on_progress=on_progress)
    with pytest.raises(trajstore.NotFound):
        read_archive(tmp_path / "copy")
    export(durable, tmp_path / "unchecked", check=False)
    read_archive(tmp_path / "unchecked")


@pytest.mark.parametrize("partitions", [1, 2, 3, 6])
def test_imported_trajectories_are_the_same_whatever_the_partitions(durable, archive, tmp_path, partitions):
    ids = populate(durable, archive)
    before = {id: folds(durable, id) for id in ids.values()}
    listed = durable.list()
    with trajstore.open(tmp_path / "two", partitions=2, ack="fsync") as two:
        export(durable, tmp_path / "copy")
        assert import_archive(two, read_archive(tmp_path / "copy")).added == len(ids)
        export(two, tmp_path / "copy of two")
    with trajstore.open(tmp_path / "target", partitions=partitions, ack="fsync") as target:
        done = import_archive(target, read_archive(tmp_path / "copy of two"))
        assert (done.added, done.continued, done.known, done.conflicts) == (len(ids), 0, 0, 0)
        assert {id: folds(target, id) for id in ids.values()} == before
        assert target.list() == listed
        for pack in packs(target):
            assert {partition_of(line.id, partitions) for line in lines(target, pack)} == {int(pack[:2])}


def lines(store, pack):
    manifest = store.archive.manifest(int(pack[:2]))
    return manifest.lines(next(record for record in manifest.records() if record.pack == pack))


def test_second_import_adds_nothing(durable, archive, tmp_path, other):
    populate(durable, archive)
    export(durable, tmp_path / "copy")
    first = import_archive(other, read_archive(tmp_path / "copy"))
    before = packs(other)
    second = import_archive(other, read_archive(tmp_path / "copy"))
    assert (second.added, second.known, second.packs) == (0, first.added, 0)
    assert packs(other) == before


def test_import_into_its_own_run_adds_nothing(durable, archive, tmp_path):
    ids = populate(durable, archive)
    export(durable, tmp_path / "copy")
    before = packs(durable)
    done = import_archive(durable, read_archive(tmp_path / "copy"))
    assert (done.known, done.packs) == (len(ids), 0)
    assert packs(durable) == before


def test_imported_trajectory_is_resumed_scored_closed_and_archived_on(durable, archive, tmp_path, other):
    ids = populate(durable, archive)
    export(durable, tmp_path / "copy")
    import_archive(other, read_archive(tmp_path / "copy"))
    for id in (ids["half"], ids["open"]):
        before = durable.load(id)
        with other.get(id).segment(context=[50]) as segment:
            segment.tokens([51, 52])
            segment.routing(rows(len(before) + 3, seed=5), start=0)
        resumed = other.get(id)
        resumed.reward(0.5)
        resumed.close("completed")
        assert other.wait(id).status == "completed"
        expected = folds(other, id)
        archive_here(other)
        assert folds(other, id) == expected
        assert folds(trajstore.open_archive(other.archive.root.location), id) == expected
        np.testing.assert_array_equal(other.load(id).token_ids[: len(before)], before.token_ids)
    with pytest.raises(trajstore.Conflict, match="already"):
        other.create(id=ids["plain"])


def test_import_continues_what_went_on_where_it_came_from(durable, archive, tmp_path, other):
    ids = populate(durable, archive)
    export(durable, tmp_path / "early")
    import_archive(other, read_archive(tmp_path / "early"))
    with durable.get(ids["half"]).segment(context=[50]) as segment:
        segment.tokens([51])
        segment.routing(rows(14), start=0)
    durable.get(ids["archived"]).observe(rows(2), start=0, source="trainer")
    durable.flush()
    export(durable, tmp_path / "late")
    done = import_archive(other, read_archive(tmp_path / "late"))
    assert (done.continued, done.known, done.added) == (2, 2, 0)
    for id in ids.values():
        assert folds(other, id) == folds(durable, id)
    stale = import_archive(other, read_archive(tmp_path / "early"))
    assert (stale.continued, stale.known, stale.packs) == (0, 4, 0)


def test_stale_handle_is_fenced_by_what_was_imported_above_it(durable, archive, tmp_path, other):
    """There, it was aborted and archived, and its emptied stream is left; here it went on and comes back."""
    aborted = record_seed_case(durable)
    aborted.close("aborted")
    archive()
    stale = durable.get(aborted.id)
    export(durable, tmp_path / "there")
    import_archive(other, read_archive(tmp_path / "there"))
    with other.get(aborted.id).segment(context=[50]) as segment:
        segment.tokens([51])
    other.flush()
    export(other, tmp_path / "back")
    assert import_archive(durable, read_archive(tmp_path / "back")).continued == 1
    stale.reward(1.0)
    with pytest.raises(trajstore.Fenced):
        durable.flush(aborted.id)
    durable.get(aborted.id).reward(2.0)
    durable.flush()
    assert durable.load(aborted.id).reward == 2.0


def test_conflicts_are_named_before_anything_is_written(durable, archive, tmp_path, other):
    ids = populate(durable, archive)
    other.create(id=ids["plain"], group="mine").close("failed")
    export(durable, tmp_path / "copy")
    archive_here(other)
    before = packs(other)
    with pytest.raises(trajstore.Conflict, match=ids["plain"]) as caught:
        import_archive(other, read_archive(tmp_path / "copy"))
    assert ids["half"] not in str(caught.value)
    assert packs(other) == before
    done = import_archive(other, read_archive(tmp_path / "copy"), skip_conflicts=True)
    assert (done.added, done.conflicts) == (3, 1)
    assert other.load(ids["plain"]).group == "mine"


def test_trajectory_that_went_on_differently_in_both_runs_is_a_conflict(durable, archive, tmp_path, other):
    ids = populate(durable, archive)
    export(durable, tmp_path / "early")
    import_archive(other, read_archive(tmp_path / "early"))
    for store in (durable, other):
        store.get(ids["half"]).reward(1.0)
        store.flush()
    export(durable, tmp_path / "late")
    with pytest.raises(trajstore.Conflict, match=ids["half"]):
        import_archive(other, read_archive(tmp_path / "late"))
    other.get(ids["open"]).observe(rows(1), start=0, source="here")
    durable.get(ids["open"]).observe(rows(1), start=0, source="there")
    durable.flush()
    export(durable, tmp_path / "notes")
    done = import_archive(other, read_archive(tmp_path / "notes"), skip_conflicts=True)
    assert (done.conflicts, done.known) == (2, 2)


def stamps(*ids, nonce=1, note=False):
    return [StagedEntry(EventId.parse(at), note, nonce, "digest", 0.0, [], []) for at in ids]


@pytest.mark.parametrize(
    ("offered", "held", "fresh"),
    [
        (["1-0", "2-0"], [], ["1-0", "2-0"]),
        (["1-0", "2-0", "3-0"], ["1-0", "2-0"], ["3-0"]),
        (["1-0"], ["1-0", "2-0"], []),
        (["3-0", "4-0"], ["1-0", "2-0", "3-0"], ["4-0"]),
        (["1-0", "2-0", "4-0"], ["1-0", "2-0", "3-0"], None),
        (["1-0", "2-0", "3-0"], ["1-0", "3-0"], None),
        (["1-0", "2-0"], ["1-0", "3-0"], None),
    ],
)
def test_what_is_not_held_is_new_or_a_conflict(offered, held, fresh):
    for note in (False, True):
        elsewhere = stamps("1-0", "9-0", note=not note)
        entries, there = stamps(*offered, note=note), stamps(*held, note=note) + elsewhere
        if fresh is None:
            with pytest.raises(trajstore.Conflict):
                not_held("x", entries, there)
        else:
            assert not_held("x", entries, there) == stamps(*fresh, note=note)
            if set(offered) & set(held):
                with pytest.raises(trajstore.Conflict, match="another one"):
                    not_held("x", entries, stamps(*held, nonce=2, note=note))


def test_continuing_what_lies_in_the_hot_log_is_a_conflict(durable, archive, tmp_path, other):
    """Its writer may be alive: what it wrote next would be another entry of the same id."""
    ids = populate(durable, archive)
    export(durable, tmp_path / "copy")
    import_archive(other, read_archive(tmp_path / "copy"))
    other.get(ids["half"]).reward(1.0)
    other.flush()
    export(other, tmp_path / "back")
    durable.flush()
    with pytest.raises(trajstore.Conflict, match="archive it first"):
        import_archive(durable, read_archive(tmp_path / "back"))
    archive()
    assert import_archive(durable, read_archive(tmp_path / "back")).continued == 1
    assert durable.load(ids["half"]).reward == 1.0


def test_deleted_trajectory_is_not_brought_back(durable, archive, tmp_path, other):
    ids = populate(durable, archive)
    export(durable, tmp_path / "copy")
    import_archive(other, read_archive(tmp_path / "copy"))
    for id in (ids["half"], ids["plain"]):
        other.delete(id)
    archive_here(other)
    done = import_archive(other, read_archive(tmp_path / "copy"))
    assert (done.gone, done.known, done.added) == (2, 2, 0)
    for id in (ids["half"], ids["plain"]):
        with pytest.raises(trajstore.NotFound):
            other.load(id)


def test_run_without_an_archive_takes_no_import(durable, archive, tmp_path, open_store):
    populate(durable, archive)
    export(durable, tmp_path / "copy")
    with pytest.raises(trajstore.Conflict, match="archive="):
        import_archive(open_store(), read_archive(tmp_path / "copy"))


def test_import_that_is_overtaken_by_another_adds_nothing_twice(durable, archive, tmp_path, other):
    """While it works, another import of the same archive runs to its end: every number that it wants is taken."""
    ids = populate(durable, archive)
    export(durable, tmp_path / "copy")
    overtaken = []

    def on_progress(done):
        if not overtaken:
            overtaken.append(import_archive(other, read_archive(tmp_path / "copy")))

    import_archive(other, read_archive(tmp_path / "copy"), on_progress=on_progress)
    assert overtaken[0].added == len(ids)
    before = packs(other)
    assert len(before) == overtaken[0].packs
    for id in ids.values():
        assert folds(other, id) == folds(durable, id)


IMPORT_AND_DIE = """
import os, signal, sys
import trajstore
from trajstore.exchange import import_archive
from trajstore.opening import read_archive

with trajstore.open(sys.argv[1], create=False) as store:
    left = int(sys.argv[3])

    def die(done):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    import_archive(store, read_archive(sys.argv[2]), pack_bytes=1, on_progress=die)
"""


def test_import_killed_half_way_is_finished_by_the_next(durable, archive, tmp_path, other):
    ids = populate(durable, archive)
    export(durable, tmp_path / "copy")
    for step in range(1, len(ids) + 1):
        arguments = [sys.executable, "-c", IMPORT_AND_DIE, str(tmp_path / "other"), str(tmp_path / "copy"), str(step)]
        assert subprocess.run(arguments, timeout=60, check=False).returncode == -signal.SIGKILL
    import_archive(other, read_archive(tmp_path / "copy"))
    for id in ids.values():
        assert folds(other, id) == folds(durable, id)
    entries = [(line.id, line.first) for pack in packs(other) for line in lines(other, pack) if line.first]
    assert len(entries) == len(set(entries))


def test_export_and_import_over_an_object_store(durable, archive, s3, tmp_path, run_name):
    ids = populate(durable, archive)
    url = s3.url(run_name)
    export(durable, url, options=s3.options)
    expected = {id: folds(durable, id) for id in ids.values()}
    bare = trajstore.open_archive(url, options=s3.options)
    assert {id: folds(bare, id) for id in ids.values()} == expected
    target = {"archive": s3.url(f"{run_name}-target"), "archive_options": s3.options}
    with trajstore.open(tmp_path / "target", partitions=2, ack="fsync", **target) as store:
        assert import_archive(store, read_archive(url, s3.options)).added == len(ids)
        assert import_archive(store, read_archive(url, s3.options)).packs == 0
        assert {id: folds(store, id) for id in ids.values()} == expected


def test_commands_export_and_import(durable, archive, folder, tmp_path, other):
    ids = populate(durable, archive)
    result = invoke("export", folder, tmp_path / "copy", "--group", "g", "--status", "open", "--json")
    assert result.exit_code == 0, result.stderr
    account = json.loads(result.stdout)
    assert (account["trajectories"], account["checked"], account["notes"]) == (1, 1, 2)
    assert result.stderr.splitlines()[-1].startswith("done after")
    result = invoke("export", tmp_path / "copy", tmp_path / "again", "--no-check", "--json")
    assert json.loads(result.stdout)["checked"] == 0
    result = invoke("import", tmp_path / "other", tmp_path / "again", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["added"] == 1
    assert folds(other, ids["half"]) == folds(durable, ids["half"])
    other.get(ids["half"]).reward(1.0)
    durable.get(ids["half"]).reward(1.0)
    other.flush()
    durable.flush()
    invoke("export", folder, tmp_path / "later")
    result = invoke("import", tmp_path / "other", tmp_path / "later", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert ids["half"] in result.stderr
    result = invoke("import", tmp_path / "other", tmp_path / "later", "--skip-conflicts", "--json")
    assert json.loads(result.stdout)["conflicts"] == 1
    result = invoke("export", folder, folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "not empty" in result.stderr
