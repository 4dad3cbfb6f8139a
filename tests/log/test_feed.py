"""Following the feed: hints are repeated, taken over, and trimmed only where no group needs them any more."""

import pytest

from tests.builders import record_seed_case
from trajstore.events import EventId
from trajstore.log.feed import ARCHIVER, MATERIALIZER, FeedFollower, FeedTail
from trajstore.log.groups import needs_of, oldest_needed


def follower(store, group=ARCHIVER, name="one"):
    """A consumer of a group."""
    return FeedFollower(store.wire, store.keys, group, name)


def finished(store, count):
    """Ids of trajectories that leave one hint each."""
    made = [store.create() for _ in range(count)]
    for trajectory in made:
        trajectory.close()
    store.flush()
    return [trajectory.id for trajectory in made]


def test_each_group_gets_every_hint_and_a_groups_members_share_them(store):
    ids = finished(store, 20)
    one, two = follower(store, name="one"), follower(store, name="two")
    first = one.poll([0, 1], count=3)
    rest = two.poll([0, 1], count=100)
    assert sorted(hint.id for hint in first + rest) == sorted(ids)
    assert not {hint.id for hint in first} & {hint.id for hint in rest}
    everything = follower(store, MATERIALIZER).poll([0, 1], count=100)
    assert sorted(hint.id for hint in everything) == sorted(ids)
    assert {(hint.kind, hint.event) for hint in everything} == {("TrajectoryClosed", "2-0")}


def test_unacknowledged_hints_are_taken_over_by_another_consumer(store):
    ids = finished(store, 10)
    dead = follower(store, name="dead")
    taken = dead.poll([0, 1], count=100)
    dead.acknowledge(taken[:4])
    heir = follower(store, name="heir")
    assert heir.poll([0, 1], count=100) == []
    again = [hint for partition in (0, 1) for hint in heir.take_over(partition, idle=0.0, count=2)]
    assert sorted(again) == sorted(taken[4:])
    assert {hint.id for hint in again} < set(ids)


def test_hints_of_a_consumer_that_is_still_busy_are_left_to_it(store):
    finished(store, 4)
    follower(store, name="busy").poll([0, 1], count=100)
    assert [follower(store, name="other").take_over(partition, idle=60.0) for partition in (0, 1)] == [[], []]


def test_waiting_poll_sees_a_hint_of_another_store(store, open_store):
    (id,) = finished(open_store(), 1)
    assert [hint.id for hint in follower(store).poll([0, 1], count=10, block=5.0)] == [id]
    assert follower(store).poll([0, 1], count=10, block=0.01) == []


def test_trim_keeps_what_any_group_still_needs(store, client):
    """Marten V9.16.1, V9.25.0: a checkpoint passed events that had not been seen yet."""
    finished(store, 12)
    lengths = [client.xlen(store.keys.feed(partition)) for partition in (0, 1)]
    archiver, materializer = follower(store), follower(store, MATERIALIZER)
    archiver.acknowledge(archiver.poll([0, 1], count=100))
    archiver.trim([0, 1])  # the other group has seen nothing
    assert [client.xlen(store.keys.feed(partition)) for partition in (0, 1)] == lengths
    seen = materializer.poll([0], count=100)
    materializer.acknowledge(seen[1:])  # all but the oldest
    archiver.trim([0, 1])
    assert client.xlen(store.keys.feed(0)) == lengths[0]
    materializer.acknowledge(seen[:1])
    archiver.trim([0, 1])
    assert [client.xlen(store.keys.feed(partition)) for partition in (0, 1)] == [0, lengths[1]]


def test_trim_keeps_what_a_group_of_others_has_pending(store, client):
    """Not only our two groups count: somebody else's consumer has a claim too."""
    finished(store, 6)
    feeds = [store.keys.feed(partition) for partition in (0, 1)]
    lengths = [client.xlen(feed) for feed in feeds]
    for feed in feeds:
        client.xgroup_create(feed, "theirs", id="0")
        client.xreadgroup("theirs", "them", {feed: ">"})
    for group in (ARCHIVER, MATERIALIZER):
        one = follower(store, group)
        one.acknowledge(one.poll([0, 1], count=100))
    follower(store).trim([0, 1])
    assert [client.xlen(feed) for feed in feeds] == lengths


