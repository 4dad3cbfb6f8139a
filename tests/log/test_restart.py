"""A server that comes back with a shorter log than it acknowledged: written again or given up, never above a gap."""

import contextlib
import threading

import pytest

import trajstore
from tests.builders import SPEC, rows
from tests.log.aof import cut_from, cut_within, until_written
from tests.log.looking import dense, entries, newest_id, until, write_one
from trajstore.archiver import Archiver
from trajstore.events import Rewarded
from trajstore.log.batch import Item, Turn, freeze

LARGE = 300


def lose(server, *words, within=False):
    """Kill the server and drop what its AOF holds from the first command with these words on; it stays down."""
    until_written(server.aof(), *words)
    server.kill()
    (cut_within if within else cut_from)(server.aof(), *words)


@pytest.mark.parametrize("within", [False, True], ids=["at a command", "in mid-command"])
def test_writer_sends_again_what_the_server_lost(own_server, own_client, open_at, within):
    store = open_at(own_server)
    trajectory = store.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    store.flush()
    before = entries(own_client, store, trajectory.id)
    stream = store.keys.entries(trajectory.id).encode()
    for part in range(4):
        segment.tokens([part] * LARGE)
        segment.routing(rows(LARGE, seed=part), start=2 + part * LARGE)
        store.flush()
    kept = entries(own_client, store, trajectory.id)
    first_lost = kept[len(before)][0]
    lose(own_server, b"XADD", stream, first_lost.encode(), within=within)
    own_server.start()
    assert newest_id(own_client, store, trajectory.id) == before[-1][0]
    segment.close("stop")
    store.flush()
    found = entries(own_client, store, trajectory.id)
    assert found[: len(kept)] == kept  # nonces and times too: the same bytes
    assert dense(found) == 1 + 1 + 8 + 1
    loaded = store.load(trajectory.id)
    assert loaded.token_ids.tolist() == [1, 2] + [part for part in range(4) for _ in range(LARGE)]
    assert (loaded.routed_experts[2 + LARGE : 2 + 2 * LARGE] == rows(LARGE, seed=1)).all()


def test_trajectory_lost_from_its_creation_on_is_written_again(own_server, own_client, open_at):
    store = open_at(own_server)
    trajectory = store.create()
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3] * LARGE)
    store.flush()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"1-0")
    own_server.start()
    assert not own_client.exists(store.keys.entries(trajectory.id))
    trajectory.close()
    store.flush()
    assert store.load(trajectory.id).status == "completed"
    assert store.list()[0].tokens == 2 + LARGE


def test_idle_writer_notices_a_restart_and_sends_again_by_itself(own_server, own_client, open_at):
    """Nobody calls it: the flusher asks an idle server while it keeps batches against its loss."""
    store = open_at(own_server)
    trajectories = [store.create() for _ in range(20)]
    for trajectory in trajectories:
        trajectory.close()
    store.flush()
    lose(own_server, b"XADD", store.keys.entries(trajectories[5].id).encode(), b"2-0")
    own_server.start()
    with trajstore.open(own_server.url(store.run)) as reader:
        until(lambda: {one.status for one in reader.list()} == {"completed"}, what="all is back")
        assert len(reader.list()) == 20


def test_idle_writer_survives_a_restart_that_lost_nothing(own_server, own_client, open_at):
    """Nothing to send after the reconnect once ended the flusher's thread."""
    store = open_at(own_server)
    trajectory = store.create()
    store.flush()
    own_server.stop()
    own_server.start()
    until(lambda: len(own_client.client_list()) > 1, what="the store has come back by itself")
    trajectory.close()
    store.flush()
    assert store.load(trajectory.id).status == "completed"


def test_flush_in_progress_outlives_a_restart(own_server, own_client, open_at):
    store = open_at(own_server, timeout=30.0)
    trajectory = store.create(routing=SPEC)
    segment = trajectory.segment()
    stop = threading.Event()
    failed: list[BaseException] = []
    count = 0

    def write():
        nonlocal count
        try:
            while not stop.is_set():
                segment.tokens([count % 1000] * LARGE)
                count += 1
                store.flush(trajectory.id)
        except trajstore.TrajstoreError as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    for goal in (20, 60):
        until(lambda goal=goal: count >= goal, what="it writes")
        own_server.kill()
        own_server.start()
    until(lambda: count >= 100, what="it writes on")
    stop.set()
    writer.join(30)
    assert not failed
    segment.close("stop")
    store.flush()
    assert dense(entries(own_client, store, trajectory.id)) == count + 4
    assert store.load(trajectory.id).token_ids.tolist() == [i % 1000 for i in range(count) for _ in range(LARGE)]


