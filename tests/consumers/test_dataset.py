"""The dataset: what was handed out and not acknowledged comes again, to one rank, and nothing else does."""

import json
import logging
import os
import pickle
import threading
import time
from contextlib import ExitStack, suppress
from itertools import count, islice

import pytest
import torch
from torch.utils.data import DataLoader

import trajstore
from tests.consumers.rollouts import finish, look, materialize, wait_until
from tests.log.proxy import FaultyProxy
from trajstore.store import Store
from trajstore_trainer import Selection, TrajectoryDataset, TrajectoryReader, padded_batch

pytestmark = pytest.mark.torch


@pytest.fixture
def dataset(store):
    """Makes datasets over the store, `dataset(rank=0)`; closes them at the end."""
    made = []

    def make(source=store, **options):
        made.append(TrajectoryDataset(source, **({"timeout": 10.0} | options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def publish(store, count, size=1, first=0, **options):
    """`count` groups g0, g1, ... of `size` members, ready."""
    made = [
        finish(store, group=f"g{first + i}", group_size=size, seed=i, **options)
        for i in range(count)
        for _ in range(size)
    ]
    materialize(store)
    return made


def names(ready):
    return sorted(one.group for one in ready)


def take(dataset, count):
    return names(islice(dataset, count))


def drain(datasets, total):
    """Names of `total` groups, from whoever gets them."""
    deadline, found = time.monotonic() + 30, []
    for one in datasets:
        one._timeout = 0.02
    while len(found) < total:
        assert time.monotonic() < deadline, f"{len(found)} of {total} came"
        for one in datasets:
            with suppress(trajstore.Unavailable):
                found += take(one, 1)
    return found


def nothing(dataset):
    """Nothing comes to it for a while."""
    dataset._timeout = 0.5
    with pytest.raises(TimeoutError):
        next(iter(dataset))
    return True


def handed(store, group="trainer"):
    """Entries that some consumer has and nobody acknowledged."""
    return sum(store.wire.call("XPENDING", store.keys.ready(p), group)[0] for p in range(store.partitions))


# At least once, by acknowledgement


def test_acknowledged_groups_come_no_more_and_their_entries_go(store, dataset):
    made = publish(store, 3, size=2)
    first = dataset()
    ready = list(islice(first, 3))
    assert sorted(one.id for group in ready for one in group.trajectories) == sorted(one.id for one in made)
    first.acknowledge()
    first.acknowledge()
    assert look(store) == []
    assert (first.counts.groups, first.counts.trajectories, first.counts.acknowledged) == (3, 6, 3)
    assert nothing(dataset())


@pytest.mark.parametrize("question", [1, 2])
def test_beginning_that_gets_no_answer_leaves_nobody_who_goes_on_reading(store, dataset, monkeypatch, question):
    """A consumer that nobody knows of would keep what it reads from everybody, for as long as the process lives."""
    publish(store, 3)
    first, exchange, asked = dataset(group="others"), store.wire.exchange, []

    def lose(commands):
        if threading.current_thread() is threading.main_thread() and [one[:2] for one in commands[:1]] == [
            ("XINFO", "GROUPS")
        ]:
            asked.append(commands)
            if len(asked) == question:
                raise trajstore.Unavailable("no answer")
        return exchange(commands)

    monkeypatch.setattr(store.wire, "exchange", lose)
    with pytest.raises(trajstore.Unavailable, match="no answer"):
        take(first, 1)
    assert [thread.name for thread in threading.enumerate() if "rank-0.0:" in thread.name] == []
    assert take(first, 3) == ["g0", "g1", "g2"]


def test_unacknowledged_groups_come_again_at_once_to_the_next_process_of_their_rank(store, dataset):
    publish(store, 4)
    first = dataset(rank=1, world_size=2, prefetch_groups=1)
    done = take(first, 1)
    first.acknowledge()
    again = take(first, 2)
    first.close()
    second = dataset(rank=1, world_size=2)
    assert take(second, 2) == again
    assert second.counts.again >= 2
    assert take(second, 1) == sorted({"g0", "g1", "g2", "g3"} - {*done, *again})


def test_groups_of_a_dead_rank_go_to_another_after_the_lease(store, dataset):
    publish(store, 3)
    dead = dataset(rank=0, world_size=2)
    had = take(dead, 3)
    dead.close()
    heir = dataset(rank=1, world_size=2, lease=0.3)
    assert take(heir, 3) == had
    assert heir.counts.taken_over == 3
    heir.acknowledge()
    assert look(store) == []


def test_groups_of_a_living_rank_stay_with_it_however_long_its_step_takes(store, dataset):
    """The lease is kept by a thread, not by asking for the next group."""
    publish(store, 2)
    slow = dataset(rank=0, world_size=2, lease=0.3)
    had = take(slow, 2)
    assert nothing(dataset(rank=1, world_size=2, lease=0.3))
    assert slow.counts.groups == len(had)
    slow.acknowledge()
    assert look(store) == []


def test_rank_that_reads_for_longer_than_the_lease_keeps_what_it_has(store, dataset, monkeypatch):
    """Folding again what does not lie ready any more takes as long as the archive takes."""
    publish(store, 2)
    for one in look(store):
        for member in one.members:
            store.wire.call("UNLINK", store.keys.ready_payload(member.id, member.version))
    load, loads, goes_on = Store.load, count(), threading.Event()

    def slow_load(*one, **options):
        assert next(loads) == 0 or goes_on.wait(30)
        return load(*one, **options)

    monkeypatch.setattr(Store, "load", slow_load)
    slow = dataset(rank=0, world_size=2, lease=0.3, prefetch_groups=1)
    had = take(slow, 1)
    wait_until(lambda: handed(store) == 2)
    assert nothing(dataset(rank=1, world_size=2, lease=0.3))
    goes_on.set()
    assert sorted([*had, *take(slow, 1)]) == ["g0", "g1"]
    slow.acknowledge()
    assert look(store) == []


def test_ranks_share_the_groups_without_loss_or_repeat(store, dataset):
    publish(store, 12)
    ranks = [dataset(rank=rank, world_size=3, prefetch_groups=1) for rank in range(3)]
    assert sorted(drain(ranks, 12)) == sorted(f"g{i}" for i in range(12))
    for one in ranks:
        one.acknowledge()
    assert look(store) == []


def test_reader_of_the_same_consumer_group_shares_with_the_dataset(store, dataset):
    publish(store, 4)
    reader = TrajectoryReader(store)
    taken = reader.take(groups=2)
    assert names([*taken, *islice(dataset(), 2)]) == [f"g{i}" for i in range(4)]


def test_another_consumer_group_gets_everything_too(store, dataset):
    publish(store, 2)
    both = [dataset(), dataset(group="evaluation")]
    assert [take(one, 2) for one in both] == [["g0", "g1"]] * 2
    both[0].acknowledge()
    assert len(look(store)) == 2
    both[1].acknowledge()
    assert look(store) == []


# Exactly once, by checkpoint


def test_what_was_handed_out_after_the_checkpoint_comes_again_and_only_that(store, dataset):
    publish(store, 5)
    first = dataset(checkpoints=True)
    before = take(first, 2)
    state = first.state_dict()
    after = take(first, 2)
    first.commit(state)
    first.commit(state)
    assert handed(store) >= 2, "what was handed out later is nobody else's yet"
    first.close()
    second = dataset(checkpoints=True)
    second.load_state_dict(state)
    rest = {f"g{i}" for i in range(5)} - set(before)
    assert set(after) < rest
    assert take(second, 3) == sorted(rest)
    assert nothing(second)


def test_crash_between_a_durable_checkpoint_and_its_commit_doubles_nothing(store, dataset):
    publish(store, 4)
    first = dataset(checkpoints=True)
    before = take(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    take(first, 1)
    first.close()
    second = dataset(checkpoints=True)
    second.load_state_dict(state)
    assert take(second, 2) == sorted({"g0", "g1", "g2", "g3"} - set(before))
    assert nothing(second)
    assert second.state_dict()["entries"] != state["entries"]
    second.commit(second.state_dict())
    assert look(store) == []


def test_going_back_within_a_process_hands_out_again_what_came_since(store, dataset):
    publish(store, 3)
    one = dataset(checkpoints=True)
    before = take(one, 1)
    state = one.state_dict()
    since = take(one, 2)
    one.load_state_dict(state)
    assert take(one, 2) == since
    assert sorted([*before, *since]) == ["g0", "g1", "g2"]


def test_without_a_checkpoint_everything_comes_again(store, dataset):
    publish(store, 3)
    first = dataset(checkpoints=True)
    take(first, 2)
    first.close()
    assert take(dataset(checkpoints=True), 3) == ["g0", "g1", "g2"]


@pytest.mark.parametrize("sizes", [(4, 2), (2, 3), (3, 1)])
def test_ranks_of_another_number_share_what_came_after_the_checkpoint(store, dataset, sizes):
    publish(store, 24)
    before, after = sizes
    ranks = [dataset(rank=rank, world_size=before, checkpoints=True, prefetch_groups=1) for rank in range(before)]
    trained = [name for one in ranks for name in take(one, 2)]
    states = [one.state_dict() for one in ranks]
    for one in ranks:
        take(one, 2)
        one.close()
    others = [dataset(rank=rank, world_size=after, checkpoints=True) for rank in range(after)]
    for one in others:
        one.load_state_dict(states)
    trained += drain(others, 24 - len(trained))
    assert sorted(trained) == sorted(f"g{i}" for i in range(24))
    for one in others:
        one.commit(one.state_dict())
    assert look(store) == []


def test_other_number_of_ranks_needs_the_states_of_all(store, dataset):
    publish(store, 2)
    ranks = [dataset(rank=rank, world_size=2, checkpoints=True) for rank in range(2)]
    states = [one.state_dict() for one in ranks]
    with pytest.raises(trajstore.SchemaError, match="those of rank 1 are missing"):
        dataset(checkpoints=True).load_state_dict(states[0])
    with pytest.raises(trajstore.SchemaError, match="those of rank 1 are missing"):
        dataset(rank=1, world_size=2, checkpoints=True).load_state_dict(states[0])
    dataset(checkpoints=True).load_state_dict({"ranks": states})


def test_rank_that_has_not_started_again_loses_nothing_to_one_that_has(store, dataset):
    """What it had may be in its checkpoint, and only it knows."""
    publish(store, 4)
    ranks = [dataset(rank=rank, world_size=2, checkpoints=True, prefetch_groups=1) for rank in range(2)]
    for one in ranks:
        take(one, 1)
    trained = [one.state_dict() for one in ranks]
    for one in ranks:
        one.close()
    early = dataset(rank=0, world_size=2, checkpoints=True, lease=0.3)
    early.load_state_dict(trained[0])
    rest = {one.group for one in look(store)}
    got = []
    early._timeout = 1.0
    with pytest.raises(trajstore.Unavailable):
        got.extend(one.group for one in early)
    late = dataset(rank=1, world_size=2, checkpoints=True, lease=0.3)
    late.load_state_dict(trained[1])
    late._timeout = 1.0
    with pytest.raises(trajstore.Unavailable):
        got.extend(one.group for one in late)
    assert early.counts.taken_over == 0
    assert len(got) == 2 == len(set(got)), "each group that no checkpoint holds, once"
    assert set(got) < rest


@pytest.mark.parametrize("loads", ["no state", "its own state", "all states"])
def test_what_a_silent_rank_of_a_checkpointing_job_has_stays_with_it(store, dataset, loads):
    """It may be silent between a checkpoint that is durable and its commit: what it had would be in two checkpoints."""
    publish(store, 4)
    options = {"world_size": 2, "checkpoints": True, "lease": 0.3, "prefetch_groups": 1}
    ranks = [dataset(rank=rank, **options) for rank in range(2)]
    got = [name for one in ranks for name in take(one, 1)]
    wait_until(lambda: handed(store) == 4)
    states = [one.state_dict() for one in ranks]
    for one in ranks:
        one.close()
    given = {"no state": None, "its own state": states[0], "all states": states}[loads]
    again = dataset(rank=0, **options)
    if given is not None:
        again.load_state_dict(given)
    mine = take(again, 1 if given else 2)
    assert nothing(again)
    assert again.counts.taken_over == 0
    late = dataset(rank=1, **options)
    late.load_state_dict(states[1])
    got += [*(name for name in mine if name not in got), *take(late, 1)]
    assert nothing(late)
    assert sorted(got) == ["g0", "g1", "g2", "g3"]


def test_what_a_process_of_an_ended_job_reads_late_is_taken_over_by_whoever_has_its_place(store, dataset):
    """It was alive when its successor began, so that it had nothing yet that could be taken at once."""
    publish(store, 2)
    heir = dataset(rank=1, world_size=2, checkpoints=True, lease=0.3, prefetch_groups=1)
    assert len(take(heir, 1)) == 1
    wait_until(lambda: handed(store) == 2)
    publish(store, 1, first=2)
    late = dataset(rank=3, world_size=4, checkpoints=True)
    assert take(late, 1) == ["g2"]
    late.close()
    assert "g2" in take(heir, 2)
    assert heir.counts.taken_over == 1


def test_one_rank_commits_for_all(store, dataset):
    publish(store, 6)
    ranks = [dataset(rank=rank, world_size=2, checkpoints=True, prefetch_groups=1, lease=0.3) for rank in range(2)]
    trained = [name for one in ranks for name in take(one, 2)]
    ranks[0].commit([one.state_dict() for one in ranks])
    assert handed(store) <= 2, "what they have read ahead"
    assert len(trained) == 4
    for one in ranks:
        wait_until(lambda one=one: one.state_dict()["entries"] == [])


def test_rank_that_was_started_again_elsewhere_is_fenced(store, dataset):
    publish(store, 3)
    zombie = dataset(checkpoints=True, lease=0.3)
    had = take(zombie, 2)
    state = zombie.state_dict()
    heir = dataset(checkpoints=True)
    assert set(had) <= set(take(heir, 3))
    with pytest.raises(trajstore.Fenced, match="was taken again by another process"):
        zombie.commit(state)

    def is_fenced():
        try:
            zombie.state_dict()
        except trajstore.Fenced:
            return True
        return False

    wait_until(is_fenced)
    assert is_fenced(), "and stays so"
    heir.commit(heir.state_dict())
    assert look(store) == []


def test_state_is_found_in_what_a_stateful_data_loader_makes_of_it(store, dataset):
    publish(store, 2)
    one = dataset(checkpoints=True)
    take(one, 2)
    one.commit({"_snapshot": {"_worker_snapshots": {"worker_0": {"dataset_state": one.state_dict()}}}, "steps": 3})
    assert look(store) == []


def test_state_of_another_run_group_or_format_is_refused(store, dataset, open_store):
    one = dataset(checkpoints=True)
    state = one.state_dict()
    with pytest.raises(trajstore.Conflict, match="consumer group 'trainer'"):
        dataset(checkpoints=True, group="other").commit(state)
    with pytest.raises(trajstore.Conflict, match="of run"):
        one.load_state_dict(state | {"run": "01ARZ3NDEKTSV4RRFFQ69G5FAV"})
    with pytest.raises(trajstore.SchemaError, match="version 2"):
        one.load_state_dict(state | {"trajstore_dataset": 2})
    with pytest.raises(trajstore.SchemaError, match="no state"):
        one.commit({"model": [1, 2]})
    with pytest.raises(trajstore.SchemaError, match="rank"):
        one.commit(state | {"rank": "zero"})


def test_the_two_ways_are_not_mixed(store, dataset):
    with pytest.raises(trajstore.Conflict, match="commit"):
        dataset(checkpoints=True).acknowledge()
    for call in (lambda one: one.state_dict(), lambda one: one.commit({}), lambda one: one.load_state_dict({})):
        with pytest.raises(trajstore.Conflict, match="acknowledge"):
            call(dataset())


# Reading ahead, waiting


@pytest.mark.parametrize("limit", ["groups", "bytes"])
def test_read_ahead_is_bounded_and_leaves_the_rest_to_others(store, dataset, limit):
    publish(store, 12)
    (size,) = {one.nbytes for group in look(store) for one in group.members}
    options = {"prefetch_groups": 3} if limit == "groups" else {"prefetch_groups": 12, "prefetch_bytes": 2 * size + 1}
    greedy = dataset(rank=0, world_size=2, **options)
    take(greedy, 1)
    wait_until(lambda: greedy._session.prefetched == 3)
    other = dataset(rank=1, world_size=2)
    assert len(take(other, 8)) == 8
    assert greedy._session.prefetched == 3
    assert nothing(other)


def test_wait_has_a_deadline_and_says_how_it_stands(store, dataset, caplog):
    """TransferQueue: reads block for ever. Every blocking call has a deadline and a clear error."""
    caplog.set_level(logging.INFO, "trajstore_trainer")
    publish(store, 1)
    one = dataset(timeout=0.5, progress_seconds=0.1)
    take(one, 1)
    with pytest.raises(TimeoutError, match=r"no group came within 0.5 s.*had 1 groups.*materializer running"):
        next(iter(one))
    assert "waiting for" in caplog.text
    assert "1 entries are not acknowledged" in caplog.text
    publish(store, 1, first=1)
    assert take(one, 1) == ["g1"], "it can be asked again"


def test_restart_of_the_server_only_holds_a_trainer_up(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=2, timeout=5.0) as store:
        publish(store, 4)
        with TrajectoryDataset(store, timeout=20.0, prefetch_groups=1) as dataset:
            had = take(dataset, 1)
            own_server.stop()
            own_server.start()
            had += take(dataset, 3)
            assert sorted(had) == ["g0", "g1", "g2", "g3"]
            dataset.acknowledge()
        assert look(store) == []


def test_ranks_cut_off_for_longer_than_the_lease_take_nothing_from_each_other(own_server, run_name):
    """Who comes back first has been away itself, and cannot tell whether the others are dead."""
    with ExitStack() as job:
        proxies = [job.enter_context(FaultyProxy(own_server.port)) for _ in range(2)]
        stores = [
            job.enter_context(trajstore.open(proxy.url(run_name), partitions=2, timeout=2.0)) for proxy in proxies
        ]
        publish(stores[0], 1)
        options = {"world_size": 2, "checkpoints": True, "lease": 2.0, "timeout": 20.0}
        one, other = (
            job.enter_context(TrajectoryDataset(store, rank=rank, **options)) for rank, store in enumerate(stores)
        )
        assert take(other, 1) == ["g0"]
        assert nothing(one)
        for proxy in proxies:
            proxy.refuse()
        cut = time.monotonic()
        wait_until(lambda: one._session.trouble and other._session.trouble and time.monotonic() > cut + 2.5)
        proxies[0].accept()
        wait_until(lambda: one._session.trouble is None)
        assert nothing(one)
        proxies[1].accept()
        wait_until(lambda: other._session.trouble is None)
        other.commit(other.state_dict())
        assert one.counts.taken_over == 0
        assert look(stores[0]) == []


@pytest.mark.parametrize("lost", ["what is new", "what the predecessor had", "what a silent rank had"])
def test_group_whose_delivery_was_lost_on_the_way_comes_all_the_same(own_server, run_name, lost):
    """The server counts it as this rank's, and this rank keeps its claims fresh: no other would ever get it."""
    with ExitStack() as job:
        proxy = job.enter_context(FaultyProxy(own_server.port))
        direct, store = (
            job.enter_context(trajstore.open(url, partitions=1, timeout=2.0))
            for url in (own_server.url(run_name), proxy.url(run_name))
        )
        options = {"world_size": 2, "lease": 0.4, "timeout": 20.0}
        if lost == "what is new":
            one = job.enter_context(TrajectoryDataset(store, rank=1, **options))
            publish(direct, 1)
            got = take(one, 1)
            proxy.drop_reply(b"$1\r\n>\r\n")
            publish(direct, 2, first=1)
        else:
            publish(direct, 3)
            dead = job.enter_context(TrajectoryDataset(direct, rank=lost == "what the predecessor had", **options))
            take(dead, 3)
            dead.close()
            proxy.drop_reply(b"XCLAIM")
            one = job.enter_context(TrajectoryDataset(store, rank=1, **options))
            got = []
        got += take(one, 3 - len(got))
        assert proxy.fired.is_set()
        assert sorted(got) == ["g0", "g1", "g2"]
        assert nothing(one), "and none comes twice"
        one.acknowledge()
        assert look(direct) == []


def test_full_server_can_be_trained_from_and_acknowledged(own_server, run_name):
    """Else nothing would ever free its memory."""
    with trajstore.open(own_server.url(run_name), partitions=2, timeout=10.0) as store:
        publish(store, 2)
        publish(store, 1, first=2, status="failed")
        own_server.client().config_set("maxmemory", "1")
        with TrajectoryDataset(store, timeout=10.0) as dataset:
            assert take(dataset, 2) == ["g0", "g1"]
            dataset.acknowledge()
            assert nothing(dataset)
            assert dataset.counts.passed_over == {"failed": 1}
        assert look(store) == []


def test_group_waits_where_a_full_server_cannot_keep_what_was_decided_on_it(own_server, run_name):
    """Without the decision it could be trained on twice."""
    with trajstore.open(own_server.url(run_name), partitions=2, timeout=10.0) as store:
        for status in ("completed", "completed", "aborted"):
            finish(store, group="g", group_size=3, status=status)
        materialize(store)
        own_server.client().config_set("maxmemory", "1")
        with TrajectoryDataset(store, timeout=0.6, selection=Selection(aborted="rest")) as dataset:
            with pytest.raises(trajstore.Unavailable, match=r"no group came within.*memory is full"):
                next(iter(dataset))
            own_server.client().config_set("maxmemory", "0")
            dataset._timeout = 10.0
            assert take(dataset, 1) == ["g"]
            dataset.acknowledge()
        assert look(store) == []


def test_batches_are_collated_from_whole_groups(store, dataset):
    publish(store, 4, size=2)
    one = dataset()
    batches = one.batches(2, lambda some: padded_batch(some, pad_token_id=7))
    sizes = [len(batch) for batch in islice(batches, 2)]
    assert sizes == [4, 4]
    one.acknowledge()
    assert look(store) == []


def test_groups_of_a_batch_that_did_not_come_are_not_acknowledged_and_are_in_the_next(store, dataset):
    publish(store, 1)
    one = dataset(checkpoints=True)
    one._timeout = 0.3
    with pytest.raises(trajstore.Unavailable):
        next(one.batches(2, padded_batch))
    assert one.state_dict()["entries"] == []
    publish(store, 2, first=1)
    one._timeout = 10.0
    batch = next(one.batches(2, padded_batch))
    assert len(batch) == 2
    assert len(one.state_dict()["entries"]) == 2
    assert sorted([*batch.groups, *take(one, 1)]) == ["g0", "g1", "g2"]


def test_groups_that_could_not_be_collated_come_again(store, dataset):
    publish(store, 2)
    one = dataset()
    with pytest.raises(ZeroDivisionError):
        next(one.batches(2, lambda _: 1 // 0))
    one.acknowledge()
    assert take(one, 2) == ["g0", "g1"]
    one.acknowledge()
    assert look(store) == []


# Processes


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_use_after_a_fork_is_a_clear_error(embedded):
    """As in the workers of a DataLoader that forks them."""
    with TrajectoryDataset(embedded.location, timeout=10.0, checkpoints=True) as dataset:
        for call in (lambda: next(iter(dataset)), dataset.state_dict, lambda: dataset.commit({})):
            pid = os.fork()
            if pid == 0:
                try:
                    call()
                except trajstore.Conflict as error:
                    os._exit(17 if "multiprocessing_context='spawn'" in str(error) else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_end_of_a_forked_child_costs_the_parent_nothing(embedded):
    """It runs the parent's exit handlers, which must not leave for it."""
    publish(embedded, 1)
    with TrajectoryDataset(embedded.location, timeout=10.0) as dataset:
        assert take(dataset, 1) == ["g0"]
        consumer = dataset._session.consumer.encode()
        pid = os.fork()
        if pid == 0:
            try:
                dataset._session.close()
                dataset.close()
                os._exit(17)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17
        consumers = [embedded.wire.call("XINFO", "CONSUMERS", embedded.keys.ready(p), "trainer") for p in range(2)]
        assert [sum(consumer in flat for flat in some) for some in consumers] == [1, 1]
        publish(embedded, 1, first=1)
        assert take(dataset, 1) == ["g1"]


def test_spawned_workers_share_the_groups(embedded):
    publish(embedded, 6)
    with TrajectoryDataset(embedded.location, timeout=60.0, prefetch_groups=1) as dataset:
        loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn", in_order=False)
        ready = list(islice(loader, 6))
        assert names(ready) == [f"g{i}" for i in range(6)]
        dataset.acknowledge(ready)
        assert look(embedded) == []


def test_pinned_batch_has_its_tensors_and_nothing_else_in_locked_memory(store, dataset, monkeypatch):
    """Page-locking itself needs CUDA."""
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor) or tensor.clone())
    publish(store, 1, size=2)
    batch = next(dataset().batches(1, padded_batch, pin_memory=True))
    tensors = [value for name in batch.__dataclass_fields__ if torch.is_tensor(value := getattr(batch, name))]
    assert len(locked) == len(tensors) > 5
    assert not {id(one) for one in locked} & {id(one) for one in tensors}
    assert len(batch) == len(batch.ids) == 2


def test_dataset_over_an_open_store_does_not_travel(store, dataset):
    with pytest.raises(trajstore.Conflict, match="cannot go to another process"):
        pickle.dumps(dataset())


def test_senseless_options_are_refused(store):
    for options in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"lease": 0.1}, {"prefetch_groups": 0}):
        with pytest.raises(trajstore.SchemaError):
            TrajectoryDataset(store, **options)
