"""What `benchmarks/reader.py` measures: the same samples by each way, goals decided, and a rival that may be absent."""

import itertools
import json
import math

import pytest
import torch

from benchmarks import reader_rivals
from benchmarks.corpora import Corpus
from benchmarks.reader import QUICK, TOPICS, run
from benchmarks.reader_batch import COLLATE
from benchmarks.reader_memory import memory_of_reading
from benchmarks.reader_rivals import Pickles, SavedBatch, transfer_queue
from benchmarks.ready_samples import Reader, publish
from trajstore_trainer import padded_batch

pytestmark = pytest.mark.torch

SHORT = Corpus("real", 6, lengths=(40, 60))

GROUPS = 3


@pytest.fixture
def trajectories(embedded):
    """Two batches lie ready; those of the first."""
    publish(embedded, SHORT, list(itertools.islice(SHORT.rollouts(), 2 * GROUPS * 4)))
    reader = Reader(embedded, GROUPS)
    reader.fresh()
    return reader.read()


def assert_same(batch, tensors):
    assert batch.tensors().keys() == tensors.keys()
    for name, tensor in batch.tensors().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_every_way_gives_the_same_batch(embedded, trajectories, tmp_path):
    again = Reader(embedded, GROUPS)
    for _ in range(2):
        again.fresh()
        assert [one.id for one in again.read()] == [one.id for one in trajectories], "a new consumer group each time"
    for layout, collate in COLLATE.items():
        batch = collate(trajectories)
        assert len(batch) == GROUPS * 4
        assert_same(batch, SavedBatch(tmp_path / layout, batch).get())
    pickles = Pickles(embedded, trajectories)
    for _ in range(2):
        pickles.put()
    assert_same(padded_batch(trajectories), pickles.get().tensors())
    pickles.close()


@pytest.mark.skipif(not reader_rivals.PYTHON.exists(), reason="TransferQueue's environment is not built")
def test_transfer_queue_gives_back_the_samples_that_were_put(trajectories, tmp_path):
    with transfer_queue(tmp_path, padded_batch(trajectories), trajectories) as queue:
        for layout in reader_rivals.LAYOUTS:
            assert [queue.tell(command, layout) for command in ("put", "get", "check")] == ["done", "done", "same"]
            assert queue.tell("clear", layout) == "done"
        with pytest.raises(RuntimeError, match="has ended"):
            queue.tell("shrink", "padded")
    for name, rows in torch.load(tmp_path / "jagged.pt").items():
        assert [len(row) for row in rows] == [len(one) for one in trajectories], name


def test_absent_rival_is_told_and_decides_no_goal(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_rivals, "PYTHON", tmp_path / "none")
    heard = []
    report = run(QUICK, tmp_path, show=heard.append)
    assert heard == report.tables
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    getting, putting, latency, memory = report.tables
    assert "build_transferqueue.sh" in getting.rows[-1][0]
    assert [len(table.rows) for table in (getting, putting, latency, memory)] == [9, 2, 3, 2]
    assert all(math.isfinite(goal.value) for goal in report.goals)
    assert {goal.name.partition(",")[0].partition(":")[0] for goal in report.goals} == {"store", "latency", "memory"}
    assert not any("TransferQueue" in goal.name for goal in report.goals)
    document = json.loads(json.dumps(report.as_json()))
    assert [goal["met"] for goal in document["goals"]] == [goal.met for goal in report.goals]
    assert list(TOPICS) == ["batch", "latency", "memory"]


def test_memory_of_reading_grows_with_the_prefetch(embedded, tmp_path):
    """Else its figure would say nothing about the bound."""
    long = Corpus("real", 6, lengths=(2048,))
    rollouts = list(itertools.islice(long.rollouts(), 12 * 4))
    publish(embedded, long, rollouts)
    narrow, wide = (memory_of_reading(tmp_path / "store", groups=2, prefetch_bytes=nbytes) for nbytes in (1, 1 << 30))
    assert wide - narrow > 0.5 * sum(one.nbytes for one in rollouts)
