"""From the hot log to the archive: what goes, what stays, and that every read sees the same trajectory throughout."""

import contextlib
import json
import shutil
import threading
import time
from functools import partial

import msgspec
import numpy as np
import pytest
from ulid import ULID

import trajstore
from tests import waiting
from tests.archive.places import age
from tests.builders import SPEC, record_seed_case, rows, seed_rows
from tests.log.proxy import FaultyProxy
from trajstore.abandon import sweep
from trajstore.archive.ripening import ripe_prefix
from trajstore.archiver import Archiver
from trajstore.blob import to_blob
from trajstore.entries import Entry, encode_entry
from trajstore.events import SCHEMA_VERSION, EventId, TrajectoryClosed, TrajectoryOpened
from trajstore.log.lease import Lease
from trajstore.summary import encode_summary
from trajstore.writing import TrajectoryWriter

POLICIES = ("last_segment_wins", "as_sampled")


def everything(store, id):
    """All that can be read of a trajectory, as bytes: both policies, and the state at every event."""
    return [
        to_blob(store.load(id, policy=policy, until=until))
        for policy in POLICIES
        for until in [None, *(event.id for event in store.events(id))]
    ]


def hot_entries(store, id):
    return store.hot.read(id)[0]


def test_hot_archived_and_mixed_trajectories_load_alike(durable, archive):
    first = durable.create(routing=SPEC)
    with first.segment(context=[1, 2, 3, 4, 5], weight_version="v1") as segment:
        segment.tokens([10, 11, 12], [-0.5, -0.25, -0.125])
        segment.routing(seed_rows(0, 7), start=0)
    archive()
    assert hot_entries(durable, first.id) == []
    with durable.get(first.id).segment(weight_version="v2") as segment:
        segment.tokens([13, 14], [-1.0, -2.0])
        segment.routing(seed_rows(1, 9), start=0)
        segment.close("stop")
    durable.flush()
    assert {event.stored == "hot" for event in durable.events(first.id)} == {True, False}, "mixed"
    mixed = everything(durable, first.id)
    hot = record_seed_case(durable)
    durable.flush()
    for policy in POLICIES:
        a, b = durable.load(first.id, policy=policy), durable.load(hot.id, policy=policy)
        for name in ("token_ids", "logprobs", "routed_experts", "routing_mask", "routing_source", "segment_ids"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    archive()
    assert hot_entries(durable, first.id) == []
    assert everything(durable, first.id) == mixed


def test_archive_alone_reads_what_the_store_reads(durable, archive, folder):
    trajectory = record_seed_case(durable, group="g", group_size=1)
    trajectory.reward(0.5, components={"format": 0.5})
    trajectory.observe(rows(9), start=0, source="trainer", weight_version="v3")
    trajectory.late_routing(rows(2, seed=9), segment=0, start=3)
    trajectory.close("completed")
    durable.flush()
    before, notes = everything(durable, trajectory.id), [note.id for note in durable.notes(trajectory.id)]
    (summary,) = durable.list()
    archive()
    offline = trajstore.open_archive(folder)
    assert everything(offline, trajectory.id) == before
    assert [note.id for note in offline.notes(trajectory.id)] == notes == ["note 1-0", "note 2-0"]
    assert offline.list() == durable.list() == [summary]
    assert offline.overlaps(trajectory.id) == durable.overlaps(trajectory.id)
    np.testing.assert_array_equal(
        offline.recorded_rows(trajectory.id, offline.overlaps(trajectory.id)[-1].second), rows(9)
    )


def test_open_epoch_stays_hot_until_it_closes(durable, archive):
    trajectory = durable.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    segment.tokens([3])
    done = archive()
    assert [entry.at for entry in hot_entries(durable, trajectory.id)] != []
    assert done.entries <= 1, "at most the finished first epoch"
    segment.tokens([4])
    segment.close("stop")
    archive()
    assert hot_entries(durable, trajectory.id) == []
    assert list(durable.load(trajectory.id).token_ids) == [1, 2, 3, 4]


def test_superseded_epoch_is_archived_as_lost_and_its_tokens_count(durable, archive):
    trajectory = durable.create(routing=SPEC)
    trajectory.segment(context=[1, 2]).tokens([3])
    durable.flush()
    with durable.get(trajectory.id).segment() as segment:
        segment.tokens([4])
    archive()
    assert hot_entries(durable, trajectory.id) == []
    loaded = durable.load(trajectory.id)
    assert [one.finish_reason for one in loaded.segments] == ["lost", "abort"]
    assert list(loaded.token_ids) == [1, 2, 3, 4]


def test_final_trajectory_leaves_the_hot_log_after_the_grace_period(durable, archive):
    trajectory = record_seed_case(durable)
    trajectory.close("completed")
    durable.flush()
    before = everything(durable, trajectory.id)
    archive(grace_seconds=0.001)
    keys = [durable.keys.entries(trajectory.id), durable.keys.payloads(trajectory.id)]
    until(lambda: durable.wire.call("EXISTS", *keys) == 0)
    assert everything(durable, trajectory.id) == before
    assert [one.id for one in durable.list(status="completed")] == [trajectory.id]
    with pytest.raises(trajstore.Conflict, match="never reused"):
        durable.create(id=trajectory.id)
    with pytest.raises(trajstore.Conflict, match="final"):
        durable.get(trajectory.id).segment()


def test_aborted_trajectory_keeps_its_fence_and_resumes_after_archiving(durable, archive):
    trajectory = record_seed_case(durable)
    trajectory.close("aborted")
    archive(grace_seconds=0.001)
    zombie = trajectory
    with durable.get(trajectory.id).segment(weight_version="v3") as segment:
        segment.tokens([15])
        segment.close("stop")
    durable.flush()
    with zombie.segment() as segment:
        segment.tokens([99])
    with pytest.raises(trajstore.Fenced):
        durable.flush(zombie.id)
    assert list(durable.load(trajectory.id).token_ids)[-2:] == [14, 15]
    assert durable.list()[0].status == "open"


def test_note_of_a_lost_trajectory_that_is_created_anew_is_archived_with_it(durable, folder, archive, monkeypatch):
    """Found by simulation seed 5743: it was refused, for its trajectory was not seen before, and stayed so for good."""
    lost = record_seed_case(durable)
    lost.observe(rows(3), start=0, source="trainer")
    durable.flush()
    for key in (durable.keys.entries(lost.id), durable.keys.payloads(lost.id)):
        durable.wire.call("DEL", key)
    read, reads = durable.hot.read, []

    def read_(id):
        reads.append(id)
        if len(reads) == 2:  # between the first look and the second
            with trajstore.open(folder) as other:
                record_seed_case(other, id=id)
        return read(id)

    monkeypatch.setattr(durable.hot, "read", read_)
    done = archive()
    assert (done.refused, done.trajectories) == (0, 1)
    assert hot_entries(durable, lost.id) == []
    assert [note.header.source for note in durable.notes(lost.id)] == ["trainer"]
    assert len(durable.load(lost.id)) == 10


def test_note_after_removal_is_kept_and_numbered_on(durable, archive):
    trajectory = record_seed_case(durable)
    trajectory.observe(rows(3), start=0, source="trainer")
    trajectory.close("completed")
    archive(grace_seconds=0.001)
    until(lambda: durable.wire.call("EXISTS", durable.keys.entries(trajectory.id)) == 0)
    durable.get(trajectory.id).observe(rows(3, seed=1), start=0, source="trainer")
    durable.flush()
    assert [note.id for note in durable.notes(trajectory.id)] == ["note 1-0", "note 2-0"]
    archive(grace_seconds=3600.0)
    assert [note.id for note in durable.notes(trajectory.id)] == ["note 1-0", "note 2-0"]
    assert all(note.stored != "hot" for note in durable.notes(trajectory.id))


def test_note_that_comes_while_its_trajectory_is_trimmed_does_not_expire_with_it(durable, archive):
    trajectory = record_seed_case(durable)
    trajectory.close("completed")
    durable.flush()
    late = durable.get(trajectory.id)
    keys = [durable.keys.notes(trajectory.id), durable.keys.entries(trajectory.id)]
    seen = []

    def observe(step):
        if step == "recorded" and not seen:
            late.observe(rows(3), start=0, source="trainer")
            durable.flush()
        if step == "trimmed":
            seen.append([durable.wire.call("PTTL", key) for key in keys])

    archive(grace_seconds=1000.0, on_step=observe)
    assert seen[0] == [-1, -1], "the note is not archived yet, so nothing may expire"
    assert len(seen) == 2
    assert all(0 < left <= 1000_000 for left in seen[1])
    assert [note.id for note in durable.notes(trajectory.id)] == ["note 1-0"]
    assert all(note.stored != "hot" for note in durable.notes(trajectory.id))


def test_entry_that_differs_between_hot_log_and_archive_is_corrupt_and_both_are_named(durable, archive):
    trajectory = record_seed_case(durable)
    durable.flush()
    (first, *_) = hot_entries(durable, trajectory.id)
    archive()
    forged = encode_entry(Entry(1, 12345, 0.0, first.decoded().events))
    stream = durable.keys.entries(trajectory.id)
    durable.wire.call("DEL", stream)
    durable.wire.call("XADD", stream, "1-0", "e", forged)
    with pytest.raises(trajstore.Corrupt, match=r"hot log \(nonce 0+3039\) and pack 00/00000001"):
        durable.load(trajectory.id)
    durable.wire.call("XADD", durable.keys.feed(0), "*", "t", trajectory.id, "k", "TrajectoryOpened", "e", "1-0")
    assert archive().refused == 1
    assert [entry.data for entry in hot_entries(durable, trajectory.id)] == [forged], "trimming would destroy it"


def test_event_of_unknown_type_is_not_archived_and_stops_nobody_else(durable, archive):
    strange, plain = record_seed_case(durable), record_seed_case(durable)
    durable.flush()
    for epoch, version in ((4, SCHEMA_VERSION + 1), (5, 1)):
        entry = encode_entry(Entry(version, 7, 0.0, [TrajectoryClosed(status="completed")]))
        durable.wire.call("XADD", durable.keys.entries(strange.id), f"{epoch}-0", "e", entry)
    durable.wire.call("XADD", durable.keys.feed(0), "*", "t", strange.id, "k", "TrajectoryClosed", "e", "5-0")
    done = archive()
    assert done.refused == 1
    assert hot_entries(durable, plain.id) == []
    assert [entry.at for entry in hot_entries(durable, strange.id)][-2:] == [(4, 0), (5, 0)]
    assert len(durable.load(strange.id, until="3-3")) == 10


def test_repeated_spurious_and_reordered_hints_archive_once(durable, archive):
    trajectory = record_seed_case(durable)
    durable.flush()
    feed = durable.keys.feed(0)
    for event in ("3-0", "2-0", "3-0", "9-9"):
        durable.wire.call("XADD", feed, "*", "t", trajectory.id, "k", "SegmentClosed", "e", event)
    durable.wire.call("XADD", feed, "*", "t", "nobody", "k", "SegmentClosed", "e", "1-0")
    assert archive().packs == 1
    assert archive().packs == 0
    assert durable.wire.call("XLEN", feed) == 7, "the materializer has not read them"
    assert durable.wire.call("XPENDING", feed, "archiver")[0] == 0


def damage_payload(store, id):
    name = store.keys.payloads(id)
    field, data = store.wire.call("HGETALL", name)
    store.wire.call("HSET", name, field, bytes([data[0] ^ 1]) + data[1:])


def put_foreign_entry(store, id):
    store.wire.call("XADD", store.keys.entries(id), "99-0", "not", "ours")


def put_foreign_key(store, id):
    store.wire.call("DEL", store.keys.entries(id))
    store.wire.call("SET", store.keys.entries(id), "not a stream")


def lose_all_but_a_note(store, id):
    store.get(id).observe(rows(1), start=0, source="trainer")
    store.flush()
    store.wire.call("DEL", store.keys.entries(id))


@pytest.mark.parametrize("harm", [damage_payload, put_foreign_entry, put_foreign_key, lose_all_but_a_note])
def test_one_damaged_trajectory_stays_hot_and_stops_no_other(durable, archive, harm):
    bad, good = durable.create(routing=SPEC), record_seed_case(durable)
    with bad.segment(context=range(500)) as segment:
        segment.close("stop")
    durable.flush()
    harm(durable, bad.id)
    for _ in range(2):
        assert archive().refused == 1
    assert hot_entries(durable, good.id) == []
    assert len(durable.load(good.id)) == 10


def test_hints_with_which_a_trajectory_was_refused_go_once_it_is_mended(durable):
    """They lie with the archiver that refused it, so no later one would be given them while that one lives."""
    bad = durable.create(routing=SPEC)
    with bad.segment(context=range(500)) as segment:
        segment.close("stop")
    durable.flush()
    damage_payload(durable, bad.id)
    mended = []

    def mend(done):
        if done.refused and not mended:
            damage_payload(durable, bad.id)  # the same bit again
            durable.get(bad.id).close("completed")
            durable.flush()
            mended.append(True)

    with archiving(durable, on_progress=mend) as archiver:
        until(lambda: mended and pending_hints(durable) == 0 and not hot_entries(durable, bad.id))
    assert archiver.done.refused == 1


def test_hints_that_a_request_took_after_it_was_given_up_are_archived_all_the_same(durable):
    """A server that stalls reads the request later, and gives the hints to an archiver that no longer listens."""
    taken = []

    def take(_):
        if not taken:
            id = record_seed_case(durable).id
            durable.flush()
            feed, reader = durable.keys.feed(0), archiver.name
            assert durable.wire.call("XREADGROUP", "GROUP", "archiver", reader, "STREAMS", feed, ">")
            taken.append(id)  # last: from here on somebody looks whether it is archived

    archiver = Archiver(durable, lease_seconds=0.5, pack_seconds=0.0)
    with archiving(durable, archiver, on_progress=take):
        until(lambda: taken and pending_hints(durable) == 0)
    assert hot_entries(durable, taken[0]) == []


@contextlib.contextmanager
def archiving(store, archiver=None, *, on_progress):
    """An archiver at work in a thread of its own."""
    archiver = archiver or Archiver(store, pack_seconds=0.0)
    stop = threading.Event()
    thread = threading.Thread(target=archiver.run, kwargs={"stop": stop, "on_progress": on_progress})
    thread.start()
    try:
        yield archiver
    finally:
        stop.set()
        thread.join(60)


def pending_hints(store):
    return store.wire.call("XPENDING", store.keys.feed(0), "archiver")[0]


def test_enough_payload_bytes_make_a_pack_without_waiting(durable):
    trajectory = durable.create(routing=SPEC)
    with trajectory.segment(context=np.arange(300_000)) as segment:
        segment.close("stop")
    durable.flush()
    stop = threading.Event()
    archiver = Archiver(durable, pack_bytes=1 << 20, pack_seconds=3600.0)
    thread = threading.Thread(target=archiver.run, kwargs={"stop": stop})
    thread.start()
    until(lambda: hot_entries(durable, trajectory.id) == [])
    stop.set()
    thread.join(30)
    assert archiver.done.packs == 1


def test_failed_publish_leaves_no_half_pack_behind(durable, archive, folder):
    record_seed_case(durable)
    packs = folder / "archive" / "packs" / "00"
    packs.parent.mkdir()
    packs.write_text("in the way")
    with pytest.raises(trajstore.Unavailable, match="holds is untouched"):
        archive()
    assert list((folder / "archive" / "staging").iterdir()) == []
    packs.unlink()
    assert archive().packs == 1


def test_what_killed_archivers_staged_is_removed_after_an_hour(durable, archive, folder):
    record_seed_case(durable)
    staging = folder / "archive" / "staging"
    old, young = ULID.from_timestamp(time.time() - 3700), ULID()
    for name in (str(old), str(young), "mine"):
        (staging / name / "pack").mkdir(parents=True)
    age(staging)
    archive()
    assert {path.name for path in staging.iterdir()} == {str(young), "mine"}


def test_archiver_that_fails_gives_its_leases_back(durable, archive, folder):
    record_seed_case(durable)
    (folder / "archive" / "packs").mkdir()
    (folder / "archive" / "packs" / "00").write_text("in the way")
    with pytest.raises(trajstore.Unavailable):
        archive()
    assert Lease(durable.wire, durable.keys, "next", seconds=15.0).acquire(0)


def test_trajectory_that_is_archived_twice_during_one_load_still_loads(durable, archive):
    """Each payload may be trimmed between plan and fetch; a load goes on as long as it is another one each time."""
    trajectory = durable.create(routing=SPEC)

    def grow():
        with durable.get(trajectory.id).segment(context=range(500)) as segment:
            segment.close("stop")
        durable.flush()

    grow()
    fetch, rounds = durable.hot.payloads, []

    def fetch_late(id, events):
        if len(rounds) < 3:
            durable.hot.payloads = fetch  # the archiver reads, too
            rounds.append(archive().packs)
            grow()
            durable.hot.payloads = fetch_late
        return fetch(id, events)

    durable.hot.payloads = fetch_late
    assert len(durable.load(trajectory.id)) == 500 * 4
    assert rounds == [1, 1, 1]


def test_zombie_of_a_removed_trajectory_leaves_no_payload_behind(durable, archive, folder):
    """Its XADD finds no stream, but the HSET beside it made the hash anew, which nothing would ever have removed."""
    segment = durable.create(id="mine", routing=SPEC).segment(context=[1])
    durable.flush()
    with trajstore.open(folder) as other:
        other.get("mine").close("completed", takeover=True)
    archive(grace_seconds=0.001)
    until(lambda: durable.wire.call("EXISTS", durable.keys.entries("mine")) == 0)
    segment.tokens(range(1000))
    with pytest.raises(trajstore.Fenced):
        durable.flush("mine")
    assert durable.wire.call("EXISTS", durable.keys.payloads("mine")) == 0


def test_abandoned_segment_is_closed_as_aborted_and_its_writer_fenced(durable, archive):
    trajectory = durable.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    segment.tokens([3])
    assert archive(abandon_seconds=3600.0).abandoned == 0
    durable.wire.call("HSET", durable.keys.quiet(0), trajectory.id, f"{durable.list()[0].last} 1000")
    assert archive(abandon_seconds=3600.0).abandoned == 1, "seen so since 1970, by the server's clock"
    assert durable.list()[0].status == "aborted"
    segment.tokens([4])
    with pytest.raises(trajstore.Fenced):
        durable.flush(trajectory.id)


def test_trajectory_that_was_only_created_is_archived_when_nothing_came_for_long(durable):
    """Its first entry is a finished epoch, of which no hint tells; it stays open, and is gone on with."""
    trajectory = durable.create(id="bare", routing=SPEC)
    durable.flush()
    durable.wire.call("HSET", durable.keys.quiet(0), "bare", "1-0 1000")
    assert archived_while_running(durable, lambda: not hot_entries(durable, "bare")).entries == 1
    assert durable.backlog().trajectories == 0
    assert durable.list()[0].status == "open"
    again = archived_while_running(durable, lambda: durable.wire.call("HGET", durable.keys.quiet(0), "bare"))
    assert (again.packs, again.abandoned) == (0, 0)
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2])
    durable.flush()
    assert list(durable.load("bare").token_ids) == [1, 2]
    assert durable.wire.call("HGET", durable.keys.quiet(0), "bare") == b"1-0 1000"


