"""What is wrong with a run is found and named, with what to do; what is sound is not."""

import shutil

import msgspec
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.rollouts import abort, finish, materialize, resume
from trajstore.abandon import sweep
from trajstore.archiver import Archiver
from trajstore.consumer_groups import remove_consumer_group
from trajstore.log.feed import MATERIALIZER, FeedFollower
from trajstore.ready_follower import ReadyFollower
from trajstore_replay import check_files, diagnose
from trajstore_replay.ages import Ages, told

WORKERS = {"unfollowed", "unfinished", "untaken", "claimed", "no-archive", "backlog", "memory"}


def found(store, *, stale_seconds=0.0, **options):
    """Findings about rollouts, as (kind, severity, trajectory)."""
    every = diagnose(store, stale_seconds=stale_seconds, name="runs/x", **options)
    return [(one.kind, one.severity, one.trajectory) for one in every if one.kind not in WORKERS]


def kinds(store, **options):
    """Kinds of all findings, workers' too."""
    return {one.kind: one for one in diagnose(store, name="runs/x", **options)}


def unclosed(store, **options):
    """A trajectory whose writer is in the middle of a segment."""
    writer = store.create(routing=SPEC, **options)
    segment = writer.segment(context=[1, 2, 3], weight_version="v1")
    segment.tokens([4, 5])
    store.flush()
    return writer.id


@pytest.fixture
def durable(tmp_path):
    """A store from which the archiver takes everything at once."""
    with trajstore.open(tmp_path / "store", partitions=2, ack="fsync") as store:
        yield store


def test_a_sound_run_has_no_findings(durable):
    finish(durable, reward=1.0)
    record_seed_case(durable).close("completed")
    durable.flush()
    materialize(durable)
    Archiver(durable).run(once=True)
    follower = ReadyFollower(durable.wire, durable.keys, "trainer", "me")
    follower.acknowledge(follower.poll(count=10))
    assert list(diagnose(durable, stale_seconds=0.0, every_log=True)) == []


def test_an_open_segment_is_a_warning_once_it_stands_still(store):
    id = unclosed(store)
    assert found(store) == [("open-segment", "warning", id)]
    assert found(store, stale_seconds=3600.0) == [("open-segment", "information", id)]
    finding = kinds(store, stale_seconds=0.0)["open-segment"]
    assert "segment 0 is open: its writer is at work, or gone" in finding.what
    assert f"{id} --model DIR --takeover --max-tokens N` goes on from its 5 tokens" in finding.what_to_do
    assert f"`trajstore close runs/x {id} aborted --takeover`" in finding.what_to_do


def test_age_goes_by_the_servers_clock_where_a_sweep_noted_it(store):
    id = unclosed(store)
    partition = store.keys.partition(id)
    sweep(store, range(store.partitions), after=1e9, created_after=1e9)
    (summary,) = store.list()
    ages = Ages.of_run(store, partition)
    assert ages.noted[id][0] == summary.last
    later = ages._replace(now=ages.now + 5000)
    ahead = msgspec.structs.replace(summary, updated=ages.now + 99999)  # a clock that runs ahead
    assert 5000 <= later.of(ahead) < 5010
    assert ages._replace(noted={}).of(ahead) == 0.0


def test_a_lost_writer_is_named_after_another_took_over(store):
    id = unclosed(store)
    store.get(id).close("aborted", takeover=True)
    store.flush()
    assert found(store) == [("lost", "warning", id)]
    finding = kinds(store, stale_seconds=0.0)["lost"]
    assert "segment 0 was lost: its writer vanished" in finding.what
    assert f"`trajstore resume runs/x {id} --model DIR --max-tokens N` goes on" in finding.what_to_do


def test_who_was_resumed_after_a_loss_is_told_of_and_no_problem(store):
    id = unclosed(store)
    with store.get(id).segment(weight_version="v2") as segment:
        segment.tokens([6])
        segment.close("stop")
    store.get(id).close("completed")
    store.flush()
    assert found(store) == [("superseded", "information", id)]
    assert kinds(store)["superseded"].what == "segment 0 was lost, and gone on from"


