"""Flush, aflush, group commit, and many producers at once."""

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, rows
from tests.log.looking import dense, entries


def test_flush_means_acknowledged(store, client):
    trajectory = store.create()
    store.flush(trajectory.id)
    assert client.xlen(store.keys.entries(trajectory.id)) == 1


def test_aflush_leaves_the_event_loop_responsive(own_server, open_at):
    store = open_at(own_server)
    trajectory = store.create()
    store.flush()
    own_server.pause()
    trajectory.reward(1.0)

    async def main():
        flush = asyncio.create_task(store.aflush())
        for _ in range(20):  # ticks, while the server stands still
            await asyncio.sleep(0.005)
        assert not flush.done()
        own_server.resume()
        await flush

    asyncio.run(main())
    assert store.load(trajectory.id).reward == 1.0


def test_aflush_raises_what_could_not_be_written(own_server, open_at):
    store = open_at(own_server, timeout=1.0)
    trajectory = store.create()
    store.flush()
    own_server.pause()
    trajectory.reward(1.0)
    with pytest.raises(trajstore.Unavailable):
        asyncio.run(store.aflush(trajectory.id))
    own_server.resume()


def test_cancelled_aflush_does_no_harm_to_the_writer(own_server, open_at):
    """The future is the flusher's: a caller that gives up must not cancel it under the flusher's hands."""
    store = open_at(own_server)
    trajectory = store.create()
    store.flush()

    async def main():
        for _ in range(20):
            own_server.pause()
            trajectory.reward(1.0)
            flush = asyncio.create_task(store.aflush())
            await asyncio.sleep(0)
            flush.cancel()
            own_server.resume()
            with pytest.raises(asyncio.CancelledError):
                await flush
            await store.aflush()

    asyncio.run(main())
    assert store._flusher._thread.is_alive()


def test_async_context_manager_flushes(backend, run_name):
    async def main():
        async with trajstore.open(backend.url(run_name), partitions=1) as store:
            trajectory = store.create()
            trajectory.close()
        return trajectory.id

    id = asyncio.run(main())
    with trajstore.open(backend.url(run_name)) as store:
        assert store.load(id).status == "completed"


def test_many_trajectories_share_round_trips(own_server, own_client, open_at):
    """Group commit: 400 trajectories, one transaction each, in a few reads of the server's socket."""
    store = open_at(own_server)
    trajectories = [store.create() for _ in range(400)]
    store.flush()
    own_client.config_resetstat()
    own_server.pause()
    for trajectory in trajectories:
        trajectory.reward(1.0)
    own_server.resume()
    store.flush()
    stats = own_client.info("stats")
    assert own_client.info("commandstats")["cmdstat_exec"]["calls"] == 400
    assert stats["total_reads_processed"] < 60


def test_events_of_one_trajectory_share_entries(own_server, own_client, open_at):
    store = open_at(own_server)
    trajectory = store.create()
    store.flush()
    segment = trajectory.segment()
    store.flush()
    own_server.pause()
    for token in range(500):
        segment.tokens([token])
    own_server.resume()
    store.flush()
    found = entries(own_client, store, trajectory.id)
    assert dense(found) == 502
    assert len(found) <= 4  # what was in flight at the pause, and the rest together


def test_interleaved_producers_over_a_thousand_trajectories_load_back_exactly(store):
    """verl #6029 and the like concatenate what belongs apart; here 1,000 trajectories grow turn by turn at once."""
    producers, each = 4, 250
    made: dict[str, list[int]] = {}

    def produce(producer):
        trajectories = [store.create(id=f"{producer}-{i}", routing=SPEC) for i in range(each)]
        segments = [t.segment(context=[producer, i]) for i, t in enumerate(trajectories)]
        for turn in range(2):
            for i, segment in enumerate(segments):
                segment.tokens([turn, i], [-0.5, -0.25])
        for i, segment in enumerate(segments):
            segment.routing(rows(6, seed=i), start=0)
            segment.close("stop")
            made[trajectories[i].id] = [producer, i, 0, i, 1, i]

    threads = [threading.Thread(target=produce, args=(producer,)) for producer in range(producers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.flush()
    assert len(made) == producers * each
    for id, tokens in made.items():
        loaded = store.load(id)
        assert loaded.token_ids.tolist() == tokens
        assert np.array_equal(loaded.routed_experts, rows(6, seed=tokens[1]))
    assert len(store.list()) == producers * each


def test_two_processes_write_to_different_trajectories_of_one_run(own_server, run_name):
    writers = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.log.fast_writer", own_server.url(run_name), name, "60"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    }
    told = {name: writer.communicate(timeout=60)[0].splitlines()[-1] for name, writer in writers.items()}
    assert [writer.returncode for writer in writers.values()] == [0, 0]
    with trajstore.open(own_server.url(run_name)) as store:
        assert len(store.list()) == 2 * 4
        for name, last in told.items():
            id, tokens = last.split()
            assert id.startswith(name)
            assert len(store.load(id).token_ids) == int(tokens)
