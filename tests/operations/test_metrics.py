"""Metrics: each is documented and comes from somewhere, and says what happened."""

import contextlib
import gc
import re
import subprocess
import sys
import threading
from pathlib import Path

import prometheus_client
import pytest

import trajstore
from tests.builders import record_seed_case
from tests.consumers.rollouts import finish, materialize
from tests.log.proxy import FaultyProxy
from tests.operations.exposed import shown
from trajstore import metrics
from trajstore.archiver import Archiver
from trajstore.cli.drift_sample import DriftSample
from trajstore.errors import Conflict, Fenced, Unavailable
from trajstore.log.counts import LATENCY_BOUNDS
from trajstore.log.lease import Lease
from trajstore.materializer import Materializer
from trajstore.metrics import METRICS
from trajstore.status import RunLook, measure_status
from trajstore_audit.drift import drift_by_layer

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_the_page_has_every_metric_with_its_kind_labels_and_help():
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(f'`{one}`' for one in m.labels)} | {m.help} |" for m in METRICS]
    assert re.findall(r"^\| `trajstore_.*$", PAGE, re.MULTILINE) == rows


def test_names_follow_the_conventions_of_prometheus():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.labels[0] == "run"


@pytest.mark.torch
def test_every_metric_comes_from_somewhere(open_store, tmp_path):
    from trajstore_trainer import Selection, TrajectoryDataset

    store = open_store(archive=tmp_path / "archive", partitions=1)
    drift = DriftSample(store, share=1.0)
    archiver, materializer = Archiver(store), Materializer(store, on_offered=drift.add)
    finish(store, group="passed over", group_size=1, status="aborted")
    finish(store, group="g", group_size=1)
    resumed = record_seed_case(store)
    fenced = store.get(resumed.id)
    store.get(resumed.id).reward(1.0)
    store.flush(resumed.id)
    fenced.reward(2.0)
    with pytest.raises(Fenced):
        store.flush(resumed.id)
    materializer.run(once=True)
    hold_a_lease(store)
    with TrajectoryDataset(store, selection=Selection(aborted="drop")) as dataset:
        next(iter(dataset))
        named = {
            one.name
            for source in (store, archiver, materializer, drift, RunLook(store))
            for one in metrics.samples(source)
        }
        named |= {one.name for one in metrics.samples(dataset)}
    assert {metric.name for metric in METRICS} - named <= MAY_BE_ABSENT
    assert named <= {metric.name for metric in METRICS}


MAY_BE_ABSENT = {
    "trajstore_run_hints_total",
    "trajstore_run_published_total",
    *(m.name for m in METRICS if "_server_" in m.name),
}
"""What an old or a fake server does not tell."""


def hold_a_lease(store):
    assert Lease(store.wire, store.keys, "somebody", seconds=15.0).acquire(0)


def test_writing_is_counted_by_what_was_acknowledged(store):
    finish(store, tokens=3)
    finish(store, tokens=3)
    now = shown(store)
    run = f"{{run={store.run}}}"
    log = [event for summary in store.list(status="completed") for event in store.events(summary.id)]
    assert now[f"trajstore_events_total{run}"] == len(log)
    entries = sum(store.wire.call("XLEN", store.keys.entries(one.id)) for one in store.list(status="completed"))
    assert now[f"trajstore_entries_total{run}"] == entries
    assert now[f"trajstore_append_seconds_count{{ack=memory,run={store.run}}}"] == entries
    assert now[f"trajstore_append_seconds_bucket{{ack=memory,le=+Inf,run={store.run}}}"] == entries
    assert now[f"trajstore_append_seconds_bucket{{ack=memory,le={LATENCY_BOUNDS[-1]},run={store.run}}}"] == entries
    assert now[f"trajstore_append_seconds_sum{{ack=memory,run={store.run}}}"] > 0
    assert now[f"trajstore_written_bytes_total{run}"] > sum(one.nbytes for one in store.list(status="completed"))
    assert (now[f"trajstore_buffer_bytes{run}"], now[f"trajstore_waiting_trajectories{run}"]) == (0, 0)
    assert now[f"trajstore_connections_total{run}"] == 1


def test_latency_counts_from_the_append_of_an_entrys_oldest_event(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1) as store:
        writer = store.create()
        store.flush()
        own_server.pause()
        writer.segment(context=[1])
        waiting = store.writer_counts()
        assert waiting.buffered > 0
        resume_after(own_server, 0.3)
        store.flush()
        before, now = waiting.latencies, store.writer_counts().latencies
        slow = [new - old for bound, new, old in zip((*LATENCY_BOUNDS, 1e9), now, before, strict=True) if bound > 0.25]
        assert sum(slow) == 1
        assert store.writer_counts().latency - waiting.latency >= 0.25


