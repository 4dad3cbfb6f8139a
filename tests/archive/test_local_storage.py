"""A folder as the place of an archive: what its location means, durability, and how a disk fails."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from ulid import ULID

from tests.archive.places import age, paths, run
from trajstore.archive.storage.local import LocalStorage, open_storage
from trajstore.errors import SchemaError, Unavailable


def test_a_folder_may_be_named_in_three_ways(tmp_path, monkeypatch):
    LocalStorage(tmp_path / "a").create("x", b"1")
    monkeypatch.chdir(tmp_path)
    there = [open_storage(name) for name in ("a", tmp_path / "a", f"file://{tmp_path}/a")]
    monkeypatch.chdir("/")
    assert [storage.read("x") for storage in there] == [b"1"] * 3
    assert {storage.location for storage in there} == {str(tmp_path / "a")}


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("", "give a path or a URL"),
        ("file://", "give a path or a URL"),
        ("a\0b", "give a path or a URL"),
        (b"a", "is text"),
        (Path("s3://bucket/name"), "give the URL as it is"),
        ("ftp://host/name", "cannot lie at a ftp:// URL"),
        ("s3://", "names no bucket"),
        ("s3:///name", "names no bucket"),
        ("s3://user:secret@bucket/name", "no user"),
        ("s3://bucket/name#1", "no fragment"),
        ("s3://bucket/name?region", "cannot be read"),
        ("s3://bucket/name?timeout=0", "in seconds"),
        ("s3://bucket/name?timeout=soon", "in seconds"),
        ("s3://bucket/name?endpoint=http://user:secret@host", "holds a user"),
        ("s3://bucket/name?no_such_option=secret", "no_such_option"),
        ("s3://bucket/name?skip_signature=maybe", "cannot be an archive"),
    ],
)
def test_what_cannot_be_a_location_is_refused(location, why):
    with pytest.raises(SchemaError, match=why) as caught:
        open_storage(location)
    assert "secret" not in str(caught.value)


def test_a_file_is_durable_before_it_has_its_name(tmp_path, monkeypatch):
    """Fsync of the content, then the name, then fsync of every folder up to the one that names the archive."""
    done, names = [], {}
    fsync, link, rename = os.fsync, os.link, Path.rename

    def synced(descriptor):
        fsync(descriptor)
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def linked(source, target):
        link(source, target)
        done.append(("name", str(target)))
        names[str(target)] = str(source)

    def renamed(source, target):
        rename(source, target)
        done.append(("name", str(target)))
        names[str(target)] = str(source)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "rename", renamed)
    root = tmp_path / "archive"
    storage = LocalStorage(root)
    storage.create("manifest/07/1.json", b"{}")
    storage.publish("packs/07/1", {"zarr.json": b"{}", "routed/c/0": b"x"}, lambda step: None)
    for name, files in (
        (root / "manifest/07/1.json", [""]),
        (root / "packs/07/1", ["/zarr.json", "/routed/c/0", "/routed/c", "/routed", ""]),
    ):
        at = done.index(("name", str(name)))
        for file in files:
            assert ("fsync", names[str(name)] + file) in done[:at]
        for folder in (name.parent, name.parent.parent, root):
            assert ("fsync", str(folder)) in done[at:]
    assert ("fsync", str(tmp_path)) in done, "the archive's own name"


def test_a_folder_loses_what_removal_empties(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.publish("packs/07/1", {"events/c/0": b"x", "zarr.json": b"{}"}, lambda step: None)
    storage.remove(["packs/07/1/events/c/0"])
    assert [path.name for path in (tmp_path / "packs/07/1").iterdir()] == ["zarr.json"]
    storage.remove(["packs/07/1/zarr.json"])
    assert not (tmp_path / "packs").exists()
    assert tmp_path.exists()


def test_writers_are_not_disturbed_by_removers(tmp_path):
    """The folder that one empties and removes is the one that the other is about to write into."""
    storage, wrong = LocalStorage(tmp_path), []

    def remove():
        try:
            while not stop.is_set():
                storage.remove(paths(storage, "packs"))
        except OSError as error:
            wrong.append(error)

    stop = threading.Event()
    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for number in range(150):
            storage.create(f"packs/07/{number}", b"x")
            storage.publish(f"packs/08/{number}", {"zarr.json": b"{}"}, lambda step: None)
    finally:
        stop.set()
        remover.join(30)
    assert wrong == []


def test_a_folder_that_is_removed_just_before_its_use_is_made_again(tmp_path, monkeypatch):
    link, rename, pruned = os.link, Path.rename, []

    def prune(target):
        if target not in pruned:
            pruned.append(target)
            target.parent.rmdir()

    def linked(source, target):
        prune(target)
        link(source, target)

    def renamed(source, target):
        prune(target)
        rename(source, target)

    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "rename", renamed)
    storage = LocalStorage(tmp_path)
    storage.create("manifest/07/1.json", b"{}")
    storage.publish("packs/07/1", {"zarr.json": b"{}"}, lambda step: None)
    assert pruned == [tmp_path / "manifest/07/1.json", tmp_path / "packs/07/1"]
    assert paths(storage) == ["manifest/07/1.json", "packs/07/1/zarr.json"]


def test_a_folder_that_another_makes_and_a_remover_takes_away_meanwhile_is_made_again(tmp_path, monkeypatch):
    """`Path.mkdir` is told that it exists, looks, and finds nothing."""
    mkdir, gone = os.mkdir, []

    def made(path, *mode):
        if Path(path).name == "07" and not gone:
            gone.append(path)
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", made)
    storage = LocalStorage(tmp_path)
    storage.publish("packs/07/1", {"zarr.json": b"{}"}, lambda step: None)
    assert gone
    assert paths(storage) == ["packs/07/1/zarr.json"]


def test_folders_that_lie_on_another_disk_are_listed(tmp_path):
    LocalStorage(tmp_path / "other").create("07/1/zarr.json", b"{}")
    storage = LocalStorage(tmp_path / "archive")
    storage.create("archive.json", b"{}")
    (tmp_path / "archive" / "packs").symlink_to(tmp_path / "other")
    assert "packs/07/1/zarr.json" in paths(storage)


def test_a_map_outlives_its_file(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.create("x", b"0123")
    mapped = storage.open_map("x")
    storage.remove(["x"])
    assert bytes(mapped) == b"0123"


def test_a_file_in_the_way_is_unavailable(tmp_path):
    (tmp_path / "archive").write_bytes(b"")
    storage = LocalStorage(tmp_path / "archive")
    for write in (
        lambda: storage.create("x", b""),
        lambda: storage.publish("packs/1", {"x": b""}, lambda step: None),
    ):
        with pytest.raises(Unavailable, match="holds is untouched"):
            write()
    assert paths(storage) == []


DENIED = """
import os, sys
from trajstore.archive.storage.local import LocalStorage
from trajstore.errors import Unavailable

