"""What a writer puts on the wire: entries, payloads, summaries, hints and their keys."""

import gc
import zlib

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.log.looking import entries, newest_id, payload_fields
from trajstore.entries import partition_of
from trajstore.events import INLINE_LIMIT, PayloadInfo, Tokens
from trajstore.log.batch import Item, Turn
from trajstore.log.keys import Keys
from trajstore.summary import decode_summary


def test_events_of_one_flush_are_one_entry_and_the_next_one_starts_after_its_last_event(store, client):
    trajectory = store.create(routing=SPEC)
    store.flush()
    segment = trajectory.segment(context=[1, 2, 3])
    store.flush()
    segment.tokens([4], [-0.5])
    store.flush()
    segment.tokens([5, 6], [-0.5, -0.5])
    store.flush()
    segment.close("stop")
    store.flush()
    found = entries(client, store, trajectory.id)
    sizes = {at: len(entry.events) for at, entry in found}
    assert list(sizes)[:4] == ["1-0", "2-0", "2-1", "2-2"]
    assert sum(sizes.values()) == 1 + 3 + 2  # the close brings RoutingAbsent("not recorded")
    trajectory.reward(1.0)
    store.flush()
    assert newest_id(client, store, trajectory.id) == "3-0"


def test_ids_of_events_are_dense_however_they_are_batched(store, client):
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1]) as segment:
        for token in range(200):
            segment.tokens([token])
        segment.routing(rows(201), start=0)
    store.flush()
    expected = 0
    for at, entry in entries(client, store, trajectory.id)[1:]:
        assert at == f"2-{expected}"
        expected += len(entry.events)
    assert expected == 1 + 200 + 1 + 1
    assert [event.id for event in store.events(trajectory.id)] == ["1-0", *(f"2-{i}" for i in range(expected))]


def test_an_epoch_has_one_nonce_and_each_claim_draws_another(store, client):
    trajectory = record_seed_case(store)
    store.flush()
    nonces: dict[str, set[int]] = {}
    for at, entry in entries(client, store, trajectory.id):
        nonces.setdefault(at.partition("-")[0], set()).add(entry.nonce)
    assert all(len(found) == 1 for found in nonces.values())
    assert len(set.union(*nonces.values())) == 3


