"""The ready streams by themselves: offering, delivery to consumers, acknowledgement, and blobs."""

import threading

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load, save

import trajstore
from tests.builders import record_seed_case
from tests.consumers.rollouts import finish, laid, look, members, wait_until
from tests.log.proxy import FaultyProxy
from trajstore.blob import from_blob, to_blob
from trajstore.errors import Corrupt
from trajstore.ready import ReadyMember, ReadyQueue
from trajstore.ready_follower import ReadyFollower


def member(id, version=1, status="completed"):
    return ReadyMember(id=id, version=version, status=status, at="3-0", tokens=5, nbytes=4)


@pytest.fixture
def queue(store):
    """The materializer's side."""
    return ReadyQueue(store.wire, store.keys)


@pytest.fixture
def follow(store):
    """Consumers: `follow(name, group=...)`."""
    return lambda consumer, group="trainer": ReadyFollower(store.wire, store.keys, group, consumer)


def publish(queue, id, version=1, group=None, size=None, **options):
    offer = queue.offer(
        member(id, version, **options), group=group, group_size=size, policy="last_segment_wins", keep=60.0
    )
    queue.put_blob(id, version, b"blob", keep=60.0)
    return offer


def ids(deliveries):
    return [one.id for delivery in deliveries for one in delivery.group.members]


# Offering


def test_same_version_is_published_once_and_an_older_one_never(queue, store):
    assert publish(queue, "a", 2).published is not None
    assert publish(queue, "a", 2) == (False, None)
    assert publish(queue, "a", 1) == (False, None)
    assert queue.offered("a", group=None, group_size=None) == 2
    assert publish(queue, "a", 3).is_new
    assert members(look(store)) == [("a", 2), ("a", 3)]


def test_group_and_id_of_the_same_name_do_not_meet(queue, store):
    publish(queue, "x")
    publish(queue, "y", group="x", size=2)
    assert members(look(store)) == [("x", 1)]
    publish(queue, "z", group="x", size=2)
    assert members(look(store)) == [("x", 1), ("y", 1), ("z", 1)]