def test_trajectory_that_was_just_created_waits_for_its_first_segment(durable):
    durable.create(id="bare", routing=SPEC)
    durable.flush()
    archived_while_running(
        durable,
        lambda: durable.wire.call("HGET", durable.keys.quiet(0), "bare"),
        lambda: record_seed_case(durable, id="other"),
        lambda: durable.archive.find("other").parts,
    )
    assert (durable.archive.find("bare").parts, len(hot_entries(durable, "bare"))) == ([], 1)


def test_archiving_once_takes_what_was_only_created(durable, archive):
    durable.create(id="bare", routing=SPEC)
    assert archive().entries == 1
    assert hot_entries(durable, "bare") == []
    assert durable.backlog().trajectories == 0
    assert archive().packs == 0


def archived_while_running(store, *steps):
    """What an archiver did until each of these was so, one after the other."""
    stop = threading.Event()
    archiver = Archiver(store, pack_seconds=0.0, abandon_seconds=3600.0)
    thread = threading.Thread(target=archiver.run, kwargs={"stop": stop})
    thread.start()
    try:
        for step in steps:
            until(step)
    finally:
        stop.set()
        thread.join(30)
    return archiver.done


def test_segment_that_moved_on_is_not_abandoned(durable, archive):
    segment = durable.create(id="slow", routing=SPEC).segment(context=[1, 2])
    durable.flush()
    durable.wire.call("HSET", durable.keys.quiet(0), "slow", f"{durable.list()[0].last} 1000")
    segment.tokens([3])
    assert archive(abandon_seconds=3600.0).abandoned == 0
    assert durable.list()[0].has_open_segment


