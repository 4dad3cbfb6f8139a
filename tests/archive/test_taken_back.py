"""A compacted pack that is damaged while the packs that it replaced are still there: nothing is lost, nor given up."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

import trajstore
from tests.archive import sound
from tests.archive.test_compaction import compact_all, live
from tests.cli.running import invoke
from trajstore.archive.record import record_path
from trajstore.archive.root import ArchiveRoot
from trajstore.archive.storage.local import LocalStorage
from trajstore.archiver import Archiver
from trajstore.opening import read_archive

HARMS = ("list", "events", "payload", "swapped", "gone")


class Sample:
    """An archive whose packs were compacted twice over and then written on.

    Attributes:
        folds: of every trajectory.
        new: name of the compacted pack of partition 0 that holds the growing trajectory.
        old: names of the packs that it replaced; the first is itself the pack of a compaction.
    """

    def __init__(self, folder: Path, ids: list[str]) -> None:
        self.folder = folder
        self.folds = sound.folds(trajstore.open_archive(folder), ids)
        reader = read_archive(folder)
        record = max((one for one in live(reader) if one.replaces), key=lambda one: len(one.replaces))
        self.new = record.pack
        self.old = [reader.manifest(0).record(number).pack for number in record.replaces]
        assert reader.manifest(0).record(record.replaces[0]).replaces


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("sample") / "store"
    with trajstore.open(folder, partitions=2, ack="fsync") as store:
        ids = sound.make(store, records=14)
        grown = [id for id in ids if id.startswith("grown")]
        compact_all(store.archive)
        for number in range(100, 112):
            for id in grown:
                sound.grow(store, id, number)
            store.flush()
            Archiver(store).run(once=True)
            if number == 110:
                compact_all(store.archive)
    return Sample(folder / "archive", ids)


@pytest.fixture
def place(sample, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(sample.folder, tmp_path / "archive")


def harm(place, pack, how):
    """Damage a pack."""
    folder = place / "packs" / pack
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "swapped":
        other = next(path for path in folder.parent.iterdir() if path != folder and (path / "routed").exists())
        shutil.rmtree(folder / "events")
        shutil.copytree(other / "events", folder / "events")
    else:
        array = {"list": "trajectories", "events": "events", "payload": "routed"}[how]
        shard = next(path for path in (folder / array / "c").rglob("*") if path.is_file())
        shard.write_bytes(shard.read_bytes()[:-20])


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def whole(sample, place):
    """Every trajectory folds as it did before the damage, and nothing is found wrong."""
    archive = trajstore.open_archive(place)
    assert sound.folds(archive, sample.folds) == sample.folds
    assert {summary.id for summary in archive.list()} == sample.folds.keys()
    result = invoke("verify", place)
    assert result.exit_code == 0, result.stdout


@pytest.mark.parametrize("how", HARMS)
def test_compaction_of_a_damaged_pack_is_taken_back_and_nothing_is_lost(sample, place, how):
    harm(place, sample.new, how)
    before = tree(place)
    for dry in ((), ("--dry-run",)):
        refused = invoke("gc", place, "--pack", sample.new, "--lost", "--grace", "0s", *dry)
        assert (refused.exit_code, tree(place)) == (1, before)
    command = f"trajstore rebuild {place} --without {sample.new}"
    assert command in refused.stderr
    done = invoke(*command.split()[1:], "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["archive"]["undone"] == [sample.new]
    whole(sample, place)
    for command in ("rebuild", "gc --grace 0s", "compact", "gc --grace 0s", "rebuild --digests"):
        name, *options = command.split()
        again = invoke(name, place, *options)
        assert again.exit_code == 0, again.stderr
        whole(sample, place)


class Killed(BaseException):
    pass


def dying(write, left):
    """A method of a storage that goes on while something is left to be taken."""

    def method(self, *arguments):
        if not left:
            raise Killed
        left.pop()
        return write(self, *arguments)

    return method


@pytest.mark.parametrize("how", ["list", "events", "swapped"])
@pytest.mark.parametrize("writes", range(6))
def test_taking_back_that_was_killed_before_any_of_its_writes_is_finished_by_the_next(
    sample, place, how, writes, monkeypatch
):
    """Table removed, record set aside and removed, another in its place, table made anew: never an older state."""
    harm(place, sample.new, how)
    left = [None] * writes
    with monkeypatch.context() as patch:
        for name in ("create", "remove"):
            patch.setattr(LocalStorage, name, dying(getattr(LocalStorage, name), left))
        with pytest.raises(Killed):
            invoke("rebuild", place, "--without", sample.new)
    archive = trajstore.open_archive(place)
    for id, folds in sample.folds.items():
        with contextlib.suppress(trajstore.Corrupt):
            assert sound.folds(archive, [id]) == {id: folds}
    done = invoke("rebuild", place, "--without", sample.new)
    assert done.exit_code == 0, done.stderr
    whole(sample, place)
    before = tree(place)
    assert (invoke("rebuild", place, "--without", sample.new).exit_code, tree(place)) == (0, before)


def test_compactions_that_are_both_damaged_are_taken_back_together(sample, place):
    harm(place, sample.new, "payload")
    harm(place, sample.old[0], "list")
    refused = invoke("gc", place, "--pack", sample.new, "--lost")
    assert (refused.exit_code, f"--without {sample.new}" in refused.stderr) == (1, True)
    done = invoke("rebuild", place, "--without", sample.new, "--json")
    assert done.exit_code == 0, done.stderr
    assert set(json.loads(done.stdout)["archive"]["undone"]) == {sample.new, sample.old[0]}
    whole(sample, place)


def test_sound_compaction_is_not_taken_back(sample, place):
    before = tree(place)
    for pack in (sample.new, sample.old[0]):
        refused = invoke("rebuild", place, "--without", pack)
        assert (refused.exit_code, "has a record" in refused.stderr, tree(place)) == (1, True, before)


def test_dropped_compaction_is_not_taken_back(sample, place):
    """Its trajectories are gone on purpose."""
    dropped = invoke("gc", place, "--pack", sample.new, "--whole-trajectories")
    assert dropped.exit_code == 0, dropped.stderr
    harm(place, sample.new, "list")
    before = tree(place)
    refused = invoke("rebuild", place, "--without", sample.new)
    assert (refused.exit_code, "has a record" in refused.stderr, tree(place)) == (1, True, before)
    assert invoke("gc", place, "--pack", sample.new, "--lost").exit_code == 0


def test_originals_stay_in_the_run_that_gives_a_pack_up(sample, place):
    """They are not sound either, so it is given up; but what is in them is not removed at one blow."""
    for pack in (sample.new, *sample.old):
        harm(place, pack, "payload")
    deeper = [record.pack for record in older(place, sample)]
    for pack in deeper:
        harm(place, pack, "payload")
    kept = {path: data for path, data in tree(place).items() if "/".join(path.parts[1:3]) in deeper}
    result = invoke("gc", place, "--pack", sample.new, "--lost", "--grace", "0s")
    assert result.exit_code == 0, result.stderr
    after = tree(place)
    assert {path: after.get(path) for path in kept} == kept
    assert sample.old[0] not in result.stdout
    assert invoke("gc", place, "--grace", "0s").exit_code == 0
    assert not kept.keys() <= tree(place).keys()


def older(place, sample):
    """Records of the packs that the first of the replaced packs replaced."""
    manifest = read_archive(place).manifest(0)
    manifest.refresh()
    return [manifest.record(number) for number in manifest.record(int(sample.old[0][3:11])).replaces]


def test_what_was_collected_goes_with_the_pack_and_the_rest_comes_back(sample, place):
    """As where `gc` was killed while it removed the packs that were replaced."""
    for pack in (sample.old[0], *(record.pack for record in older(place, sample))):
        for path in (place / "packs" / pack).iterdir():
            if path.name not in ("zarr.json", "trajectories"):
                shutil.rmtree(path)
    harm(place, sample.new, "payload")
    refused = invoke("gc", place, "--pack", sample.new, "--lost")
    assert (refused.exit_code, "--without" in refused.stderr) == (1, True)
    assert invoke("rebuild", place, "--without", sample.new).exit_code == 0
    assert invoke("verify", place).exit_code == 0
    archive = trajstore.open_archive(place)
    manifest = read_archive(place).manifest(0)
    manifest.refresh()
    gone = {id for id in sample.folds if id.startswith("grown") and manifest.is_dropped(id)}
    assert len(gone) == 1
    for id in gone:
        with pytest.raises(trajstore.NotFound, match="dropped by retention"):
            archive.load(id)
    rest = sample.folds.keys() - gone
    assert sound.folds(archive, rest) == {id: sample.folds[id] for id in rest}


def test_record_that_was_taken_back_is_kept_aside(sample, place):
    harm(place, sample.new, "payload")
    path = place / record_path(0, int(sample.new[3:11]))
    before = path.read_bytes()
    invoke("rebuild", place, "--without", sample.new)
    assert Path(f"{path}.damaged").read_bytes() == before
    assert ArchiveRoot.at(place).storage.read(f"packs/{sample.new}/zarr.json")