def test_members_offered_at_the_same_time_complete_their_group_once(queue, store):
    start = threading.Barrier(8)
    published = []

    def offer(i):
        start.wait(10)
        published.append(publish(queue, f"m{i}", group="g", size=8).published)

    threads = [threading.Thread(target=offer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(one is not None for one in published) == 1
    assert members(look(store)) == [(f"m{i}", 1) for i in range(8)]


def test_only_aborted_members_are_asked_whether_they_go_on(queue):
    asked = []

    def offer(one):
        return queue.offer(
            one, group="g", group_size=3, policy="last_segment_wins", keep=60.0, goes_on=lambda m: asked.append(m.id)
        )

    offer(member("a", status="aborted"))
    offer(member("b"))
    assert asked == [], "the group is not complete anyway"
    assert offer(member("c", status="aborted")).published is not None
    assert asked == ["a"]


def test_entry_says_the_size_with_which_its_group_was_first_published(queue, store):
    for id, size in (("a", 2), ("b", 3), ("c", 2), ("d", 4), ("e", 9)):
        publish(queue, id, group="g", size=size)
    publish(queue, "alone")
    publish(queue, "one-of-many", group="h")
    found = sorted(((one.group or "", one.version, one.size, len(one.members)) for one in look(store)), key=str)
    assert found == [("", 1, None, 1), ("g", 3, 3, 3), ("g", 4, 3, 4), ("g", 5, 3, 5), ("h", 1, None, 1)]


def test_entry_without_a_size_is_read(queue, follow, store):
    """As it was written before there was one."""
    one = publish(queue, "a", group="g", size=1).published
    before = msgspec.structs.asdict(one) | {"members": [msgspec.structs.asdict(member("a"))]}
    del before["size"]
    stream = store.keys.ready(store.keys.partition("g"))
    store.wire.call("XADD", stream, "*", "g", msgspec.msgpack.encode(before))
    first, second = follow("one").poll(count=2)
    assert (first.group.size, second.group.size) == (1, None)
    assert first.group.members == second.group.members


# Delivery


def test_poll_takes_no_more_than_it_was_asked_for(queue, follow):
    """What one consumer takes is kept from the others, over all partitions together."""
    for i in range(8):
        publish(queue, f"t{i}")
    first, second = follow("one"), follow("two")
    taken = [ids(first.poll(count=1)), ids(second.poll(count=3)), ids(first.poll(count=10))]
    assert [len(one) for one in taken] == [1, 3, 4]
    assert sorted(one for some in taken for one in some) == [f"t{i}" for i in range(8)]
    assert first.poll(count=1) == second.poll(count=1) == []


def test_consumer_that_was_away_finds_what_is_new_at_once(queue, follow):
    first, second = follow("one"), follow("two")
    for i in range(20):
        publish(queue, f"t{i}")
    assert len(second.poll(count=1)) == 1
    assert len(first.poll(count=30)) == 19
    publish(queue, "last")
    assert ids(second.poll(count=5)) == ["last"]


def test_consumer_finds_again_what_the_server_has_forgotten_that_it_gave_out(queue, follow, store):
    """Found by simulation seed 241: a server that lost its tail knows less of the group than its consumers do."""
    publish(queue, "t")
    follower = follow("one")
    (given,) = follower.poll(count=1)
    ready = store.keys.ready(given.partition)
    store.wire.call_all([("XACK", ready, "trainer", given.at), ("XGROUP", "SETID", ready, "trainer", "0")])
    assert ids([*follower.poll(count=1), *follower.poll(count=1)]) == ["t"]


def test_consumer_that_was_cut_off_while_it_asked_goes_on_with_that_partition(own_server, run_name):
    """Found by simulation seed 368: it never looked there again."""
    with (
        FaultyProxy(own_server.port) as proxy,
        trajstore.open(own_server.url(run_name), partitions=1) as store,
        trajstore.open(proxy.url(run_name)) as far,
    ):
        queue = ReadyQueue(store.wire, store.keys)
        publish(queue, "theirs")
        assert ids(ReadyFollower(store.wire, store.keys, "trainer", "one").poll(count=1)) == ["theirs"]
        follower = ReadyFollower(far.wire, far.keys, "trainer", "two")
        proxy.drop_reply(b"GROUPS")  # with which it asks how far the others are, for it got nothing
        with pytest.raises(trajstore.Unavailable):
            follower.poll(count=1)
        publish(queue, "mine")
        assert ids(follower.poll(count=1)) == ["mine"]


def test_poll_waits_for_the_first(queue, follow):
    follower = follow("one")
    assert follower.poll(count=1, block=0.01) == []
    found = []
    thread = threading.Thread(target=lambda: found.extend(follower.poll(count=1, block=5.0)))
    thread.start()
    publish(queue, "late")
    thread.join(20)
    assert ids(found) == ["late"]


def test_what_was_not_acknowledged_is_found_page_by_page(queue, follow, store):
    for i in range(7):
        publish(queue, f"t{i}")
    before = follow("rank-0").poll(count=7)
    follow("rank-0").acknowledge(before[2:3])
    found = []
    for partition in range(store.partitions):
        after = "0-0"
        while after is not None:
            page, after = follow("rank-0").unacknowledged(partition, after=after, count=2)
            assert len(page) <= 2
            found += page
    assert sorted(ids(found)) == sorted(ids(before[:2] + before[3:]))


def test_take_over_claims_what_is_idle_up_to_the_count(queue, follow):
    for i in range(6):
        publish(queue, f"t{i}")
    before = follow("dead").poll(count=6)
    heir = follow("heir")
    assert heir.take_over(idle=60.0, count=10, skip=lambda _: False) == []
    first = heir.take_over(idle=0.0, count=2, skip=lambda _: False)
    rest = heir.take_over(idle=0.0, count=10, skip=lambda one: one in first)
    assert (len(first), len(rest)) == (2, 4)
    assert sorted(ids(first + rest)) == sorted(ids(before))


# Acknowledgement


def test_acknowledged_entries_are_trimmed_and_their_blobs_go(queue, follow, store):
    for i in range(5):
        publish(queue, f"t{i}")
    follower = follow("one")
    taken = follower.poll(count=5)
    follower.acknowledge(taken[1:])
    assert sum(blob is not None for one in taken for blob in laid(store, one.group.members)) == 1
    assert taken[0].group in look(store), "still needed"
    follower.acknowledge(taken)
    assert look(store) == []
    follower.acknowledge(taken)


def test_blobs_stay_for_a_group_that_has_not_read_them(queue, follow, store):
    publish(queue, "a")
    trainer, evaluation = follow("t"), follow("e", "evaluation")
    taken = trainer.poll(count=1)
    trainer.acknowledge(taken)
    assert len(look(store)) == 1
    same = evaluation.poll(count=1)
    assert same == taken
    assert laid(store, same[0].group.members) == [b"blob"]
    evaluation.acknowledge(same)
    assert look(store) == []
    assert laid(store, same[0].group.members) == [None]


def test_blobs_go_before_the_entry_where_nobody_is_in_the_other_group(queue, follow, store):
    publish(queue, "a")
    trainer, evaluation = follow("t"), follow("e", "evaluation")
    evaluation.leave()
    trainer.acknowledge(trainer.poll(count=1))
    (entry,) = look(store)
    assert laid(store, entry.members) == [None]
    assert ids(follow("f", "evaluation").poll(count=1)) == ["a"]


def test_group_that_exists_can_be_joined_again(queue, follow):
    publish(queue, "a")
    assert ids(follow("e", "evaluation").poll(count=1)) == ["a"]
    assert follow("f", "evaluation").poll(count=1) == []


def test_blob_expires(queue, follow):
    queue.put_blob("a", 1, b"blob", keep=0.001)
    wait_until(lambda: follow("one").folds([member("a")]) == [None])


# Blobs


def test_damaged_blobs_are_corrupt(store):
    blob = to_blob(store.load(record_seed_case(store).id))
    assert len(from_blob(blob)) == 10
    for damaged in (b"", blob[:100], blob[:-1], b"\xff" * 64, blob.replace(b"trajstore", b"trajstare")):
        with pytest.raises(Corrupt):
            from_blob(damaged)


def test_no_damage_of_the_header_is_taken_for_room_or_for_more_rows(store):
    """Sizes come from the header: a wrong one must neither be believed nor reserve memory."""
    blob = to_blob(store.load(record_seed_case(store).id))
    length = int.from_bytes(blob[:8], "little")
    text, body = blob[8 : 8 + length], blob[8 + length :]
    header = msgspec.json.decode(text)
    first, last = (by(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"]) for by in (min, max))

    def with_changes(name, **changes):
        data = msgspec.json.encode(header | {name: header[name] | changes})
        return len(data).to_bytes(8, "little") + data + body

    end = header[last]["data_offsets"][1]
    (rows,) = header[last]["shape"]  # of one byte each
    for damaged in (
        with_changes(first, shape=[1 << 60]),
        with_changes(first, shape=[-1, -10]),
        with_changes(first, data_offsets=[1, header[first]["data_offsets"][1] + 1]),
        with_changes(last, data_offsets=[header[last]["data_offsets"][0], end + (1 << 60)], shape=[rows + (1 << 60)]),
        with_changes(last, dtype="F8_E5M2"),
        (1 << 63).to_bytes(8, "little") + blob[8:],
        blob + b"\0" * end,
    ):
        with pytest.raises(Corrupt):
            from_blob(damaged)
    assert to_blob(from_blob(with_changes(first))) == blob


def with_array(blob, name, array):
    """The same blob with another array of this name; None for without."""
    text = blob[8 : 8 + int.from_bytes(blob[:8], "little")]
    arrays = {key: value for key, value in (load(blob) | {name: array}).items() if value is not None}
    return save(arrays, msgspec.json.decode(text)["__metadata__"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logprobs", lambda array: array.view(np.int32)),
        ("routed_experts", lambda array: array.astype(np.uint16)),
        ("routing_mask", lambda array: array.view(np.uint8)),
        ("routed_experts", lambda array: array.reshape(array.shape[1], array.shape[0], array.shape[2])),
        ("routed_experts", lambda array: array.reshape(len(array), -1)),
        ("segment_ids", lambda array: array.reshape(1, -1)),
        ("loss_mask", lambda array: np.append(array, True)),
        ("logprobs", lambda _: None),
        ("routed_experts", lambda _: None),
        ("more", lambda _: np.zeros(3, np.uint8)),
    ],
)
def test_array_of_another_dtype_or_shape_is_corrupt_and_named(store, name, change):
    """Its bytes may be as many as wanted. One that is missing or too many is named, too."""
    blob = to_blob(store.load(record_seed_case(store).id))
    arrays = load(blob)
    assert to_blob(from_blob(with_array(blob, "logprobs", arrays["logprobs"]))) == blob
    with pytest.raises(Corrupt, match=name):
        from_blob(with_array(blob, name, change(arrays.get(name))))


def test_arrays_that_are_longer_than_the_tokens_are_corrupt(store):
    blob = to_blob(store.load(record_seed_case(store).id))
    with pytest.raises(Corrupt, match=r"logprobs is F32 \[10\], not F32 \[9\]"):
        from_blob(with_array(blob, "token_ids", load(blob)["token_ids"][:-1]))


def test_routing_of_a_trajectory_without_a_spec_is_corrupt(store):
    blob = to_blob(store.load(finish(store, routing=None).id))
    assert from_blob(blob).routed_experts is None
    with pytest.raises(Corrupt, match="routed_experts"):
        from_blob(with_array(blob, "routed_experts", np.zeros((5, 3, 2), np.uint8)))


def test_folds_arrive_beside_those_that_are_gone_or_damaged(queue, follow, store):
    """More than are asked for at once, in order, over one connection that stays in step."""
    trajectory = store.load(record_seed_case(store).id)
    laid = {f"t{i}": [to_blob(trajectory), to_blob(trajectory)[:-1], b"blob", b"", None][i % 5] for i in range(23)}
    for id, blob in laid.items():
        if blob is not None:
            queue.put_blob(id, 1, blob, keep=60.0)
    for _ in range(2):
        found = follow("one").folds([member(id) for id in laid])
        kinds = ["gone" if one is None else "damaged" if isinstance(one, Corrupt) else one.id for one in found]
        assert kinds == [[trajectory.id, "damaged", "damaged", "damaged", "gone"][i % 5] for i in range(23)]
    assert store.wire.call("PING") == b"PONG"
