"""What `benchmarks/archive.py` measures: ways that store the same and read it back, rows stored once, goals decided."""

import json
import math

import numpy as np
import pytest

from benchmarks.archive import TOPICS, run
from benchmarks.corpora import Corpus
from benchmarks.packs import Packs
from benchmarks.rivals import RIVALS
from benchmarks.tables import Goal, Scale

TINY = Scale(
    pack_bytes=1 << 20,
    repeats=1,
    read_packs=2,
    reads=3,
    many=(20, 60),
    archiver_pack_bytes=1 << 20,
    archiver_packs=(1, 2),
)

SHORT = Corpus("real", lengths=(100, 300))


@pytest.mark.parametrize("name", ["packs", *RIVALS])
def test_every_way_reads_back_what_it_stored(name, tmp_path):
    way = Packs(tmp_path, SHORT.spec) if name == "packs" else RIVALS[name](tmp_path)
    stored = SHORT.take(1 << 18)
    way.write(stored[:3])
    way.write(stored[3:])
    for number, (wanted, scanned) in enumerate(zip(stored, way.scan(), strict=True)):
        for found in (scanned, way.read(number)):
            for column, same in zip(wanted, found, strict=True):
                assert column.dtype == same.dtype
                np.testing.assert_array_equal(column, same)
        np.testing.assert_array_equal(way.routed(number), wanted.routed)


@pytest.mark.parametrize("corpus", [Corpus("real"), Corpus("real", 6), Corpus("noise"), Corpus("sorted")])
def test_corpora_never_store_a_window_twice(corpus):
    rollouts = corpus.take(12 << 20)
    rows = np.concatenate([rollout.routed for rollout in rollouts])
    assert len(rows) > 65536 or corpus.repeat > 1, "it has gone round the recorded array"
    corpus.spec.narrow(rows, start=0)
    windows = rows[: len(rows) // 64 * 64].reshape(-1, 64 * corpus.spec.row_bytes)
    assert len({window.tobytes() for window in windows}) == len(windows)


def test_report_decides_every_goal(tmp_path):
    heard = []
    report = run(TINY, tmp_path, show=heard.append)
    assert heard == report.tables
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert all(math.isfinite(goal.value) for goal in report.goals)
    assert {goal.name.partition(",")[0].partition(":")[0] for goal in report.goals} == {
        "write",
        "size",
        "read",
        "growth",
        "archiver",
    }
    document = json.loads(json.dumps(report.as_json()))
    assert [goal["met"] for goal in document["goals"]] == [goal.met for goal in report.goals]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_one_topic_alone_is_measured(tmp_path):
    titles = [table.title for table in run(TINY, tmp_path, only="resumed").tables]
    assert titles
    assert all(title.startswith("Resumed") for title in titles)
    assert "resumed" in TOPICS


def test_goal_is_met_from_its_limit_on():
    assert Goal("speed", 5.0, ">=", 5.0).met
    assert not Goal("speed", 4.9, ">=", 5.0).met
    assert Goal("size", 0.42, "<=", 0.42).met
    assert Goal("size", 0.43, "<=", 0.42).as_text().startswith("NO")