def test_segment_that_moves_on_while_the_archiver_looks_at_it_is_not_abandoned(own_server, run_name, tmp_path):
    """Found by simulation seed 5132: it was closed above what had been written between the look and the closing."""
    place = {"archive": tmp_path / "archive", "partitions": 1}
    with (
        FaultyProxy(own_server.port) as proxy,
        trajstore.open(proxy.url(run_name), **place) as archiving,
        trajstore.open(own_server.url(run_name), **place) as writing,
    ):
        trajectory = writing.create(id="slow")
        trajectory.segment(context=[1, 2])
        writing.flush()
        writing.wire.call("HSET", writing.keys.quiet(0), "slow", f"{writing.list()[0].last} 1000")
        gate = proxy.hold_before(b"memory")  # asked last before it is closed
        sweeper = threading.Thread(
            target=sweep, args=(archiving, [0]), kwargs={"after": 3600.0, "created_after": 3600.0}, daemon=True
        )
        sweeper.start()
        assert proxy.fired.wait(10)
        with writing.get("slow").segment(context=[3]) as resumed:
            writing.flush()
            gate.set()
            sweeper.join(30)
            resumed.tokens([4])
        writing.flush()
        assert "TrajectoryClosed" not in [event.type for event in writing.events("slow")]
        assert writing.load("slow").token_ids.tolist() == [1, 2, 3, 4]


