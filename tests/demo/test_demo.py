"""The main job as a user runs it: `trajstore demo`, real processes, real model, read back afterwards."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import click
import msgspec
import numpy as np
import pytest
from rich.console import Console

import trajstore
from trajstore_demo import command
from trajstore_demo.plan import DemoPlan
from trajstore_demo.report import DemoReport, next_commands

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

DEMO = [sys.executable, "-m", "trajstore", "demo"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A run that has ended, and its summary as `--json` printed it."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run([*DEMO, str(folder), "--json"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_main_job_aborts_resumes_trains_and_archives(finished):
    folder, report = finished
    assert report["trajectories"] >= 32
    assert report["statuses"].keys() <= {"completed", "truncated"}
    assert report["updates_that_aborted"] >= 2
    assert report["aborted_segments"] > 0
    assert report["resumed"] > 0
    assert report["hot_entries"] == 0
    assert report["packs"] > 0
    assert len(report["rewards"]) == report["groups"] // 2
    assert report["kl"][0] < 1e-6, "the first step trains on what its own weights sampled: the logprobs must agree"
    assert report == json.loads((folder / "demo" / "summary.json").read_text())


def test_every_rollout_of_the_main_job_is_whole(finished):
    """One row for each token but the last, from the newest segment; a logprob and a version for each sampled token."""
    archive = trajstore.open_archive(finished[0])
    for summary in archive.list():
        t = archive.load(summary.id)
        assert t.routing_mask[:-1].all()
        assert not t.routing_mask[-1]
        assert (t.routing_source[:-1] == len(t.segments) - 1).all(), "each resume re-prefilled everything"
        assert np.isfinite(t.logprobs[t.loss_mask]).all()
        assert all(t.weight_version(i) for i in np.flatnonzero(t.loss_mask))
        assert t.routing.layer_ids == (1, 2, 3, 4, 5), "the first layer is dense"
        assert t.reward is not None
        sampled = archive.load(summary.id, policy="as_sampled")
        assert sampled.routing_mask[:-1].all()
        owner = sampled.segment_ids[1:]
        np.testing.assert_array_equal(sampled.routing_source[:-1], owner, "row p is of the segment that brought p + 1")


def test_drift_of_the_main_job_is_what_the_recordings_say(finished):
    folder, report = finished
    archive = trajstore.open_archive(folder)
    rows, differing = np.zeros(5, int), np.zeros(5, int)
    for summary in archive.list():
        recordings = [segment.recordings for segment in archive.load(summary.id).segments]
        assert all(len(some) <= 1 for some in recordings)
        blocks = [archive.recorded_rows(summary.id, some[0]) for some in recordings if some]
        for first, second in itertools.pairwise(blocks):
            a, b = np.sort(first, axis=-1), np.sort(second[: len(first)], axis=-1)
            rows += len(a)
            differing += (a != b).any(axis=-1).sum(axis=0)
    assert report["drift"]["rows"] == rows.tolist()
    assert report["drift"]["differing"] == differing.tolist()
    assert differing.sum() > 0, "weights changed, so some routing must have"


def test_every_command_that_the_demo_names_works(finished):
    folder, report = finished
    _, *lines = next_commands(msgspec.convert(report, DemoReport, strict=False), folder).splitlines()
    told = [line.partition("[dim]")[0].split()[1:] for line in lines]
    assert {command for command, *_ in told} == {"ls", "show", "events", "replay", "why", "audit"}
    for arguments in told:
        command = [sys.executable, "-m", "trajstore", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (arguments, done.stderr)
    assert "<html" in (folder / "demo" / "audit.html").read_text()


def test_no_process_is_left_behind(finished):
    assert not processes_over(finished[0])


def test_demo_wants_a_folder_of_its_own(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    refused = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "not empty" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("victim", ["trajstore_demo.training", "materialize"])
def test_run_whose_process_dies_ends_with_its_name_and_leaves_nothing_running(tmp_path, victim):
    folder = tmp_path / "run"
    demo = subprocess.Popen([*DEMO, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(first_process(folder, victim), signal.SIGKILL)
    _, shown = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert {"trajstore_demo.training": "trainer", "materialize": "materializer"}[victim] in shown
    assert "Traceback" not in shown
    assert not processes_over(folder)


def test_worker_that_ends_well_but_early_ends_the_run(tmp_path):
    """A materializer that somebody stops exits with 0; the trainer would wait for it for ever."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    commands = dict.fromkeys(("archiver", "trainer", "rollout"), sleeper)
    commands["materializer"] = [sys.executable, "-c", "import sys; sys.stderr.write('signed off')"]
    plan = DemoPlan(groups=2, seed=0)
    with trajstore.open(tmp_path / "run") as store:
        plan.write(tmp_path / "run")
        with (
            command._processes(tmp_path / "run", commands) as processes,
            pytest.raises(click.ClickException, match=r"materializer .* code 0, before .*\n  signed off"),
        ):
            command._watch(store, tmp_path / "run", plan, Console(file=io.StringIO()), processes)


def test_interrupted_run_leaves_nothing_running(tmp_path):
    folder = tmp_path / "run"
    demo = subprocess.Popen([*DEMO, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first_process(folder, "trajstore_demo.rollout")
    demo.send_signal(signal.SIGINT)
    _, shown = demo.communicate(timeout=120)
    assert demo.returncode != 0
    assert "Traceback" not in shown
    assert not processes_over(folder)


def test_process_that_is_just_being_started_does_not_outlive_an_interruption(tmp_path, monkeypatch):
    """Ctrl-C between a process's start and its name on the list: it ran on, one time in twelve."""
    (tmp_path / "demo").mkdir()
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(KeyboardInterrupt), command._processes(tmp_path, {"first": sleeper, "second": sleeper}):
        pytest.fail("the interruption went by")
    ended = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    assert ended == [-signal.SIGTERM]


def processes_over(folder: Path, of: str = "") -> list[int]:
    """Pids of processes that have the run's folder (and `of`) in their command line or their working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            inside = (process / "cwd").resolve().is_relative_to(folder)
        except OSError:
            continue
        if (str(folder) in command or inside) and of in command and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def first_process(folder: Path, of: str) -> int:
    waiter = threading.Event()
    for _ in range(6000):
        for pid in processes_over(folder, of):
            return pid
        waiter.wait(0.01)
    raise AssertionError(f"no {of} started")
