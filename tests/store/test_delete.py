"""Deleting: one tombstone, after which nothing of a trajectory is read, written, published or delivered any more."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.rollouts import abort, finish, look, materialize, members, resume
from tests.store.children import servers_of, until
from trajstore.archiver import Archiver
from trajstore.entries import Entry, decode_entry, encode_entry
from trajstore.events import SCHEMA_VERSION, EventId, TrajectoryClosed, TrajectoryDeleted, TrajectoryOpened
from trajstore.fold import plan
from trajstore.ready import ReadyMember, ReadyQueue

ARCHIVER_STEPS = ("staged", "synced", "moved", "recorded", "trimmed")

DELETE_AND_DIE = """
import os, signal, sys
import trajstore

with trajstore.open(sys.argv[1], create=False) as store:
    transaction, cut = store.wire.transaction, int(sys.argv[3])

    def die(commands, *, watch=None):
        if commands[0][0] != "UNLINK":
            return transaction(commands, watch=watch)
        store.wire.exchange(commands[:cut])
        os.kill(os.getpid(), signal.SIGKILL)

    store.wire.transaction = die
    store.delete(sys.argv[2], reason="private")
"""
"""Dies once `cut` of the commands have run that remove what the tombstone leaves, as if they were no transaction."""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "durable"


@pytest.fixture
def durable(folder):
    """An embedded store whose archiver need not wait for anything to ripen."""
    with trajstore.open(folder, partitions=1, ack="fsync") as store:
        yield store


def archive(store, **options):
    store.flush()
    return Archiver(store, **options).run(once=True)


def reads(store, id):
    """Every way to read a trajectory."""
    recording = trajstore.history.Recording(segment=0, event="2-2", start=0, stop=7, origin="computed")
    return [
        lambda: store.load(id),
        lambda: store.load(id, until="1-0"),
        lambda: store.load(id, policy="as_sampled"),
        lambda: store.load_routing(id),
        lambda: store.plan(id),
        lambda: store.events(id),
        lambda: store.notes(id),
        lambda: store.overlaps(id),
        lambda: store.recorded_rows(id, recording),
    ]


def assert_deleted(store, id):
    """Nothing can be read of it, and only a list of what was deleted names it."""
    ways = reads(store, id)
    if isinstance(store, trajstore.Store):
        ways += [lambda: store.get(id), lambda: store.wait(id), lambda: store.wait(id, status="open")]
    for read in ways:
        with pytest.raises(trajstore.NotFound, match="was deleted at"):
            read()
    assert id not in [one.id for one in store.list()]
    assert id in [one.id for one in store.list(status="deleted")]
    assert isinstance(store.tombstone(id).header, TrajectoryDeleted)


def left(store, id):
    """Names of the keys that hold something of a trajectory, but for a stream with a tombstone alone."""
    entries, _ = store.hot.read(id)
    keys = [store.keys.payloads(id), store.keys.notes(id), *(store.keys.ready_payload(id, v) for v in range(9))]
    found = [key for key in keys if store.wire.call("EXISTS", key)]
    lone = len(entries) == 1 and isinstance(entries[0].events()[0].header, TrajectoryDeleted)
    return found if not entries or lone else [store.keys.entries(id), *found]


def with_everything(store, **options):
    """A trajectory that has payloads outside its headers, notes, and two published versions. Its `1-0` is private."""
    trajectory = store.create(routing=SPEC, metadata={"name": "Ada"}, **options)
    with trajectory.segment(context=range(200)) as segment:
        segment.tokens(range(200), [-0.5] * 200)
        segment.routing(rows(400), start=0)
        segment.close("stop")
    trajectory.observe(rows(300), start=0, source="trainer")
    trajectory.close("aborted")
    store.flush()
    materialize(store)
    store.get(trajectory.id).close("aborted")
    store.flush()
    materialize(store)
    assert len(left(store, trajectory.id)) == 5
    return trajectory


# What a deletion is


def test_deleted_trajectory_is_found_by_no_read(store):
    trajectory, other = record_seed_case(store), record_seed_case(store)
    trajectory.observe(rows(9), start=0, source="trainer")
    trajectory.close("completed")
    store.flush()
    assert store.delete(trajectory.id) == 1
    assert_deleted(store, trajectory.id)
    assert [one.id for one in store.list()] == [other.id]
    assert len(store.load(other.id)) == 10
    assert store.tombstone(other.id) is None
    assert store.tombstone("nobody") is None


def test_error_says_when_and_why(store):
    record_seed_case(store, id="mine")
    store.delete("mine", reason="the user asked for it")
    with pytest.raises(trajstore.NotFound, match=r"mine was deleted at 20..-.*\(event 4-0, the user asked for it\)"):
        store.load("mine")
    (summary,) = store.list(status=["open", "deleted"])
    assert (summary.id, summary.status, summary.last, summary.tokens) == ("mine", "deleted", "4-0", 0)


def test_id_of_a_deleted_trajectory_stays_taken(store, open_store):
    record_seed_case(store, id="mine")
    store.delete("mine")
    for one in (store, open_store()):
        with pytest.raises(trajstore.Conflict, match="never reused"):
            one.create(id="mine")


def test_deleting_again_is_no_error_and_counts_nothing(store):
    record_seed_case(store, id="mine")
    assert [store.delete("mine"), store.delete("mine", reason="again")] == [1, 0]
    assert store.tombstone("mine").header.reason == ""
    assert_deleted(store, "mine")


def test_unknown_trajectory_cannot_be_deleted(store):
    with pytest.raises(trajstore.NotFound):
        store.delete("nobody")
    assert store.delete(group="nobody") == 0
    assert store.create(id="nobody").id == "nobody"


@pytest.mark.parametrize(
    ("id", "options"),
    [(None, {}), ("a", {"group": "g"}), ("a", {"reason": 7}), ("a", {"reason": "x" * 1001})],
)
def test_wrong_arguments_are_refused_and_delete_nothing(embedded, id, options):
    embedded.create(id="a", group="g")
    with pytest.raises(trajstore.SchemaError):
        embedded.delete(id, **options)
    assert len(embedded.list()) == 1


def test_deleting_a_group_deletes_the_members_known_now(store, open_store):
    made = [finish(store, group="g", group_size=3).id for _ in range(2)]
    made.append(store.create(group="g").id)  # not even flushed
    other = finish(store, group="h").id
    store.delete(made[0])
    assert store.delete(group="g") == 2
    assert open_store().delete(group="g") == 0
    for id in made:
        assert_deleted(store, id)
    assert {one.id: one.group for one in store.list(status="deleted", group="g")} == dict.fromkeys(made, "g")
    assert [one.id for one in store.list()] == [other]


def test_group_can_be_deleted_although_the_log_of_a_member_is_lost(store):
    lost, there = finish(store, group="g"), finish(store, group="g")
    store.wire.call("DEL", store.keys.entries(lost.id))
    assert store.delete(group="g") == 1
    assert_deleted(store, there.id)


def test_payloads_go_at_once_and_the_tombstone_alone_stays(store):
    trajectory = with_everything(store)
    store.delete(trajectory.id)
    assert left(store, trajectory.id) == []
    ((entry,), notes) = store.hot.read(trajectory.id)
    assert (str(entry.at), notes) == ("5-0", [])
    assert b"Ada" not in entry.data


def test_damaged_trajectories_can_be_deleted(store):
    """Holes, and an event of a version to come: none of it folds, all of it must go."""
    holed, cut, strange = (record_seed_case(store) for _ in range(3))
    store.flush()
    store.wire.call("XDEL", store.keys.entries(holed.id), "2-0")
    store.wire.call("XDEL", store.keys.entries(cut.id), "3-0")
    entry = encode_entry(Entry(99, 7, 0.0, [TrajectoryClosed(status="completed")]))
    store.wire.call("XADD", store.keys.entries(strange.id), "4-0", "e", entry)
    for id in (holed.id, cut.id, strange.id):
        assert store.delete(id) == 1
        assert_deleted(store, id)


def test_summary_made_anew_is_the_same(store):
    finish(store, id="mine", group="g", group_size=4)
    store.delete("mine")
    before = store.list(status="deleted")
    store.wire.call("DEL", store.keys.summaries(store.keys.partition("mine")))
    assert store.rebuild_summaries() == 1
    (after,) = store.list(status="deleted")
    assert (after.id, after.group, after.group_size, after.last) == ("mine", "g", 4, before[0].last)


def test_fold_of_a_tombstone_alone_says_that_it_was_deleted():
    """Not that the first events are missing."""
    at = EventId(7, 0)
    (tombstone,) = decode_entry(at, encode_entry(Entry(SCHEMA_VERSION, 7, 0.0, [TrajectoryDeleted(reason="private")])))
    with pytest.raises(trajstore.NotFound, match=r"was deleted at 1970-01-01.*private"):
        plan([tombstone])
    with pytest.raises(trajstore.NotFound, match="was deleted"):
        plan([tombstone], until=EventId(1, 0))


def test_wait_ends_with_the_deletion(store, open_store):
    record_seed_case(store, id="mine")
    store.flush()
    outcome = []

    def wait():
        try:
            open_store().wait("mine", timeout=30.0)
        except trajstore.NotFound as error:
            outcome.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    store.delete("mine")
    thread.join(20)
    assert "was deleted" in outcome[0]
    assert store.wait("mine", status="deleted").last == "4-0"


# Writers


def test_writer_with_an_open_segment_is_fenced_without_being_asked(store, open_store):
    segment = store.create(id="mine", routing=SPEC).segment(context=[1, 2])
    segment.tokens([3])
    store.flush()
    open_store().delete("mine")
    segment.tokens(range(1000))
    with pytest.raises(trajstore.Fenced):
        store.flush("mine")
    with pytest.raises(trajstore.Fenced):
        segment.close("stop")
    assert_deleted(store, "mine")
    assert left(store, "mine") == []
    assert store.list(status="deleted")[0].last == "3-0", "the fenced writer's summary does not stay"


def test_handle_of_the_process_that_deletes_is_fenced_too(store):
    trajectory = store.create(id="mine")
    segment = trajectory.segment(context=[1, 2])
    segment.tokens([3])
    assert store.delete("mine") == 1
    store.flush()
    segment.close("stop")
    with pytest.raises(trajstore.Fenced):
        store.flush("mine")
    with pytest.raises(trajstore.Fenced):
        trajectory.close()
    assert_deleted(store, "mine")


def test_writer_that_takes_the_epoch_first_only_delays_the_deletion(store, open_store):
    record_seed_case(store, id="mine")
    other = open_store()
    lane, rivals = store._flusher.lane, [1, 2]

    def be_late(id, **state):
        if rivals:
            other.get(id).reward(rivals.pop())
            other.flush()
        return lane(id, **state)

    store._flusher.lane = be_late
    assert store.delete("mine") == 1
    assert rivals == []
    assert str(store.tombstone("mine").at) == "6-0"
    store.flush()  # nothing of it is left to be reported
    assert_deleted(other, "mine")


def test_deletion_that_lost_a_race_leaves_nothing_to_be_reported_though_another_thread_deletes_too(store, open_store):
    record_seed_case(store, id="mine")
    store.flush()
    other = open_store()
    lane, drain, rivals = store._flusher.lane, store._flusher.drain, [1]

    def be_late(id, **state):
        if rivals:
            other.get(id).reward(rivals.pop())
            other.flush()
        return lane(id, **state)

    def another_begins(id=None):
        drain(id)
        lane("mine")

    store._flusher.lane, store._flusher.drain = be_late, another_begins
    assert store.delete("mine") == 1
    store._flusher.drain = drain
    store.flush()


def test_of_many_that_delete_one_does(store, open_store):
    record_seed_case(store, id="mine")
    store.flush()
    counts, stores = [], [store, open_store(), open_store()]
    threads = [threading.Thread(target=lambda one=one: counts.append(one.delete("mine"))) for one in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(counts) == [0] * 5 + [1]
    assert len(store.hot.read("mine")[0]) == 1
    for one in stores:
        one.flush()


def test_acknowledged_deletion_survives_the_server(own_server, run_name):
    own_server.client().config_set("appendfsync", "always")
    with trajstore.open(own_server.url(run_name), partitions=1, ack="fsync") as store:
        record_seed_case(store, id="mine")
        store.delete("mine")
        own_server.kill()
        own_server.start()
        assert_deleted(store, "mine")


def test_full_server_refuses_a_tombstone_and_changes_nothing(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1, timeout=2.0) as store:
        trajectory = record_seed_case(store)
        store.flush()
        own_server.client().config_set("maxmemory", "1")
        with pytest.raises(trajstore.StoreFull, match="drain"):
            store.delete(trajectory.id)
        assert len(store.load(trajectory.id)) == 10
        own_server.client().config_set("maxmemory", "0")
        assert store.delete(trajectory.id) == 1
        assert_deleted(store, trajectory.id)


# The archive


def test_deleted_trajectory_is_not_found_through_the_archive_alone(durable, folder):
    trajectory, other = record_seed_case(durable, group="g"), record_seed_case(durable)
    trajectory.close("completed")
    archive(durable)
    durable.delete(trajectory.id, reason="private")
    assert len(trajstore.open_archive(folder).load(trajectory.id)) == 10, "not archived yet"
    assert archive(durable).refused == 0
    offline = trajstore.open_archive(folder)
    for one in (durable, offline):
        assert_deleted(one, trajectory.id)
        assert one.list(status="deleted")[0].group == "g"
        assert len(one.load(other.id)) == 10
    with pytest.raises(trajstore.Conflict, match="never reused"):
        durable.create(id=trajectory.id)


def test_tombstone_of_what_was_never_archived_is_archived_alone(durable, folder):
    trajectory = with_everything(durable)
    durable.delete(trajectory.id)
    done = archive(durable)
    assert (done.entries, done.refused, done.nbytes) == (1, 0, 0)
    assert durable.hot.read(trajectory.id) == ([], [])
    assert durable.wire.call("PTTL", durable.keys.entries(trajectory.id)) > 0, "the fence stays for the grace period"
    assert_deleted(durable, trajectory.id)
    assert_deleted(trajstore.open_archive(folder), trajectory.id)
    assert durable.delete(trajectory.id) == 0
    assert archive(durable).packs == 0


def test_what_was_archived_and_removed_is_deleted_by_a_new_stream(durable, folder):
    trajectory = finish(durable)
    archive(durable, grace_seconds=0.001)
    until(lambda: not durable.hot.exists(trajectory.id), what="the keys' end")
    assert durable.delete(trajectory.id) == 1
    assert_deleted(durable, trajectory.id)
    archive(durable, grace_seconds=0.001)
    until(lambda: not durable.hot.exists(trajectory.id), what="the keys' end")
    assert_deleted(durable, trajectory.id)
    assert_deleted(trajstore.open_archive(folder), trajectory.id)


def test_tombstone_does_not_expire_with_the_keys_of_the_trajectory_that_it_deletes(durable, folder):
    """Found by simulation seed 55: deleted when its keys were about to go, and there again when they were gone."""
    trajectory = finish(durable)
    archive(durable, grace_seconds=1000.0)
    assert durable.wire.call("PTTL", durable.keys.entries(trajectory.id)) > 0
    assert durable.delete(trajectory.id) == 1
    assert durable.wire.call("PTTL", durable.keys.entries(trajectory.id)) == -1
    archive(durable, grace_seconds=0.001)
    until(lambda: not durable.hot.exists(trajectory.id), what="the keys' end")
    assert_deleted(durable, trajectory.id)


def test_writer_that_comes_back_after_all_was_removed_is_refused(durable, folder):
    segment = durable.create(id="mine", routing=SPEC).segment(context=[1])
    durable.flush()
    with trajstore.open(folder) as other:
        other.delete("mine")
        archive(other, grace_seconds=0.001)
    until(lambda: not durable.hot.exists("mine"), what="the keys' end")
    segment.tokens(range(1000))
    with pytest.raises(trajstore.Fenced):  # nothing was lost
        durable.flush("mine")
    assert left(durable, "mine") == []
    assert_deleted(durable, "mine")


def test_nothing_comes_back_with_a_stream_that_is_written_anew(durable, folder):
    """By a writer that was cut off, and has kept its batches, until the keys were gone."""
    trajectory = record_seed_case(durable)
    archive(durable)
    durable.delete(trajectory.id)
    archive(durable, grace_seconds=0.001)
    until(lambda: not durable.hot.exists(trajectory.id), what="the keys' end")
    entry = encode_entry(Entry(SCHEMA_VERSION, 7, 0.0, [TrajectoryOpened(metadata={"name": "Ada"})]))
    durable.wire.call("XADD", durable.keys.entries(trajectory.id), "1-0", "e", entry)
    durable.wire.call("XADD", durable.keys.feed(0), "*", "t", trajectory.id, "k", "SegmentClosed", "e", "1-0")
    assert_deleted(durable, trajectory.id)
    assert archive(durable).refused == 0
    assert left(durable, trajectory.id) == []
    assert_deleted(durable, trajectory.id)


@pytest.mark.parametrize("step", ARCHIVER_STEPS)
def test_tombstone_wins_at_every_step_of_an_archiver(durable, folder, step):
    trajectory, other = with_everything(durable), finish(durable)
    growing = durable.create(id="growing").segment(context=[1, 2])
    durable.flush()

    def delete(now):
        if now == step and rival.tombstone(trajectory.id) is None:
            assert rival.delete(trajectory.id) + rival.delete("growing") == 2
            assert_deleted(durable, trajectory.id)

    with trajstore.open(folder) as rival:
        assert archive(durable, on_step=delete).refused == 0
        assert archive(rival).refused == 0
    growing.tokens([3])
    with pytest.raises(trajstore.Fenced):
        durable.flush("growing")
    for id in (trajectory.id, "growing"):
        assert left(durable, id) == []
        assert_deleted(durable, id)
        assert_deleted(trajstore.open_archive(folder), id)
    assert len(durable.load(other.id)) == len(trajstore.open_archive(folder).load(other.id)) == 5
    assert durable.wire.call("XPENDING", durable.keys.feed(0), "archiver")[0] == 0


def test_deletion_between_an_archivers_look_and_its_payloads_refuses_nothing(durable, folder):
    trajectory = with_everything(durable)
    fetch = durable.hot.payloads

    def fetch_late(id, events):
        with trajstore.open(folder) as rival:
            rival.delete(id)
        return fetch(id, events)

    durable.hot.payloads = fetch_late
    assert archive(durable).refused == 0
    assert left(durable, trajectory.id) == []
    assert_deleted(trajstore.open_archive(folder), trajectory.id)
    assert durable.wire.call("XPENDING", durable.keys.feed(0), "archiver")[0] == 0


def test_note_that_comes_after_the_tombstone_is_not_archived_and_goes(durable, folder):
    """Notes fence nobody, and are not fenced."""
    trajectory = with_everything(durable)
    with trajstore.open(folder) as rival:
        rival.delete(trajectory.id)
        for _ in range(2):
            trajectory.observe(rows(300), start=0, source="late")
            durable.flush()
            assert_deleted(durable, trajectory.id)
            assert left(durable, trajectory.id) != []
            assert archive(rival).refused == 0
            assert left(durable, trajectory.id) == []
            assert durable.wire.call("PTTL", durable.keys.entries(trajectory.id)) > 0
    assert_deleted(trajstore.open_archive(folder), trajectory.id)
    notes = [trajstore.open_archive(folder)._view._archive().find(trajectory.id).last_note]
    assert notes == [0]


# kill -9


def die_deleting(folder, id, cut):
    killed = subprocess.run([sys.executable, "-c", DELETE_AND_DIE, folder, id, str(cut)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("remover", ["delete", "archiver", "materializer"])
@pytest.mark.parametrize("cut", range(4))
def test_killed_deletion_leaves_nothing_readable_and_is_made_good(durable, folder, cut, remover):
    trajectory = with_everything(durable)
    materialize(durable)
    die_deleting(folder, trajectory.id, cut)
    assert_deleted(durable, trajectory.id)
    assert left(durable, trajectory.id) != []
    match remover:
        case "delete":
            assert durable.delete(trajectory.id) == 0
        case "archiver":
            done = archive(durable)
            assert (done.refused, done.entries) == (0, 1), "the tombstone alone"
            assert durable.wire.call("PTTL", durable.keys.entries(trajectory.id)) > 0, "nothing keeps it"
        case "materializer":
            materialize(durable)
    assert left(durable, trajectory.id) == []
    assert_deleted(durable, trajectory.id)


def test_tombstone_that_the_server_has_lost_removes_nothing(store, monkeypatch):
    """Found by simulation seed 6321: somebody may go on with the trajectory, which would lack its first events."""
    trajectory = record_seed_case(store)
    store.flush()
    monkeypatch.setattr("trajstore.store.write_tombstone", lambda *_, **__: EventId(9, 0))
    assert store.delete(trajectory.id)
    assert len(store.load(trajectory.id)) == 10


def test_whoever_changes_what_is_deleted_delays_its_removal(store, monkeypatch):
    trajectory = with_everything(store)
    transaction, tries = store.wire.transaction, []

    def disturbed(commands, *, watch=None):
        if commands[0][0] == "UNLINK":
            tries.append(commands)
            if len(tries) < 3:
                store.wire.call("XTRIM", store.keys.entries(trajectory.id), "MINID", f"{len(tries)}-1")
        return transaction(commands, watch=watch)

    monkeypatch.setattr(store.wire, "transaction", disturbed)
    assert store.delete(trajectory.id)
    assert len(tries) == 3
    assert left(store, trajectory.id) == []


def test_server_killed_with_the_deleting_process_keeps_the_tombstone(durable, folder):
    trajectory = with_everything(durable)
    die_deleting(folder, trajectory.id, 0)
    (server,) = servers_of(folder)
    os.kill(server, signal.SIGKILL)
    until(lambda: not servers_of(folder), what="the server's end")
    with trajstore.open(folder) as again:
        assert_deleted(again, trajectory.id)
        archive(again)
        assert left(again, trajectory.id) == []


# The materializer


def test_deleted_trajectory_is_not_published(store):
    trajectory = finish(store)
    store.delete(trajectory.id)
    assert materialize(store).groups == 0
    assert look(store) == []


@pytest.mark.parametrize("when", ["before all", "after its offer", "last"])
def test_group_does_not_wait_for_a_deleted_member(store, when):
    def member():
        made.append(finish(store, group="g", group_size=3))
        materialize(store)

    made = []
    if when == "before all":
        gone = store.create(group="g", group_size=3)
        store.delete(gone.id)
        materialize(store)
    elif when == "after its offer":
        gone = finish(store, group="g", group_size=3)
        materialize(store)
        store.delete(gone.id)
        materialize(store)
    else:
        gone = store.create(group="g", group_size=3)
    member()
    assert look(store) == []
    member()
    if when == "last":
        assert look(store) == []
        store.delete(gone.id)
        materialize(store)
    (ready,) = look(store)
    assert members([ready]) == sorted((one.id, 1) for one in made)
    assert materialize(store).groups == 0


def test_group_does_not_wait_for_a_resumed_member_that_is_deleted(store):
    first, second = abort(store, group="g", group_size=2), None
    materialize(store)
    resume(store, first)
    second = finish(store, group="g", group_size=2)
    materialize(store)
    assert look(store) == []
    store.delete(first.id)
    materialize(store)
    assert members(look(store)) == [(second.id, 1)]


def test_group_of_which_all_is_deleted_is_dropped(store):
    made = [finish(store, group="g", group_size=2) for _ in range(2)]
    assert store.delete(group="g") == len(made)
    materialize(store)
    assert look(store) == []
    assert store.wire.call("PTTL", store.keys.assembly("g")) > 0


def test_published_group_comes_again_without_the_deleted_only_if_another_member_changes(store):
    """An aborted one is another matter: tests/consumers/test_materializer.py."""
    first = finish(store, group="g", group_size=3)
    second, third = (abort(store, group="g", group_size=3) for _ in range(2))
    materialize(store)
    store.delete(first.id)
    materialize(store)
    assert [one.version for one in look(store)] == [3]
    resume(store, second, "completed")
    materialize(store)
    old, new = look(store)
    assert members([old]) == sorted((one.id, 1) for one in (first, second, third))
    assert (members([new]), new.version) == (sorted([(second.id, 2), (third.id, 1)]), 4)


def test_offer_of_a_materializer_that_was_slower_than_the_deletion_is_refused(store):
    gone, there = finish(store, group="g", group_size=2), finish(store, group="g", group_size=2)
    queue = ReadyQueue(store.wire, store.keys)
    about = {"group": "g", "group_size": 2, "policy": "last_segment_wins", "keep": 60.0}
    late, other = (
        ReadyMember(id=one.id, version=1, status="completed", at="3-0", tokens=5, nbytes=9) for one in (gone, there)
    )
    queue.withdraw(gone.id, at="4-0", goes_on=lambda _: False, **about)
    assert queue.offer(late, **about) == (False, None)
    assert queue.offer(other, **about).published.members == (other,)
    assert members(look(store)) == [(there.id, 1)]


@pytest.mark.parametrize("step", ["folded", "laid", "offered"])
def test_deletion_while_a_materializer_publishes_leaves_no_payload(store, open_store, step):
    trajectory = finish(store, group="g", group_size=1)
    other = open_store()

    def delete(now):
        if now == step:
            other.delete(trajectory.id)

    done = materialize(store, on_step=delete)
    assert left(store, trajectory.id) == []
    assert done.groups == (step == "offered")
    assert len(look(store)) == (step == "offered")


# The trainer


@pytest.mark.torch
def test_reader_skips_deleted_entries_acknowledges_and_counts_them(store):
    from trajstore_trainer import TrajectoryReader

    made = [finish(store) for _ in range(4)]
    materialize(store)
    for one in made[:3]:
        store.delete(one.id)
    reader = TrajectoryReader(store)
    taken = []
    while len(taken) < 1:
        taken += reader.take(groups=1, timeout=5.0)
    with pytest.raises(trajstore.Unavailable):
        reader.take(timeout=0.05)
    assert [one.id for entry in taken for one in entry.trajectories] == [made[3].id]
    assert reader.deleted == 3
    assert members(look(store)) == [(made[3].id, 1)], "acknowledged, the others are not there any more"
    reader.acknowledge(taken)
    assert look(store) == []


@pytest.mark.torch
def test_group_is_delivered_without_its_deleted_member(store, caplog):
    from trajstore_trainer import TrajectoryReader

    gone, there = (finish(store, group="g", group_size=2) for _ in range(2))
    materialize(store)
    store.delete(gone.id, reason="private")
    reader = TrajectoryReader(store)
    (ready,) = reader.take()
    assert [one.id for one in ready.trajectories] == [there.id]
    assert re.search("was deleted .*private", ready.missing[gone.id])
    assert reader.deleted == 1
    assert caplog.text == "", "nothing is wrong"


@pytest.mark.torch
@pytest.mark.parametrize("archived", [False, True])
def test_payload_that_a_killed_deletion_left_is_not_delivered(durable, folder, archived):
    from trajstore_trainer import TrajectoryReader

    trajectory = finish(durable)
    materialize(durable)
    die_deleting(folder, trajectory.id, 0)
    assert durable.wire.call("EXISTS", durable.keys.ready_payload(trajectory.id, 1)) == 1
    if archived:
        archive(durable)
    reader = TrajectoryReader(durable)
    with pytest.raises(trajstore.Unavailable):
        reader.take(timeout=0.0)
    assert reader.deleted == 1
    assert look(durable) == []


# Any order


class Cut(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One durable store for all examples; and another, for processes that end in the middle of a deletion."""
    folder = tmp_path_factory.mktemp("delete") / "store"
    with trajstore.open(folder, partitions=1, ack="fsync") as store, trajstore.open(folder) as mortal:

        def cut(*keys):
            raise Cut

        mortal.wire.watching = cut
        yield folder, store, mortal


