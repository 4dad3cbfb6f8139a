"""Lost replies and cut connections: an ambiguous write is resolved by reading it back, never repeated blindly."""

import contextlib

import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.log.looking import dense, entries, until, write_one
from tests.log.proxy import FaultyProxy
from trajstore.archiver import Archiver
from trajstore.log.resp import send

TOKENS = list(range(300))


def test_lost_reply_is_resolved_without_doubling_or_loss(own_server, own_client, proxy, open_at):
    """redis-py >= 8 by default sends an XADD again when its reply is lost (pitfall 32)."""
    store = open_at(proxy)
    trajectory = store.create(routing=SPEC)
    store.flush()
    proxy.drop_reply(b"XADD")
    with trajectory.segment(context=TOKENS) as segment:
        segment.tokens(TOKENS, [-0.5] * len(TOKENS))
        segment.routing(rows(2 * len(TOKENS)), start=0)
        store.flush()
        assert proxy.fired.wait(10)
        segment.tokens([7])
    store.flush()
    assert dense(entries(own_client, store, trajectory.id)) == 6
    assert store.load(trajectory.id).token_ids.tolist() == [*TOKENS, *TOKENS, 7]
    assert proxy.connections >= 3


@pytest.mark.parametrize("fault", ["drop_reply", "cut_before"])
def test_writer_gets_through_every_kind_of_fault_at_every_step(own_server, own_client, proxy, open_at, fault):
    store = open_at(proxy)
    trajectories = [store.create(routing=SPEC) for _ in range(2)]
    store.flush()
    for trajectory in trajectories:
        for step in (
            lambda t: t.segment(context=[1, 2, 3]),
            lambda t: t._open.tokens(TOKENS),
            lambda t: t._open.close("stop"),
            lambda t: t.reward(0.5),
            lambda t: t.observe(rows(3), start=0, source="trainer"),
            lambda t: t.observe(rows(300), start=0, source="trainer"),
            lambda t: t.close(),
        ):
            getattr(proxy, fault)(b"XADD")
            step(trajectory)
            store.flush()
            assert proxy.fired.is_set()
    for trajectory in trajectories:
        assert dense(entries(own_client, store, trajectory.id)) == 7
        assert [note.header.rows for note in store.notes(trajectory.id)] == [3, 300]
        assert store.load(trajectory.id).status == "completed"


def test_batch_cut_off_before_execution_is_sent_again_as_it_was(own_server, own_client, proxy, open_at):
    store = open_at(proxy)
    trajectory = store.create()
    store.flush()
    proxy.cut_before(b"XADD")
    segment = trajectory.segment(context=TOKENS)
    store.flush()
    assert proxy.fired.is_set()
    segment.close("stop")
    store.flush()
    found = entries(own_client, store, trajectory.id)
    assert dense(found) == 3
    assert len({entry.nonce for at, entry in found if at.startswith("2-")}) == 1


def test_foreign_entry_at_the_doubtful_id_means_fenced(own_server, own_client, proxy, open_at):
    """The batch never arrived, and meanwhile somebody else claimed the epoch."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = record_seed_case(store)
    store.flush()
    rival = other.get(trajectory.id)
    proxy.refuse()
    trajectory.reward(0.25)
    rival.reward(0.75)
    other.flush()
    proxy.accept()
    with pytest.raises(trajstore.Fenced, match="another writer"):
        store.flush(trajectory.id)
    assert other.load(trajectory.id).reward == 0.75


def test_newer_epoch_after_a_lost_reply_does_not_hide_that_the_batch_arrived(own_server, own_client, proxy, open_at):
    """Written, reply lost, resumed by another: that batch was acknowledged late, the next one is refused."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = record_seed_case(store)
    store.flush()
    proxy.drop_reply(b"XADD")
    until_cut = trajectory.segment()
    assert proxy.fired.wait(10)
    proxy.refuse()
    other.get(trajectory.id).reward(0.75, takeover=True)
    other.flush()
    proxy.accept()
    with pytest.raises(trajstore.Fenced):
        write_one(until_cut)
    assert [event.type for event in other.events(trajectory.id)][-2:] == ["SegmentOpened", "Rewarded"]


def test_lost_reply_to_an_entry_that_was_archived_and_trimmed_meanwhile(start_server, tmp_path, open_at):
    server = start_server(appendfsync="always")
    with FaultyProxy(server.port) as proxy, server.client() as client:
        store = open_at(proxy, archive=tmp_path / "archive")
        trajectory = store.create(routing=SPEC)
        segment = trajectory.segment(context=[1, 2])
        store.flush()
        trajectory.observe(rows(2), start=0, source="trainer")
        store.flush()
        proxy.drop_reply(b"XADD")
        segment.close("stop")
        assert proxy.fired.wait(10)
        proxy.refuse()
        with trajstore.open(server.url(store.run), archive=tmp_path / "archive") as archiving:
            assert Archiver(archiving).run(once=True).packs == 1
        assert client.xlen(store.keys.entries(trajectory.id)) == 0
        proxy.accept()
        store.flush(trajectory.id)
        trajectory.reward(1.0)
        trajectory.observe(rows(2), start=0, source="trainer")
        store.flush(trajectory.id)
        events = [event.type for event in store.events(trajectory.id)]
        assert events.count("SegmentClosed") == 1
        assert events[-1] == "Rewarded"
        assert [note.at.epoch for note in store.notes(trajectory.id)] == [1, 2]


