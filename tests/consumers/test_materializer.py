"""From closed trajectories to ready entries: each version once, whatever hints, rivals and crashes there are."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.rollouts import abort, finish, laid, look, materialize, members, resume, wait_until
from trajstore.archiver import Archiver
from trajstore.blob import from_blob, to_blob
from trajstore.materializer import Materializer

STEPS = ("folded", "laid", "offered", "acknowledged")

MATERIALIZE_AND_DIE = """
import os, signal, sys
import trajstore
from trajstore.materializer import Materializer

seen = 0
def die(step):
    global seen
    seen += step == sys.argv[2]
    if seen == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

with trajstore.open(sys.argv[1], create=False) as store:
    Materializer(store, on_step=die).run(once=True)
"""

MATERIALIZE = """
import sys
import trajstore
from trajstore.materializer import Materializer

with trajstore.open(sys.argv[1], create=False) as store:
    Materializer(store).run()
"""


def pending(store):
    """Hints that some materializer has and has not acknowledged."""
    return sum(store.wire.call("XPENDING", store.keys.feed(p), "materializer")[0] for p in range(store.partitions))


def hint(store, id, kind="TrajectoryClosed"):
    """A spurious one."""
    store.wire.call("XADD", store.keys.feed(store.keys.partition(id)), "*", "t", id, "k", kind, "e", "3-0")


def entry(group, version, *ids):
    return (group, version, tuple(sorted(ids)))


def entries(store):
    return sorted(
        (entry(one.group, one.version, *(member.id for member in one.members)) for one in look(store)),
        key=lambda one: (one[0] or "", one[1]),
    )


# What is published


def test_finished_trajectory_is_published_with_the_fold_that_load_gives(store):
    trajectory = record_seed_case(store, metadata={"task": "sums"})
    trajectory.reward(0.5, components={"format": 0.5})
    trajectory.close("completed")
    store.flush()
    done = materialize(store)
    assert (done.trajectories, done.groups, done.tokens, done.refused) == (1, 1, 10, 0)
    (ready,) = look(store)
    (member,) = ready.members
    assert (ready.group, ready.version, ready.policy) == (None, 1, "last_segment_wins")
    assert (member.id, member.version, member.status, member.tokens) == (trajectory.id, 1, "completed", 10)
    (blob,) = laid(store, [member])
    assert len(blob) == member.nbytes == done.nbytes
    assert blob == to_blob(store.load(trajectory.id, until=member.at))
    assert from_blob(blob).metadata == {"task": "sums"}


def test_open_trajectory_is_not_published(store):
    record_seed_case(store)
    store.flush()
    assert materialize(store).trajectories == 0
    assert look(store) == []
    assert pending(store) == 0


def test_policy_of_the_fold_is_recorded_in_the_entry(store):
    record_seed_case(store).close("completed")
    store.flush()
    materialize(store, policy="as_sampled")
    (ready,) = look(store)
    (blob,) = laid(store, ready.members)
    assert ready.policy == from_blob(blob).policy == "as_sampled"


def test_empty_trajectories_and_ones_without_routing_are_published(store):
    """miles #1672: an aborted turn has no routes or no tokens."""
    nothing = store.create(routing=SPEC)
    nothing.close("failed")
    plain = finish(store, routing=None)
    assert materialize(store).trajectories == 2
    ready = {one.members[0].id: one.members[0] for one in look(store)}
    blobs = laid(store, [ready[nothing.id], ready[plain.id]])
    empty, unrouted = map(from_blob, blobs)
    assert (len(empty), empty.routed_experts.shape, empty.status) == (0, (0, 3, 2), "failed")
    assert unrouted.routed_experts is None
    assert list(unrouted.token_ids) == [1, 2, 10, 11, 12]


def test_reclosed_aborted_trajectory_is_published_again_with_a_higher_version(store):
    trajectory = abort(store)
    materialize(store)
    resume(store, trajectory)
    assert materialize(store).trajectories == 0, "it is open again"
    store.get(trajectory.id).close("completed")
    store.flush()
    materialize(store)
    first, second = look(store)
    assert members([first, second]) == [(trajectory.id, 1), (trajectory.id, 2)]
    assert [one.members[0].status for one in (first, second)] == ["aborted", "completed"]
    assert [one.members[0].tokens for one in (first, second)] == [5, 7]


