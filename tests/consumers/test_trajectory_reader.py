"""The trainer's reader: what was published comes, once acknowledged it is gone, and nothing waits for ever."""

import dataclasses
import threading

import numpy as np
import pytest

import trajstore
from tests.builders import record_seed_case
from tests.consumers.rollouts import abort, finish, look, materialize, resume, wait_until
from trajstore.blob import to_blob
from trajstore.log.wire import reply_fields
from trajstore.ready_follower import ReadyFollower
from trajstore_trainer import Selection, TrajectoryReader
from trajstore_trainer.selection import judge

pytestmark = pytest.mark.torch


def ids(ready):
    return sorted(one.id for entry in ready for one in entry.trajectories)


def groups(ready):
    return sorted(entry.group for entry in ready)


def ids_of(made):
    return sorted(one.id for one in made)


def publish(store, count, size=1, first=0):
    """`count` groups g0, g1, ... of `size` members, ready."""
    made = [finish(store, group=f"g{first + i}", group_size=size, seed=i) for i in range(count) for _ in range(size)]
    materialize(store)
    return made


def blob_keys(store, ready):
    return [store.keys.ready_payload(one.id, one.version) for entry in ready for one in entry.trajectories]


def laid_blobs(store, ready):
    """How many of the members' blobs are there; in a cluster each key may lie elsewhere."""
    return sum(store.wire.call("EXISTS", key) for key in blob_keys(store, ready))


def test_reader_yields_the_folded_members_of_a_group_by_id(store):
    made = publish(store, 1, size=3)
    (ready,) = TrajectoryReader(store).take()
    assert (ready.group, ready.version, ready.missing) == ("g0", 3, {})
    assert [one.id for one in ready.trajectories] == sorted(one.id for one in made)
    for one in ready.trajectories:
        assert to_blob(one) == to_blob(store.load(one.id))


def test_arrays_of_a_taken_trajectory_own_their_memory(store):
    """verifiers #1783: views pin whole arrays."""
    publish(store, 1)
    (ready,) = TrajectoryReader(store).take()
    for name in ("token_ids", "logprobs", "loss_mask", "routed_experts", "routing_mask"):
        array = getattr(ready.trajectories[0], name)
        assert array.flags.owndata, name
        assert array.flags.writeable, name


def test_take_gives_as_many_groups_as_asked_and_keeps_the_rest_for_others(store):
    publish(store, 5)
    first, second = TrajectoryReader(store), TrajectoryReader(store)
    taken = first.take(groups=2)
    assert len(taken) == 2
    rest = second.take(groups=10, timeout=0.0)
    assert groups(taken + rest) == [f"g{i}" for i in range(5)]


def test_payloads_of_a_take_are_fetched_together(store, monkeypatch):
    publish(store, 3, size=2)
    fetched = []
    fetch = store.wire.fetch
    monkeypatch.setattr(store.wire, "fetch", lambda keys, read: fetched.append(len(keys)) or fetch(keys, read))
    assert len(TrajectoryReader(store).take(groups=3)) == 3
    assert fetched == [6]


def test_take_waits_until_enough_is_there(store):
    reader, found = TrajectoryReader(store), []
    thread = threading.Thread(target=lambda: found.extend(reader.take(groups=2, timeout=20.0)))
    thread.start()
    publish(store, 1)
    publish(store, 1, first=1)
    thread.join(20)
    assert groups(found) == ["g0", "g1"]


def test_take_returns_at_the_deadline_what_is_there(store):
    publish(store, 1)
    assert groups(TrajectoryReader(store).take(groups=3, timeout=0.05)) == ["g0"]


def test_nothing_ready_before_the_deadline_is_an_error_that_says_what_to_do(store):
    """TransferQueue: reads block for ever. Every blocking call has a deadline and a clear error."""
    reader = TrajectoryReader(store)
    with pytest.raises(TimeoutError, match="materializer running"):
        reader.take(timeout=0.05)
    with pytest.raises(trajstore.Unavailable):
        reader.take(timeout=0.0)
    publish(store, 1)
    assert groups(reader.take(timeout=0.0)) == ["g0"]


# At least once


