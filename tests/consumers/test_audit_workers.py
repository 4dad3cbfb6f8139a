"""Audits in several processes, on a Dask cluster, and again after a kill: the same numbers, nothing counted twice."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

import trajstore
from tests.consumers.test_audit_faults import drifted, real, record
from tests.consumers.test_audit_parts import plain
from tests.waiting import until
from trajstore.archiver import Archiver
from trajstore.server import stop_server
from trajstore_audit import audit, planning, running

SCRIPT = """
import sys
from trajstore_audit import audit, planning
planning._IDS = 2
def told(progress):
    print("done", progress.trajectories, flush=True)
    sys.stdin.readline()
audit(sys.argv[1], work=sys.argv[2], progress=told)
"""

WITH_WORKERS = """
import sys
from trajstore_audit import audit, planning
planning._IDS = 2
def told(progress):
    print("done", progress.trajectories, flush=True)
    sys.stdin.readline()
audit(sys.argv[1], workers=2, progress=told)
"""

CLUSTER = """
import logging, sys
from distributed import LocalCluster
options = dict(threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp", host="127.0.0.1")
with LocalCluster(n_workers=1, silence_logs=logging.CRITICAL, **options) as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An archive of 20 trajectories, in units of two."""
    monkeypatch.setattr(planning, "_IDS", 2)
    folder = tmp_path / "store"
    with trajstore.open(folder, partitions=2, ack="fsync") as store:
        for i in range(20):
            first = real(200 * i, 100)
            second = drifted(first, 0.1, seed=i)
            if i % 5 == 0:
                second[50] = first[52]
            trajectory = record(store, (first, 0), (second, 0), group=f"g{i % 3}")
            trajectory.close("completed")
        store.flush()
        Archiver(store).run(once=True)
    return folder / "archive"


def numbers(found):
    """All but how long it took."""
    values = plain(found)
    del values["totals"]["seconds"]
    return values


def test_processes_give_the_same_numbers(place):
    alone = audit(place)
    assert alone.findings_by_kind == {"shifted": 4}
    heard, lines = [], []
    several = audit(place, workers=2, progress=heard.append, pairs=lines.extend)
    assert numbers(several) == numbers(alone)
    assert [one.trajectories for one in heard] == sorted(one.trajectories for one in heard)
    assert (heard[-1].trajectories, heard[-1].total, heard[-1].reused) == (20, 20, 0)
    assert len(lines) == len({line.id for line in lines}) == 20


def test_processes_read_a_store_with_its_server(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_IDS", 2)
    with trajstore.open(tmp_path / "store", partitions=2) as store:
        for i in range(6):
            record(store, (real(100 * i, 50), 0), (drifted(real(100 * i, 50), 0.2, seed=i), 0))
        assert numbers(audit(tmp_path / "store", workers=2)) == numbers(audit(store))
        with pytest.raises(trajstore.SchemaError, match="give its location"):
            audit(store, workers=2)


def on_dask(workers):
    """A cluster of processes on this machine."""
    return pytest.importorskip("distributed").LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        protocol="tcp",
        host="127.0.0.1",
        silence_logs=logging.CRITICAL,
    )


def test_dask_workers_give_the_same_numbers_even_of_a_place_that_was_made_anew(place, tmp_path):
    with on_dask(2) as cluster:
        found = audit(place, scheduler=cluster.scheduler_address)
        assert numbers(found) == numbers(audit(place))
        shutil.rmtree(tmp_path / "store")
        with trajstore.open(tmp_path / "store", partitions=2, ack="fsync") as store:
            for i in range(3):
                record(store, (real(100 * i, 50), 0), (real(100 * i, 50), 0)).close("completed")
            store.flush()
            Archiver(store).run(once=True)
        found = audit(place, scheduler=cluster.scheduler_address)
    assert (found.totals.trajectories, found.totals.skipped) == (3, {})
    assert numbers(found) == numbers(audit(place))


@pytest.mark.parametrize("times", [2, 99])
def test_unit_whose_part_was_lost_with_its_dask_worker_is_audited_again(place, monkeypatch, times):
    """distributed's executor takes a part whose worker died while it was fetched for an error, and unpacks it."""
    executor = pytest.importorskip("distributed.cfexecutor").ClientExecutor
    submit, sent = executor.submit, []

    def lose_some(self, run, data):
        sent.append(data)
        if sent.count(data) <= times and data == sent[0]:
            lost = Future()
            lost.set_exception(ValueError("too many values to unpack (expected 3)"))
            return lost
        return submit(self, run, data)

    monkeypatch.setattr(executor, "submit", lose_some)
    with on_dask(1) as cluster:
        if times == 2:
            assert numbers(audit(place, scheduler=cluster.scheduler_address)) == numbers(audit(place))
        else:
            with pytest.raises(ValueError, match="unpack"):
                audit(place, scheduler=cluster.scheduler_address)
    assert sent.count(sent[0]) == min(times + 1, 4)


def test_dask_cluster_that_lost_its_workers_is_told(place, monkeypatch):
    monkeypatch.setattr(running, "_LOOK", 0.1)
    monkeypatch.setattr(running, "_WITHOUT_WORKERS", 0.3)
    with on_dask(1) as cluster:

        def told(progress):
            if cluster.scheduler.workers:
                cluster.scale(0)
                until(lambda: not cluster.scheduler.workers, seconds=30)

        with pytest.raises(trajstore.Unavailable, match=r"had no workers for 0\.3 s; start some"):
            audit(place, scheduler=cluster.scheduler_address, progress=told)


def test_dask_workers_that_die_of_a_unit_are_told(place, monkeypatch):
    dask = pytest.importorskip("dask")
    monkeypatch.setattr(running, "run_unit", _die)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        on_dask(1) as cluster,
        pytest.raises(trajstore.Unavailable, match="died again and again"),
    ):
        audit(place, scheduler=cluster.scheduler_address)