def test_writer_that_no_longer_has_the_lost_batches_gives_up_and_names_them(own_server, own_client, open_at):
    store = open_at(own_server, buffer_bytes=1000)  # and so many bytes are kept against a loss
    trajectory = store.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    store.flush()
    good = store.events(trajectory.id)[-1].id
    segment.tokens([3] * LARGE)
    store.flush()
    segment.tokens([4] * LARGE)
    store.flush()
    found = entries(own_client, store, trajectory.id)
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), found[-2][0].encode())
    own_server.start()
    with pytest.raises(trajstore.SequenceGap, match=f"from after {good} up to {found[-1][0]}") as caught:
        write_one(segment)
    assert caught.value.last_good == good
    with pytest.raises(trajstore.SequenceGap):
        segment.close("stop")
    assert newest_id(own_client, store, trajectory.id) == found[-3][0]
    assert store.load(trajectory.id, until=caught.value.last_good).token_ids.tolist() == [1, 2]
    resumed = store.get(trajectory.id)
    with resumed.segment() as segment:
        segment.tokens([6])
    store.flush(trajectory.id)
    assert store.load(trajectory.id).token_ids.tolist() == [1, 2, 6]


def test_idle_writer_is_told_of_a_loss_although_it_kept_nothing_to_write_again(own_server, own_client, open_at):
    """Found by the simulation: with nothing kept the flusher did not ask the server any more."""
    store = open_at(own_server, buffer_bytes=1000)
    trajectory = store.create()
    with trajectory.segment(context=[1] * LARGE) as segment:
        segment.close("stop")
    store.flush()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    until(lambda: trajectory._lane.error is not None, what="it has seen the restart")
    with pytest.raises(trajstore.SequenceGap, match="up to 2-"):
        store.flush(trajectory.id)


def test_idle_writer_is_told_of_a_loss_above_which_another_has_gone_on(own_server, own_client, proxy, open_at):
    """Found by the simulation, seed 101: its segment is closed, so nothing that it does would ever show it."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = store.create()
    store.flush()
    with trajectory.segment(context=[1, 2]) as segment:
        segment.close("stop")
    store.flush()
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    for _ in range(2):  # a newer epoch than the one that was lost
        with other.get(trajectory.id).segment(context=[4]) as theirs:
            theirs.close("stop")
        other.flush()
    proxy.accept()
    until(lambda: trajectory._lane.error is not None, what="it has seen what the server came back with")
    with pytest.raises(trajstore.SequenceGap, match="another writer has gone on"):
        store.flush(trajectory.id)
    assert other.load(trajectory.id).token_ids.tolist() == [4, 4]


def test_writer_is_told_of_a_loss_above_which_anothers_entries_were_archived_and_trimmed(
    own_server, own_client, proxy, open_at, tmp_path, monkeypatch
):
    """Found by simulation seed 6501: where the archive has a newer entry, it was taken to have the lost one too."""
    monkeypatch.setattr("trajstore.archiver.FSYNC_HORIZON", 0.0)
    store, other = (open_at(server, archive=tmp_path / "archive") for server in (proxy, own_server))
    trajectory = store.create()
    segment = trajectory.segment(context=[1, 2])
    store.flush()
    segment.tokens([3])
    segment.close("stop")
    store.flush()
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-1")
    own_server.start()
    other.get(trajectory.id).close("truncated", takeover=True)
    other.flush()
    Archiver(other).run(once=True)
    assert entries(own_client, other, trajectory.id) == []
    proxy.accept()
    until(lambda: trajectory._lane.error is not None, what="it has seen what the server came back with")
    with pytest.raises(trajstore.SequenceGap, match="another writer has gone on"):
        store.flush(trajectory.id)


@pytest.mark.parametrize("archives", [False, True], ids=["in the hot log", "archived and trimmed"])
def test_nothing_is_written_above_the_epoch_that_another_wrote_anew_where_nothing_was_kept(
    own_server, own_client, proxy, open_at, tmp_path, monkeypatch, archives
):
    """Found by simulation seed 8567: the other's was longer, so that the server took the next turn above it."""
    monkeypatch.setattr("trajstore.archiver.FSYNC_HORIZON", 0.0)
    monkeypatch.setattr("trajstore.store.KEPT_BYTES", 0)
    store, other = (open_at(server, archive=tmp_path / "archive") for server in (proxy, own_server))
    trajectory = store.create()
    store.flush()
    with trajectory.segment(context=[1, 2]) as segment:
        segment.close("stop")
    store.flush()
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    with other.get(trajectory.id).segment(context=[4]) as theirs:
        for token in range(5):
            theirs.tokens([token])
            other.flush()
        theirs.close("stop")
    other.flush()
    if archives:
        Archiver(other).run(once=True)
        assert entries(own_client, other, trajectory.id) == []
    proxy.accept()
    until(lambda: trajectory._lane.error is not None, what="it has seen what the server came back with")
    with pytest.raises(trajstore.SequenceGap, match="another writer has gone on"):
        store.flush(trajectory.id)
    with pytest.raises(trajstore.SequenceGap):
        trajectory.segment(context=[3])
    assert other.load(trajectory.id).token_ids.tolist() == [4, *range(5)]


