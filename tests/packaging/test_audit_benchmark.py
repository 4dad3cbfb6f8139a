"""What `benchmarks/audit.py` measures: the same cells by all ways, goals decided, nothing left behind."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.audit import CORPUS, QUICK, TOPICS, AuditScale, by_numpy, by_torch, drift, measure_memory, run
from trajstore_audit import differing_sets

pytestmark = pytest.mark.torch

TINY = AuditScale(kernel_bytes=1 << 18, drifted_bytes=3 << 20, memory_bytes=4 << 20, repeats=1)


def test_every_way_finds_the_same_cells():
    first = CORPUS.take(1 << 20)[0].routed
    for share in (0.0, 0.1, 1.0):
        second = drift(first, share)
        expected = by_numpy(first, second)
        np.testing.assert_array_equal(differing_sets(first, second), expected)
        np.testing.assert_array_equal(by_torch(torch.from_numpy(first), torch.from_numpy(second)).numpy(), expected)
        assert share - 0.1 < expected.mean() <= share


def test_report_decides_every_goal(tmp_path):
    heard = []
    report = run(TINY, tmp_path, show=heard.append)
    assert heard == report.tables
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert all(math.isfinite(goal.value) for goal in report.goals)
    assert {goal.name.partition(",")[0].partition(":")[0] for goal in report.goals} == set(TOPICS)
    assert json.loads(json.dumps(report.as_json()))["goals"]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_quick_run_judges_no_time(tmp_path):
    report = run(TINY._replace(judges_time=QUICK.judges_time), tmp_path)
    assert [goal.name for goal in report.goals] == ["memory: bytes over 1 GiB"]


def test_more_than_the_disk_has_free_is_not_begun(tmp_path):
    with pytest.raises(SystemExit, match=r"are needed; give --dir"):
        measure_memory(TINY._replace(memory_bytes=1 << 60), tmp_path)
    assert list(tmp_path.iterdir()) == []