def test_segment_that_moved_on_while_the_archiver_asked_is_quiet_only_since_then(durable, monkeypatch):
    """Found by simulation seed 1441: it was closed early by as long as the first answer to the sweep took."""
    segment = durable.create(id="slow", routing=SPEC).segment(context=[1, 2])
    durable.flush()
    call, times = durable.wire.call, iter((1000, 5000))
    monkeypatch.setattr(
        durable.wire, "call", lambda *command: [next(times), 0] if command[0] == "TIME" else call(*command)
    )
    sweep(durable, [0], after=3600.0, created_after=3600.0)
    assert call("HGET", durable.keys.quiet(0), "slow") == b"2-0 5000"
    times = iter((8000,))
    assert sweep(durable, [0], after=3600.0, created_after=3600.0).closed == 0
    segment.close("stop")


def test_entry_that_was_written_anew_between_the_two_looks_must_ripen_anew():
    """Also where the server does not tell that it restarted, or another has taken its place."""
    now = [(EventId(epoch, 0), digest) for epoch, digest in ((1, "a"), (2, "another"), (3, "c"))]
    seen = {EventId(1, 0): "a", EventId(2, 0): "b", EventId(3, 0): "c"}
    assert ripe_prefix(now, seen, None) == [EventId(1, 0)]