@pytest.mark.parametrize(
    ("goes_on", "keeps"),
    [(False, True), (True, True), (True, False)],
    ids=["idle", "goes on", "goes on, kept nothing"],
)
def test_writer_is_told_of_a_loss_in_whose_place_anothers_entry_was_archived_and_trimmed(
    own_server, own_client, proxy, open_at, tmp_path, monkeypatch, goes_on, keeps
):
    """Found by simulation seed 7645: the log is as long as before, and only the archive knows whose its end was."""
    monkeypatch.setattr("trajstore.archiver.FSYNC_HORIZON", 0.0)
    if not keeps:
        monkeypatch.setattr("trajstore.store.KEPT_BYTES", 0)
    store, other = (open_at(server, archive=tmp_path / "archive") for server in (proxy, own_server))
    trajectory = store.create()
    store.flush()
    segment = trajectory.segment(context=[1, 2]) if goes_on else None
    if segment is None:
        trajectory.reward(1.0)
    store.flush()
    assert newest_id(own_client, store, trajectory.id) == "2-0"
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    other.get(trajectory.id).close("truncated")
    other.flush()
    Archiver(other).run(once=True)
    assert entries(own_client, other, trajectory.id) == []
    if segment is not None:
        segment.tokens([3])
    proxy.accept()
    until(lambda: trajectory._lane.error is not None, what="it has seen what the server came back with")
    with pytest.raises(trajstore.SequenceGap, match="another writer has gone on"):
        store.flush(trajectory.id)
    assert newest_id(own_client, other, trajectory.id) == "2-0"
    assert other.load(trajectory.id).status == "truncated"


def test_writer_whose_next_batch_had_not_gone_out_is_not_told_of_a_loss_when_another_has_gone_on(
    own_server, proxy, open_at
):
    """Found by simulation seed 1633: the id of that batch was read in the place of the newest kept one's."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = store.create()
    trajectory.reward(1.0)
    store.flush()
    proxy.refuse()
    flusher, lane = store._flusher, trajectory._lane
    until(lambda: not flusher._session.connected, what="it has met the end of its connection")
    other.get(trajectory.id).reward(2.0)
    other.flush()
    with flusher._lock:  # as when a note of another trajectory was asked about in the same round
        lane.frozen.append(
            freeze(lane.id, [Item(Turn(3), Rewarded(reward=3.0), None)], note=False, summary=None, now=0.0)
        )
        lane.queued += 1
        flusher._buffered += lane.frozen[0].items[0].nbytes
        flusher._schedule(lane)
    proxy.accept()
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)


@pytest.mark.parametrize("deletes", [False, True], ids=["written", "deleted"])
def test_nothing_is_written_above_the_tombstone_of_whoever_deleted_the_trajectory_anew(
    own_server, own_client, proxy, open_at, deletes
):
    """Found by simulation seeds 2894 and 5379: the log is shorter than it was, and would take what follows."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = store.create()
    store.flush()
    for reward in (1.0, 2.0):
        trajectory.reward(reward)
        store.flush()
    if deletes:
        store.delete(trajectory.id)
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    other.delete(trajectory.id)
    proxy.accept()
    until(lambda: trajectory._lane.error is not None, what="it has seen what the server came back with")
    with pytest.raises(trajstore.Fenced):
        trajectory.reward(3.0)
    store.create()
    with contextlib.suppress(trajstore.Fenced):  # of the deletion
        store.flush()
    assert newest_id(own_client, other, trajectory.id) == "2-0"


