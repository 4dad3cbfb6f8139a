"""A consumer group that nobody uses any more is removed, and takes with it what was kept for it alone."""

import pytest

import trajstore
from tests.consumers.rollouts import finish, look, materialize
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
    remove(store, "trainer")
    remove(store, "ppo")
    assert len(look(store)) == 1, "there is no group that has had it"
    assert take_all(store, "new") == [last.id]


def test_group_with_consumers_is_not_removed_unless_by_force(store, published):
    reader = TrajectoryReader(store, group="look", consumer="rank-3")
    (ready, *_) = reader.take(1)
    with pytest.raises(
        trajstore.Conflict, match=r"has consumers: rank-3, last heard 0 s ago. Stop them first.*--force"
    ):
        remove(store, "look")
    reader.acknowledge([ready])
    assert len(take_all(store, "look")) == 2, "it is as it was"
    reader = TrajectoryReader(store, group="look", consumer="rank-3")
    remove(store, "look", force=True)
    with pytest.raises(trajstore.Unavailable, match="NOGROUP"):
        reader.take(1, timeout=0.1)
    assert take_all(store, "trainer") == published


def test_group_that_is_not_there_is_named_with_those_that_are(store):
    TrajectoryReader(store, group="look").close()
    with pytest.raises(trajstore.NotFound, match=r"no consumer group 'luck'; its groups: look, trainer"):
        remove(store, "luck")