@pytest.mark.parametrize("ended", ["closed", "deleted"])
def test_summary_that_says_open_of_what_has_ended_is_mended(durable, archive, ended):
    """Found by the simulation: the loser of a race had left its own, and was cut off before it could mend it."""
    with durable.create(id="mine", routing=SPEC).segment(context=[1, 2]) as segment:
        durable.flush()
        (before,) = durable.list(status="open")
        segment.tokens([3])
    durable.flush()
    if ended == "closed":
        durable.get("mine").close("completed")
        durable.flush()
    else:
        durable.delete("mine")
    archive(grace_seconds=0.001)
    until(lambda: durable.wire.call("EXISTS", durable.keys.entries("mine")) == 0)
    losers = encode_summary(msgspec.structs.replace(before, last="3-0"))
    durable.wire.call("HSET", durable.keys.summaries(0), "mine", losers)
    durable.wire.call("HSET", durable.keys.quiet(0), "mine", "3-0 1000")
    assert [one.id for one in durable.list(status="open")] == ["mine"]
    assert archive(abandon_seconds=3600.0).abandoned == 0
    assert durable.list(status="open") == []
    assert durable.wire.call("HGET", durable.keys.summaries(0), "mine") is None


def test_zombie_whose_lease_went_to_another_cannot_publish(durable, folder):
    """The manifest's number is the fence: it was taken while the zombie slept between deciding and publishing."""
    first, second = record_seed_case(durable), record_seed_case(durable)
    durable.flush()
    before = everything(durable, first.id), everything(durable, second.id)

    def steal(step):
        if step == "moved":
            Lease(durable.wire, durable.keys, "other", seconds=0.0).acquire(0)
            with trajstore.open(folder) as other:
                assert Archiver(other, lease_seconds=0.0).run(once=True).packs == 1

    done = Archiver(durable, lease_seconds=1.0, on_step=steal).run(once=True)
    assert done.packs == 0
    records = list((folder / "archive" / "manifest" / "00").iterdir())
    assert len(records) == 1, "one record, so nothing is doubled"
    assert len(list((folder / "archive" / "packs" / "00").iterdir())) == 1, "the refused pack is gone"
    assert (everything(durable, first.id), everything(durable, second.id)) == before
    assert json.loads(records[0].read_bytes())["counts"]["trajectories"] == 2