@pytest.mark.parametrize("goes_on", [False, True], ids=["idle", "goes on"])
def test_loss_is_not_written_above_nor_forgotten_while_the_archive_cannot_be_asked_about_it(
    own_server, own_client, open_at, tmp_path, monkeypatch, goes_on
):
    """Found by the simulation: what is not in the hot log may have been archived, and only the archive can tell."""
    monkeypatch.setattr("trajstore.store.FSYNC_HORIZON", 2.0)
    archive = tmp_path / "archive"
    store = open_at(own_server, archive=archive)
    trajectory, other = store.create(), store.create()
    segment = trajectory.segment(context=[1, 2])
    store.flush()
    before = newest_id(own_client, store, trajectory.id)
    segment.tokens([3])
    store.flush()
    lost = newest_id(own_client, store, trajectory.id)
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), lost.encode())
    archive.rename(tmp_path / "away")
    archive.symlink_to(archive)  # whoever asks goes round in circles
    own_server.start()
    if goes_on:
        segment.tokens([4])
    other.reward(1.0)
    store.flush(other.id)  # so it has looked, and holds up nobody else
    assert newest_id(own_client, store, trajectory.id) == before
    if not goes_on:
        until(lambda: own_client.info("commandstats")["cmdstat_ping"]["calls"] >= 4, what="longer than the horizon")
    archive.unlink()
    (tmp_path / "away").rename(archive)
    until(lambda: newest_id(own_client, store, trajectory.id) >= lost, what="it is written again")
    store.flush()
    assert store.load(trajectory.id).token_ids.tolist() == [1, 2, 3] + [4] * goes_on


def test_last_good_id_counts_every_event_of_the_last_entry(own_server, own_client, open_at):
    """The id of an entry is that of its first event; what is left of the log reaches to its last."""
    store = open_at(own_server, buffer_bytes=1 << 20)
    trajectory = store.create()
    store.flush()
    own_server.pause()
    segment = trajectory.segment(context=[1])
    for token in range(10):  # together in one entry, or two
        segment.tokens([token])
    own_server.resume()
    store.flush()
    other = open_at(own_server, buffer_bytes=10)
    with other.get(trajectory.id).segment() as lost:
        lost.tokens([7] * LARGE)
    other.flush()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"3-0")
    own_server.start()
    lost._trajectory.reward(1.0)
    with pytest.raises(trajstore.SequenceGap) as caught:
        other.flush(trajectory.id)
    assert caught.value.last_good == "2-10"


def test_nothing_is_written_above_a_gap_by_a_handle_that_read_before_the_loss(own_server, own_client, open_at):
    """Its store has written nothing yet, so it connects after the loss; it must look all the same."""
    first = open_at(own_server, buffer_bytes=10)
    trajectory = first.create()
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3] * LARGE)
    first.flush()
    second = open_at(own_server)
    handle = second.get(trajectory.id)
    newest = newest_id(own_client, first, trajectory.id)
    lose(own_server, b"XADD", first.keys.entries(trajectory.id).encode(), newest.encode())
    own_server.start()
    handle.reward(1.0)
    with pytest.raises(trajstore.SequenceGap):
        second.flush(trajectory.id)
    assert newest_id(own_client, first, trajectory.id) != "3-0"


def test_another_writers_later_epoch_means_fenced_after_a_loss(own_server, own_client, proxy, open_at):
    store, other = open_at(proxy), open_at(own_server)
    trajectory = store.create()
    segment = trajectory.segment(context=[1, 2])
    store.flush()
    segment.tokens([3])
    store.flush()
    lost = newest_id(own_client, store, trajectory.id)
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), lost.encode())
    own_server.start()
    with other.get(trajectory.id).segment() as again:
        again.tokens([4])
    other.flush()
    proxy.accept()
    with pytest.raises(trajstore.Fenced):
        write_one(segment)
    assert other.load(trajectory.id).token_ids.tolist() == [1, 2, 4]