def test_dask_scheduler_that_is_lost_is_told(place, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(running, "_LOOK", 0.1)
    monkeypatch.setattr(running, "_CONNECT", 1.0)
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def told(progress):
        process.kill()
        process.wait(timeout=30)

    try:
        with pytest.raises(trajstore.Unavailable, match=r"was lost|does not answer"):
            audit(place, scheduler=process.stdout.readline().strip(), progress=told)
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdin.close()
        process.stdout.close()


def test_scheduler_that_does_not_answer_is_unavailable(place, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(running, "_CONNECT", 0.5)
    with pytest.raises(trajstore.Unavailable, match="does not answer"):
        audit(place, scheduler="tcp://127.0.0.1:9")


def test_audit_that_was_killed_goes_on_where_it_was(place, tmp_path):
    work = tmp_path / "work"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place), str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(3):
            assert process.stdout.readline().startswith("done")
            process.stdin.write("\n")
            process.stdin.flush()
        done = int(process.stdout.readline().removeprefix("done"))
    finally:
        process.kill()  # SIGKILL, while it waits
        process.wait(timeout=30)
        process.stdin.close()
        process.stdout.close()
    kept = {path.name: path.stat().st_mtime_ns for path in (work / "parts").iterdir()}
    assert 4 <= len(kept) <= 5
    heard = []
    found = audit(place, work=work, progress=heard.append)
    assert numbers(found) == numbers(audit(place))
    assert 4 <= done <= heard[-1].reused < 20
    after = {path.name: path.stat().st_mtime_ns for path in (work / "parts").iterdir()}
    assert after.items() > kept.items(), "what was kept is not counted again"


def test_part_that_is_damaged_is_counted_anew(place, tmp_path):
    before = numbers(audit(place, work=tmp_path / "work"))
    parts = sorted((tmp_path / "work" / "parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    parts[1].write_bytes(b"")
    heard = []
    assert numbers(audit(place, work=tmp_path / "work", progress=heard.append)) == before
    assert heard[-1].trajectories == 20
    assert 16 <= heard[-1].reused < 20


def test_what_has_grown_since_is_audited_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_IDS", 1)
    with trajstore.open(tmp_path / "store", partitions=1) as store:
        trajectories = [record(store, (real(100 * i, 50), 0), (real(100 * i, 50), 0)) for i in range(3)]
        audit(store, work=tmp_path / "work")
        with trajectories[0].segment(weight_version="v9") as segment:
            segment.tokens([1])
            segment.routing(real(0, 50), start=0)
        store.flush()
        heard = []
        found = audit(store, work=tmp_path / "work", progress=heard.append)
        assert heard[-1].reused == 2
        assert numbers(found) == numbers(audit(store))


@pytest.mark.parametrize("note", ["observation", "late routing"])
def test_what_was_noted_since_is_audited_anew(tmp_path, monkeypatch, note):
    monkeypatch.setattr(planning, "_IDS", 1)
    with trajstore.open(tmp_path / "store", partitions=1) as store:
        trajectories = [record(store, (real(100 * i, 50), 0), (real(100 * i, 50), 0)) for i in range(3)]
        for known in ([], [trajectories[0]]):  # the second time there is a note already
            for one in known:
                one.observe(real(0, 5), start=0, source="trainer")
            store.flush()
            before = audit(store, work=tmp_path / "work")
            if note == "observation":
                trajectories[0].observe(real(0, 20), start=0, source="trainer")
            else:
                trajectories[0].late_routing(real(7000, 20), segment=1, start=0)
            store.flush()
            heard = []
            found = audit(store, work=tmp_path / "work", progress=heard.append)
            assert heard[-1].reused == 2
            assert numbers(found) == numbers(audit(store)) != numbers(before)


def test_what_was_damaged_and_is_restored_is_audited_with_the_same_work(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=1, ack="fsync") as store:
        first = real(0, 300)
        record(store, (first, 0), (real(7000, 300), 0)).close("completed")
        store.flush()
        Archiver(store).run(once=True)
    archive = tmp_path / "store" / "archive"
    (shard,) = archive.glob("packs/*/*/routed/c/0/0/0")
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 0xFF
    shard.write_bytes(bad)
    assert audit(archive, work=tmp_path / "work").totals.skipped == {"damaged": 1}
    shard.write_bytes(good)
    found = audit(archive, work=tmp_path / "work")
    assert (found.totals.skipped, found.totals.trajectories) == ({}, 1)


def test_work_of_another_audit_is_refused(place, tmp_path):
    audit(place, work=tmp_path / "work", seed=1)
    with pytest.raises(trajstore.Conflict, match="seed was 1 and is 2"):
        audit(place, work=tmp_path / "work", seed=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(trajstore.Conflict, match=r"notes\.txt"):
        audit(place, work=tmp_path / "other")
    with pytest.raises(trajstore.Unavailable, match="cannot be used"):
        audit(place, work=tmp_path / "other" / "notes.txt")


def test_workers_end_with_an_audit_that_was_killed_and_so_does_an_embedded_stores_server(place):
    folder = place.parent
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_WORKERS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().startswith("done")
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len([pid for pid in workers if _runs(pid)]) >= 3, "two, and what tracks their semaphores"
        assert not json.loads((folder / "redis" / "server.json").read_bytes())["stopped"]
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdin.close()
        process.stdout.close()
    try:
        until(lambda: not any(map(_runs, workers)), seconds=30)
        assert json.loads((folder / "redis" / "server.json").read_bytes())["stopped"]
    finally:
        for pid in filter(_runs, workers):
            os.kill(pid, signal.SIGKILL)
        stop_server(folder)


def _runs(pid):
    """No zombie, either: whoever inherits an orphan may leave it so."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _die(data):
    os._exit(9)


def test_worker_that_dies_is_told(place, monkeypatch):
    monkeypatch.setattr(running, "run_unit", _die)
    with pytest.raises(trajstore.Unavailable, match="a worker of the audit died"):
        audit(place, workers=2)