# Groups


def test_last_member_publishes_the_group_once_by_id(store):
    made = [finish(store, group="g", group_size=3) for _ in range(2)]
    materialize(store)
    assert look(store) == []
    made.append(finish(store, group="g", group_size=3))
    done = materialize(store)
    assert (done.trajectories, done.groups) == (1, 1)
    (ready,) = look(store)
    assert [one.id for one in ready.members] == sorted(one.id for one in made)
    assert (ready.group, ready.version) == ("g", 3)


def waiting(store, name="g"):
    """Since when a group waits, by the server's clock; b"" until somebody looked, None if it does not."""
    return store.wire.call("HGET", store.keys.waiting(store.keys.partition(name)), name)


def set_back(store, seconds, name="g"):
    """As if it had waited for so much longer."""
    since = float(waiting(store, name)) - seconds
    store.wire.call("HSET", store.keys.waiting(store.keys.partition(name)), name, f"{since:.6f}")


def test_group_with_a_late_member_is_published_without_it_after_so_long(store):
    made = [finish(store, group="g", group_size=3) for _ in range(2)]
    materialize(store, group_seconds=1000)
    assert look(store) == []
    set_back(store, 990)
    materialize(store, group_seconds=1000)
    assert look(store) == []
    set_back(store, 20)
    assert materialize(store, group_seconds=1000).groups == 1
    (ready,) = look(store)
    assert [one.id for one in ready.members] == sorted(one.id for one in made)
    assert (ready.size, ready.came, ready.late, ready.before) == (3, 2, 1, 0)
    assert waiting(store) is None
    assert materialize(store, group_seconds=0).groups == 0, "once"


def test_wait_is_counted_from_the_moment_and_not_from_its_second(store):
    """Else a group is published nearly a second before its time."""

    def now():
        seconds, microseconds = store.wire.call("TIME")
        return int(seconds) * 1_000_000 + int(microseconds)

    finish(store, group="g", group_size=2)
    before = now()
    materialize(store, group_seconds=1000)
    assert before <= round(float(waiting(store)) * 1_000_000) <= now()


def assembly_expires(store, name="g"):
    """Whether the materializer's memory of a group ends some day."""
    return store.wire.call("PTTL", store.keys.assembly(name)) > 0


def test_late_member_is_not_forgotten_with_the_group_that_was_published_without_it(store):
    """Of a group of 4 two come late; the memory of its first publication may end between them."""
    made = [finish(store, group="g", group_size=4) for _ in range(2)]
    materialize(store, group_seconds=0)
    assert assembly_expires(store)
    made.append(finish(store, group="g", group_size=4))
    materialize(store)
    assert not assembly_expires(store), "what has come is not published"
    made.append(finish(store, group="g", group_size=4))
    materialize(store)
    assert [one.id for one in look(store)[-1].members] == sorted(one.id for one in made)
    assert assembly_expires(store)


def test_group_that_waits_for_a_resumed_member_in_vain_is_published_as_that_was_aborted(store, caplog):
    """The trainer's aborted= decides, for nobody is late."""
    aborted = abort(store, group="g", group_size=2)
    materialize(store)
    store.get(aborted.id).segment(weight_version="v2").close("abort")
    store.flush()
    finish(store, group="g", group_size=2)
    materialize(store)
    assert look(store) == []
    materialize(store, group_seconds=0)
    (ready,) = look(store)
    assert (ready.late, sorted(one.status for one in ready.members)) == (0, ["aborted", "completed"])
    (told,) = (line for line in caplog.messages if "is published" in line)
    assert told == (
        "group g is published with a member as it was aborted: that was resumed, and has not been closed again in time"
    )


