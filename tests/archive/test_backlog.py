"""What waits to be archived is counted to the byte, and a full server is drained while its writers wait."""

import contextlib
import functools
import json
import threading
import time

import numpy as np
import pytest

import trajstore
from tests.archive.test_archiver import until
from tests.builders import SPEC, record_seed_case, rows
from tests.cli.running import invoke
from trajstore.archiver import Archiver

SEED_BYTES = 5 * 4 + 3 * 8 + 7 * 6 + 2 * 8 + 9 * 6
"""Payloads of the seed case: prompt, A B C with logprobs, their rows, D E with logprobs, their rows."""


def waiting(store):
    found = store.backlog()
    return found.trajectories, found.nbytes


def test_backlog_is_the_payload_bytes_written_and_nothing_once_archived(store):
    ids = [record_seed_case(store).id for _ in range(7)]
    store.flush()
    found = store.backlog()
    assert (found.trajectories, found.nbytes) == (7, 7 * SEED_BYTES)
    assert len(found.partitions) == store.partitions
    assert [one.trajectories for one in found.partitions] == [
        sum(store.keys.partition(id) == number for id in ids) for number in range(store.partitions)
    ]
    assert found.seconds > 0
    Archiver(store).run(once=True)
    found = store.backlog()
    assert (found.trajectories, found.nbytes, found.seconds) == (0, 0, 0.0)


def test_only_what_came_after_the_archived_part_waits(durable, archive):
    trajectory = record_seed_case(durable)
    archive()
    with durable.get(trajectory.id).segment(context=[1, 2, 3]) as segment:
        segment.routing(rows(13), start=0)
        segment.close("abort")
    durable.flush()
    assert waiting(durable) == (1, 3 * 4 + 13 * 6)
    archive()
    assert waiting(durable) == (0, 0)


def test_open_segment_waits_without_getting_old(durable, archive):
    segment = durable.create(routing=SPEC).segment(context=[1, 2])
    segment.tokens([3])
    durable.flush()
    archive()
    assert waiting(durable) == (1, 3 * 4)
    assert durable.backlog().seconds == 0, "no archiver could have archived it"
    segment.close("stop")
    durable.flush()
    assert durable.backlog().seconds > 0
    archive()
    assert waiting(durable) == (0, 0)


def test_notes_count_also_those_of_a_finished_and_archived_trajectory(durable, archive):
    done, growing = record_seed_case(durable), record_seed_case(durable)
    done.close("completed")
    archive()
    assert waiting(durable) == (0, 0)
    done.observe(rows(4), start=0, source="trainer")
    for seed in range(2):
        growing.observe(rows(200)[:10], start=0, source=f"trainer-{seed}")
    durable.flush()
    assert waiting(durable) == (2, (4 + 2 * 10) * 6)
    assert durable.backlog().seconds > 0
    archive()
    assert waiting(durable) == (0, 0)
    growing.observe(rows(3), start=0, source="trainer")
    durable.flush()
    assert waiting(durable) == (1, 3 * 6), "the older notes do not count again"


def test_what_is_archived_but_not_trimmed_yet_does_not_wait(durable, archive):
    record_seed_case(durable)
    seen = []

    def look(step):
        seen.append((step, waiting(durable)))

    archive(on_step=look)
    assert seen == [
        *((step, (1, SEED_BYTES)) for step in ("staged", "synced", "moved")),
        ("recorded", (0, 0)),
        ("trimmed", (0, 0)),
    ]


def test_deleted_trajectory_waits_with_no_bytes(durable, archive):
    trajectory = record_seed_case(durable)
    durable.flush()
    durable.delete(trajectory.id)
    assert waiting(durable) == (1, 0)
    archive()
    assert waiting(durable) == (0, 0)


def test_store_without_archive_has_everything_waiting(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=2) as store:
        record_seed_case(store)
        store.flush()
        assert waiting(store) == (1, SEED_BYTES)
        with own_server.client() as client:
            client.config_set("maxmemory", "64mb")
            used = client.info("memory")["used_memory"]
        found = store.backlog()
        assert found.maxmemory == 64 << 20
        assert found.used_memory == pytest.approx(used, rel=0.2)


def test_command_says_what_the_store_says(durable, folder):
    record_seed_case(durable)
    durable.flush()
    document = json.loads(invoke("backlog", folder, "--json").stdout)
    assert (document["trajectories"], document["nbytes"]) == (1, SEED_BYTES)
    assert document["partitions"][0]["nbytes"] == SEED_BYTES
    assert document["seconds"] > 0
    assert document["used_memory"] > 0
    shown = invoke("backlog", folder).stdout
    assert f"{SEED_BYTES} bytes" in shown
    assert "1 trajectories" in shown


# A full server

BLOCK = 20_000