storage = LocalStorage(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)  # root may do everything
for use in (
    lambda: storage.read("x"),
    lambda: storage.size("x"),
    lambda: list(storage.list("")),
    lambda: storage.create("y", b""),
    lambda: storage.remove(["x"]),
    lambda: storage.publish("packs/1", {"y": b""}, print),
):
    try:
        use()
    except Unavailable as error:
        assert sys.argv[1] in str(error) and "Permission denied" in str(error), error
    else:
        raise AssertionError("was allowed")
print("denied")
"""


def test_denied_permission_is_unavailable(tmp_path):
    LocalStorage(tmp_path / "archive").create("x", b"1")
    (tmp_path / "archive").chmod(0)
    try:
        assert run(DENIED, str(tmp_path / "archive")) == "denied\n"
    finally:
        (tmp_path / "archive").chmod(0o700)


FULL = """
import resource, sys
from trajstore.archive.storage.local import LocalStorage
from trajstore.errors import Unavailable

storage = LocalStorage(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for use in (
    lambda: storage.create("y", bytes(8192)),
    lambda: storage.publish("packs/1", {"small": b"x", "large": bytes(8192)}, print),
):
    try:
        use()
    except Unavailable as error:
        assert sys.argv[1] in str(error) and "free space" in str(error), error
    else:
        raise AssertionError("was written")
"""


def test_what_another_host_is_still_writing_stays_whatever_the_clocks_say(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    slow, ours, killed = (ULID.from_timestamp(time.time() - seconds) for seconds in (7200, 60, 7201))
    for name in (slow, ours, killed):
        (tmp_path / "staging" / str(name) / "tokens").mkdir(parents=True)
        (tmp_path / "staging" / str(name) / "tokens" / "zarr.json").write_bytes(b"{}")
    age(tmp_path / "staging" / str(killed))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 5000)  # this host's is fast, that of `slow` two hours behind
    storage.clear_staging(older_than=3600)
    assert {path.name for path in (tmp_path / "staging").iterdir()} == {str(slow), str(ours)}


def test_clearing_a_place_that_never_had_anything_staged_makes_nothing(tmp_path):
    LocalStorage(tmp_path / "archive").clear_staging(older_than=3600)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.create("x", b"1")
    assert run(FULL, str(tmp_path)) == ""
    assert paths(storage) == ["x"]
    assert list((tmp_path / "staging").iterdir()) == []


def test_create_whose_reply_was_lost_on_the_way_is_ours(tmp_path, monkeypatch):
    """Over NFS a `link` that is sent again answers that the file exists, though it was ours that made it."""
    link = os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", lost)
    LocalStorage(tmp_path).create("manifest/07/1.json", b"mine")
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FileExistsError):
        LocalStorage(tmp_path).create("manifest/07/1.json", b"yours")
    assert LocalStorage(tmp_path).read("manifest/07/1.json") == b"mine"