def test_lost_reply_to_a_note_does_not_double_it(own_server, own_client, proxy, open_at):
    store = open_at(proxy)
    trajectory = record_seed_case(store)
    store.flush()
    for count in range(1, 5):
        proxy.drop_reply(b"XADD")
        trajectory.observe(rows(count), start=0, source="trainer")
        store.flush()
        assert proxy.fired.is_set()
    assert [note.header.rows for note in store.notes(trajectory.id)] == [1, 2, 3, 4]


def test_many_trajectories_in_one_round_survive_a_cut_in_the_middle(own_server, own_client, proxy, open_at):
    """Some batches of the pipeline ran, one is in doubt, the rest never arrived."""
    store = open_at(proxy)
    trajectories = [store.create(routing=SPEC) for _ in range(60)]
    store.flush()
    for i in (3, 30, 55):
        gate = proxy.hold_before(trajectories[0].id.encode())
        trajectories[0].reward(float(i))
        assert proxy.fired.wait(10)
        for trajectory in trajectories[1:]:
            trajectory.reward(float(i))  # all wait for the one in flight, then go together
        proxy.drop_reply(trajectories[i].id.encode())
        gate.set()
        store.flush()
        assert proxy.fired.is_set()
    for trajectory in trajectories:
        assert dense(entries(own_client, store, trajectory.id)) == 4
        assert store.load(trajectory.id).reward == 55.0


@pytest.mark.parametrize("beside", ["payloads", "summaries", "feed"])
def test_entry_of_which_a_part_was_refused_is_not_acknowledged(own_server, own_client, open_at, beside):
    """What a server refuses within EXEC holds up nothing else of it: the entry is in, without what belongs to it."""
    store = open_at(own_server, partitions=1)
    trajectory = store.create()
    store.flush()
    key = store.keys.payloads(trajectory.id) if beside == "payloads" else getattr(store.keys, beside)(0)
    held = own_client.dump(key)
    own_client.set(key, "foreign")
    rounds = store._flusher.counts().rounds
    trajectory.segment(context=TOKENS).close("stop")
    until(lambda: store._flusher.counts().rounds >= rounds + 4, what="it is sent again and again")
    assert trajectory._lane.busy
    own_client.delete(key)
    if held is not None:
        own_client.restore(key, 0, held)
    store.flush()
    assert store.load(trajectory.id).token_ids.tolist() == TOKENS
    assert dense(entries(own_client, store, trajectory.id)) == 3
    assert [summary.finish_reason for summary in store.list()] == ["stop"]


def test_part_that_stays_refused_is_told_at_the_deadline(own_server, own_client, open_at):
    store = open_at(own_server, partitions=1, timeout=1.0)
    trajectory = store.create()
    store.flush()
    own_client.set(store.keys.payloads(trajectory.id), "foreign")
    trajectory.segment(context=TOKENS)
    with pytest.raises(trajstore.Corrupt, match="refused HSET: a key of trajstore's holds something else"):
        store.flush(trajectory.id)


def test_call_that_is_interrupted_leaves_no_reply_to_the_next(own_server, own_client, proxy, open_at):
    """Ctrl-C between the request and its reply."""
    wire = open_at(proxy, timeout=2.0).wire
    gate = proxy.hold_before(b"first")
    with contextlib.suppress(KeyboardInterrupt), wire.connection() as connection:
        send(connection, [("ECHO", "first")])
        raise KeyboardInterrupt
    assert proxy.fired.wait(10)
    assert wire.call("ECHO", "second") == b"second"
    gate.set()
    assert wire.call("ECHO", "third") == b"third"


def test_connection_that_swallows_replies_is_given_up_before_the_deadline(own_server, own_client, proxy, open_at):
    """A black hole costs a third of the deadline, so that there is time to read back what became of the batch."""
    store = open_at(proxy, timeout=3.0)
    trajectory = store.create()
    store.flush()
    proxy.swallow_reply(b"XADD")
    trajectory.reward(1.0)
    store.flush()
    assert dense(entries(own_client, store, trajectory.id)) == 2


def test_connections_cut_all_the_time_cost_nothing_that_was_written(own_server, own_client, proxy, open_at):
    store = open_at(proxy)
    trajectory = store.create()
    with trajectory.segment() as segment:
        for token in range(60):
            segment.tokens([token])
            if token % 7 == 0:
                proxy.cut_all()
    until(lambda: not trajectory._lane.busy, what="all is acknowledged")
    store.flush()
    assert store.load(trajectory.id).token_ids.tolist() == list(range(60))
    assert dense(entries(own_client, store, trajectory.id)) == 1 + 1 + 60 + 1
