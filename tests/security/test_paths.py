"""Names from outside stay names: none becomes a path, a key of something else, or a way out of the archive's folder."""

import os

import pytest

import trajstore
from tests.consumers.rollouts import finish, materialize
from trajstore.archive.storage.local import LocalStorage
from trajstore.archive.storage.objects import ObjectStorage
from trajstore.archiver import Archiver
from trajstore.log.keys import Keys

ESCAPES = ("../x", "a/../../x", "/etc/passwd", "a//b", "./x", "a/.", "a/..", "", "x\0y", "a/\0")


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leads_out_of_an_archive(tmp_path, path):
    outside = tmp_path / "x"
    outside.write_text("mine")
    storage = LocalStorage(tmp_path / "archive")
    for use in (
        storage.read,
        storage.size,
        storage.open_map,
        lambda one: storage.create(one, b""),
        lambda one: storage.remove([one]),
        lambda one: storage.publish("packs/00/p", {one: b""}, lambda _: None),
        lambda one: storage.publish(one, {"f": b""}, lambda _: None),
    ):
        with pytest.raises(trajstore.SchemaError, match="no path inside an archive"):
            use(path)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("path", ESCAPES)
def test_no_name_leads_out_of_a_prefix_in_a_bucket(path):
    options = {"region": "us-east-1", "access_key_id": "a", "secret_access_key": "b"}
    storage = ObjectStorage("s3://bucket/exp1", options)
    for use in (storage.read, storage.size, lambda one: storage.create(one, b""), lambda one: storage.remove([one])):
        with pytest.raises(trajstore.SchemaError, match="no path inside an archive"):
            use(path)


def test_link_below_the_top_of_an_archive_is_not_followed_when_listing_or_removing(tmp_path):
    """`gc` would list the disk, go in circles, and remove what is somebody else's."""
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "letter").write_text("mine")
    storage = LocalStorage(tmp_path / "archive")
    storage.create("packs/00/p/zarr.json", b"{}")
    (storage.path / "packs" / "00" / "q").symlink_to(outside)
    (storage.path / "packs" / "00" / "circle").symlink_to(storage.path / "packs")
    assert {file.path for file in storage.list("")} == {"packs/00/p/zarr.json"}
    assert {file.path for file in storage.list("packs/00")} == {"packs/00/p/zarr.json"}
    with pytest.raises(trajstore.SchemaError, match="symbolic link"):
        storage.remove(["packs/00/q/letter"])
    assert (outside / "letter").read_text() == "mine"


def test_top_folder_of_an_archive_may_be_a_link(tmp_path):
    """Packs on another disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    storage = LocalStorage(tmp_path / "archive")
    storage.create("archive.json", b"{}")
    (storage.path / "packs").symlink_to(disk)
    storage.create("packs/00/p/zarr.json", b"{}")
    assert {file.path for file in storage.list("")} == {"archive.json", "packs/00/p/zarr.json"}
    storage.remove(["packs/00/p/zarr.json"])
    assert list(disk.rglob("*.json")) == []


def test_no_id_and_no_group_names_a_file(embedded, tmp_path):
    """So neither a name that a system keeps for itself nor one that differs in case only can hit another's file."""
    ids = ["CON", "con", "aux.json", "a:b@c", "x~1", "Z" * 200]
    for id in ids:
        finish(embedded, id=id, group="../../g/*", group_size=len(ids))
    materialize(embedded)
    Archiver(embedded).run(once=True)
    names = [os.path.join(folder, name) for folder, _, some in os.walk(embedded.location) for name in some]
    allowed = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ./-_"
    assert {letter for name in names for letter in name.removeprefix(embedded.location)} <= set(allowed)
    assert not any(id in os.path.basename(name).split(".") for name in names for id in ids)
    archive = trajstore.open_archive(embedded.location)
    assert sorted(one.id for one in archive.list()) == sorted(ids)
    assert {archive.load(id).id for id in ids} == set(ids)


@pytest.mark.parametrize("run", ["exp1", "exp1:00", "a:b:c"])
@pytest.mark.parametrize("id", ["x", "x:feed", "e:x", "00:x", "x:1:y"])
def test_keys_of_different_things_differ(run, id):
    """However ids are chosen; and every key of a partition carries the run and the partition in its hash tag."""
    keys = Keys(run, 1)
    every = [
        keys.entries(id),
        keys.payloads(id),
        keys.notes(id),
        keys.assembly(id),
        keys.ready_payload(id, 1),
        keys.chosen(id, "trainer"),
        keys.feed(0),
        keys.summaries(0),
        keys.lease(0),
        keys.quiet(0),
        keys.ready(0),
        keys.filtered(0),
    ]
    other = [Keys.run_record(run), Keys.archive_location(run)]
    assert len({*every, *other}) == len(every) + len(other)
    assert all(key.startswith(f"trajstore:{{{run}:00}}:") for key in every)
    beside = Keys(f"{run}:00", 1)
    assert not {beside.entries(id), beside.feed(0), Keys.run_record(f"{run}:00")} & {*every, *other}
