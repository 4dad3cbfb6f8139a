"""One writer at a time: the epoch in the entry's id is the fence, and the nonce tells whose it is."""

import threading
from contextlib import suppress

import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.log.looking import entries, payload_fields, write_one

LARGE = 300
"""Tokens whose payload does not ride in the header."""


def aborted(store):
    """Id of a trajectory that waits to be resumed."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5])
    store.flush()
    return trajectory.id


def race(store, handle, mark, start, lost):
    """Resume with several entries, told apart by their tokens; the error goes into `lost`."""
    start.wait(10)
    try:
        segment = handle.segment(weight_version=str(mark))
        for part in range(4):
            segment.tokens([mark] * LARGE)
            segment.routing(rows(LARGE, seed=mark), start=5 + part * LARGE)
            if part % 2:
                store.flush(handle.id)
        segment.close("stop")
        store.flush(handle.id)
    except trajstore.TrajstoreError as error:
        lost[mark] = error


def test_zombie_writer_is_fenced_after_resume(store, open_store):
    """verl RFC #7579: recycled ids silently train on mislabeled data; here the old writer's next write is refused."""
    trajectory = store.create(routing=SPEC)
    zombie = trajectory.segment(context=[1, 2, 3])
    zombie.tokens([4, 5])
    store.flush()
    other = open_store()
    with other.get(trajectory.id).segment(weight_version="v2") as segment:
        segment.tokens([6])
        segment.close("stop")
    other.flush()
    zombie.tokens([99])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    with pytest.raises(trajstore.Fenced):
        zombie.tokens([98])
    assert other.load(trajectory.id).token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert other.load(trajectory.id).segments[0].finish_reason == "lost"


def test_fenced_writer_gets_on_with_a_new_handle(store, open_store):
    id = aborted(store)
    late = store.get(id)
    with open_store().get(id).segment() as segment:
        segment.tokens([6])
    open_store().flush()
    segment._trajectory._flusher.flush()
    late.reward(1.0)
    with pytest.raises(trajstore.Fenced):
        store.flush(id)
    store.get(id).reward(2.0)
    store.flush(id)
    assert store.load(id).reward == 2.0


@pytest.mark.parametrize("attempt", range(6))
def test_of_two_resumers_with_whole_batches_in_flight_exactly_one_wins(store, open_store, attempt):
    """Each pushes several entries into the same epoch at once; none of the loser's may lie among the winner's."""
    ids = [aborted(store) for _ in range(4)]
    stores = {7: store, 8: open_store()}
    for id in ids:
        handles = {mark: one.get(id) for mark, one in stores.items()}
        start = threading.Barrier(2)
        lost: dict[int, BaseException] = {}
        threads = [
            threading.Thread(target=race, args=(stores[mark], handles[mark], mark, start, lost)) for mark in stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [type(error) for error in lost.values()] == [trajstore.Fenced]
        winner = next(mark for mark in stores if mark not in lost)
        loaded = store.load(id)
        assert loaded.token_ids.tolist() == [1, 2, 3, 4, 5] + [winner] * 4 * LARGE
        assert (loaded.routed_experts[5 : 5 + LARGE] == rows(LARGE, seed=winner)).all()
        assert loaded.routing_mask[5:].all()


def test_nothing_of_a_lost_race_lies_inside_the_winners_epoch(store, open_store, client):
    id = aborted(store)
    other = open_store()
    late = other.get(id)
    winner = store.get(id).segment()
    winner.tokens([7])
    store.flush()
    loser = late.segment()
    with pytest.raises(trajstore.Fenced):
        write_one(loser)
    winner.tokens([7])
    winner.close("stop")
    store.flush()
    nonces = {entry.nonce for at, entry in entries(client, store, id) if at.startswith("3-")}
    assert len(nonces) == 1
    assert store.load(id).token_ids.tolist() == [1, 2, 3, 4, 5, 7, 7]


def test_losers_payload_for_the_winners_id_does_not_take_its_place(store, open_store, client):
    """Both write a payload for the same event id: the nonce in its field keeps them apart, and the loser's goes."""
    id = aborted(store)
    other = open_store()
    other.create()
    other.flush()  # connected, so it does not look before it writes
    winner, loser = store.get(id), other.get(id)
    winner.segment(context=[7] * LARGE)
    store.flush()
    loser.segment(context=[8] * LARGE)
    with pytest.raises(trajstore.Fenced):
        other.flush(id)
    fields = payload_fields(client, store, id)
    assert len(fields) == 1
    assert {field.partition(":")[0] for field in fields} == {"3-0"}
    assert store.load(id).token_ids.tolist() == [1, 2, 3, 4, 5] + [7] * LARGE


def test_summary_is_the_winners_again_after_a_lost_race(store, open_store):
    """The loser's MULTI writes its summary although its entry is refused; it puts that right before it reports."""
    other = open_store()
    for _ in range(5):
        id = aborted(store)
        winner, loser = store.get(id), other.get(id)
        with winner.segment(weight_version="winner") as segment:
            segment.tokens([7] * 3)
        store.flush()
        late = loser.segment(weight_version="loser")
        with pytest.raises(trajstore.Fenced):
            write_one(late)
        (summary,) = [one for one in store.list() if one.id == id]
        assert (summary.weight_version, summary.tokens) == ("winner", 8)


def test_two_creators_of_one_id_leave_one_trajectory(store, open_store):
    stores = [store, open_store()]
    for attempt in range(10):
        id = f"twice-{attempt}"
        start = threading.Barrier(2)
        won: list[int] = []

        def create(by, id=id, start=start, won=won):
            start.wait(10)
            with suppress(trajstore.Conflict, trajstore.Fenced):
                stores[by].create(id=id, metadata={"by": by})
                stores[by].flush(id)
                won.append(by)

        threads = [threading.Thread(target=create, args=(by,)) for by in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        (winner,) = won
        assert store.get(id).metadata == {"by": winner}


def test_reward_with_takeover_fences_the_open_segment(store, open_store):
    trajectory = record_seed_case(store)
    running = trajectory.segment()
    running.tokens([1])
    store.flush()
    other = open_store()
    with pytest.raises(trajstore.Conflict, match="takeover"):
        other.get(trajectory.id).reward(1.0)
    other.get(trajectory.id).reward(1.0, takeover=True)
    other.flush()
    running.tokens([2])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    assert other.load(trajectory.id).reward == 1.0


def test_trimmed_stream_keeps_its_fence(store, client):
    """Redis: XTRIM keeps a stream's last id, DEL resets it (pitfall 33), so only what is final is ever removed."""
    id = aborted(store)
    zombie = store.get(id)
    with store.get(id).segment() as segment:
        segment.tokens([6])
    store.flush()
    client.xtrim(store.keys.entries(id), maxlen=0, approximate=False)
    zombie.reward(1.0)
    with pytest.raises(trajstore.Fenced):
        store.flush(id)
    assert client.xlen(store.keys.entries(id)) == 0