def test_epoch_that_another_writer_claimed_anew_after_a_loss_is_not_continued(own_server, own_client, proxy, open_at):
    """The server forgot the whole epoch and gave its number to somebody else; only the nonce tells."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = store.create()
    store.flush()
    segment = trajectory.segment(context=[1, 2])
    segment.tokens([3])
    store.flush()
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    theirs = other.get(trajectory.id).segment(context=[9])
    other.flush()
    proxy.accept()
    with pytest.raises(trajstore.Fenced):
        write_one(segment)
    theirs.close("stop")
    other.flush()
    assert other.load(trajectory.id).token_ids.tolist() == [9]


def test_what_was_young_when_the_server_went_is_kept_until_it_is_back(
    own_server, own_client, proxy, open_at, monkeypatch
):
    """However long a restart takes: a server that is away gets no further with its fsync."""
    monkeypatch.setattr("trajstore.store.FSYNC_HORIZON", 1.0)
    store = open_at(proxy, timeout=30.0)
    trajectory = store.create()
    store.flush()
    segment = trajectory.segment(context=[1] * LARGE)
    store.flush()
    proxy.refuse()
    segment.tokens([2])  # so that it tries at once
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    until(lambda: proxy.refused >= 8, what="longer than the horizon")
    proxy.accept()
    segment.close("stop")
    store.flush()
    assert store.load(trajectory.id).token_ids.tolist() == [1] * LARGE + [2]


def test_notes_lost_by_the_server_are_written_again(own_server, own_client, open_at):
    store = open_at(own_server)
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1] * LARGE) as segment:
        segment.close("stop")
    store.flush()
    for count in range(1, 6):
        trajectory.observe(rows(count * 40), start=0, source="trainer")
    store.flush()
    lose(own_server, b"XADD", store.keys.notes(trajectory.id).encode(), b"3-0")
    own_server.start()
    trajectory.observe(rows(7), start=0, source="trainer")
    store.flush()
    assert [note.header.rows for note in store.notes(trajectory.id)] == [40, 80, 120, 160, 200, 7]
    observed = store.plan(trajectory.id).history.observations
    assert [len(store.recorded_rows(trajectory.id, one)) for one in observed] == [40, 80, 120, 160, 200, 7]


def test_note_that_arrives_late_after_a_loss_is_not_there_twice(own_server, own_client, proxy, open_at):
    """Found by the simulation: the notes before it were lost, and it was written under a lower number meanwhile."""
    store = open_at(proxy, buffer_bytes=1000, timeout=3.0, partitions=1)  # and so many bytes are kept against a loss
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=[1] * LARGE) as segment:
        segment.close("stop")
    store.flush()
    trajectory.observe(rows(LARGE), start=0, source="lost")
    store.flush()
    lose(own_server, b"XADD", store.keys.notes(trajectory.id).encode(), b"1-0")
    own_server.start()
    until(lambda: own_client.client_list(_type="normal")[1:], what="it has seen the restart")
    gate = proxy.hold_before(b"XADD")
    trajectory.observe(rows(7), start=0, source="late")
    store.flush()
    assert proxy.fired.is_set()
    hints = own_client.xlen(store.keys.feed(0))
    gate.set()
    until(lambda: own_client.xlen(store.keys.feed(0)) > hints, what="the first request has arrived")
    assert [note.header.source for note in store.notes(trajectory.id)] == ["late"]


@pytest.mark.parametrize("sampled", [1, 6], ids=["shorter", "longer"])
def test_late_recording_written_again_says_nothing_of_what_another_wrote_in_the_place_of_its_segment(
    own_server, own_client, proxy, open_at, sampled
):
    """Found by the simulation: where the other's segment was shorter, the trajectory did not fold any more."""
    store, other = open_at(proxy), open_at(own_server)
    trajectory = store.create(routing=SPEC)
    store.flush()
    with trajectory.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.close("stop")
    trajectory.late_routing(rows(4), segment=0, start=0)
    store.flush()
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectory.id).encode(), b"2-0")
    own_server.start()
    with other.get(trajectory.id).segment(context=[9]) as theirs:
        theirs.tokens([8] * sampled)
        theirs.close("stop")
    other.flush()
    proxy.accept()
    until(lambda: other.notes(trajectory.id), what="the note is written again")
    loaded = other.load(trajectory.id)
    assert loaded.token_ids.tolist() == [9] + [8] * sampled
    assert not loaded.routing_mask.any()


def test_flush_waits_for_what_is_being_written_again(own_server, own_client, proxy, open_at):
    store = open_at(proxy)
    trajectories = [store.create() for _ in range(10)]
    store.flush()
    for trajectory in trajectories:
        trajectory.segment(context=[1] * LARGE)
    store.flush()
    proxy.refuse()
    lose(own_server, b"XADD", store.keys.entries(trajectories[0].id).encode(), b"1-0")
    own_server.start()
    first = proxy.hold_before(b"1-0\r\n$1\r\ne\r\n")  # the XADD of the first of two entries to write again
    proxy.accept()
    assert proxy.fired.wait(10)
    flushed = threading.Event()
    flusher = threading.Thread(target=lambda: (store.flush(), flushed.set()))
    flusher.start()
    assert not flushed.wait(0.2)
    second = proxy.hold_before(b"2-0\r\n$1\r\ne\r\n")
    first.set()
    assert proxy.fired.wait(10)
    assert not flushed.wait(0.2)
    second.set()
    assert flushed.wait(10)
    flusher.join()
    assert {newest_id(own_client, store, trajectory.id) for trajectory in trajectories} == {"2-0"}
