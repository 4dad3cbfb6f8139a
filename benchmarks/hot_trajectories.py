"""Whole small trajectories, create to close, at both levels of acknowledgement; beside the same commands sent bare."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from benchmarks import reader_rivals
from benchmarks.hot_scale import HotScale, bare_client, opened, tidy, uncollected
from benchmarks.measure import in_turns
from benchmarks.reader_rivals import transfer_queue
from benchmarks.tables import Cell, Goal, Table, Topic
from trajstore.log.wire import Command
from trajstore.server import Ack
from trajstore_trainer import padded_batch

__all__ = ["measure_trajectories"]

SPEC = trajstore.RoutingSpec(layer_ids=(0, 1), top_k=2, num_experts=8, num_hidden_layers=2)
PROMPT, OUTPUT = 16, 16

PUBLISHED = 2_800.0
"""Samples per second that TransferQueue is said to put durably, on another machine; 17,000 in memory."""


def measure_trajectories(scale: HotScale, folder: Path) -> Topic:
    """Beside a pipelined redis-py loop that sends the very commands of such a round, and TransferQueue's put."""
    levels: dict[Ack, int] = {"memory": scale.trajectories, "fsync": scale.fsynced}
    rows: list[Sequence[Cell]] = []
    goals = []
    for ack, count in levels.items():
        place = folder / ack
        place.mkdir()
        rates = _rates(place, ack, count, scale.repeats)
        ours, bare = rates.values()
        rows += [(f"{name}, {ack}", rate, rate / bare) for name, rate in rates.items()]
        goals.append(Goal(f"trajectories, {ack}: speed over the same commands sent bare", ours / bare, ">=", 0.5))
        if ack == "fsync":
            goals.append(
                Goal("trajectories, fsync: a second (published of TransferQueue: 2800)", ours, ">=", PUBLISHED)
            )
    name, put = _transfer_queue(folder, min(levels.values()), scale.repeats)
    rows.append((name, put, None))
    title = f"Whole trajectories of {PROMPT} + {OUTPUT} tokens: six events, three entries"
    return Topic([Table(title, ("", "a second", "x bare"), rows)], goals)


def write(store: trajstore.Store, count: int) -> list[str]:
    """Trajectories from create to close, acknowledged; their ids."""
    context, tokens = np.arange(PROMPT, dtype=np.int32), np.arange(OUTPUT, dtype=np.int32)
    logprobs = np.full(OUTPUT, -0.5, np.float32)
    rows = np.tile(np.array([[0, 1], [2, 3]], np.uint8), (PROMPT + OUTPUT - 1, 1, 1))
    ids = []
    for _ in range(count):
        trajectory = store.create(routing=SPEC)
        with trajectory.segment(context=context, engine="e/1", weight_version="v1") as segment:
            segment.record(tokens, logprobs, routing=[(rows, 0, "computed")])
            segment.close("stop")
        trajectory.close("completed")
        ids.append(trajectory.id)
    store.flush()
    return ids


def _rates(folder: Path, ack: Ack, count: int, repeats: int) -> dict[str, float]:
    """Trajectories a second: ours, and the bare loop."""
    with opened(folder, ack=ack) as store:
        client = bare_client(store)
        rounds = _listen(store, count)

        def bare() -> None:
            for commands in rounds:
                pipe = client.pipeline(transaction=False)
                for command in commands:
                    pipe.execute_command(*command)  # type: ignore[no-untyped-call]
                pipe.execute()

        def make_room() -> None:
            client.flushdb()
            tidy(store)

        with uncollected():
            seconds = in_turns(
                {"trajstore": lambda: write(store, count), "redis-py, the same commands": bare},
                repeats=repeats,
                before=make_room,
            )
        client.close()
    return {name: count / statistics.median(taken) for name, taken in seconds.items()}


def _listen(store: trajstore.Store, count: int) -> list[list[Command]]:
    """The commands that such a round sends, flush by flush: each list goes out together, as it did."""
    session: Any = store._flusher._session
    heard: list[list[Command]] = []
    exchange = session.exchange

    def listening(commands: Sequence[Command]) -> list[Any]:
        if commands and commands[0][0] == "MULTI":
            heard.append([tuple(command) for command in commands])
        return list(exchange(commands))

    session.exchange = listening
    try:
        write(store, count)
    finally:
        del session.exchange
    return heard


def _transfer_queue(folder: Path, count: int, repeats: int) -> tuple[str, float | None]:
    """Samples a second of its put; None where it is not installed."""
    if not reader_rivals.PYTHON.exists():
        return "TransferQueue, put (not built: tests/live/build_transferqueue.sh)", None
    with opened(folder) as store:
        trajectories = [store.load(id) for id in write(store, count)]
    with transfer_queue(folder, padded_batch(trajectories), trajectories) as queue:
        seconds = in_turns(
            {"put": lambda: queue.tell("put", "padded")},
            repeats=repeats,
            before=lambda: queue.tell("clear", "padded"),
        )
    return "TransferQueue, put, in memory", count / statistics.median(seconds["put"])
