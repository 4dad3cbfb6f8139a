"""`kill -9` of a writer in the middle of a batch: nothing acknowledged is lost, nothing is doubled, all of it folds."""

import signal
import subprocess
import sys

import numpy as np
import pytest

import trajstore
from tests.builders import rows
from tests.log.fast_writer import CHUNK


@pytest.mark.parametrize("after", [1, 7, 40, 90])
def test_killed_writer_loses_nothing_that_was_acknowledged(own_server, run_name, after):
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.log.fast_writer", own_server.url(run_name), "w", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    acknowledged: dict[str, int] = {}
    with writer.stdout as pipe:
        for _ in range(after):
            id, tokens = pipe.readline().split()
            acknowledged[id] = int(tokens)
        writer.send_signal(signal.SIGKILL)
        for line in pipe.read().splitlines():  # what it told before the signal arrived
            if len(line.split()) == 2:
                id, tokens = line.split()
                acknowledged[id] = max(acknowledged.get(id, 0), int(tokens))
    writer.wait(10)
    with trajstore.open(own_server.url(run_name)) as store:
        for summary in store.list():
            loaded = store.load(summary.id)
            told = acknowledged.get(summary.id, 0)
            assert len(loaded.token_ids) >= told
            assert len(loaded.token_ids) <= told + CHUNK  # at most the one that was in flight
            assert np.array_equal(loaded.token_ids, np.arange(len(loaded.token_ids)) % 1000)
            assert summary.tokens == len(loaded.token_ids)
            for segment in loaded.segments[: told // CHUNK]:
                turn = int(segment.weight_version[1:])
                block = loaded.routed_experts[segment.base : segment.base + CHUNK]
                assert np.array_equal(block, rows(CHUNK, seed=turn % 50))
            store.get(summary.id).close("aborted", takeover=True)
        store.flush()
        assert {summary.status for summary in store.list()} == {"aborted"}
        assert set(acknowledged) <= {summary.id for summary in store.list()}
