"""What `benchmarks/hotpath.py` measures: the same bytes on both sides, goals decided, nothing left behind."""

import json
import math

import pytest

from benchmarks import reader_rivals
from benchmarks.hot_scale import QUICK, bare_client, opened, tidy
from benchmarks.hot_trajectories import _listen, write
from benchmarks.hotpath import TOPICS, run

pytestmark = pytest.mark.torch

TINY = QUICK._replace(payloads=2, together=2, events=128, trajectories=4, fsynced=4, many=(2, 4), waiting=(2, 4))


def test_report_decides_every_goal(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_rivals, "PYTHON", tmp_path / "none")
    heard = []
    report = run(TINY, tmp_path, show=heard.append)
    assert heard == report.tables
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)
    assert [len(table.rows) for table in report.tables] == [5, 5, 3, 2, 5, 2, 2]
    assert all(math.isfinite(goal.value) for goal in report.goals)
    assert {goal.name.partition(":")[0].partition(",")[0] for goal in report.goals} == set(TOPICS)
    document = json.loads(json.dumps(report.as_json()))
    assert [goal["met"] for goal in document["goals"]] == [goal.met for goal in report.goals]


def test_bare_loop_sends_what_the_store_sends(tmp_path):
    """Its goal says something only if the server does the same work for both."""
    with opened(tmp_path) as store:
        client = bare_client(store)
        before = set(client.keys())
        for _ in range(9):  # a flush that begins in the middle of a segment sends it in two parts
            heard = _listen(store, 3)
            names = [command[0] for commands in heard for command in commands]
            if names.count("MULTI") == 9:
                break
        assert names.count("MULTI") == names.count("EXEC") == 9, "create, segment and close of each"
        for commands in heard:
            pipe = client.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            pipe.execute()
        written = set(client.keys("*:e:*")) - before
        assert len(written) == 3
        for key in written:
            theirs, ours = client.xrange(key), store.wire.call("XRANGE", key, "-", "+")
            assert [(at, *fields.items()) for at, fields in theirs] == [(at, tuple(pair)) for at, pair in ours]
        client.close()


def test_tidied_server_holds_as_much_as_before(tmp_path):
    with opened(tmp_path) as store:
        (id,) = write(store, 1)
        tidy(store)
        assert store.load(id).status == "completed"
