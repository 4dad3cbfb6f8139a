"""One damaged pack or record: what is sound stays in use, what is damaged is named, and can be given up for good."""

import json
import shutil
from pathlib import Path

import pytest

import trajstore
from tests.archive.sound import folds, grow
from tests.archive.test_compaction import live
from tests.builders import record_seed_case
from tests.cli.running import invoke
from trajstore.archive.rebuild.rebuild import rebuild_archive
from trajstore.archive.root import ArchiveRoot
from trajstore.archive.storage.local import LocalStorage
from trajstore.archiver import Archiver
from trajstore.exchange import export
from trajstore.opening import read_archive

PACKS = 8
"""In each of two partitions: enough for a compaction."""

UNREADABLE = ("list", "gone", "record", "untabled")


class Sample:
    """An archive of small packs with one finished trajectory each, and one trajectory that grows from pack to pack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        archive = trajstore.open_archive(folder)
        self.parts: dict[str, list[str]] = {}
        reader = read_archive(folder)
        for partition in range(2):
            for record in live(reader, partition):
                for line in reader.manifest(partition).lines(record):
                    self.parts.setdefault(line.id, []).append(record.pack)
        self.folds = folds(archive, self.parts)
        self.grown = next(id for id in self.parts if id.startswith("grown"))

    def within(self, pack: str) -> set[str]:
        """Trajectories that have a part in a pack."""
        return {id for id, packs in self.parts.items() if pack in packs}

    def pack(self, *, grown: bool = False) -> str:
        """A pack in the middle of partition 0, with a part of the growing trajectory or without."""
        found = sorted({pack for packs in self.parts.values() for pack in packs if pack.startswith("00/")})
        return next(pack for pack in found[1:] if (pack in self.parts[self.grown]) == grown)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("sample") / "store"
    with trajstore.open(folder, partitions=2, ack="fsync") as store:
        names: tuple[list[str], list[str]] = ([], [])
        for name in (f"t{i}" for i in range(200)):
            names[store.keys.partition(name)].append(name)
        grown = next(id for id in (f"grown-{i}" for i in range(99)) if store.keys.partition(id) == 0)
        for number in range(PACKS):
            for partition in range(2):
                if partition == 0 and number % 3 == 0:
                    grow(store, grown, number)
                else:
                    record_seed_case(store, id=names[partition][number]).close("completed")
            store.flush()
            Archiver(store).run(once=True)
    return Sample(folder / "archive")


@pytest.fixture
def place(sample, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(sample.folder, tmp_path / "archive")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def harm(place, pack, how):
    """Damage a pack, or its record; returns what is to be named."""
    number = pack[3:11]
    if how == "record":
        cut(place / "manifest" / pack[:2] / f"{number}.json")
        return f"{number}.json"
    if how == "untabled":
        (place / "index" / pack[:2] / f"{number}-{number}.safetensors").unlink()
    if how == "gone":
        shutil.rmtree(place / "packs" / pack)
    else:
        array = "routed" if how == "payload" else "trajectories"
        cut(next(path for path in (place / "packs" / pack / array / "c").rglob("*") if path.is_file()))
    return pack


def listed(place):
    """Ids, and the command's result."""
    result = invoke("ls", place, "--json")
    return {summary["id"] for summary in json.loads(result.stdout)}, result


def unlisted(sample, pack, how):
    """What cannot be listed: of a pack without list and lookup table nobody knows whose parts it holds."""
    lost = sample.within(pack)
    return lost if how != "untabled" else {id for id, packs in sample.parts.items() if packs[0][:2] == pack[:2]}


@pytest.mark.parametrize("how", UNREADABLE)
@pytest.mark.parametrize("grown", [False, True], ids=["whole", "in part"])
def test_what_is_sound_is_listed_and_what_is_damaged_is_named(sample, place, how, grown):
    """A trajectory with one part in the damaged pack is never listed as it was before that part."""
    pack = sample.pack(grown=grown)
    name = harm(place, pack, how)
    found, result = listed(place)
    assert found == sample.parts.keys() - unlisted(sample, pack, how)
    assert (result.exit_code, name in result.stderr) == (1, True)
    archive = trajstore.open_archive(place)
    with pytest.raises(trajstore.Corrupt, match=name):
        archive.list()
    heard = []
    assert {summary.id for summary in archive.list(on_corrupt=heard.append)} == found
    assert all(isinstance(error, trajstore.Corrupt) for error in heard)
    assert name in str(heard)


