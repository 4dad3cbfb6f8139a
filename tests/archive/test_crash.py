"""`kill -9` of archivers, writers and servers: nothing lost, nothing doubled, every load the same bytes; and no growth.

Zarr (PITFALLS.md, 36): concurrent resize is unsafe, and a crash in a partial shard write leaves an unreadable shard ->
only whole, immutable batches; a batch exists once its commit does.
"""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

import trajstore
from tests.archive.test_archiver import everything, hot_entries
from tests.builders import SPEC, record_seed_case, rows
from tests.servers import binary_of
from tests.soak.archive import one_round
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


# The crash loop, as far as there is time for it here; `make soak` has hundreds of kills


@pytest.mark.parametrize(
    ("server", "appendfsync", "place", "kills"),
    [("redis", "always", "local", 8), ("valkey", "always", "s3", 6), ("redis", "everysec", "local", 6)],
)
def test_every_acknowledged_event_is_there_once_after_a_crash_loop(
    request, tmp_path, server, appendfsync, place, kills
):
    if binary_of(server) is None:
        pytest.skip(f"backend {server}: no server of that kind on this machine")
    s3 = request.getfixturevalue("s3") if place == "s3" else None
    done, account = one_round(tmp_path, seed=3, kills=kills, server=server, appendfsync=appendfsync, s3=s3)
    assert done.total >= kills
    assert account.trajectories > 10
    assert account.notes > 0
    assert appendfsync == "everysec" or account.lost == 0


# Memory

ARCHIVE_AND_MEASURE = """
import json, re, sys
import trajstore
from trajstore.archiver import Archiver

peaks = []

def measure(step):
    if step == "trimmed":
        with open("/proc/self/status") as status:  # ru_maxrss counts in what the process was before its exec
            peaks.append(int(re.search(r"VmHWM:\\s*([0-9]+) kB", status.read())[1]))

with trajstore.open(sys.argv[1], create=False) as store:
    Archiver(store, pack_bytes=int(sys.argv[2]), on_step=measure).run(once=True)
sys.stdout.write(json.dumps(peaks))
"""


def peaks_of(folder, *, pack_bytes):
    """Peak resident memory of an archiver's process after each of its packs, in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", ARCHIVE_AND_MEASURE, str(folder), str(pack_bytes)],
        stdout=subprocess.PIPE,
        timeout=110,
        check=True,
    )
    return json.loads(done.stdout)


def test_archiver_needs_no_more_memory_for_many_packs(durable, folder):
    block = rows(160_000)
    for seed in range(110):
        trajectory = durable.create(routing=SPEC)
        with trajectory.segment(context=np.full(len(block), seed)) as segment:
            segment.routing(np.roll(block, seed, axis=0), start=0)
            segment.close("stop")
    durable.flush()
    peaks = peaks_of(folder, pack_bytes=6 << 20)
    assert len(peaks) >= 25
    assert peaks[24] <= 1.15 * peaks[4], f"{peaks[4]} KiB after 5 packs, {peaks[24]} after 25"


def test_archiver_needs_no_more_memory_for_many_small_trajectories(durable, folder):
    for number in range(20_000):
        trajectory = durable.create(routing=SPEC)
        with trajectory.segment(context=[number]) as segment:
            segment.close("stop")
    durable.flush()
    peaks = peaks_of(folder, pack_bytes=64 << 20)
    assert len(durable.list()) == 20_000
    assert durable.backlog().trajectories == 0
    assert len(peaks) >= 25
    assert peaks[-1] <= 1.15 * peaks[4], f"{peaks[4]} KiB after 5 packs, {peaks[-1]} after {len(peaks)}"