def test_feed_goes_on_after_it_was_trimmed_empty(store):
    """XTRIM keeps groups and last id, where DEL would lose both (pitfall 33)."""
    for group in (ARCHIVER, MATERIALIZER):
        finished(store, 1)
        one = follower(store, group)
        one.acknowledge(one.poll([0, 1], count=100))
    other = follower(store, ARCHIVER)
    other.acknowledge(other.poll([0, 1], count=100))
    other.trim([0, 1])
    ids = finished(store, 5)
    assert sorted(hint.id for hint in other.poll([0, 1], count=100)) == sorted(ids)


def test_hints_trimmed_while_pending_are_dropped_by_a_take_over(store, client):
    """XAUTOCLAIM drops trimmed ids, and older servers give nil for them (pitfall 33)."""
    finished(store, 6)
    follower(store, name="dead").poll([0, 1], count=100)
    for partition in (0, 1):
        client.xtrim(store.keys.feed(partition), maxlen=0, approximate=False)
        assert follower(store, name="heir").take_over(partition, idle=0.0) == []


def test_consumer_that_leaves_takes_nothing_pending_with_it(store, client):
    """XGROUP DELCONSUMER forgets what was pending; a consumer with pending hints stays."""
    finished(store, 6)
    one = follower(store, name="leaving")
    hints = one.poll([0, 1], count=100)
    one.acknowledge([hint for hint in hints if hint.partition == 0])
    one.leave([0, 1])
    consumers = {
        partition: [consumer["name"] for consumer in client.xinfo_consumers(store.keys.feed(partition), ARCHIVER)]
        for partition in (0, 1)
    }
    pending = [hint for hint in hints if hint.partition == 1]
    assert b"leaving" not in consumers[0]
    assert (b"leaving" in consumers[1]) == bool(pending)


def test_tail_takes_nothing_from_the_groups(store):
    finished(store, 3)
    late, whole = FeedTail(store.wire, store.keys), FeedTail(store.wire, store.keys, from_start=True)
    ids = finished(store, 2)
    assert sorted(hint.id for hint in late.poll(count=10, block=1.0)) == sorted(ids)
    assert len(whole.poll(count=10, block=1.0)) == 5
    assert len(follower(store).poll([0, 1], count=10)) == 5


def test_repeated_and_spurious_hints_change_nothing(store, client):
    trajectory = record_seed_case(store)
    trajectory.close()
    store.flush()
    feed = store.keys.feed(store.keys.partition(trajectory.id))
    for event in ("1-0", "4-0", "99-0"):
        client.xadd(feed, {"t": trajectory.id, "k": "TrajectoryClosed", "e": event})
    hints = follower(store).poll([0, 1], count=100)
    assert len(hints) >= 4
    assert {hint.id for hint in hints} == {trajectory.id}
    assert store.load(trajectory.id).status == "completed"


@pytest.mark.parametrize(
    ("delivered", "pending", "expected"),
    [
        (b"5-0", None, EventId(5, 1)),
        (b"5-0", b"2-7", EventId(2, 7)),
        (b"0-0", None, EventId(0, 1)),
        (b"0-0", b"4-0", EventId(0, 1)),
    ],
)
def test_a_group_needs_what_it_has_not_seen_and_not_acknowledged(delivered, pending, expected):
    assert oldest_needed(delivered, pending) == expected


def test_group_that_is_removed_while_it_is_looked_at_needs_nothing(store, monkeypatch):
    streams = [store.keys.ready(partition) for partition in range(store.partitions)]
    store.wire.call_all([("XGROUP", "CREATE", stream, "look", "0") for stream in streams])
    exchange = store.wire.exchange

    def remove_first(commands):
        if commands[0][0] == "XPENDING":
            exchange([("XGROUP", "DESTROY", stream, "look") for stream in streams])
        return exchange(commands)

    monkeypatch.setattr(store.wire, "exchange", remove_first)
    needs = needs_of(store.wire, [*streams, "not-there"])
    assert [[need.name for need in some] for some in needs] == [[b"trainer"]] * len(streams) + [[]]
