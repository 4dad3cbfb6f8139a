"""A whole archive in an object store: fenced by conditional puts, found again, and read without Redis."""

import numpy as np
import pytest

import trajstore
from tests.archive.test_archiver import everything, hot_entries
from tests.builders import record_seed_case
from trajstore.archiver import Archiver
from trajstore.log.lease import Lease


@pytest.fixture
def place(s3, run_name):
    return s3.url(run_name)


@pytest.fixture
def on_s3(folder, s3, place):
    with trajstore.open(folder, partitions=1, ack="fsync", archive=place, archive_options=s3.options) as store:
        yield store


def test_archived_trajectories_load_alike_from_s3_with_and_without_redis(on_s3, s3, place):
    trajectory = record_seed_case(on_s3)
    on_s3.flush()
    before = everything(on_s3, trajectory.id)
    assert Archiver(on_s3).run(once=True).packs == 1
    assert hot_entries(on_s3, trajectory.id) == []
    assert everything(on_s3, trajectory.id) == before
    alone = trajstore.open_archive(place, options=s3.options)
    np.testing.assert_array_equal(alone.load(trajectory.id).routed_experts, on_s3.load(trajectory.id).routed_experts)
    with on_s3.get(trajectory.id).segment(context=[7]) as segment:
        segment.tokens([8])
    on_s3.flush()
    Archiver(on_s3).run(once=True)
    assert len(alone.load(trajectory.id)) == 12, "an open reader sees what was archived since"


def test_run_finds_its_archive_again_and_records_no_secret(on_s3, folder, s3, place, monkeypatch):
    trajectory = record_seed_case(on_s3)
    on_s3.flush()
    Archiver(on_s3).run(once=True)
    recorded = on_s3.wire.call("GET", on_s3.keys.archive_location(on_s3.run)).decode()
    assert place in recorded
    assert not any(s3.options[name] in recorded for name in s3.options if "secret" in name)
    on_s3.close()
    for name, value in s3.options.items():
        if "key" in name:
            monkeypatch.setenv(f"AWS_{name.removeprefix('aws_').upper()}", value)
    with trajstore.open(folder) as again:
        assert len(again.load(trajectory.id)) == 10


def test_zombie_cannot_publish_to_s3(on_s3, folder, s3):
    """The conditional put of the record's number is the fence, as the hard link is on a disk."""
    first, second = record_seed_case(on_s3), record_seed_case(on_s3)
    on_s3.flush()
    before = everything(on_s3, first.id), everything(on_s3, second.id)

    def steal(step):
        if step == "moved":
            Lease(on_s3.wire, on_s3.keys, "other", seconds=0.0).acquire(0)
            with trajstore.open(folder, archive_options=s3.options) as other:
                assert Archiver(other, lease_seconds=0.0).run(once=True).packs == 1

    assert Archiver(on_s3, lease_seconds=1.0, on_step=steal).run(once=True).packs == 0
    files = [file.path for file in on_s3.archive.root.storage.list("")]
    assert sum(path.startswith("manifest/") for path in files) == 1
    assert len({path.split("/")[2] for path in files if path.startswith("packs/")}) == 1, "the refused pack is gone"
    assert (everything(on_s3, first.id), everything(on_s3, second.id)) == before


def test_another_run_cannot_claim_the_same_prefix(on_s3, tmp_path, s3, place):
    with pytest.raises(trajstore.Conflict, match="incarnation"):
        trajstore.open(tmp_path / "other", archive=place, archive_options=s3.options)