@pytest.fixture
def small(own_server):
    """A server with room for little, which fsyncs, so that an archiver need not wait."""
    with own_server.client() as client:
        client.config_set("appendfsync", "always")
        client.config_set("maxmemory", "16mb")
    return own_server


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Where to archive, as options of `trajstore.open`."""
    if request.param == "local":
        return {"archive": tmp_path / "archive"}
    s3 = request.getfixturevalue("s3")
    return {"archive": s3.url(tmp_path.name), "archive_options": s3.options}


@functools.cache
def block(seed):
    """Made once: a writer must outrun an archiver."""
    return rows(BLOCK, seed=seed)


def write(store, seed):
    """A finished trajectory with 200 kB of payload; its id."""
    trajectory = store.create(routing=SPEC)
    with trajectory.segment(context=np.full(BLOCK, seed, np.int32)) as segment:
        segment.routing(block(seed % 8), start=0)
        segment.close("stop")
    trajectory.close()
    return trajectory.id


def record(store, seed):
    """The same, acknowledged."""
    id = write(store, seed)
    store.flush(id)
    return id


def fill(store, *, most=200):
    """Write until the store is full; ids of what was acknowledged, by seed."""
    written = {}
    for seed in range(most):
        try:
            written[seed] = record(store, seed)
        except trajstore.StoreFull:
            return written
    raise AssertionError("the server never filled up")


@contextlib.contextmanager
def archiving(url, *, archive, archive_options=None, **options):
    """An archiver at work for the length of the block."""
    stop = threading.Event()
    with trajstore.open(url, archive=archive, archive_options=archive_options) as store:
        archiver = Archiver(store, **options)
        thread = threading.Thread(target=archiver.run, kwargs={"stop": stop})
        thread.start()
        try:
            yield archiver
        finally:
            stop.set()
            thread.join(60)


def all_there(store, written):
    for seed, id in written.items():
        loaded = store.load(id)
        assert loaded.status == "completed"
        assert (loaded.token_ids == seed).all()
        assert (loaded.routed_experts == block(seed % 8)).all()


def test_full_server_drains_through_a_newly_started_archiver_while_its_writer_waits(small, run_name, place):
    url = small.url(run_name)
    with trajstore.open(url, partitions=2, timeout=1.0, **place) as hasty:
        written = fill(hasty)
        found = hasty.backlog()
        payloads = [event.payload for one in hasty.list() for event in hasty.events(one.id)]
        assert found.nbytes == sum(payload.nbytes for payload in payloads if payload is not None)
        assert found.used_memory >= 0.85 * found.maxmemory
    with trajstore.open(url, timeout=60.0, **place) as patient:
        late: dict[int, str] = {}
        writer = threading.Thread(target=lambda: late.update({seed: record(patient, seed) for seed in (900, 901)}))
        writer.start()
        assert late == {}, "nothing has made room yet"
        with archiving(url, pack_seconds=0.0, **place) as archiver:
            writer.join(60)
            until(lambda: patient.backlog().seconds == 0, seconds=60)
        assert len(late) == 2
        assert waiting(patient)[0] <= 1, "what the full server has cut off is open still"
        assert archiver.done.trajectories >= len(written) + 2
        all_there(patient, written | late)


def test_archiver_of_a_full_server_does_not_wait_for_room_to_close_what_is_abandoned(small, run_name, tmp_path):
    """Found by simulation seed 5383: meanwhile its leases ran out, and of two archivers neither archived anything."""
    with trajstore.open(small.url(run_name), partitions=2, archive=tmp_path / "archive", timeout=1.0) as store:
        trajectory = store.create()
        trajectory.segment(context=[1, 2])
        store.flush()
        quiet = store.keys.quiet(store.keys.partition(trajectory.id))
        store.wire.call("HSET", quiet, trajectory.id, f"{store.list()[0].last} 1000")
        with small.client() as client:
            client.config_set("maxmemory", "1mb")
            assert Archiver(store, abandon_seconds=3600.0).run(once=True).abandoned == 0
            assert store._flusher.counts().failed == {}, "it has tried, and waited until its deadline"
            client.config_set("maxmemory", "16mb")
        assert Archiver(store, abandon_seconds=3600.0).run(once=True).abandoned == 1
        assert store.list()[0].status == "aborted"


def test_writer_gets_store_full_only_after_its_deadline(small, run_name, tmp_path):
    with trajstore.open(small.url(run_name), partitions=2, archive=tmp_path / "archive", timeout=1.0) as hasty:
        fill(hasty)
        begun = time.monotonic()
        with pytest.raises(trajstore.StoreFull, match=r"within 1 s.*Start an archiver"):
            record(hasty, 901)
        assert time.monotonic() - begun >= 1.0


def test_writer_that_outruns_the_archiver_is_slowed_and_not_failed(small, run_name, place):
    """It writes three times what the server can hold, which is full meanwhile."""
    url = small.url(run_name)
    with trajstore.open(url, partitions=2, timeout=60.0, buffer_bytes=1 << 20, **place) as store:
        with archiving(url, pack_bytes=2 << 20, pack_seconds=0.0, **place):
            written = {seed: write(store, seed) for seed in range((48 << 20) // (BLOCK * 10))}
            store.flush()
            until(lambda: waiting(store) == (0, 0), seconds=60)
        with small.client() as client:
            memory = client.info("memory")
        assert memory["used_memory_peak"] >= 0.9 * memory["maxmemory"], "the writer did not outrun it"
        all_there(store, written)
