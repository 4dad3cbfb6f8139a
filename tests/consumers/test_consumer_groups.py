"""A consumer group that nobody uses any more is removed, and takes with it what was kept for it alone."""

import pytest

import trajstore
from tests.consumers.rollouts import finish, laid, look, materialize
from trajstore.consumer_groups import remove_consumer_group
from trajstore_trainer import TrajectoryReader

pytestmark = pytest.mark.torch


def take_all(store, group):
    """Read and acknowledge as a consumer that signs off; ids, sorted."""
    with TrajectoryReader(store, group=group) as reader:
        ready = reader.take(100, timeout=0.0)
        reader.acknowledge(ready)
        return sorted(one.id for entry in ready for one in entry.trajectories)


def remove(store, name, **options):
    remove_consumer_group(store.wire, store.keys, name, **options)


@pytest.fixture
def published(store):
    """Ids of three trajectories that are ready."""
    made = [finish(store) for _ in range(3)]
    materialize(store)
    return sorted(one.id for one in made)


def test_what_was_kept_for_a_group_goes_with_it(store, published):
    TrajectoryReader(store, group="look").close()
    assert take_all(store, "trainer") == published
    assert len(look(store)) == 3, "look has not had them"
    remove(store, "look")
    assert look(store) == []


def test_what_another_group_needs_stays(store, published):
    TrajectoryReader(store, group="look").close()
    remove(store, "look")
    assert take_all(store, "trainer") == published


def test_group_that_every_run_has_goes_too_and_is_made_again_by_who_reads(store, published):
    assert take_all(store, "ppo") == published
    remove(store, "trainer")
    assert look(store) == []
    late = finish(store)
    materialize(store)
    assert take_all(store, "ppo") == [late.id]
    assert look(store) == [], "nothing is kept for the trainer any more"
    last = finish(store)
    materialize(store)
    assert take_all(store, "trainer") == [last.id]


def test_last_group_stays(store, published):
    """Without any nothing would ever be trimmed, and nobody be named for it."""
    with pytest.raises(trajstore.Conflict, match=r"'trainer' is the last consumer group.*run no materializer"):
        remove(store, "trainer", force=True)
    assert take_all(store, "trainer") == published


def test_group_with_consumers_is_not_removed_unless_by_force(store, published):
    reader = TrajectoryReader(store, group="look", consumer="rank-3")
    (ready, *_) = reader.take(1)
    held = r"rank-3 \(last heard of 0 s ago, 1 entries in hand\)\. Stop them first.*--force"
    with pytest.raises(trajstore.Conflict, match=held):
        remove(store, "look")
    reader.acknowledge([ready])
    reader.close()
    assert len(take_all(store, "look")) == 2, "it is as it was"
    reader = TrajectoryReader(store, group="look", consumer="rank-3")
    remove(store, "look", force=True)
    with pytest.raises(trajstore.Unavailable, match="has removed the consumer group"):
        reader.take(1, timeout=0.1)
    assert take_all(store, "trainer") == published


def test_reader_that_has_taken_nothing_yet_is_a_consumer_and_holds_folds(store):
    """A trainer that is begun before its rollouts, under no name of its own."""
    with TrajectoryReader(store) as waiting, TrajectoryReader(store, group="look") as fast:
        with pytest.raises(trajstore.Conflict, match="has consumers"):
            remove(store, "trainer")
        made = [finish(store) for _ in range(8)]
        materialize(store)
        seen = fast.take(8)
        fast.acknowledge(seen)
        entries = look(store)
        assert len(entries) == 8
        assert [blob for one in entries for blob in laid(store, one.members) if blob is None] == []
        assert sorted(one.id for entry in waiting.take(8) for one in entry.trajectories) == sorted(x.id for x in made)


def test_many_consumers_are_told_in_short(store):
    for number in range(6):
        TrajectoryReader(store, group="look", consumer=f"rank-{number}")
    with pytest.raises(trajstore.Conflict, match=r"(rank-\d \([^)]*\)(, | )){4}and 2 more\. Stop"):
        remove(store, "look")


def test_group_that_is_removed_while_another_acknowledges_disturbs_nobody(store, monkeypatch, published):
    TrajectoryReader(store, group="look").close()
    with TrajectoryReader(store) as reader:
        ready = reader.take(3)
        exchange = store.wire.exchange

        def remove_first(commands):
            if commands and commands[0][0] == "XPENDING":
                monkeypatch.undo()
                remove(store, "look")
            return exchange(commands)

        monkeypatch.setattr(store.wire, "exchange", remove_first)
        reader.acknowledge(ready)
    finish(store)
    materialize(store)
    assert len(take_all(store, "trainer")) == 1
    assert look(store) == []


def test_partition_that_the_server_has_lost_is_told_to_who_joins(store, published):
    store.wire.call("DEL", store.keys.ready(0))
    with pytest.raises(trajstore.Unavailable, match="trajstore rebuild"):
        TrajectoryReader(store)
    with pytest.raises(trajstore.Unavailable, match="trajstore rebuild"):
        TrajectoryReader(store, group="look")
    remove(store, "look")  # which it has in the other partition


def test_group_that_is_not_there_is_named_with_those_that_are(store):
    TrajectoryReader(store, group="look").close()
    with pytest.raises(trajstore.NotFound, match=r"no consumer group 'luck'; its groups: look, trainer"):
        remove(store, "luck")


def test_name_that_is_no_text_is_removed_all_the_same(store):
    store.wire.call_all([("XGROUP", "CREATE", store.keys.ready(p), b"\xff\xfe", "0") for p in range(store.partitions)])
    remove(store, b"\xff\xfe".decode(errors="surrogateescape"))
    with pytest.raises(trajstore.NotFound, match="its groups: trainer"):
        remove(store, "look")
