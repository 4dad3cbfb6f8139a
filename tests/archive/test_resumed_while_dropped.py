"""A trajectory is gone on with in the very moment in which retention drops its pack: it is whole, or gone as a whole.

Each order of the steps is forced by a hook in one of them: the drop asks the hot log twice and then creates its record;
a writer reads the trajectory and then appends; an archiver publishes, then trims.
"""

import time

import pytest

import trajstore
from tests.archive.test_archiver import everything
from tests.archive.test_compaction import live
from tests.builders import record_seed_case, rows
from tests.cli.running import invoke
from trajstore.abandon import sweep
from trajstore.archive.upkeep.ledger import Ledger
from trajstore.archive.upkeep.retention import drop, expired, free_dropped, still_hot
from trajstore.archiver import Archiver

HOUR = 3600.0


@pytest.fixture
def aborted(durable, archive):
    """An archived trajectory of which the hot log holds nothing any more, and that may be resumed."""
    trajectory = record_seed_case(durable)
    trajectory.close("aborted")
    archive()
    assert durable.wire.call("XLEN", durable.keys.entries(trajectory.id)) == 0
    return trajectory.id


def resume(store, id):
    """Another segment, acknowledged and still open."""
    segment = store.get(id).segment(context=[1])
    segment.tokens([2])
    store.flush()
    return segment


def drop_old(store, *, on_asked=lambda count: None):
    """Choose what is old, and drop it.

    Args:
        on_asked: called after each answer of the hot log, with how many there were.
    """
    asked = 0
    hot = still_hot(store.wire, store.keys)

    def busy(ids):
        nonlocal asked
        found = hot(ids)
        asked += 1
        on_asked(asked)
        return found

    number = store.archive.manifest(0).refresh() + 1
    records = expired(Ledger(store.archive.manifest(0)), before=time.time() + HOUR, busy=busy)
    return drop(store.archive, 0, records, number=number, writer="test", busy=busy)


def before_record(store, monkeypatch, step):
    """Do something after everything was asked, right before the next record is created."""
    create = type(store.archive.root.storage).create

    def hooked(self, path, data):
        if path.startswith("manifest/"):
            monkeypatch.undo()
            step()
        create(self, path, data)

    monkeypatch.setattr(type(store.archive.root.storage), "create", hooked)


def assert_nothing_is_left(store, id):
    """Nobody lists it, and the server has nothing of it."""
    assert id not in {summary.id for summary in store.list()}
    assert [key for key in store.wire.call("KEYS", "*") if id.encode() in key] == []
    assert id not in {summary.id for summary in store.hot.summaries(0)}
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        store.load(id)
    with pytest.raises(trajstore.Conflict, match="never reused"):
        store.create(id=id)


def test_trajectory_that_is_resumed_after_it_was_chosen_is_kept(durable, aborted):
    segments = []

    def step(asked):
        if asked == 1:
            segments.append(resume(durable, aborted))

    with pytest.raises(trajstore.Fenced, match=aborted):
        drop_old(durable, on_asked=step)
    segments[0].close("stop")
    assert len(durable.load(aborted).segments) == 3
    assert len(live(durable.archive)) == 1


def test_trajectory_that_is_resumed_and_archived_after_it_was_chosen_is_kept(durable, aborted, archive):
    """The hot log holds nothing of it before, nor after; the archiver's record tells."""

    def step(asked):
        if asked == 1:
            resume(durable, aborted).close("stop")
            durable.get(aborted).close("completed")
            archive()

    with pytest.raises(trajstore.Fenced, match="another archiver"):
        drop_old(durable, on_asked=step)
    assert durable.load(aborted).status == "completed"
    assert len(live(durable.archive)) == 2


def test_command_keeps_what_is_resumed_after_it_was_chosen(durable, aborted, folder, monkeypatch):
    """It looks again, and then finds nothing to drop."""
    hot = still_hot(durable.wire, durable.keys)
    resumed = []

    def hooked(wire, keys):
        def busy(ids):
            found = hot(ids)
            if not resumed:
                resumed.append(resume(durable, aborted))
            return found

        return busy

    monkeypatch.setattr("trajstore.cli.dropping.still_hot", hooked)
    result = invoke("gc", folder, "--older-than", "0s")
    assert (result.exit_code, "0 packs dropped" in result.stderr) == (0, True)
    resumed[0].close("stop")
    assert len(durable.load(aborted).segments) == 3