def test_archiver_leaves_a_partition_alone_that_another_holds(durable):
    record_seed_case(durable)
    durable.flush()
    assert Lease(durable.wire, durable.keys, "the holder", seconds=60.0).acquire(0)
    stop = threading.Event()
    assert Archiver(durable, lease_seconds=60.0).run(stop=stop, on_progress=lambda _: stop.set()).packs == 0
    assert hot_entries(durable, durable.list()[0].id) != []


def test_two_archivers_share_the_partitions_of_one_run(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=8, ack="fsync") as store:
        ids = [record_seed_case(store).id for _ in range(40)]
        store.flush()
        before = {id: everything(store, id) for id in ids}
        written = sum(len(hot_entries(store, id)) for id in ids)
        stop = threading.Event()
        archivers = [Archiver(store, pack_seconds=0.0) for _ in range(2)]
        threads = [threading.Thread(target=archiver.run, kwargs={"stop": stop}) for archiver in archivers]
        for thread in threads:
            thread.start()
        until(lambda: not any(hot_entries(store, id) for id in ids))
        stop.set()
        for thread in threads:
            thread.join(30)
        assert sum(archiver.done.entries for archiver in archivers) == written
        assert {id: everything(store, id) for id in ids} == before


def test_store_without_archive_says_how_to_give_one(own_server, run_name):
    with trajstore.open(own_server.url(run_name)) as store, pytest.raises(trajstore.Conflict, match="--archive"):
        Archiver(store)