ACTIONS = ("grow", "note", "abort", "archive", "archive and remove", "materialize", "delete", "delete and die")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=9))
def test_whatever_comes_before_and_after_a_deleted_trajectory_stays_deleted(shared, actions):
    folder, store, mortal = shared
    id, tokens, deleted = store.create(routing=SPEC, group="g").id, [], False
    store.flush()
    for action in actions:
        try:
            match action:
                case "grow":
                    with store.get(id).segment(context=[len(tokens)] * 200) as segment:
                        segment.close("stop")
                    tokens += [len(tokens)] * 200
                case "note":
                    store.get(id).observe(rows(len(tokens)), start=0, source="trainer")
                case "abort":
                    store.get(id).close("aborted")
                case "archive":
                    assert archive(store).refused == 0
                case "archive and remove":
                    assert archive(store, grace_seconds=0.001).refused == 0
                case "materialize":
                    assert materialize(store).refused == 0
                case "delete":
                    assert store.delete(id) == (not deleted)
                    deleted = True
                    assert left(store, id) == []
                case "delete and die":
                    if not deleted:
                        deleted = True
                        with pytest.raises(Cut):
                            mortal.delete(id)
            store.flush()
        except trajstore.NotFound:
            assert deleted, action
        if deleted:
            assert_deleted(store, id)
        else:
            assert store.load(id).token_ids.tolist() == tokens
            assert id in [one.id for one in store.list()]
    if deleted:
        assert archive(store).refused == 0
        assert_deleted(store, id)
        assert_deleted(trajstore.open_archive(folder), id)
        assert left(store, id) == []