def test_aborted_idle_unbegun_and_failed_rollouts_are_told_apart(store):
    aborted = abort(store).id
    failed = finish(store, status="failed").id
    idle = resume(store, abort(store)).id  # its last segment was aborted, and it is open
    ended = record_seed_case(store).id
    unbegun = store.create().id
    store.flush()
    expected = {
        ("aborted", "warning", aborted),
        ("failed", "information", failed),
        ("aborted", "warning", idle),
        ("idle", "warning", ended),
        ("unbegun", "warning", unbegun),
    }
    assert set(found(store)) == expected
    young = {(kind, "information", id) for kind, _, id in expected if kind in ("aborted", "failed")}
    assert set(found(store, stale_seconds=3600.0)) == young


def test_a_rollout_that_ended_by_itself_is_to_be_closed_and_scored_unless_it_was(store):
    id = record_seed_case(store).id
    store.flush()
    advice = f"`trajstore close runs/x {id} completed --reward R`"
    assert kinds(store, stale_seconds=0.0)["idle"].what_to_do == f"score it and close it: {advice}"
    store.get(id).reward(1.0)
    store.flush()
    advice = f"`trajstore close runs/x {id} completed`"
    assert kinds(store, stale_seconds=0.0)["idle"].what_to_do == f"close it: {advice}"


def test_rewound_tokens_are_told_of(store):
    writer = store.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4, 5])
        segment.routing(rows(4), start=0)
    with writer.segment(base=3, context=[9]) as segment:
        segment.close("stop")
    writer.close("completed")
    store.flush()
    assert found(store) == [("superseded", "information", writer.id)]
    assert kinds(store)["superseded"].what == "2 tokens of segment 0 were superseded: segment 1 began at 3"


def test_a_gap_says_what_is_sound_below_it(durable):
    writer = durable.create(routing=SPEC)
    for token in range(3):
        with writer.segment(context=[token]) as segment:
            segment.tokens([token])
            durable.flush()
    writer.close("completed")
    durable.flush()
    durable.wire.call("XDEL", durable.keys.entries(writer.id), "3-0")
    finding = kinds(durable)["gap"]
    assert (finding.severity, finding.trajectory, finding.event) == ("warning", writer.id, "2-3")
    assert f"`trajstore show runs/x {writer.id} --until 2-3`" in finding.what_to_do
    assert len(durable.load(writer.id, until="2-3")) == 2


def test_a_group_that_waits_names_who_is_missing(store):
    finish(store, group="prompt-17", group_size=4)
    waiting = unclosed(store, group="prompt-17", group_size=4)
    deleted = finish(store, group="prompt-17", group_size=4)
    store.delete(deleted.id)
    finish(store, group="whole", group_size=1)
    unclosed(store, group="not begun to come", group_size=2)
    stuck = [one for one in diagnose(store, stale_seconds=0.0) if one.kind == "stuck-group"]
    (finding,) = stuck
    assert "group prompt-17 waits, with 2 of 4 members" in finding.what
    assert f"{waiting}: segment 0 is open" in finding.what
    assert finding.what.endswith("; 1 never created, or dropped since")
    assert not [one for one in diagnose(store, stale_seconds=3600.0) if one.kind == "stuck-group"]


def test_a_group_of_which_all_that_came_were_deleted_waits_for_nobody(store):
    for _ in range(2):
        finish(store, group="given up", group_size=3)
    materialize(store)
    assert "stuck-group" in kinds(store, stale_seconds=0.0)
    assert store.delete(group="given up") == 2
    materialize(store)
    assert "stuck-group" not in kinds(store, stale_seconds=0.0)


def test_a_group_that_was_published_without_its_late_members_is_no_problem(store):
    finish(store, group="prompt-17", group_size=2)
    materialize(store)
    assert kinds(store, stale_seconds=0.0)["stuck-group"].severity == "warning"
    materialize(store, group_seconds=0.0)
    finding = kinds(store, stale_seconds=0.0)["stuck-group"]
    assert finding.severity == "information"
    assert finding.what.startswith("group prompt-17 was published with 1 of 2 members")


def test_a_consumer_group_that_nobody_uses_is_removed_as_the_advice_says(store):
    ReadyFollower(store.wire, store.keys, "look", "me").leave()
    finish(store)
    materialize(store)
    found = [one for one in diagnose(store, stale_seconds=0.0, name="runs/x") if one.kind == "untaken"]
    told_of = {one.what.split("'")[1]: one.what_to_do for one in found}
    for name, advice in told_of.items():
        assert f"`trajstore consumers runs/x --remove {name}`" in advice
    assert told_of.keys() == {"look", "trainer"}
    remove_consumer_group(store.wire, store.keys, "look")
    assert [one.what for one in diagnose(store, stale_seconds=0.0) if "look" in one.what] == []
    left = kinds(store, stale_seconds=0.0)["untaken"].what_to_do
    assert "--remove" not in left, "it is the last"
    assert "run no materializer" in left