def test_entries_lost_in_a_crash_between_the_two_looks_are_not_published(own_server, run_name, tmp_path):
    """The archive must never hold an entry that the server, back from its log, no longer has."""
    with trajstore.open(own_server.url(run_name), partitions=1) as writer:
        trajectory = record_seed_case(writer)
    with trajstore.open(own_server.url(run_name), archive=tmp_path / "archive") as store:
        crashed = threading.Event()

        def crash(progress):
            if progress.waiting and not crashed.is_set():  # looked at once, not ripe yet
                own_server.kill()
                own_server.start()
                own_server.client().xtrim(store.keys.entries(trajectory.id), maxlen=0)
                crashed.set()

        stop = threading.Event()
        archiver = Archiver(store, pack_seconds=0.0)
        thread = threading.Thread(target=archiver.run, kwargs={"stop": stop, "on_progress": crash})
        thread.start()
        until(lambda: crashed.is_set() and store.wire.call("XPENDING", store.keys.feed(0), "archiver")[0] == 0)
        stop.set()
        thread.join(60)
        assert archiver.done.packs == 0


until = partial(waiting.until, seconds=20.0)


def test_partition_with_a_damaged_manifest_stops_no_other(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=2, ack="fsync") as store:
        names = {store.keys.partition(f"t{i}"): f"t{i}" for i in range(20)}
        for id in names.values():
            record_seed_case(store, id=id)
        store.flush()
        Archiver(store).run(once=True)
    record = tmp_path / "store" / "archive" / "manifest" / "00" / "00000001.json"
    record.write_bytes(record.read_bytes()[:-9])
    shutil.rmtree(tmp_path / "store" / "archive" / "index" / "00")  # it would tell what the record said
    with trajstore.open(tmp_path / "store", ack="fsync") as store:
        ids = (str(ULID()) for _ in range(100))
        stays = next(id for id in ids if store.keys.partition(id) == 0)
        TrajectoryWriter.create(stays, TrajectoryOpened(), store._flusher, store._load_tokens).close("completed")
        names[1] = record_seed_case(store, id=next(f"n{i}" for i in range(40) if store.keys.partition(f"n{i}"))).id
        store.flush()
        stopped = threading.Event()
        worker = threading.Thread(target=lambda: Archiver(store, pack_seconds=0.0).run(stop=stopped))
        worker.start()
        until(lambda: not hot_entries(store, names[1]))
        assert worker.is_alive()
        stopped.set()
        worker.join()
        assert len(store.hot.read(stays)[0]) == 2, "it stays where it is"