def test_what_was_appended_right_before_the_record_is_freed_by_gc_and_its_writer_is_told(
    durable, aborted, folder, monkeypatch
):
    segments = []
    before_record(durable, monkeypatch, lambda: segments.append(resume(durable, aborted)))
    drop_old(durable)
    assert durable.list() == [], "though the hot log's summary is still there"
    assert invoke("gc", folder).exit_code == 0
    assert_nothing_is_left(durable, aborted)
    segments[0].tokens([3])
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        durable.flush(aborted)
    assert_nothing_is_left(durable, aborted)


def test_what_was_appended_right_before_the_record_is_freed_by_an_archiver(durable, aborted, archive, monkeypatch):
    segments = []
    before_record(durable, monkeypatch, lambda: segments.append(resume(durable, aborted)))
    drop_old(durable)
    segments[0].close("stop")
    assert archive().refused == 0
    assert_nothing_is_left(durable, aborted)


def test_writer_that_read_the_trajectory_before_the_record_is_told(durable, aborted, archive):
    """Its first append comes after everybody has looked; an archiver finds that by its hint."""
    writer = durable.get(aborted)
    drop_old(durable)
    writer.reward(0.5)
    durable.flush()
    assert durable.list() == []
    assert archive().refused == 0
    writer.reward(1.0)
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        durable.flush(aborted)
    archive()
    assert_nothing_is_left(durable, aborted)


def test_note_of_a_dropped_trajectory_is_freed_and_its_writer_is_told(durable, aborted, archive):
    writer = durable.get(aborted)
    writer.observe(rows(3), start=0, source="trainer")
    durable.flush()
    archive()
    drop_old(durable)
    writer.observe(rows(3), start=0, source="trainer")
    durable.flush()
    assert archive().refused == 0
    assert_nothing_is_left(durable, aborted)
    writer.observe(rows(3), start=0, source="trainer")
    with pytest.raises(trajstore.NotFound, match="dropped by retention"):
        durable.flush(aborted)
    assert_nothing_is_left(durable, aborted)


def test_abandoned_segment_of_a_dropped_trajectory_is_freed(durable, aborted, archive, monkeypatch):
    """Its writer is gone and its hints are read: only the sweep comes by."""
    before_record(durable, monkeypatch, lambda: resume(durable, aborted))
    drop_old(durable)
    assert sweep(durable, [0], after=0, created_after=HOUR).closed == 0, "the first sweep notes where it stands"
    sweep(durable, [0], after=0, created_after=HOUR)
    assert_nothing_is_left(durable, aborted)


def test_freeing_touches_nothing_that_is_kept(durable, aborted, archive):
    other = record_seed_case(durable)
    other.close("aborted")
    archive()
    resume(durable, other.id)
    before = everything(durable, other.id)
    drop_old(durable)
    manifest = durable.archive.manifest(0)
    assert free_dropped(durable.wire, durable.keys, durable.hot, manifest, 0) == [aborted]
    assert free_dropped(durable.wire, durable.keys, durable.hot, manifest, 0) == []
    assert everything(durable, other.id) == before
    assert [summary.id for summary in durable.list()] == [other.id]


def test_archiver_that_decided_before_the_drop_publishes_nothing_of_it(durable, aborted):
    """Its record's number is taken: it looks again, and frees instead."""
    segments = [resume(durable, aborted)]
    segments[0].close("stop")
    durable.flush()
    records = live(durable.archive)
    done = []

    def step(name):
        if name == "moved" and not done:
            done.append(name)
            number = durable.archive.manifest(0).refresh() + 1
            drop(durable.archive, 0, records, number=number, writer="test", busy=lambda ids: set())

    Archiver(durable, on_step=step, lease_seconds=0.2).run(once=True)
    assert done
    assert_nothing_is_left(durable, aborted)
    assert live(durable.archive) == []