def test_feeds_that_nobody_follows_are_named_with_the_worker_to_start(store):
    finish(store)
    told_of = [one for one in diagnose(store, stale_seconds=0.0, name="runs/x") if one.kind == "unfollowed"]
    assert sorted(one.what_to_do for one in told_of) == [
        "run `trajstore archive runs/x`",
        "run `trajstore materialize runs/x`",
    ]
    assert "unfollowed" not in kinds(store, stale_seconds=3600.0)
    assert kinds(store)["backlog"].what.startswith("1 trajectories are not archived yet")


def test_hints_that_a_worker_sits_on_are_named_with_it(store):
    finish(store)
    FeedFollower(store.wire, store.keys, MATERIALIZER, "host-9").poll(range(store.partitions), count=10)
    finding = kinds(store, stale_seconds=0.0)["unfinished"]
    assert "host-9 of consumer group 'materializer' took 2 hints" in finding.what


def test_what_no_trainer_takes_and_what_one_sits_on_are_named(store):
    finish(store)
    finish(store)
    materialize(store)
    untaken = kinds(store, stale_seconds=0.0)["untaken"]
    assert untaken.what.startswith("2 published entries wait for consumer group 'trainer'")
    assert "0 consumers" in untaken.what
    ReadyFollower(store.wire, store.keys, "trainer", "rank-3").poll(count=10)
    later = kinds(store, stale_seconds=0.0)
    assert "rank-3 of consumer group 'trainer' took 2 published entries" in later["claimed"].what
    assert "untaken" not in later


def test_a_run_without_an_archive_says_so(open_store):
    assert kinds(open_store())["no-archive"].what_to_do == "`trajstore archive runs/x --archive FOLDER`"


def test_a_full_server_is_an_error(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1) as store:
        store.wire.call("SET", "ballast", bytes(32 << 20))
        used = int(store.wire.exchange([("INFO", "memory")])[0].split(b"used_memory:")[1].split()[0])
        store.wire.call("CONFIG", "SET", "maxmemory", used * 21 // 20)
        assert kinds(store)["memory"].severity == "error"
        store.wire.call("CONFIG", "SET", "maxmemory", used * 5 // 4)
        assert kinds(store)["memory"].severity == "warning"
        store.wire.call("CONFIG", "SET", "maxmemory", 0)


def test_an_archive_alone_tells_what_it_can(durable, tmp_path):
    aborted, failed = abort(durable, group="g", group_size=2).id, finish(durable, status="failed").id
    Archiver(durable).run(once=True)
    archive = trajstore.open_archive(tmp_path / "store" / "archive")
    assert set(found(archive)) == {
        ("aborted", "information", aborted),
        ("failed", "information", failed),
        ("stuck-group", "information", ""),
    }


def test_archived_logs_are_read_on_demand(durable):
    writer = durable.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3])
    with writer.segment(base=1, context=[9]) as segment:
        segment.close("stop")
    writer.close("completed")
    durable.flush()
    Archiver(durable).run(once=True)
    assert found(durable) == []
    assert found(durable, every_log=True) == [("superseded", "information", writer.id)]


def test_a_lost_pack_is_found_without_reading_data(durable, tmp_path):
    finish(durable)
    Archiver(durable).run(once=True)
    archive = tmp_path / "store" / "archive"
    (archive / "staging" / "of a killed archiver").mkdir(parents=True)
    (archive / "staging" / "of a killed archiver" / "tokens").write_bytes(b"half")
    assert list(check_files(str(archive))) == []  # which is no fault
    pack = next((archive / "packs").glob("*/*"))
    shutil.rmtree(pack / "tokens")
    assert {one.kind for one in check_files(str(archive))} == {"missing-file"}
    assert "missing-file" in kinds(durable)


def test_durations_are_told_as_people_say_them():
    assert [told(one) for one in (0, 119, 120, 7199, 7200, 200000)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
        "2 days",
    ]