def test_unacknowledged_comes_again_first_to_the_next_reader_of_that_name(store):
    publish(store, 3)
    before = TrajectoryReader(store, consumer="rank-0")
    taken = before.take(groups=3)
    before.acknowledge(taken[:1])
    publish(store, 2, first=3)
    again = TrajectoryReader(store, consumer="rank-0")
    assert groups(again.take(groups=2)) == groups(taken[1:])
    assert groups(again.take(groups=5, timeout=0.0)) == ["g3", "g4"]


def test_reader_does_not_get_again_what_it_has_in_hand(store):
    """Not after its own claim time either: it is slow, not dead."""
    publish(store, 2)
    reader = TrajectoryReader(store, consumer="rank-0", claim_seconds=0.0)
    assert len(reader.take(groups=2)) == 2
    with pytest.raises(trajstore.Unavailable):
        reader.take(timeout=0.05)


def test_reader_that_signs_off_keeps_its_name_only_where_it_has_something_in_hand(store):
    for _ in range(2):
        finish(store)
    materialize(store)
    streams = [store.keys.ready(p) for p in range(store.partitions)]

    def names():
        return [
            reply_fields(one)[b"name"]
            for stream in streams
            for one in store.wire.call("XINFO", "CONSUMERS", stream, "trainer")
        ]

    with TrajectoryReader(store, consumer="done") as reader:
        (one,) = reader.take(timeout=10.0)
        reader.acknowledge([one])
    assert names() == []
    with TrajectoryReader(store, consumer="holds") as reader:
        assert reader.take(timeout=10.0)
    assert names() == [b"holds"]


def test_what_another_thread_settles_while_the_reader_asks_what_it_once_had_comes_no_more(store, monkeypatch):
    """A dataset's trainer commits while its thread reads ahead: two groups of a checkpoint came twice, now and then."""
    publish(store, 2)
    (ready,) = TrajectoryReader(store, consumer="rank-0").take()
    reader = TrajectoryReader(store, consumer="rank-0", claim_seconds=None)
    reader.hold([ready.delivery])
    assert groups(reader.poll(1, 0.0)) == [ready.group]
    ask = ReadyFollower.unacknowledged

    def asks_too_early(follower, *where, **options):
        found, cursor = ask(follower, *where, **options)
        follower.acknowledge(found)
        reader.settled([one.place for one in found])
        return found, cursor

    monkeypatch.setattr(ReadyFollower, "unacknowledged", asks_too_early)
    (other,) = reader.poll(1, 10.0)
    assert other.group != ready.group
    assert look(store) != [], "only what was given out before was settled"
    assert reader.poll(2, 0.1) == []


def test_what_a_silent_consumer_had_is_taken_over(store):
    publish(store, 2)
    taken = TrajectoryReader(store, consumer="rank-0").take(groups=2)
    with pytest.raises(trajstore.Unavailable):
        TrajectoryReader(store, consumer="rank-1").take(timeout=0.05)
    heir = TrajectoryReader(store, consumer="rank-2", claim_seconds=0.1)
    again = heir.take(groups=2, timeout=10.0)
    assert groups(again) == groups(taken)
    heir.acknowledge(again)
    assert look(store) == []


def test_acknowledged_comes_no_more_and_its_payloads_go(store):
    publish(store, 2, size=2)
    reader = TrajectoryReader(store, consumer="rank-0")
    ready = reader.take(groups=2)
    assert laid_blobs(store, ready) == 4
    reader.acknowledge(ready)
    reader.acknowledge(ready)
    assert laid_blobs(store, ready) == 0
    assert look(store) == []
    with pytest.raises(trajstore.Unavailable):
        TrajectoryReader(store, consumer="rank-0").take(timeout=0.0)


def test_each_consumer_group_gets_everything(store):
    publish(store, 2)
    trainer, audit = TrajectoryReader(store), TrajectoryReader(store, group="evaluation")
    trainer.acknowledge(trainer.take(groups=2))
    assert groups(audit.take(groups=2)) == ["g0", "g1"]


