"""A whole archive in an object store: fenced by conditional puts, found again, and read without Redis."""

import logging
import threading
from contextlib import ExitStack

import numpy as np
import pytest

import trajstore
from tests.archive.test_archiver import everything, hot_entries, until
from tests.builders import record_seed_case
from tests.s3 import Answer, Proxy
from trajstore.archive.root import ArchiveRoot
from trajstore.archiver import Archiver
from trajstore.events import EventId
from trajstore.log.lease import Lease


@pytest.fixture
def place(s3, run_name):
    return s3.url(run_name)


@pytest.fixture
def on_s3(folder, s3, place):
    with trajstore.open(folder, partitions=1, ack="fsync", archive=place, archive_options=s3.options) as store:
        yield store


def test_archived_trajectories_load_alike_from_s3_with_and_without_redis(on_s3, s3, place):
    trajectory = record_seed_case(on_s3)
    on_s3.flush()
    before = everything(on_s3, trajectory.id)
    assert Archiver(on_s3).run(once=True).packs == 1
    assert hot_entries(on_s3, trajectory.id) == []
    assert everything(on_s3, trajectory.id) == before
    alone = trajstore.open_archive(place, options=s3.options)
    np.testing.assert_array_equal(alone.load(trajectory.id).routed_experts, on_s3.load(trajectory.id).routed_experts)
    with on_s3.get(trajectory.id).segment(context=[7]) as segment:
        segment.tokens([8])
    on_s3.flush()
    Archiver(on_s3).run(once=True)
    assert len(alone.load(trajectory.id)) == 12, "an open reader sees what was archived since"


def test_run_finds_its_archive_again_and_records_no_secret(on_s3, folder, s3, place, monkeypatch):
    trajectory = record_seed_case(on_s3)
    on_s3.flush()
    Archiver(on_s3).run(once=True)
    recorded = on_s3.wire.call("GET", on_s3.keys.archive_location(on_s3.run)).decode()
    assert place in recorded
    assert not any(s3.options[name] in recorded for name in s3.options if "secret" in name)
    on_s3.close()
    for name, value in s3.options.items():
        if "key" in name:
            monkeypatch.setenv(f"AWS_{name.removeprefix('aws_').upper()}", value)
    with trajstore.open(folder) as again:
        assert len(again.load(trajectory.id)) == 10


def test_zombie_cannot_publish_to_s3(on_s3, folder, s3):
    """The conditional put of the record's number is the fence, as the hard link is on a disk."""
    first, second = record_seed_case(on_s3), record_seed_case(on_s3)
    on_s3.flush()
    before = everything(on_s3, first.id), everything(on_s3, second.id)

    def steal(step):
        if step == "moved":
            Lease(on_s3.wire, on_s3.keys, "other", seconds=0.0).acquire(0)
            with trajstore.open(folder, archive_options=s3.options) as other:
                assert Archiver(other, lease_seconds=0.0).run(once=True).packs == 1

    assert Archiver(on_s3, lease_seconds=1.0, on_step=steal).run(once=True).packs == 0
    files = [file.path for file in on_s3.archive.root.storage.list("")]
    assert sum(path.startswith("manifest/") for path in files) == 1
    assert len({path.split("/")[2] for path in files if path.startswith("packs/")}) == 1, "the refused pack is gone"
    assert (everything(on_s3, first.id), everything(on_s3, second.id)) == before


def test_another_run_cannot_claim_the_same_prefix(on_s3, tmp_path, s3, place):
    with pytest.raises(trajstore.Conflict, match="incarnation"):
        trajstore.open(tmp_path / "other", archive=place, archive_options=s3.options)


class Flaky(Proxy):
    """An S3 server that can be gone: `down` closes every connection without a reply."""

    def __init__(self, server):
        self.down = False
        super().__init__(server, lambda request, ask: Answer(lost=True) if self.down else ask(request))
        self.options["timeout"] = "4"  # each request half of it: little enough to wait for, enough for a busy machine


@pytest.fixture
def flaky(s3):
    with Flaky(s3) as proxy:
        yield proxy


@pytest.fixture
def reopen(folder, flaky, place):
    """Opens the embedded run whose archive lies behind the flaky server; the first time with `archive=`."""
    with ExitStack() as stores:

        def open_(**options):
            options = {"archive_options": flaky.options} | options
            return stores.enter_context(trajstore.open(folder, ack="fsync", **options))

        yield open_


def test_run_opens_and_is_written_while_its_archive_does_not_answer(reopen, flaky, place, caplog):
    with reopen(partitions=1, archive=place) as first:
        old = record_seed_case(first)
        first.flush()
        Archiver(first).run(once=True)
        before = everything(first, old.id)
    flaky.down = True
    with caplog.at_level(logging.WARNING):
        store = reopen()
    assert "opened without its archive" in caplog.text
    assert place in caplog.text
    new = store.create()
    with new.segment(context=[1, 2]) as segment:
        segment.tokens([3])
    new.close("completed")
    store.flush()
    for needs_it in (
        lambda: store.get(old.id),
        lambda: store.create(id="fresh"),  # it may be archived
        lambda: store.list(),
        lambda: Archiver(store),
    ):
        with pytest.raises(trajstore.Unavailable, match="endpoint, network and credentials"):
            needs_it()
    flaky.down = False
    assert everything(store, old.id) == before, "without reopening"
    store.create(id="fresh")
    Archiver(store).run(once=True)
    assert hot_entries(store, new.id) == []
    assert list(store.load(new.id).token_ids) == [1, 2, 3]