def test_group_comes_again_whole_when_its_late_member_comes(store):
    made = [finish(store, group="g", group_size=3) for _ in range(2)]
    materialize(store, group_seconds=0)
    made.append(finish(store, group="g", group_size=3))
    materialize(store, group_seconds=0)
    early, whole = look(store)
    assert (early.version, whole.version) == (2, 3)
    assert [one.id for one in whole.members] == sorted(one.id for one in made)
    assert (whole.late, whole.before) == (0, 2)
    assert waiting(store) is None


def test_group_waits_for_ever_where_no_materializer_is_told_otherwise(store):
    finish(store, group="g", group_size=2)
    materialize(store)
    assert waiting(store) == b""
    materialize(store)
    assert look(store) == []


def test_complete_and_single_trajectories_wait_for_nobody(store):
    finish(store)
    for _ in range(2):
        finish(store, group="g", group_size=2)
    materialize(store)
    assert waiting(store) is None
    assert all(store.wire.call("HGETALL", store.keys.waiting(p)) == [] for p in range(store.partitions))


def test_late_group_of_which_all_is_deleted_is_not_published(store):
    gone = finish(store, group="g", group_size=2)
    materialize(store)
    store.delete(gone.id)
    assert materialize(store, group_seconds=0).groups == 0
    assert look(store) == []
    assert waiting(store) is None
    assert assembly_expires(store)


def test_group_of_which_all_is_deleted_before_it_was_whole_is_forgotten_but_for_what_comes_yet(store):
    gone = [finish(store, group="g", group_size=3) for _ in range(2)]
    materialize(store)
    for one in gone:
        store.delete(one.id)
    materialize(store)
    assert waiting(store) is None
    assert assembly_expires(store)
    last = finish(store, group="g", group_size=3)
    materialize(store)
    assert [[one.id for one in ready.members] for ready in look(store)] == [[last.id]], "the deleted count as come"


def test_group_of_nobody_that_is_found_waiting_is_forgotten(store):
    """As it is where an older materializer saw the last of it deleted."""
    gone = finish(store, group="g", group_size=2)
    materialize(store)
    store.delete(gone.id)
    materialize(store)
    store.wire.call("PERSIST", store.keys.assembly("g"))
    store.wire.call("HSET", store.keys.waiting(store.keys.partition("g")), "g", "1700000000")
    assert materialize(store, group_seconds=1).groups == 0
    assert waiting(store) is None
    assert assembly_expires(store)


def test_group_whose_members_were_deleted_waits_for_those_to_come(store):
    gone = finish(store, group="g", group_size=3)
    materialize(store)
    store.delete(gone.id)
    materialize(store)
    finish(store, group="g", group_size=3)
    materialize(store)
    assert waiting(store) == b""
    assert not assembly_expires(store)


