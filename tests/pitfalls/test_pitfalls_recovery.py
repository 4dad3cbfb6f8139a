"""Loss and recovery (PITFALLS.md, 28 to 31, 33, 36)."""

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.core.packs import pack
from trajstore.archive.reader import ArchiveReader


def test_every_token_knows_its_weight_version(store):
    """verl #4199: in-flight samples lost on resume; slime #2092: one sample spans three weight versions unnoticed."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3, 4])
        segment.close("abort")
    with store.get(trajectory.id).segment(weight_version="v3") as segment:
        segment.tokens([5, 6, 7])
        segment.close("stop", weight_versions=[("v2", 0, 1), ("v3", 1, 3)])
    loaded = store.load(trajectory.id)
    assert [loaded.weight_version(i) for i in range(7)] == ["", "", "v1", "v1", "v2", "v3", "v3"]
    assert loaded.weight_versions == ("v1", "v2", "v3")


def test_in_flight_samples_survive_the_loss_of_their_writer(open_store):
    """verl #4199: in-flight samples lost on resume."""
    gone = open_store()
    trajectory = gone.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    segment.tokens([3, 4], [-1.0, -2.0])
    gone.flush()
    other = open_store()
    with other.get(trajectory.id).segment() as resumed:
        assert resumed.start == 4
        resumed.tokens([5], [-3.0])
        resumed.close("stop")
    loaded = other.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(loaded.logprobs[2:], [-1.0, -2.0, -3.0])


def test_ids_are_never_reused(store):
    """verl RFC #7579: recycled ids "silently train on mislabeled data"."""
    store.create(id="t-1").close("completed")
    store.flush()
    with pytest.raises(trajstore.Conflict, match="never reused"):
        store.create(id="t-1")
    entries, _ = store.hot.read("t-1")
    pack(store, "t-1", entries=entries)
    store.wire.call("DEL", store.keys.entries("t-1"), store.keys.payloads("t-1"))
    with pytest.raises(trajstore.Conflict, match="never reused"):
        store.create(id="t-1")
    assert store.load("t-1").status == "completed"


def test_writes_of_a_superseded_writer_are_fenced(store):
    """verl RFC #7579: recycled ids "silently train on mislabeled data"."""
    trajectory = store.create(routing=SPEC)
    zombie = trajectory.segment(context=[1])
    zombie.tokens([2])
    store.flush()
    with store.get(trajectory.id).segment() as segment:
        segment.tokens([3])
        segment.close("stop")
    store.flush(trajectory.id)
    zombie.tokens([99, 99])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    assert store.load(trajectory.id).token_ids.tolist() == [1, 2, 3]


def test_run_is_in_every_key(backend, open_store, run_name, tmp_path):
    """prime-rl #2304: a fresh run consumed stale files."""
    store = open_store(archive=tmp_path / "archive")
    trajectory = record_seed_case(store, group="g", group_size=1)
    trajectory.observe(rows(9), start=0, source="trainer")
    trajectory.close("completed")
    store.flush()
    with backend.client() as client:
        keys = {key.decode() for key in client.keys(f"*{trajectory.id}*")} | {
            key.decode() for key in client.keys(f"*{run_name}*")
        }
    assert len(keys) >= 6
    assert all(key.startswith(f"trajstore:{{{run_name}") for key in keys)
    with trajstore.open(backend.url(run_name + "-fresh"), partitions=2) as fresh:
        assert fresh.list() == []
        with pytest.raises(trajstore.NotFound):
            fresh.load(trajectory.id)


def test_logprob_that_is_not_finite_is_accepted_and_flagged(store):
    """SkyRL #1909: a rare non-finite logprob killed runs."""
    trajectory = store.create()
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2, 3, 4], [-1.0, float("-inf"), float("nan")])
        segment.close("stop")
    loaded = store.load(trajectory.id)
    np.testing.assert_array_equal(loaded.logprobs, [np.nan, -1.0, -np.inf, np.nan])
    assert loaded.nonfinite_logprobs == 2
    assert store.list()[0].nonfinite == 2


def test_trimmed_stream_keeps_its_fence(store):
    """Pitfall 33: `DEL` of a stream resets its last id, so that old ids are accepted again; XTRIM keeps it."""
    trajectory = store.create(routing=SPEC)
    zombie = trajectory.segment(context=[1])
    store.flush()
    store.get(trajectory.id).segment().close("stop")
    store.flush()
    entries, _ = store.hot.read(trajectory.id)
    pack(store, trajectory.id, entries=entries)
    store.wire.call("XTRIM", store.keys.entries(trajectory.id), "MAXLEN", 0)
    zombie.tokens([99])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    assert store.load(trajectory.id).token_ids.tolist() == [1]


def test_stream_that_is_gone_is_not_made_again_by_an_old_writer(store):
    """Pitfall 33: without a stream there is no fence, so every XADD but the first one refuses to make one."""
    trajectory = store.create(routing=SPEC)
    zombie = trajectory.segment(context=[1])
    store.flush()
    store.get(trajectory.id).segment().close("stop")
    store.flush()
    entries, _ = store.hot.read(trajectory.id)
    pack(store, trajectory.id, entries=entries)
    store.wire.call("DEL", store.keys.entries(trajectory.id))
    zombie.tokens([99])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    assert store.wire.call("EXISTS", store.keys.entries(trajectory.id)) == 0
    with store.get(trajectory.id).segment() as segment:
        segment.tokens([2])
        segment.close("stop")
    assert store.events(trajectory.id)[-1].at.epoch == 4, "above everything archived"
    assert store.load(trajectory.id).token_ids.tolist() == [1, 2]


@pytest.mark.parametrize("step", ["staged", "synced", "moved"])
def test_pack_exists_once_its_manifest_record_does(store, step):
    """Pitfall 36: Zarr's resize is unsafe, a crash leaves an unreadable shard; a batch exists once its commit does."""
    trajectory = record_seed_case(store)
    store.flush()
    entries, _ = store.hot.read(trajectory.id)

    class Crash(Exception):
        pass

    def crash(now):
        if now == step:
            raise Crash

    with pytest.raises(Crash):
        pack(store, trajectory.id, entries=entries, on_step=crash)
    fresh = ArchiveReader(store.archive.root, store.archive.info)
    assert fresh.read(trajectory.id) == ([], [])
    assert fresh.last_entry(trajectory.id) is None
    assert {event.stored for event in store.events(trajectory.id)} == {"hot"}
    pack(store, trajectory.id, entries=entries)
    assert {event.stored == "hot" for event in store.events(trajectory.id)} == {False}
    assert len(store.load(trajectory.id)) == 10
