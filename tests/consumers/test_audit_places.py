"""What a worker's process has open: one audit's place, as it is when that audit begins, while it is read."""

import json
import shutil

import pytest

import trajstore
from tests.consumers.test_audit_faults import drifted, real, record
from tests.s3 import S3Server
from tests.waiting import until
from trajstore.archive.upkeep.retention import drop, nothing_hot
from trajstore.archiver import Archiver
from trajstore_audit import audit, planning, unit
from trajstore_audit.places import OpenPlaces
from trajstore_audit.result import Parameters
from trajstore_audit.tally import decode_part
from trajstore_audit.unit import Unit, audit_unit, encode_unit, run_unit


def archived(folder, count, **options):
    """Ids of so many trajectories with drift, in a store with one partition, each in a pack of its own."""
    ids = []
    with trajstore.open(folder, partitions=1, ack="fsync", **options) as store:
        for i in range(count):
            first = real(100 * i, 60)
            trajectory = record(store, (first, 0), (drifted(first, 0.2, seed=i), 0))
            trajectory.close("completed")
            ids.append(trajectory.id)
            store.flush()
            Archiver(store, grace_seconds=0.001).run(once=True)
    return ids


def units(place, ids, *, audit):
    return [Unit(place=str(place), parameters=Parameters(place=""), ids=(id,), key="", audit=audit) for id in ids]


def server_runs(folder):
    """Whether an embedded store's server has been seen to its end."""
    return not json.loads((folder / "redis" / "server.json").read_bytes())["stopped"]


@pytest.fixture
def places(monkeypatch):
    """This process's, as if it were a worker's; what is not read stays open for longer than any test takes."""
    made = OpenPlaces(idle=1000)
    monkeypatch.setattr(unit, "_places", made)
    yield made
    made.close()


def test_a_worker_of_two_audits_sees_what_was_made_anew_between_them(tmp_path, places):
    for number, audit_ in ((2, "first"), (3, "second")):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        ids = archived(tmp_path / "store", number)
        parts = [
            decode_part(run_unit(encode_unit(one))) for one in units(tmp_path / "store" / "archive", ids, audit=audit_)
        ]
        assert [(part.trajectories, part.skipped) for part in parts] == [(1, {})] * number


def test_what_was_listed_and_is_not_there_is_a_finding_and_counts_as_skipped(tmp_path, places):
    """As a worker sees it for whom another place has the same name."""
    archived(tmp_path / "store", 1)
    (one,) = units(tmp_path / "store" / "archive", ["01ELSEWHERE"], audit="a")
    part = decode_part(run_unit(encode_unit(one)))
    assert (part.trajectories, part.skipped) == (0, {"not found": 1})
    (finding,) = part.findings
    assert (finding.kind, finding.id) == ("unreadable", "01ELSEWHERE")
    assert "there is no trajectory" in finding.what
    assert "made anew" in finding.what_to_do


def test_what_was_deleted_or_dropped_since_it_was_listed_is_no_finding(tmp_path):
    ids = archived(tmp_path / "store", 3)
    with trajstore.open(tmp_path / "store") as store:
        store.delete(ids[0])
        manifest = store.archive.manifest(0)
        number = manifest.refresh() + 1
        (record,) = [one for one in manifest.live() if ids[1] in {line.id for line in manifest.lines(one)}]
        drop(store.archive, 0, [record], number=number, writer="test", busy=nothing_hot)
        part = audit_unit(store, Unit(place="", parameters=Parameters(place=""), ids=tuple(ids), key=""))
    assert (part.trajectories, part.skipped, part.findings) == (1, {"deleted": 2}, [])


def test_a_store_is_open_for_one_audit_and_closed_for_the_next(tmp_path, places):
    one, other = tmp_path / "one", tmp_path / "other"
    ids = {folder: archived(folder, 1) for folder in (one, other)}
    run_unit(encode_unit(units(one, ids[one], audit="a")[0]))
    assert server_runs(one), "it stays open for the next unit"
    run_unit(encode_unit(units(other, ids[other], audit="b")[0]))
    assert (server_runs(one), server_runs(other)) == (False, True)
    places.close()
    assert not server_runs(other)


def test_a_place_that_is_read_is_not_closed_for_another_audit(tmp_path, places):
    (id,) = archived(tmp_path / "store", 1)
    folder = str(tmp_path / "store")
    with places.reading("a", folder, None) as first:
        with places.reading("b", folder, None) as second:
            assert first is not second
        with places.reading("a", folder, None) as again:
            assert again is first
        with places.reading("c", folder, None):
            assert first.load(id).id == id
            with pytest.raises(trajstore.TrajstoreError, match="closed"):
                second.load(id)


def test_a_store_that_nobody_reads_any_more_is_closed(tmp_path):
    archived(tmp_path / "store", 1)
    places = OpenPlaces(idle=0.01)
    with places.reading("a", str(tmp_path / "store"), None):
        assert server_runs(tmp_path / "store")
    until(lambda: not server_runs(tmp_path / "store"), seconds=30)
    with places.reading("a", str(tmp_path / "store"), None) as again:
        assert len(again.list()) == 1
    places.close()


def test_a_place_that_cannot_be_opened_leaves_nothing_open(tmp_path, places):
    for _ in range(2):
        with pytest.raises(trajstore.NotFound), places.reading("a", str(tmp_path / "typo"), None):
            pass
    assert places._open == {}


def test_an_archive_in_an_object_store_is_audited_alike_by_all(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_IDS", 1)
    server = S3Server()
    try:
        where = server.url("audited")
        archived(tmp_path / "store", 3, archive=where, archive_options=server.options)
        alone = audit(where, options=server.options)
        assert (alone.totals.trajectories, alone.segments.total.tokens) == (3, 180)
        assert alone.segments.total.differing > 0
        several = audit(where, options=server.options, workers=2)
        assert several.segments.total == alone.segments.total
        assert several.findings_by_kind == alone.findings_by_kind == {}
    finally:
        server.stop()
