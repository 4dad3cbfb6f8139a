"""A rank of a chaos run: `python -m tests.soak.chaos.trainer HOW URL RANK WORLD JOURNAL LEASE`, until SIGTERM.

HOW is "checkpoint": what it has trained on and the state of its dataset are one file, replaced as one, and each life
goes on from it. Or "acknowledge": a journal of what it has trained on, then the acknowledgement. A rank that is told
that others have what it had ends with `FENCED`, to be started again.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

import trajstore
from tests.soak.chaos.ledger import Journal, TrainedOn
from tests.soak.chaos.stacks import tell_when_asked
from tests.soak.patience import once_there
from trajstore_trainer import ReadyTrajectories, Selection, TrajectoryDataset

__all__ = ["CONSUMERS", "FENCED", "Checkpoint"]

CONSUMERS = {"checkpoint": "trainer", "acknowledge": "acknowledging"}
"""Consumer group of each kind of rank."""

FENCED = 3
EVERY = 4
TIMEOUT = 10.0
SELECTION = Selection(unfit="rest", min_members=1)


class Checkpoint(msgspec.Struct):
    """What is durable together: what the weights have seen, and where the dataset stands."""

    trained: list[TrainedOn] = []
    state: Any = None


def train_by_checkpoint(dataset: TrajectoryDataset, path: Path, stop: threading.Event) -> None:
    """Go on from the checkpoint, and write the next ones."""
    held = msgspec.json.decode(path.read_bytes(), type=Checkpoint) if path.exists() else Checkpoint()
    if held.state is None:
        held.state = once_there(dataset.state_dict)
    once_there(lambda: dataset.load_state_dict(held.state))
    uncommitted = 0
    while not stop.is_set():
        with contextlib.suppress(trajstore.Unavailable):  # nothing came for a while, or the server is away
            for ready in dataset:
                held.trained.append(_trained_on(ready))
                uncommitted += 1
                if uncommitted >= EVERY or stop.is_set():
                    break
        if uncommitted:
            with contextlib.suppress(trajstore.Unavailable):
                held.state = dataset.state_dict()
                _replace(path, msgspec.json.encode(held))
                dataset.commit(held.state)
                uncommitted = 0


def train_by_acknowledgement(dataset: TrajectoryDataset, path: Path, stop: threading.Event) -> None:
    """Enter what was trained on, then acknowledge it."""
    journal = Journal(path)
    while not stop.is_set():
        with contextlib.suppress(trajstore.Unavailable):
            dataset.acknowledge()  # what the server did not answer to the last time; nothing new may come after it
            for ready in dataset:
                journal.write(_trained_on(ready))
                dataset.acknowledge()
                if stop.is_set():
                    break


def _trained_on(ready: ReadyTrajectories) -> TrainedOn:
    name = ready.group or ready.trajectories[0].id
    return TrainedOn(str(ready.delivery.place), name, ready.version, [(one.id, one.at) for one in ready.trajectories])


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def main(how: str, url: str, rank: str, world: str, path: str, lease: str) -> None:
    """Train until SIGTERM."""
    tell_when_asked()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store = once_there(lambda: trajstore.open(url, create=False, timeout=TIMEOUT))
    with (
        store,
        TrajectoryDataset(
            store,
            group=CONSUMERS[how],
            rank=int(rank),
            world_size=int(world),
            checkpoints=how == "checkpoint",
            selection=SELECTION,
            lease=float(lease),
            timeout=1.0,
            prefetch_groups=2,
        ) as dataset,
    ):
        try:
            (train_by_checkpoint if how == "checkpoint" else train_by_acknowledgement)(dataset, Path(path), stop)
        except trajstore.Fenced as error:
            logging.getLogger(__name__).warning("%s", error)
            sys.exit(FENCED)


if __name__ == "__main__":
    main(*sys.argv[1:])