def test_small_payloads_ride_in_the_entry_and_large_ones_carry_id_and_nonce(store, client):
    trajectory = store.create(routing=SPEC)
    small, large = (INLINE_LIMIT // 4 - 1), INLINE_LIMIT // 4
    with trajectory.segment(context=list(range(small))) as segment:
        segment.tokens(list(range(large)))
        segment.routing(rows(8), start=0)
    store.flush()
    found = entries(client, store, trajectory.id)
    nonce = found[-1][1].nonce
    assert payload_fields(client, store, trajectory.id) == {f"2-1:{nonce:016x}"}
    headers = [header for _, entry in found[1:] for header in entry.events]
    assert [header.payload.inline is None for header in headers[:3]] == [False, True, False]
    assert store.load(trajectory.id).token_ids.tolist() == [*range(small), *range(large)]


def test_only_the_first_entry_may_create_a_stream(store, open_store, client):
    """NOMKSTREAM: what was removed stays removed, and nobody writes above nothing."""
    id = store.create().id
    store.flush()
    other = open_store()
    other.create()
    other.flush()  # connected, so it does not look before it writes
    resumed = other.get(id)
    client.delete(store.keys.entries(id))
    resumed.reward(1.0)
    with pytest.raises(trajstore.SequenceGap, match="up to 1-0"):
        other.flush(id)
    assert not client.exists(store.keys.entries(id))


def test_every_key_carries_run_and_partition_tag(store, client):
    """prime-rl #2304: a fresh run consumed stale files; here the run is in every key."""
    trajectory = record_seed_case(store, group="g", group_size=1)
    trajectory.observe(rows(3), start=0, source="trainer")
    trajectory.close()
    store.flush()
    mine = {key.decode() for key in client.keys("*") if store.run.encode() in key}
    tag = f"trajstore:{{{store.run}:{partition_of(trajectory.id, 2):02}}}:"
    of_trajectory = {key for key in mine if trajectory.id in key}
    assert len(of_trajectory) == 2  # its entries and notes; all payloads were small
    assert all(key.startswith(tag) for key in of_trajectory)
    fixed = {f"trajstore:{{{store.run}}}:run", f"trajstore:{{{store.run}}}:archive"}
    assert all(key in fixed or key.startswith(f"trajstore:{{{store.run}:0") for key in mine)


def test_two_runs_on_one_server_do_not_see_each_other(backend, run_name):
    """prime-rl #2304."""
    with (
        trajstore.open(backend.url(run_name), partitions=1) as one,
        trajstore.open(backend.url(run_name + "-2"), partitions=1) as other,
    ):
        mine = one.create(id="same")
        mine.close()
        other.create(id="same")
        one.flush()
        other.flush()
        assert [summary.status for summary in one.list()] == ["completed"]
        assert [summary.status for summary in other.list()] == ["open"]


def test_batches_are_split_and_stay_below_16_mib(own_server, open_at, own_client):
    store = open_at(own_server)
    spec = trajstore.RoutingSpec(layer_ids=tuple(range(64)), top_k=8, num_experts=128, num_hidden_layers=64)
    count = (3 << 20) // spec.row_bytes
    block = np.broadcast_to(np.arange(8, dtype=np.uint8), (count, 64, 8))
    trajectory = store.create(routing=spec)
    store.flush()
    own_server.pause()
    segment = trajectory.segment(context=[0] * count * 8)
    for i in range(8):
        segment.routing(block, start=count * i)
    segment.close("stop")
    own_server.resume()
    store.flush()
    sizes = [
        sum(header.payload.nbytes for header in entry.events if getattr(header, "payload", None) is not None)
        for _, entry in entries(own_client, store, trajectory.id)
    ]
    assert sum(sizes) > 24 << 20
    assert max(sizes) <= 16 << 20
    assert len(sizes) > 2
    assert store.load(trajectory.id).routing_mask[: count * 8].all()


def test_large_recording_takes_what_is_small_beside_it_into_its_entry(own_server, open_at, own_client):
    """Each further entry is a round trip; another large one would make the `MULTI` slow."""
    store = open_at(own_server)
    spec = trajstore.RoutingSpec(layer_ids=tuple(range(64)), top_k=8, num_experts=128, num_hidden_layers=64)
    count = (3 << 19) // spec.row_bytes
    block = np.broadcast_to(np.arange(8, dtype=np.uint8), (count, 64, 8))
    trajectory = store.create(routing=spec)
    store.flush()
    own_server.pause()
    with trajectory.segment(context=[0] * count) as segment:
        segment.tokens([1] * count, [-0.5] * count)
        segment.routing(block, start=0)
        segment.routing(block, start=count)
        segment.close("stop")
    own_server.resume()
    store.flush()
    kinds = [
        [type(header).__name__ for header in entry.events] for _, entry in entries(own_client, store, trajectory.id)
    ]
    assert kinds[1:] == [["SegmentOpened", "Tokens", "Routing"], ["Routing", "SegmentClosed"]]


def test_what_is_kept_of_an_acknowledged_batch_is_out_of_the_collectors_sight(own_server, open_at):
    """Tens of thousands are kept at a time, and each full collection would go through all that they hold."""
    trajectory = record_seed_case(open_at(own_server))
    trajectory._flusher.flush()
    (batch, *_) = [kept.batch for kept in trajectory._lane.kept]
    assert batch.items == ()
    assert not any(gc.is_tracked(one) for one in (batch, batch.turn, batch.summary))


def test_small_inline_events_count_with_their_payload_towards_the_limit(store):
    """A batch of nothing but inline payloads would otherwise come out at three times the limit."""
    data = bytes(500)
    info = PayloadInfo(nbytes=500, crc=zlib.crc32(data), inline=data)
    assert Item(Turn(2), Tokens(start=0, count=125, payload=info), None).nbytes > 500


def test_lifecycle_events_leave_hints_in_the_partitions_feed(store, client):
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
    store.flush()
    trajectory.reward(0.5)
    store.flush()
    trajectory.observe(rows(2), start=0, source="trainer")
    store.flush()
    trajectory.close()
    store.flush()
    feed = store.keys.feed(store.keys.partition(trajectory.id))
    hints = [(fields[b"t"].decode(), fields[b"k"].decode()) for _, fields in client.xrange(feed)]
    kinds = ["SegmentClosed", "Rewarded", "RoutingObserved", "TrajectoryClosed"]
    assert hints == [(trajectory.id, kind) for kind in kinds]


def test_the_summary_beside_the_log_says_what_the_log_says(store, client):
    trajectory = record_seed_case(store, group="g", group_size=2)
    trajectory.reward(0.25)
    trajectory.close()
    store.flush()
    raw = client.hget(store.keys.summaries(store.keys.partition(trajectory.id)), trajectory.id)
    summary = decode_summary(raw)
    assert (summary.status, summary.segments, summary.tokens, summary.rows) == ("completed", 2, 10, 16)
    assert (summary.reward, summary.group, summary.finish_reason, summary.last) == (0.25, "g", "stop", "5-0")


def test_lost_summaries_are_rebuilt_from_the_log(store, client):
    for _ in range(5):
        record_seed_case(store)
    before = store.list()
    for partition in range(store.partitions):
        client.delete(store.keys.summaries(partition))
    assert store.list() == []
    assert store.rebuild_summaries() == 5
    assert store.list() == before


def test_keys_of_one_trajectory_lie_in_one_slot():
    keys = Keys("run", 16)
    names = [keys.entries("a"), keys.payloads("a"), keys.notes("a"), keys.feed(keys.partition("a"))]
    names += [keys.summaries(keys.partition("a")), keys.lease(keys.partition("a"))]
    assert len({name[name.index("{") : name.index("}") + 1] for name in names}) == 1


def test_connections_for_watching_are_given_back(store):
    """redis-py 8 stops a pool at 100 connections that it ever made: a materializer died at its 100th publish."""
    key = store.keys.ready(0)
    for _ in range(150):
        with store.wire.watching(key) as watch:
            assert store.wire.transaction([("EXISTS", key)], watch=watch) == [1]
    for _ in range(150):
        session = store.wire.session()
        session.connect()
        session.disconnect()
    assert store.wire.call("PING") == b"PONG"


def test_watch_that_ends_without_a_transaction_leaves_nothing_watched(store):
    key = store.keys.summaries(0)
    with store.wire.watching(key):
        pass
    store.wire.call("HSET", key, "x", "1")
    with store.wire.watching(store.keys.feed(0)) as watch:
        assert store.wire.transaction([("HDEL", key, "x")], watch=watch) == [1]