@pytest.mark.parametrize("harm", ["another run's", "gone"])
def test_archive_that_is_not_the_runs_is_found_out_when_it_first_answers(reopen, flaky, s3, place, tmp_path, harm):
    reopen(partitions=1, archive=place).close()
    flaky.down = True
    store = reopen()
    storage = ArchiveRoot.at(place, s3.options).storage
    storage.remove(["archive.json"])
    if harm == "another run's":
        trajstore.open(tmp_path / "other", archive=place, archive_options=s3.options).close()
    flaky.down = False
    for _ in range(2):
        with pytest.raises(trajstore.Conflict, match="archives incarnation" if harm != "gone" else "holds no archive"):
            store.list()
    assert {file.path for file in storage.list("")} == ({"archive.json"} if harm != "gone" else set())


def test_writer_in_doubt_does_not_wait_for_a_silent_archive_again_and_again(reopen, flaky, place):
    """One thread writes for all trajectories; a hundred that ask one after the other would hold everybody up."""
    reopen(partitions=1, archive=place).close()
    flaky.down = True
    store = reopen()
    for _ in range(100):
        with pytest.raises(trajstore.Unavailable, match="endpoint, network"):
            store._archive.entry("doubtful", EventId(1, 0))
    with pytest.raises(trajstore.Unavailable):
        store._archive.last_note("doubtful")
    assert 2 <= len(flaky.requests) < 100
    flaky.down = False

    def answers():
        try:
            return store._archive.entry("doubtful", EventId(1, 0)) is None
        except trajstore.Unavailable:
            return False

    until(answers)


def test_first_open_with_an_archive_that_does_not_answer_begins_nothing(reopen, flaky, place):
    flaky.down = True
    with pytest.raises(trajstore.Unavailable, match="endpoint, network"):
        reopen(archive=place)
    flaky.down = False
    with pytest.raises(trajstore.NotFound, match="no run"):
        reopen(create=False, archive_options=None)


def test_run_whose_record_was_lost_is_not_begun_anew_while_its_archive_does_not_answer(reopen, flaky, place):
    with reopen(partitions=1, archive=place) as store:
        store.wire.call("DEL", store.keys.run_record(store.run))
    flaky.down = True
    with pytest.raises(trajstore.Unavailable, match="endpoint, network"):
        reopen()
    flaky.down = False
    with pytest.raises(trajstore.Conflict, match="the hot log was lost"):
        reopen()


def test_archive_given_elsewhere_must_answer_for_nobody_knows_that_it_is_the_runs(reopen, flaky, s3, place):
    reopen(partitions=1, archive=place).close()
    flaky.down = True
    with pytest.raises(trajstore.Unavailable, match="endpoint, network"):
        reopen(archive=s3.url("elsewhere"))


def test_archiver_that_begins_while_its_archive_does_not_answer_goes_on_when_it_does(reopen, flaky, place, caplog):
    with reopen(partitions=1, archive=place) as store:
        trajectory = record_seed_case(store)
        store.flush()
        archiver = Archiver(store, pack_seconds=0.1)
        flaky.down = True
        with pytest.raises(trajstore.Unavailable, match="endpoint, network"):
            archiver.run(once=True)
        stop = threading.Event()
        running = threading.Thread(target=archiver.run, kwargs={"stop": stop})
        running.start()
        try:
            until(lambda: "archiving pauses" in caplog.text)
            flaky.down = False
            until(lambda: hot_entries(store, trajectory.id) == [])
        finally:
            stop.set()
            running.join(60)
        assert archiver.done.packs == 1


def test_what_it_costs_in_requests_is_as_documented(reopen, flaky, place):
    """The figures of `docs/object_stores.md`."""

    def asked(do):
        before = len(flaky.requests)
        do()
        return [request.method for request in flaky.requests[before:]]

    patient = {**flaky.options, "timeout": "30"}
    with reopen(partitions=1, archive=place, archive_options=patient) as store:
        trajectories = [record_seed_case(store) for _ in range(3)]
        store.flush()
        publish = asked(lambda: Archiver(store).run(once=True))
    assert (publish.count("PUT"), len(publish) <= 13 + 6) == (13, True), "1 GET more looks for staged files"
    assert asked(lambda: reopen(archive_options=patient).close()) == ["GET", "GET"]
    assert asked(lambda: trajstore.open_archive(place, options=patient)) == ["GET"]
    alone = trajstore.open_archive(place, options=patient)
    arrays = 5
    before = len(flaky.requests)
    assert len(asked(lambda: alone.load(trajectories[0].id))) <= 2 + 8 + 2 + 3 * arrays
    assert {one.method for one in flaky.requests[before:] if "/packs/" in one.path} == {"GET"}, "records know the sizes"
    again = asked(lambda: alone.load(trajectories[1].id))
    assert set(again) == {"GET"}
    assert len(again) <= 1 + arrays