def test_rival_materializers_publish_a_late_group_once(store, open_store):
    for i in range(8):
        finish(store, group=f"g{i}", group_size=2)
    materialize(store)
    rivals = [Materializer(open_store(), group_seconds=0) for _ in range(4)]
    threads = [threading.Thread(target=rival.run, kwargs={"once": True}) for rival in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(one.group for one in look(store)) == [f"g{i}" for i in range(8)]
    assert sum(rival.done.groups for rival in rivals) == 8


def test_members_without_a_group_size_are_published_one_by_one(store):
    made = [finish(store, group="g") for _ in range(2)]
    materialize(store)
    assert members(look(store)) == sorted((one.id, 1) for one in made)
    assert {one.group for one in look(store)} == {"g"}


def test_aborted_member_that_nobody_resumed_completes_its_group(store):
    """Whether to train on it is the trainer's choice, so it has to see it; resumed, the group comes again."""
    first, second = abort(store, group="g", group_size=2), finish(store, group="g", group_size=2)
    materialize(store)
    (ready,) = look(store)
    assert {one.id: one.status for one in ready.members} == {first.id: "aborted", second.id: "completed"}
    resume(store, first, "completed")
    materialize(store)
    assert entries(store) == [entry("g", 2, first.id, second.id), entry("g", 3, first.id, second.id)]


def test_group_waits_for_an_aborted_member_that_was_resumed(store):
    first = abort(store, group="g", group_size=2)
    materialize(store)
    resume(store, first)
    second = finish(store, group="g", group_size=2)
    materialize(store)
    assert look(store) == [], "published now, it would come again as soon as the first is closed"
    store.get(first.id).close("completed")
    store.flush()
    materialize(store)
    assert entries(store) == [entry("g", 3, first.id, second.id)]


def test_all_members_aborted_and_resumed_give_one_entry_in_whatever_order_they_close(store):
    made = [abort(store, group="g", group_size=3) for _ in range(2)]
    materialize(store)
    for one in made:
        resume(store, one)
    made.append(finish(store, group="g", group_size=3))
    materialize(store)
    for one in reversed(made[:2]):
        assert look(store) == []
        store.get(one.id).close("truncated")
        store.flush()
        materialize(store)
    assert entries(store) == [entry("g", 5, *(one.id for one in made))]


def test_group_waits_for_an_aborted_member_whose_next_close_is_not_handled_yet(open_store):
    store = open_store(partitions=1)  # one feed, so hints are handled in order
    first = abort(store, group="g", group_size=2)
    materialize(store)
    second = finish(store, group="g", group_size=2)
    resume(store, first, "completed")
    materialize(store)
    assert entries(store) == [entry("g", 3, first.id, second.id)]


def test_member_beyond_the_group_size_publishes_the_whole_group_again(store):
    made = [finish(store, group="g", group_size=2) for _ in range(2)]
    materialize(store)
    made.append(finish(store, group="g", group_size=2))
    materialize(store)
    ids = [one.id for one in made]
    assert entries(store) == [entry("g", 2, *ids[:2]), entry("g", 3, *ids)]


def test_published_group_grows_no_more_whatever_its_later_members_say(store):
    made = [finish(store, group="g", group_size=2) for _ in range(2)]
    materialize(store)
    made.append(finish(store, group="g", group_size=4))
    materialize(store)
    ids = [one.id for one in made]
    assert entries(store) == [entry("g", 2, *ids[:2]), entry("g", 3, *ids)]
    assert {one.size for one in look(store)} == {2}


@pytest.mark.parametrize("resumed", [True, False])
def test_group_comes_again_when_a_member_for_which_trainers_may_wait_is_deleted(store, resumed):
    first, second = abort(store, group="g", group_size=2), finish(store, group="g", group_size=2)
    materialize(store)
    if resumed:
        resume(store, first)
        materialize(store)
    store.delete(first.id)
    for _ in range(2):
        materialize(store)
        assert entries(store) == [entry("g", 2, first.id, second.id), entry("g", 3, second.id)]
        hint(store, first.id)


@pytest.mark.parametrize("sizes", [(2, 3, 3), (3, 2, 3), (3, 3, 2)])
def test_where_members_differ_in_group_size_the_largest_counts(store, sizes):
    made = []
    for size in sizes:
        made.append(finish(store, group="g", group_size=size))
        materialize(store)
    assert entries(store) == [entry("g", 3, *(one.id for one in made))]


# Hints


def test_repeated_spurious_and_reordered_hints_publish_once(store):
    trajectory, still_open = finish(store), record_seed_case(store)
    grouped = [finish(store, group="g", group_size=2) for _ in range(2)]
    store.flush()
    for _ in range(3):
        for id in (grouped[1].id, trajectory.id, still_open.id, "never-created", grouped[0].id):
            hint(store, id)
        hint(store, trajectory.id, "SomethingNew")
        materialize(store)
    assert members(look(store)) == sorted((one.id, 1) for one in [trajectory, *grouped])
    assert pending(store) == 0


def test_what_was_offered_before_is_not_folded_again(store):
    trajectory, steps = finish(store), []
    materialize(store)
    hint(store, trajectory.id)
    materialize(store, on_step=steps.append)
    assert steps == ["acknowledged"]


def test_reward_and_late_routing_after_an_aborted_close_publish_nothing_new(store):
    trajectory = abort(store)
    materialize(store)
    trajectory.reward(1.0)
    store.flush()
    trajectory.late_routing(np.array([[[0, 1]] * 3]), segment=0, start=0)
    store.flush()
    assert materialize(store).trajectories == 0
    assert members(look(store)) == [(trajectory.id, 1)]


def test_trajectory_that_cannot_be_folded_is_counted_and_blocks_no_other(store, caplog):
    bad, gone = finish(store, group="g", group_size=2), finish(store)
    mate, good = finish(store, group="g", group_size=2), finish(store)
    store.wire.call("XDEL", store.keys.entries(bad.id), "2-0")
    store.wire.call("DEL", *(key(gone.id) for key in (store.keys.entries, store.keys.payloads)))
    done = materialize(store)
    assert (done.refused, done.trajectories) == (1, 2)
    assert members(look(store)) == sorted([(good.id, 1), (bad.id, 1), (mate.id, 1)])
    assert bad.id in caplog.text
    assert mate.id not in caplog.text
    assert pending(store) == 0


def damage(store, trajectory):
    """Make its payload another one."""
    name = store.keys.payloads(trajectory.id)
    store.wire.call("HSET", name, store.wire.call("HKEYS", name)[0], b"\x00" * 3200)


def lose_an_event(store, trajectory):
    store.wire.call("XDEL", store.keys.entries(trajectory.id), "2-0")


@pytest.mark.parametrize("harm", [damage, lose_an_event])
@pytest.mark.parametrize("first", [True, False])
def test_member_that_cannot_be_folded_is_named_and_does_not_hold_its_group_back(store, harm, first):
    """What becomes of the group is the trainer's choice."""
    bad = finish(store, group="g", group_size=2, tokens=400)
    harm(store, bad)
    if first:
        assert materialize(store).refused == 1
        assert look(store) == []
    good = finish(store, group="g", group_size=2)
    materialize(store)
    (ready,) = look(store)
    found = {one.id: (one.version, one.status, one.nbytes > 0) for one in ready.members}
    assert found == {bad.id: (1, "unreadable", False), good.id: (1, "completed", True)}
    assert laid(store, [one for one in ready.members if one.id == bad.id]) == [None]
    hint(store, bad.id)
    assert materialize(store).groups == 0


@pytest.mark.parametrize("harm", [damage, lose_an_event])
def test_group_waits_for_a_member_that_cannot_be_folded_while_it_is_open(store, harm):
    bad = abort(store, group="g", group_size=2, tokens=400)
    resume(store, bad)
    harm(store, bad)
    finish(store, group="g", group_size=2)
    materialize(store)
    assert look(store) == []
    store.delete(bad.id)
    materialize(store)
    assert len(look(store)) == 1


def test_trajectory_by_itself_that_cannot_be_folded_is_not_published(store):
    bad = finish(store, tokens=400)
    damage(store, bad)
    assert materialize(store).refused == 1
    assert look(store) == []


def test_damaged_payload_is_refused_and_blocks_no_other(store):
    bad, good = finish(store, tokens=400), finish(store)
    damage(store, bad)
    done = materialize(store)
    assert (done.refused, done.trajectories) == (1, 1)
    assert members(look(store)) == [(good.id, 1)]


def test_fold_above_the_limit_is_published_without_its_payload(store):
    finish(store)
    materialize(store, blob_bytes=100)
    (ready,) = look(store)
    assert ready.members[0].nbytes > 100
    assert laid(store, ready.members) == [None]


def test_note_on_a_published_trajectory_publishes_nothing(store):
    """Also when what was published is no longer remembered."""
    trajectory = finish(store)
    materialize(store, assembly_seconds=0.001)
    wait_until(lambda: not store.wire.call("KEYS", f"trajstore:{{{store.run}:*:g:*"))
    trajectory.observe(rows(1), start=0, source="trainer")
    store.flush()
    assert materialize(store).trajectories == 0
    assert members(look(store)) == [(trajectory.id, 1)]
    assert pending(store) == 0


def test_fold_that_the_server_has_no_room_for_is_published_without_its_payload(own_server, run_name):
    with trajstore.open(own_server.url(run_name)) as store:
        trajectory = finish(store, tokens=100_000)
        used = int(own_server.client().info("memory")["used_memory"])
        own_server.client().config_set("maxmemory", int((used + 200_000) / 0.9))
        assert materialize(store).trajectories == 1
        (ready,) = look(store)
        assert laid(store, ready.members) == [None]
        assert members([ready]) == [(trajectory.id, 1)]


def test_folds_lie_ready_only_while_writers_have_a_third_of_the_server(own_server, run_name):
    with trajstore.open(own_server.url(run_name)) as store, own_server.client() as client:
        finish(store, tokens=100_000)
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", int((used + 3_000_000) / 0.6))
        assert materialize(store).unlaid == 0
        assert [blob is not None for one in look(store) for blob in laid(store, one.members)] == [True]
        finish(store, tokens=100_000)
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", int((used + 200_000) / 0.6))
        assert materialize(store).unlaid == 1
        assert sorted(blob is not None for one in look(store) for blob in laid(store, one.members)) == [False, True]


def test_writers_and_archiver_go_on_while_nobody_trains(own_server, run_name, tmp_path):
    """Folds that nobody took filled the server up to where writers stop, and archiving made no room."""
    with own_server.client() as client:
        client.config_set("appendfsync", "always")
        client.config_set("maxmemory", "16mb")
    options = {"archive": tmp_path / "archive", "partitions": 1, "timeout": 10.0}
    with trajstore.open(own_server.url(run_name), **options) as store:
        for seed in range(20):  # of 800 kB each, and their folds of as much
            finish(store, tokens=60_000, seed=seed)
            materialize(store)
            Archiver(store, grace_seconds=0.0).run(once=True)
        for seed in range(4):  # faster than they are archived
            finish(store, tokens=60_000, seed=seed)
        materialize(store)
        Archiver(store, grace_seconds=0.0).run(once=True)
        assert len(look(store)) == 24
        assert store.backlog().trajectories == 0


# Several, and their ends


def test_rival_materializers_publish_each_version_once(store, open_store):
    rivals = [Materializer(open_store(), claim_seconds=0.05) for _ in range(3)]
    stop = threading.Event()
    threads = [threading.Thread(target=one.run, kwargs={"stop": stop}) for one in rivals]
    for thread in threads:
        thread.start()
    try:
        made = [finish(store, group=f"g{i % 6}", group_size=4, seed=i) for i in range(24)]
        alone = [abort(store) for _ in range(6)]
        wait_until(lambda: len(look(store)) >= 12)
        for one in alone:
            resume(store, one, "completed")
        wait_until(lambda: len(look(store)) >= 18 and pending(store) == 0)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    expected = [(one.id, 1) for one in made] + [(one.id, version) for one in alone for version in (1, 2)]
    assert members(look(store)) == sorted(expected)
    assert sum(one.done.trajectories for one in rivals) == 36
    assert sum(one.done.groups for one in rivals) == 18


def test_stop_leaves_what_is_in_hand_to_others(store):
    made = [finish(store) for _ in range(6)]
    stop = threading.Event()
    first = Materializer(store, on_step=lambda step: stop.set() if step == "acknowledged" else None)
    assert first.run(stop=stop).trajectories == 1
    assert pending(store) >= 1, "read, not acknowledged"
    assert len(look(store)) == 1
    second = Materializer(store, claim_seconds=0.01)
    ended = threading.Event()
    second.run(stop=ended, on_progress=lambda done: ended.set() if done.trajectories == 5 else None)
    assert members(look(store)) == sorted((one.id, 1) for one in made)


@pytest.mark.parametrize("step", STEPS)
def test_materializer_killed_at_any_step_loses_and_doubles_nothing(embedded, step, tmp_path):
    made = [finish(embedded, group=f"g{i // 2}", group_size=2, seed=i) for i in range(6)]
    alone = finish(embedded)
    killed = subprocess.run(
        [sys.executable, "-c", MATERIALIZE_AND_DIE, tmp_path / "store", step, "3"], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert step == "acknowledged" or pending(embedded) > 0
    materialize(embedded)
    assert members(look(embedded)) == sorted((one.id, 1) for one in [*made, alone])
    assert len(look(embedded)) == 4
    assert pending(embedded) == 0


def test_materializer_killed_in_the_midst_of_its_work_is_succeeded(store, backend, run_name):
    made = [finish(store, group=f"g{i}", group_size=1, seed=i) for i in range(10)]
    process = subprocess.Popen([sys.executable, "-c", MATERIALIZE, backend.url(run_name)])
    try:
        wait_until(lambda: look(store))
        made += [finish(store, group=f"g{i}", group_size=1, seed=i) for i in range(10, 20)]
    finally:
        process.kill()
        assert process.wait(20) == -signal.SIGKILL
    made.append(finish(store))
    ended = threading.Event()
    successor = threading.Thread(target=Materializer(store, claim_seconds=0.1).run, kwargs={"stop": ended})
    successor.start()
    try:
        wait_until(lambda: len(look(store)) >= len(made))
        wait_until(lambda: pending(store) == 0)
    finally:
        ended.set()
        successor.join(20)
    assert members(look(store)) == sorted((one.id, 1) for one in made)


def test_materializer_outlives_a_restart_of_the_server(own_server, run_name):
    stop = threading.Event()
    with trajstore.open(own_server.url(run_name), partitions=2, timeout=10.0) as store:
        first = finish(store)
        materializer = Materializer(store)
        thread = threading.Thread(target=materializer.run, kwargs={"stop": stop})
        thread.start()
        try:
            wait_until(lambda: materializer.done.trajectories == 1)
            own_server.stop()
            own_server.start()
            second = finish(store)
            wait_until(lambda: materializer.done.trajectories == 2)
        finally:
            stop.set()
            thread.join(20)
        assert members(look(store)) == sorted([(first.id, 1), (second.id, 1)])


@pytest.mark.parametrize("step", ["folded", "laid"])
def test_what_was_folded_before_the_server_lost_it_is_not_offered(own_server, run_name, step):
    """The close that is written in its place has the same version, and would be taken for published."""
    lost = []

    def crash(now):
        if now == step and not lost:
            newest = own_server.client().xrevrange(store.keys.entries(made.id), count=1)[0][0]
            lost.append(own_server.client().xdel(store.keys.entries(made.id), newest))
            own_server.stop()
            own_server.start()

    with trajstore.open(own_server.url(run_name), partitions=1, timeout=10.0) as store:
        made = finish(store)
        with pytest.raises(trajstore.Unavailable, match="has restarted since"):
            Materializer(store, on_step=crash).run(once=True)
        assert lost == [1]
        assert look(store) == []
        materialize(store)
        assert look(store) == [], "it is open now, as far as the server knows"


def test_full_server_only_holds_a_materializer_up(own_server, run_name):
    """What it had in hand comes next, without waiting until its own hints count as those of a silent one."""
    stop, limits = threading.Event(), []

    def fill(step):
        if step == "folded" and not limits:
            limits.append(own_server.client().config_set("maxmemory", "1"))

    with trajstore.open(own_server.url(run_name), partitions=1, timeout=10.0) as store:
        made = [finish(store) for _ in range(2)]
        materializer = Materializer(store, on_step=fill, claim_seconds=3600.0)
        thread = threading.Thread(target=materializer.run, kwargs={"stop": stop})
        thread.start()
        try:
            wait_until(lambda: limits)
            with pytest.raises(trajstore.StoreFull):
                materialize(store)
            assert look(store) == []
            own_server.client().config_set("maxmemory", "0")
            wait_until(lambda: materializer.done.trajectories == 2)
        finally:
            stop.set()
            thread.join(20)
        assert members(look(store)) == sorted((one.id, 1) for one in made)


def test_once_says_that_the_server_does_not_answer(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1, timeout=2.0) as store:
        finish(store)
        own_server.stop()
        with pytest.raises(trajstore.Unavailable):
            materialize(store)
        own_server.start()
        assert materialize(store).trajectories == 1