def test_readers_of_a_group_share_it_without_loss_or_repeat(store, open_store):
    taken, done = [], threading.Event()

    def consume(reader):
        while not done.is_set():
            try:
                ready = reader.take(timeout=0.05)
            except trajstore.Unavailable:
                continue
            taken.extend(groups(ready))
            reader.acknowledge(ready)

    threads = [threading.Thread(target=consume, args=(TrajectoryReader(open_store()),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        publish(store, 12)
        wait_until(lambda: len(taken) >= 12)
        wait_until(lambda: not look(store))
    finally:
        done.set()
        for thread in threads:
            thread.join(20)
    assert sorted(taken) == sorted(f"g{i}" for i in range(12))


# Payloads that are gone


def test_lost_payload_is_folded_again_with_the_same_result(store):
    trajectory = abort(store)
    materialize(store, policy="as_sampled")
    expected = to_blob(store.load(trajectory.id, policy="as_sampled"))
    resume(store, trajectory, "completed")
    store.wire.call("DEL", store.keys.ready_payload(trajectory.id, 1))
    (ready,) = TrajectoryReader(store).take()
    assert to_blob(ready.trajectories[0]) == expected, "as of the event that was published, not as of now"
    assert ready.trajectories[0].status == "aborted"


def test_expired_and_damaged_payloads_are_folded_again(store):
    made = [finish(store, group="g", group_size=2) for _ in range(2)]
    materialize(store, blob_seconds=0.001)
    store.wire.call("SET", store.keys.ready_payload(made[0].id, 1), b"not a fold")
    (ready,) = TrajectoryReader(store).take()
    assert ids([ready]) == sorted(one.id for one in made)
    for one in ready.trajectories:
        np.testing.assert_array_equal(one.routed_experts, store.load(one.id).routed_experts)


def test_payload_of_another_policy_is_folded_again(store):
    """Two materializers of one run, each with a policy of its own."""
    made = []
    for policy in ("last_segment_wins", "as_sampled"):
        made.append(record_seed_case(store, group="g", group_size=2))
        made[-1].close("completed")
        store.flush()
        materialize(store, policy=policy)
    (ready,) = TrajectoryReader(store).take()
    assert ready.delivery.group.policy == "as_sampled"
    one, other = (store.load(made[0].id, policy=policy) for policy in ("last_segment_wins", "as_sampled"))
    assert to_blob(one) != to_blob(other)
    assert [to_blob(found) for found in ready.trajectories] == [
        to_blob(store.load(found.id, policy="as_sampled")) for found in ready.trajectories
    ]


@pytest.mark.parametrize("changed", [{"policy": "as_sampled"}, {"at": "2-1"}, {"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}])
def test_payload_of_another_fold_is_not_taken_for_this_one(store, caplog, changed):
    (made,) = publish(store, 1)
    whole = store.load(made.id)
    payload = store.keys.ready_payload(made.id, 1)
    other = dataclasses.replace(whole, token_ids=whole.token_ids + 1)
    store.wire.call("SET", payload, to_blob(other))
    reader = TrajectoryReader(store, consumer="rank-0")
    assert to_blob(reader.take()[0].trajectories[0]) == to_blob(other), "this is where it is read"
    store.wire.call("SET", payload, to_blob(dataclasses.replace(other, **changed)))
    (ready,) = TrajectoryReader(store, consumer="rank-0").take()
    assert to_blob(ready.trajectories[0]) == to_blob(whole)
    assert made.id in caplog.text


def test_entry_that_is_claimed_twice_comes_once(store):
    """Found by simulation seed 1627: its former consumer took it back in the middle of an adoption."""
    (made,) = publish(store, 1)
    claimed = ReadyFollower(store.wire, store.keys, "trainer", "rank-0").poll(count=1)
    reader = TrajectoryReader(store, consumer="rank-1")
    reader.hold([*claimed, *claimed])
    assert [ids([ready]) for ready in reader.poll(9, 0.0)] == [[made.id]]
    assert reader.poll(9, 0.0) == []


def test_folds_are_kept_for_other_groups_only_while_those_have_consumers(store):
    """Every run has the group `trainer`: a job that reads under another name kept all of its folds for nobody."""
    publish(store, 2)
    with TrajectoryReader(store, group="look") as look_in:
        (seen,) = look_in.take()
        look_in.acknowledge([seen])
        assert laid_blobs(store, [seen]) == 0, "the trainer has no consumer yet"
        (other,) = look_in.take()
        with TrajectoryReader(store) as trainer:
            first = trainer.take(2)
            assert ids(first) == ids([seen, other]), "what the fold is gone of is folded again"
            look_in.acknowledge([other])
            assert laid_blobs(store, [other]) == 1, "the trainer has it in hand"
            trainer.acknowledge(first)
            assert laid_blobs(store, [other]) == 0
        assert look(store) == []


def test_member_that_cannot_be_folded_is_named_and_the_others_come(store):
    bad, good = finish(store, group="g", group_size=2, tokens=400), finish(store, group="g", group_size=2)
    key = store.keys.payloads(bad.id)
    (field, payload), *_ = reply_fields(store.wire.call("HGETALL", key)).items()
    store.wire.call("HSET", key, field, b"\0" * 10)
    materialize(store)
    reader = TrajectoryReader(store, consumer="rank-0")
    (ready,) = reader.take()
    assert ids([ready]) == [good.id]
    assert set(ready.missing) == {bad.id}
    assert judge(ready, Selection(), version=None).why == "missing"
    kept = judge(ready, Selection(unfit="rest", min_members=1), version=None)
    assert ([one.id for one in kept.keep], kept.reasons) == ([good.id], {bad.id: "missing"})
    store.wire.call("HSET", key, field, payload)
    (ready,) = TrajectoryReader(store, consumer="rank-0").take()
    assert ids([ready]) == ids_of([bad, good]), "it can be read again by now"


def test_group_published_again_shares_members_with_its_acknowledged_entry(store):
    first, second = abort(store, group="g", group_size=2), finish(store, group="g", group_size=2)
    materialize(store)
    resume(store, first, "completed")
    materialize(store)
    reader = TrajectoryReader(store)
    for version in (2, 3):
        (ready,) = reader.take()
        assert (ready.version, ids([ready])) == (version, sorted([first.id, second.id]))
        reader.acknowledge([ready])


def test_member_whose_data_is_gone_for_good_is_named_and_holds_up_nothing(store, caplog):
    """TransferQueue: a dead storage unit's keys are still listed, and reading them blocks for ever."""
    gone, there = publish(store, 1, size=2)
    (alone,) = publish(store, 1, first=1)
    for one in (gone, alone):
        keys = [store.keys.entries(one.id), store.keys.payloads(one.id), store.keys.ready_payload(one.id, 1)]
        store.wire.call("DEL", *keys)
    reader = TrajectoryReader(store, consumer="rank-0")
    ready = {one.group: one for one in reader.take(groups=2)}
    assert ids(ready.values()) == [there.id]
    assert set(ready["g0"].missing) == {gone.id}
    assert set(ready["g1"].missing) == {alone.id}
    assert ready["g1"].trajectories == []
    assert gone.id in caplog.text
    reader.acknowledge(ready.values())
    assert look(store) == []


def test_take_that_failed_half_way_loses_nothing(own_server, run_name, monkeypatch):
    with trajstore.open(own_server.url(run_name), partitions=2, timeout=2.0) as store:
        made = publish(store, 3)
        reader = TrajectoryReader(store)
        fetch = store.wire.fetch

        def stop_before_fetching(*args):
            own_server.stop()
            return fetch(*args)

        with monkeypatch.context() as patch:
            patch.setattr(store.wire, "fetch", stop_before_fetching)
            with pytest.raises(trajstore.Unavailable):
                reader.take(groups=3)
        own_server.start()
        ready = reader.take(groups=3, timeout=0.0)
        assert ids(ready) == sorted(one.id for one in made)
        reader.acknowledge(ready)
        assert look(store) == []


def test_full_server_can_be_read_and_acknowledged(own_server, run_name):
    """Else nothing would ever free its memory."""
    with trajstore.open(own_server.url(run_name), partitions=2, timeout=10.0) as store:
        publish(store, 2)
        reader = TrajectoryReader(store)
        own_server.client().config_set("maxmemory", "1")
        ready = reader.take(groups=2)
        reader.acknowledge(ready)
        assert laid_blobs(store, ready) == 0
        assert look(store) == []