def test_hot_log_tells_how_a_trajectory_of_a_damaged_pack_stands(durable, archive, folder):
    resumed, finished = record_seed_case(durable), record_seed_case(durable)
    finished.close("completed")
    archive(grace_seconds=0.001)
    (record,) = live(durable.archive)
    durable.get(resumed.id).segment(context=[1]).close("stop")
    durable.flush()
    harm(folder / "archive", record.pack, "list")
    result = invoke("ls", folder, "--json")
    assert [(one["id"], one["segments"]) for one in json.loads(result.stdout)] == [(resumed.id, 3)]
    assert (result.exit_code, record.pack in result.stderr) == (1, True)


@pytest.mark.parametrize("how", [*UNREADABLE, "payload"])
def test_what_is_sound_is_exported_and_what_is_damaged_is_named(sample, place, tmp_path, how):
    pack = sample.pack()
    name = harm(place, pack, how)
    result = invoke("export", place, tmp_path / "copy")
    assert (result.exit_code, name in result.stderr) == (1, True)
    sound = sample.parts.keys() - unlisted(sample, pack, how)
    found, again = listed(tmp_path / "copy")
    assert (found, again.exit_code) == (sound, 0)
    assert folds(trajstore.open_archive(tmp_path / "copy"), sound) == {id: sample.folds[id] for id in sound}
    assert invoke("verify", tmp_path / "copy").exit_code == 0


@pytest.mark.parametrize("how", [*UNREADABLE, "payload"])
def test_damaged_ids_are_named_and_the_others_exported(sample, place, tmp_path, how):
    pack = sample.pack()
    name = harm(place, pack, how)
    damaged, sound = sorted(sample.within(pack)), sorted(sample.parts.keys() - unlisted(sample, pack, how))[:3]
    asked = [*damaged, *sound]
    with pytest.raises(trajstore.Corrupt):
        export(read_archive(place), tmp_path / "strict", ids=asked)
    options = [part for id in asked for part in ("--id", id)]
    result = invoke("export", place, tmp_path / "copy", *options)
    assert (result.exit_code, name in result.stderr) == (1, True)
    found, again = listed(tmp_path / "copy")
    assert (found, again.exit_code) == (set(sound), 0)
    nobody = invoke("export", place, tmp_path / "none", *options, "--id", "nobody")
    assert (nobody.exit_code, "'nobody'" in nobody.stderr) == (1, True)
    assert name in nobody.stderr or how == "payload", "payloads are read after all that was asked for was found"
    alone = invoke("export", place, tmp_path / "none", "--id", damaged[0])
    assert (alone.exit_code, name in alone.stderr) == (1, True)
    assert ("nothing was written" in alone.stderr) == (how != "payload")
    assert not (tmp_path / "none").exists()


def test_export_of_what_is_damaged_alone_names_it(sample, place, tmp_path):
    pack = sample.pack()
    (place / "manifest" / "01").rename(tmp_path / "hidden")
    harm(place, pack, "untabled")
    result = invoke("export", place, tmp_path / "copy")
    assert (result.exit_code, pack in result.stderr, (tmp_path / "copy").exists()) == (1, True, False)


def gone_of(sample, place):
    """Trajectories that retention has dropped."""
    archive = trajstore.open_archive(place)
    found = set()
    for id in sample.parts:
        try:
            archive.load(id)
        except trajstore.NotFound:
            found.add(id)
        except trajstore.Corrupt:
            continue
    return found


@pytest.mark.parametrize("how", UNREADABLE)
def test_retention_drops_what_is_sound_and_old_and_names_the_rest(sample, place, how):
    pack = sample.pack()
    name = harm(place, pack, how)
    dry = invoke("gc", place, "--older-than", "0s", "--dry-run", "--json")
    result = invoke("gc", place, "--older-than", "0s", "--json")
    kept = unlisted(sample, pack, how) | {sample.grown}  # which is open
    assert (result.exit_code, name in result.stderr) == (1, True)
    assert gone_of(sample, place) == sample.parts.keys() - kept
    assert json.loads(dry.stdout)["dropped"] == json.loads(result.stdout)["dropped"]
    assert (place / "packs" / pack).exists() == (how != "gone")


def test_packs_of_a_trajectory_stay_while_one_of_them_is_damaged(sample, place):
    """Its newest part may lie there."""
    harm(place, sample.pack(grown=True), "list")
    result = invoke("gc", place, "--older-than", "0s", "--json")
    dropped = {one["pack"] for one in json.loads(result.stdout)["dropped"]}
    assert (result.exit_code, sample.grown in result.stderr) == (1, True)
    assert not dropped & set(sample.parts[sample.grown])
    assert dropped