def resume_after(server, seconds):
    """From here on the wait is the server's."""
    threading.Timer(seconds, server.resume).start()


def test_a_fenced_writer_and_a_lost_reply_are_counted(own_server, run_name):
    proxy = FaultyProxy(own_server.port)
    with trajstore.open(proxy.url(run_name), partitions=1, timeout=10.0) as store, proxy:
        writer = store.create()
        store.flush()
        proxy.drop_reply(b"XADD")
        with writer.segment(context=[1]) as segment:
            segment.close("stop")
        store.flush()
        assert proxy.fired.is_set()
        loser = store.get(writer.id)
        store.get(writer.id).reward(1.0)
        store.flush()
        loser.reward(2.0)
        with pytest.raises(Fenced):
            store.flush(writer.id)
        now = shown(store)
        assert now[f"trajstore_resolved_writes_total{{run={run_name},verdict=landed}}"] == 1
        assert now[f"trajstore_resolved_writes_total{{run={run_name},verdict=refused}}"] == 1
        assert now[f"trajstore_failed_writes_total{{error=Fenced,run={run_name}}}"] == 1
        assert now[f"trajstore_connections_total{{run={run_name}}}"] == 2


def test_a_full_buffer_is_counted(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1, buffer_bytes=600, timeout=1.0) as store:
        writer = store.create()
        store.flush()
        own_server.pause()
        writer.reward(1.0)
        writer.reward(1.0)
        counts = store.writer_counts()
        assert 0 < counts.buffered <= counts.buffer_bytes == 600
        with pytest.raises(Unavailable):
            writer.reward(1.0)
        counts = store.writer_counts()  # what was in the buffer has reached its deadline, perhaps
        assert counts.blocked >= 1
        assert counts.blocked_seconds > 0
        own_server.resume()
        with contextlib.suppress(trajstore.TrajstoreError):  # the deadline may have come first
            store.flush(writer.id)


def test_two_stores_of_one_run_add_up(open_store):
    one, other = open_store(), open_store()
    finish(one)
    finish(other)
    both = shown(one, other)[f"trajstore_events_total{{run={one.run}}}"]
    assert both == one.writer_counts().events + other.writer_counts().events


def test_a_registry_takes_them_once_and_says_so(store):
    registry = prometheus_client.CollectorRegistry()
    metrics.watch(store, registry=registry)
    with pytest.raises(Conflict, match="in one call of watch"):
        metrics.watch(store, registry=registry)


def test_watching_keeps_nothing_alive(embedded):
    archiver = Archiver(embedded)
    registry = prometheus_client.CollectorRegistry()
    metrics.watch(archiver, registry=registry)
    assert b"trajstore_archiver_packs_total{" in metrics.exposition(registry)[0]
    del archiver
    gc.collect()
    assert b"trajstore_archiver_packs_total{" not in metrics.exposition(registry)[0]


def test_drift_is_that_of_an_audit(store):
    ids = []
    for _ in range(3):
        writer = record_seed_case(store)
        writer.close("completed")
        ids.append(writer.id)
    drift, none = DriftSample(store, share=1.0), DriftSample(store, share=0.0)
    materialize(store, on_offered=lambda one: (drift.add(one), none.add(one)))
    found = drift_by_layer(store, ids)
    assert (drift.rows, drift.differing) == (found.tokens, found.tokens_differing)
    assert drift.differing == 21
    assert none.rows == 0


def test_a_run_whose_server_is_away_is_down_and_shows_nothing_else(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1, timeout=1.0) as store:
        own_server.kill()
        assert shown(RunLook(store)) == {f"trajstore_run_up{{run={run_name}}}": 0}


def test_a_scrape_waits_for_a_server_that_hangs_no_longer_than_its_scraper(store, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(metrics, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr("trajstore.status.measure_status", lambda run: gate.wait(20) and measure_status(run))
    look = RunLook(store)
    assert shown(look) == {f"trajstore_run_up{{run={store.run}}}": 0}
    gate.set()
    monkeypatch.setattr(metrics, "_LOOK_SECONDS", 20.0)
    assert shown(look)[f"trajstore_run_up{{run={store.run}}}"] == 1


def test_the_library_does_without_prometheus_client():
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import trajstore, trajstore.metrics, trajstore.cli.workers, trajstore.cli.status\n"
        "from trajstore.cli.listening import metrics_page\n"
        "answer = metrics_page()()\n"
        "assert (answer.status, b'trajstore[metrics]' in answer.body) == (501, True), answer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("Error")) == (0, 0), done.stderr
