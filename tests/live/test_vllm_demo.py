"""The main job with a real vLLM, as a person runs it."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("vllm", reason="no vLLM in this environment; `make engines-live` builds one")

import trajstore
from trajstore_demo.report import DemoReport


def test_the_main_job_runs_over_vllm_and_its_trainer_agrees_with_the_rollout(tmp_path: Path):
    folder = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "trajstore_vllm_demo", folder], check=True, timeout=280)
    report = msgspec.json.decode((folder / "demo" / "summary.json").read_bytes(), type=DemoReport)
    assert sum(report.statuses.values()) == 80
    assert set(report.statuses) <= {"completed", "truncated"}
    assert len(report.rewards) == 10
    assert report.updates_that_aborted >= 1
    assert report.mixed_versions >= 1
    assert report.hot_entries == 0
    assert report.kl[0] < 1e-4  # the first step trains on what its own weights sampled
    archive = trajstore.open_archive(folder / "archive")
    for one in archive.list():
        t = archive.load(one.id)
        assert t.routing_mask.tolist() == [True] * (len(t) - 1) + [False]