@pytest.mark.parametrize("how", [*UNREADABLE, "missing record"])
def test_compaction_of_the_other_partition_goes_on(sample, place, how):
    """Of the damaged partition goes on what can be told apart from the damage."""
    pack = sample.pack()
    if how == "missing record":
        shutil.rmtree(place / "index" / "00")
        (place / "manifest" / "00" / f"{pack[3:11]}.json").unlink()
        name = f"{pack[3:11]}.json"
    else:
        name = harm(place, pack, how)
    result = invoke("compact", place, "--json")
    assert (result.exit_code, name in result.stderr) == (1, True)
    reader = read_archive(place)
    assert len(live(reader, 1)) == 1
    sound = {id for id, packs in sample.parts.items() if packs[0].startswith("01/")}
    assert folds(trajstore.open_archive(place), sound) == {id: sample.folds[id] for id in sound}


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["list", "gone", "untabled", "payload"])
@pytest.mark.parametrize("grown", [False, True], ids=["whole", "in part"])
def test_damaged_pack_is_given_up_for_good(sample, place, tmp_path, how, grown):
    pack = sample.pack(grown=grown)
    harm(place, pack, how)
    before = tree(place)
    dry = invoke("gc", place, "--pack", pack, "--lost", "--dry-run", "--json")
    assert (dry.exit_code, tree(place)) == (0, before)
    result = invoke("gc", place, "--pack", pack, "--lost", "--json")
    assert result.exit_code == 0
    (told,) = json.loads(result.stdout)["dropped"]
    assert json.loads(dry.stdout)["dropped"] == [told]
    assert (told["pack"], told["lost"]) == (pack, True)
    assert told["ids"] == (sorted(sample.within(pack)) if how == "payload" else None)
    if how != "untabled":  # else nobody knows any more whose parts were in it
        gone = sample.within(pack)
        for id in gone:
            with pytest.raises(trajstore.NotFound, match="dropped by retention"):
                trajstore.open_archive(place).load(id)
    else:
        gone = sample.within(pack) - ({sample.grown} if grown else set())
    found, again = listed(place)
    assert (found, again.exit_code) == (sample.parts.keys() - gone, 0)
    sound = sample.parts.keys() - sample.within(pack)
    assert folds(trajstore.open_archive(place), sound) == {id: sample.folds[id] for id in sound}
    if how != "untabled" or not grown:
        assert invoke("verify", place).exit_code == 0
        assert pack in invoke("verify", place).stdout, "it stays on record what was given up"
        assert invoke("export", place, tmp_path / "copy").exit_code == 0
    assert invoke("compact", place).exit_code == 0
    assert invoke("gc", place, "--grace", "0s").exit_code == 0
    assert folds(trajstore.open_archive(place), sound) == {id: sample.folds[id] for id in sound}


@pytest.mark.parametrize("how", ["list", "gone"])
def test_what_was_given_up_stays_so_when_the_archive_is_rebuilt(sample, place, how):
    pack = sample.pack()
    harm(place, pack, how)
    invoke("gc", place, "--pack", pack, "--lost")
    before = tree(place)
    done = rebuild_archive(ArchiveRoot.at(place), digests=True)
    assert (done, tree(place)) == (type(done)(), before), "what its lookup table knows is not forgotten"
    shutil.rmtree(place / "index")
    found, result = listed(place)
    assert (found, result.exit_code) == (sample.parts.keys() - sample.within(pack), 0)
    assert rebuild_archive(ArchiveRoot.at(place)).damaged == []
    assert invoke("verify", place).exit_code == 0


@pytest.mark.parametrize("how", ["list", "gone", "untabled"])
def test_list_of_a_dropped_pack_is_given_up_alike(sample, place, how):
    """It stays for the ids that it knows; where it is damaged, nothing is to be told of it for ever."""
    pack = sample.pack()
    assert invoke("gc", place, "--pack", pack, "--grace", "0s").exit_code == 0
    refused = invoke("gc", place, "--pack", pack, "--lost")
    assert (refused.exit_code, "not damaged" in refused.stderr) == (1, True)
    harm(place, pack, how)
    assert invoke("verify", place).exit_code == 1
    assert listed(place)[1].exit_code == (1 if how == "untabled" else 0)
    assert invoke("gc", place, "--pack", pack, "--lost").exit_code == 0
    for command in ("ls", "verify", "rebuild", "compact", "gc"):
        result = invoke(command, place)
        assert result.exit_code == 0, result.stderr
    assert listed(place)[0] == sample.parts.keys() - sample.within(pack)
    again = invoke("gc", place, "--pack", pack, "--lost")
    assert (again.exit_code, "no live pack" in again.stderr) == (1, True)


