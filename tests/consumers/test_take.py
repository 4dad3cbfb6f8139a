"""`trajstore take`: a trainer on the command line. What is written is acknowledged after, and nothing else is."""

import json
import signal

import pytest

torch = pytest.importorskip("torch")

from tests.cli.running import ended, invoke, run, started  # noqa: E402
from tests.consumers.rollouts import finish, look, materialize  # noqa: E402
from trajstore.log.wire import reply_fields  # noqa: E402
from trajstore_replay.taking import take, write_ready  # noqa: E402
from trajstore_trainer import TrajectoryReader, read_trajectories  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def published(embedded):
    """Three groups of two, ready; ids by group."""
    made = {f"g{i}": [finish(embedded, group=f"g{i}", group_size=2, seed=i).id for _ in range(2)] for i in range(3)}
    materialize(embedded)
    return made


def test_files_hold_the_groups_and_the_queue_does_not(embedded, published, tmp_path):
    done = invoke("take", tmp_path / "store", "--count", 3, "--seconds", 60, "--out", tmp_path / "taken", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert {one["group"]: sorted(one["ids"]) for one in told} == {g: sorted(ids) for g, ids in published.items()}
    for one in told:
        trajectories = list(read_trajectories(one["file"]))
        assert sorted(t.id for t in trajectories) == sorted(published[one["group"]])
        assert (trajectories[0].routed_experts == embedded.load(trajectories[0].id).routed_experts).all()
    assert look(embedded) == []
    assert "3 groups, 6 trajectories, 30 tokens" in done.stderr


def test_json_has_the_trajectories_themselves(embedded, published, tmp_path):
    done = invoke("take", tmp_path / "store", "--seconds", 0, "--json", "--routing")
    assert done.exit_code == 0
    groups = json.loads(done.stdout)
    assert {one["group"] for one in groups} == published.keys()
    some = groups[0]["trajectories"][0]
    assert some["token_ids"] == embedded.load(some["id"]).token_ids.tolist()
    assert some["routed_experts"] == embedded.load(some["id"]).routed_experts.tolist()
    assert groups[0]["missing"] == {}


def test_group_without_its_late_member_says_so(embedded, tmp_path):
    for _ in range(2):
        finish(embedded, group="g", group_size=3)
    materialize(embedded, group_seconds=0)
    finish(embedded, group="g", group_size=3)
    materialize(embedded)
    options = ("take", tmp_path / "store", "--seconds", 0)
    told = [
        {name: one[name] for name in ("version", "size", "came", "late", "before")}
        for one in json.loads(invoke(*options, "--consumers", "look", "--json").stdout)
    ]
    assert told == [
        {"version": 2, "size": 3, "came": 2, "late": 1, "before": 0},
        {"version": 3, "size": 3, "came": 3, "late": 0, "before": 2},
    ]
    shown = invoke(*options, "--out", tmp_path / "taken").stdout.splitlines()
    assert shown[0].endswith("g  2 trajectories, 1 late")
    assert shown[1].endswith("g  3 trajectories, published before as version 2")


def consumers(store):
    """Names in the trainer's consumer group, over all partitions."""
    streams = [store.keys.ready(p) for p in range(store.partitions)]
    replies = [store.wire.call("XINFO", "CONSUMERS", stream, "trainer") for stream in streams]
    return {reply_fields(one)[b"name"].decode() for reply in replies for one in reply}


def test_nobody_is_left_behind_who_has_nothing_in_hand(embedded, published):
    take(embedded, lambda ready: None, count=1)
    take(embedded, lambda ready: None, count=1, name="me")
    assert consumers(embedded) == set()

    def full(ready):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        take(embedded, full, name="holds")
    assert consumers(embedded) == {"holds"}
    assert take(embedded, lambda ready: None, name="holds", seconds=0) == 1
    assert consumers(embedded) == set()


def test_what_could_not_be_written_is_not_acknowledged_and_comes_again_under_the_name(embedded, published):
    kept = []

    def full_after_one(ready):
        if kept:
            raise OSError("disk full")
        kept.append(ready.group)

    with pytest.raises(OSError, match="disk full"):
        take(embedded, full_after_one, name="me")
    assert len(look(embedded)) == 2
    assert take(embedded, lambda ready: kept.append(ready.group), seconds=0, name="me") == 2
    assert sorted(kept) == ["g0", "g1", "g2"]
    assert look(embedded) == []


def test_consumers_of_another_name_take_nothing_from_the_trainer(embedded, published, tmp_path):
    for _ in range(2):
        invoke("take", tmp_path / "store", "--seconds", 0, "--consumers", "look", "--out", tmp_path / "taken")
    assert len(list((tmp_path / "taken").iterdir())) == 3, "the second time there was nothing new"
    assert len(TrajectoryReader(embedded).take(groups=3, timeout=30)) == 3


def test_entry_that_comes_again_replaces_its_own_file(embedded, published, tmp_path):
    (ready, *_) = TrajectoryReader(embedded).take(groups=1, timeout=30)
    assert write_ready(tmp_path, ready) == write_ready(tmp_path, ready)
    assert len(list(tmp_path.glob("*.msgpack"))) == 1


def test_fewer_than_asked_for_is_exit_code_1_and_what_came_is_kept(embedded, published, tmp_path):
    done = invoke("take", tmp_path / "store", "--count", 4, "--seconds", 0.2, "--out", tmp_path / "taken")
    assert done.exit_code == 1
    assert "3 of 4 groups came within 0.2 s" in done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert look(embedded) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_waits_for_what_comes_until_it_is_asked_to_stop(embedded, tmp_path, how):
    with started("take", tmp_path / "store", "--out", tmp_path / "taken", "--json") as process:
        assert process.stdout.readline() == "[\n"
        made = finish(embedded, group="late")
        materialize(embedded)
        assert json.loads(process.stdout.readline())["ids"] == [made.id]
        code, out, errors = ended(process, how)
    assert (code, out) == (0, "]\n")
    assert "stopped: 1 groups" in errors


def test_reader_that_goes_away_leaves_the_group_in_the_queue(embedded, published, tmp_path):
    with started("take", tmp_path / "store", "--json", "--seconds", "30") as process:
        process.stdout.close()
        assert process.wait(60) != 0
    assert len(look(embedded)) >= 2, "at most what the pipe still took"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "--out DIR, or --json"),
        (("--out", "x", "--routing"), "--routing goes with --json alone"),
        (("--json", "--seconds", "-1"), "x>=0"),
        (("--json", "--count", "0"), "x>=1"),
    ],
)
def test_wrong_use_is_told_before_anything_is_taken(embedded, published, tmp_path, options, why):
    refused = invoke("take", tmp_path / "store", *options)
    assert refused.exit_code == 2
    assert why in refused.stderr
    assert len(look(embedded)) == 3


def test_archive_has_nothing_to_take(embedded, tmp_path):
    refused = run("take", tmp_path / "store" / "archive", "--json")
    assert refused.returncode == 1
    assert "this command wants the run itself" in refused.stderr
