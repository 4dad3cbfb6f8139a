"""Large payloads, small events, and what one call costs the engine's thread."""

import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from unittest import mock

import numpy as np
import numpy.typing as npt

import trajstore
from benchmarks.hot_scale import HotScale, RawClient, bare_client, opened, socket_path, tidy, uncollected
from benchmarks.measure import in_turns
from benchmarks.tables import Cell, Goal, Table, Topic
from trajstore.log.resp import pack
from trajstore.slabs import Slabs

__all__ = ["measure_calls", "measure_events", "measure_payloads"]

SPEC = trajstore.RoutingSpec(layer_ids=tuple(range(32)), top_k=8, num_experts=128, num_hidden_layers=32)
PAYLOAD = 3 << 19
"""Bytes of routing in one event: 6144 rows of 32 layers, top-8."""

TOKENS = 62
"""Of one small event: 248 bytes of ids and 248 of logprobs ride in its header."""

BATCH = 200
"""XADDs that the bare client sends together."""


def measure_payloads(scale: HotScale, folder: Path) -> Topic:
    """Recordings of 1.5 MB, written until acknowledged and read back, beside bare HSETs and HGETs of the same bytes.

    Trajectories of several, each recording of other rows, show what a payload costs; those of one, what a rollout adds.
    A thread of HSETs beside one that checks the rows first, as every recording is checked, shows what is left of the
    bare client then: with the server these are three that want a core. What is read is checksummed; the same with
    zlib's CRC-32 shows what that costs where isal is missing.
    """
    count, shapes = scale.payloads, (scale.together, 1)
    recorded = _rows(PAYLOAD // SPEC.row_bytes)
    payload = recorded.tobytes()
    keys = [f"bare-{i}" for i in range(count)]
    contexts = {several: np.zeros(len(recorded) * several + 1, np.int32) for several in shapes}
    with opened(folder) as store:
        client, raw = bare_client(store), RawClient(socket_path(store))
        sets = [pack([("HSET", key, "1-1", payload)]) for key in keys]
        gets = [pack([("HGET", key, "1-1")]) for key in keys]
        ids: dict[int, list[str]] = {several: [] for several in shapes}

        def write(several: int) -> None:
            for _ in range(count // several):
                trajectory = store.create(routing=SPEC)
                with trajectory.segment(context=contexts[several]) as segment:
                    for i in range(several):
                        segment.routing(recorded, start=len(recorded) * i)
                ids[several].append(trajectory.id)
            store.flush()

        def read(several: int) -> None:
            for id in ids[several]:
                store.load_routing(id)

        def read_by_zlib() -> None:
            with mock.patch("trajstore.log.reader.crc32", zlib.crc32):
                read(scale.together)

        def bare_write() -> None:
            for key in keys:
                client.hset(key, "1-1", payload)

        def bare_write_checked() -> None:
            slabs, checked = Slabs(), SimpleQueue[memoryview]()

            def send() -> None:
                for key in keys:
                    client.hset(key, "1-1", checked.get())

            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(send)
                for _ in keys:
                    checked.put(SPEC.narrow(recorded, start=0, empty=slabs.cut).reshape(-1).data)
                sent.result()

        def bare_read() -> None:
            for key in keys:
                client.hget(key, "1-1")

        def make_room() -> None:
            client.flushdb()
            for written in ids.values():
                for id in written:
                    store.wire.call("UNLINK", store.keys.entries(id), store.keys.payloads(id))
                written.clear()
            tidy(store)

        names = {several: f"trajstore, {several} in a trajectory" for several in shapes}
        writes = in_turns(
            {names[several]: partial(write, several) for several in shapes}
            | {"redis-py, HSET": bare_write, "the same, rows checked beside": bare_write_checked}
            | {"raw frames": partial(raw.send, sets)},
            repeats=scale.repeats,
            before=make_room,
        )
        make_room()
        for several in shapes:
            write(several)
        bare_write()
        tidy(store)
        ways: dict[str, Callable[[], object]] = {names[several]: partial(read, several) for several in shapes}
        ways |= {"redis-py, HGET": bare_read, "raw frames": partial(raw.receive, gets, len(payload))}
        ways[f"{names[scale.together]}, zlib's CRC"] = read_by_zlib
        reads = in_turns(ways, repeats=scale.repeats)
        raw.close()
        client.close()
    tables, goals = [], []
    for verb, found in (("Appending", writes), ("Reading", reads)):
        rates = {name: count * len(payload) / 1e6 / statistics.median(seconds) for name, seconds in found.items()}
        ours, _, bare, *_ = rates.values()
        tables.append(
            Table(
                f"{verb} {count} recordings of {len(payload) / 1e6:.1f} MB",
                ("", "MB/s", "x redis-py"),
                [(name, rate, rate / bare) for name, rate in rates.items()],
            )
        )
        goals.append(Goal(f"payloads, {verb.lower()}: speed over bare redis-py", ours / bare, ">=", 0.9))
    return Topic(tables, goals)


def measure_events(scale: HotScale, folder: Path) -> Topic:
    """Events of 500 bytes, in one trajectory and in many, beside pipelined XADDs of as many bytes."""
    tokens, logprobs = np.arange(TOKENS, dtype=np.int32), np.full(TOKENS, -0.5, np.float32)
    data = tokens.tobytes() + logprobs.tobytes()
    count = scale.events
    with opened(folder) as store, uncollected():
        client = bare_client(store)

        def make_room() -> None:
            client.flushdb()
            tidy(store)

        def write(trajectories: int) -> None:
            segments = [store.create().segment(context=[1]) for _ in range(trajectories)]
            for _ in range(count // trajectories):
                for segment in segments:
                    segment.tokens(tokens, logprobs)
            for segment in segments:
                segment.close("stop")
            store.flush()

        def bare() -> None:
            for begin in range(0, count, BATCH):
                pipe = client.pipeline(transaction=False)
                for i in range(begin, min(begin + BATCH, count)):
                    pipe.xadd(f"bare-{i % 64}", {"e": data})
                pipe.execute()

        seconds = in_turns(
            {
                "trajstore, one trajectory": lambda: write(1),
                "trajstore, 64 trajectories": lambda: write(min(64, count)),
                f"redis-py, XADD, {BATCH} together": bare,
            },
            repeats=scale.repeats,
            before=make_room,
        )
        client.close()
    rates = {name: count / statistics.median(taken) for name, taken in seconds.items()}
    one, many, xadd = rates.values()
    table = Table(
        f"Appending {count} events of {len(data)} bytes",
        ("", "events/s", "x redis-py"),
        [(name, rate, rate / xadd) for name, rate in rates.items()],
    )
    return Topic([table], [Goal("events: speed over a bare pipelined XADD", min(one, many) / xadd, ">=", 0.5)])


def measure_calls(scale: HotScale, folder: Path) -> Topic:
    """What a call costs the thread that makes it: a token of a decode step, and its routing. The buffer has room.

    Calls come at the pace of an engine: 64 requests in flight, then a pause.
    """
    step = _rows(1)
    token, logprob = np.zeros(1, np.int32), np.full(1, -0.5, np.float32)
    calls: dict[str, list[float]] = {"tokens(1 token)": [], "record(1 token, 1 row of 32 layers)": []}
    with opened(folder) as store, uncollected():
        for name, taken in calls.items():
            with_rows = name.startswith("record")
            segments = [store.create(routing=SPEC).segment(context=[1]) for _ in range(64)]
            for i in range(max(2, scale.events // 64 // 8)):
                for segment in segments:
                    begun = time.perf_counter()
                    if with_rows:
                        segment.record(token, logprob, routing=[(step, i, "computed")])
                    else:
                        segment.tokens(token, logprob)
                    taken.append(time.perf_counter() - begun)
                time.sleep(0.01)  # the model's forward
            for segment in segments:
                segment.close("stop")
            store.flush()
        blocked = store.writer_counts().blocked
    rows: list[Sequence[Cell]] = [
        (name, *(1e6 * float(np.percentile(taken, percent)) for percent in (50, 90, 99, 100)))
        for name, taken in calls.items()
    ]
    table = Table("What a call costs its thread, µs", ("", "p50", "p90", "p99", "most"), rows)
    p50 = 1e6 * statistics.median(next(iter(calls.values())))
    goals = [
        Goal("calls: p50 of one append, µs", p50, "<=", 20.0),
        Goal("calls: that waited for room in the buffer", blocked, "<=", 0.0),
    ]
    return Topic([table], goals)


def _rows(count: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.random((count, SPEC.num_layers, SPEC.num_experts)).argsort(axis=-1)[..., : SPEC.top_k].astype(np.uint8)