def test_pack_of_a_damaged_record_is_not_given_up_before_a_rebuild(sample, place):
    pack = sample.pack()
    harm(place, pack, "record")
    result = invoke("gc", place, "--pack", pack, "--lost")
    assert (result.exit_code, "trajstore rebuild" in result.stderr) == (1, True)
    assert invoke("rebuild", place).exit_code == 0
    found, result = listed(place)
    assert (found, result.exit_code) == (sample.parts.keys(), 0)


def test_two_damaged_packs_of_a_partition_are_given_up_together(sample, place):
    packs = [sample.pack(), sample.pack(grown=True)]
    for pack in packs:
        harm(place, pack, "untabled")
    one = invoke("gc", place, "--pack", packs[0], "--lost")
    assert (one.exit_code, packs[1] in one.stderr) == (1, True)
    assert invoke("gc", place, *(part for pack in packs for part in ("--pack", pack)), "--lost").exit_code == 0
    assert listed(place)[1].exit_code == 0


def test_restored_list_is_read_again(sample, place):
    pack = sample.pack()
    shard = place / "packs" / pack / "trajectories" / "c" / "0"
    data = shard.read_bytes()
    harm(place, pack, "untabled")
    archive = trajstore.open_archive(place)
    with pytest.raises(trajstore.Corrupt, match=pack):
        archive.list()
    shard.write_bytes(data)
    assert {summary.id for summary in archive.list()} == sample.parts.keys()
    assert folds(archive, sample.parts) == sample.folds


def test_sound_pack_is_not_given_up(sample, place):
    before = tree(place)
    result = invoke("gc", place, "--pack", sample.pack(), "--lost")
    assert (result.exit_code, "not damaged" in result.stderr, tree(place)) == (1, True, before)
    result = invoke("gc", place, "--pack", "00/00000099-01ARZ3NDEKTSV4RRFFQ69G5FAV", "--lost")
    assert (result.exit_code, "no live pack" in result.stderr) == (1, True)
    assert invoke("gc", place, "--lost").exit_code == 2


def test_damaged_pack_without_the_flag_is_refused(sample, place):
    pack = sample.pack()
    harm(place, pack, "list")
    before = tree(place)
    result = invoke("gc", place, "--pack", pack)
    assert (result.exit_code, pack in result.stderr, tree(place)) == (1, True, before)


def test_live_trajectory_of_a_lost_pack_goes_with_it_and_its_writer_is_told(durable, archive, folder):
    trajectory = record_seed_case(durable)
    kept = record_seed_case(durable).id
    archive()
    segment = durable.get(trajectory.id).segment(context=[1])
    segment.tokens([2])
    durable.flush()
    (record,) = live(durable.archive)
    other = record_seed_case(durable)
    archive()
    harm(folder / "archive", record.pack, "gone")
    assert invoke("gc", folder, "--pack", record.pack, "--lost").exit_code == 0
    assert [summary.id for summary in durable.list()] == [other.id]
    assert not durable.hot.exists(trajectory.id)
    segment.tokens([3])
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        durable.flush(trajectory.id)
    for id in (trajectory.id, kept):
        with pytest.raises(trajstore.Conflict, match="never reused"):
            durable.create(id=id)
    archive()
    assert durable.wire.call("KEYS", f"*{trajectory.id}*") == []


def test_gc_reads_each_record_once(sample, place, monkeypatch):
    """Of more records than a manifest remembers, too."""
    monkeypatch.setattr("trajstore.archive.manifest._RECORDS", 1)
    shutil.copytree(place, place.parent / "again")
    asked: list[str] = []
    read = LocalStorage.read

    def count(self, path):
        asked.append(path)
        return read(self, path)

    monkeypatch.setattr(LocalStorage, "read", count)
    records = sorted((place / "manifest" / "01").iterdir())
    assert invoke("gc", place, "--older-than", "1d", "--pack", sample.pack(), "--dry-run").exit_code == 0
    counts = [asked.count(f"manifest/01/{path.name}") for path in records]
    assert max(counts) <= 2, "once to follow the manifest, once to look at it"
