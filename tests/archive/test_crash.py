"""`kill -9` of the archiver at every step of a publish: nothing lost, nothing doubled, every load the same bytes.

Zarr (PITFALLS.md, 36): concurrent resize is unsafe, and a crash in a partial shard write leaves an unreadable shard ->
only whole, immutable batches; a batch exists once its commit does.
"""

import signal
import subprocess
import sys

import pytest

import trajstore
from tests.archive.test_archiver import everything, hot_entries
from tests.builders import record_seed_case, rows
from trajstore.archiver import Archiver

STEPS = ("staged", "synced", "moved", "recorded", "trimmed")

ARCHIVE_AND_DIE = """
import os, signal, sys
import trajstore
from trajstore.archiver import Archiver

def die(step):
    if step == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

with trajstore.open(sys.argv[1], create=False) as store:
    Archiver(store, lease_seconds=0.2, on_step=die).run(once=True)
"""


@pytest.mark.parametrize("step", STEPS)
def test_archiver_killed_at_any_step_loses_and_doubles_nothing(durable, folder, step):
    whole, noted, growing = record_seed_case(durable), record_seed_case(durable), record_seed_case(durable)
    whole.close("completed")
    noted.observe(rows(4), start=1, source="trainer")
    growing.segment(context=[6]).tokens([20, 21])
    durable.flush()
    ids = [whole.id, noted.id, growing.id]
    before = {id: everything(durable, id) for id in ids}
    events = {id: [event.id for event in durable.events(id)] for id in ids}

    killed = subprocess.run([sys.executable, "-c", ARCHIVE_AND_DIE, str(folder), step], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {id: everything(durable, id) for id in ids} == before

    done = Archiver(durable, lease_seconds=0.2).run(once=True)
    assert done.packs == (0 if step in ("recorded", "trimmed") else 1), "exactly one publish in all"
    assert {id: everything(durable, id) for id in ids} == before
    assert {id: [event.id for event in durable.events(id)] for id in ids} == events
    assert hot_entries(durable, whole.id) == []
    assert durable.wire.call("XPENDING", durable.keys.feed(0), "archiver")[0] == 0
    assert len(list((folder / "archive" / "manifest" / "00").glob("*.json"))) == 1
    offline = trajstore.open_archive(folder)
    assert everything(offline, whole.id) == before[whole.id]


def test_archiver_killed_again_and_again_still_gets_there(durable, folder):
    """Each life ends at another step, with new trajectories in between."""
    ids, before = [], {}
    for step in STEPS * 2:
        trajectory = record_seed_case(durable)
        durable.flush()
        ids.append(trajectory.id)
        before[trajectory.id] = everything(durable, trajectory.id)
        subprocess.run([sys.executable, "-c", ARCHIVE_AND_DIE, str(folder), step], timeout=60, check=False)
        assert {id: everything(durable, id) for id in ids} == before
    Archiver(durable, lease_seconds=0.2).run(once=True)
    assert {id: everything(trajstore.open_archive(folder), id) for id in ids} == before
    entries = [entry for id in ids for entry in durable.events(id)]
    assert len(entries) == len({(event.nonce, event.at) for event in entries}) == 10 * len(durable.events(ids[0]))
