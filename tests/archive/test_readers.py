"""Readers beside an archiver that stands still at each step of publish and trim: they see what they saw before.

A bare archive's reader sees each trajectory as it was before the publish or as it is after, never a part of it.
"""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest

import trajstore
from tests.archive.test_archiver import everything
from tests.builders import SPEC, record_seed_case, rows
from trajstore.archiver import Archiver

STEPS = ("staged", "synced", "moved", "recorded", "trimmed")

ARCHIVE_AND_WAIT = """
import json, sys
import trajstore
from trajstore.archiver import Archiver

def wait(step):
    sys.stdout.write(step + "\\n")
    sys.stdout.flush()
    assert sys.stdin.readline(), "the test is gone"

with trajstore.open(sys.argv[1], archive_options=json.loads(sys.argv[2]), create=False) as store:
    Archiver(store, on_step=wait).run(once=True)
"""


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Location and options of an archive, on a disk and in an object store."""
    if request.param == "local":
        return str(tmp_path / "archive"), {}
    s3 = request.getfixturevalue("s3")
    return s3.url(tmp_path.name), s3.options


@contextlib.contextmanager
def archiver_that_waits(folder, options):
    """Yields the steps of its publishes; at each it stands still until the next is asked for."""
    process = subprocess.Popen(
        [sys.executable, "-c", ARCHIVE_AND_WAIT, str(folder), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def steps():
        while step := process.stdout.readline().strip():
            yield step
            process.stdin.write("go on\n")
            process.stdin.flush()
        assert process.wait(60) == 0

    try:
        yield steps()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def grow(store, id):
    """A third segment that re-prefills everything, a reward and a note."""
    trajectory = store.get(id)
    with trajectory.segment(context=[6, 7], weight_version="v3") as segment:
        segment.tokens(np.arange(300), np.full(300, -0.5))
        segment.routing(rows(311), start=0)
        segment.close("stop")
    trajectory.reward(0.5)
    trajectory.observe(rows(200), start=0, source="trainer")
    return trajectory


def seen(archive, id):
    """All that a reader can ask about one trajectory."""
    overlaps = archive.overlaps(id)
    return (
        everything(archive, id),
        [(event.id, event.type) for event in archive.events(id)],
        [(note.id, note.type) for note in archive.notes(id)],
        overlaps,
        [archive.recorded_rows(id, one).tobytes() for pair in overlaps for one in (pair.first, pair.second)],
    )


def listed(archive):
    return {summary.id: summary for summary in archive.list()}


def test_readers_see_the_same_at_every_step_of_publish_and_trim(tmp_path, place):
    location, options = place
    folder = tmp_path / "store"
    opened = {"partitions": 1, "ack": "fsync", "archive": location, "archive_options": options}
    with trajstore.open(folder, **opened) as store:
        old = [record_seed_case(store).id for _ in range(3)]
        store.flush()
        Archiver(store).run(once=True)
        offline = trajstore.open_archive(location, options=options)
        archived = {id: seen(offline, id) for id in old}
        archived_list = listed(offline)

        grow(store, old[0])
        grow(store, old[1]).close("completed")
        new = [record_seed_case(store).id for _ in range(2)]
        still_open = store.create(routing=SPEC)
        still_open.segment(context=[1, 2]).tokens([3])
        store.flush()
        before = {id: seen(store, id) for id in [*old, *new, still_open.id]}
        before_list = listed(store)

        steps = []
        with archiver_that_waits(folder, options) as archiver:
            for step in archiver:
                steps.append(step)
                assert {id: seen(store, id) for id in before} == before, step
                assert listed(store) == before_list, step
                done = step in ("recorded", "trimmed")
                for bare in (offline, trajstore.open_archive(location, options=options)):
                    there = [*old, *new] if done else old
                    assert {id: seen(bare, id) for id in there} == (
                        {id: before[id] for id in there} if done else archived
                    ), step
                    assert listed(bare) == ({id: before_list[id] for id in there} if done else archived_list), step
                    for id in {*before} - {*there}:
                        with pytest.raises(trajstore.NotFound):
                            bare.load(id)
        assert steps == list(STEPS)
        assert {id: seen(store, id) for id in before} == before
