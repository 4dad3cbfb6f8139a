"""Taking what is ready, for whoever is no Python trainer: each entry goes to a sink, and is acknowledged after."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trajstore.archive.storage.durable import sync_folder
from trajstore.log.run import TRAINER_GROUP
from trajstore.store import Store
from trajstore_trainer import ReadyTrajectories, TrajectoryReader, write_trajectories

__all__ = ["take", "write_ready"]

_BLOCK = 0.5  # seconds within which a stop is noticed


def take(
    store: Store,
    sink: Callable[[ReadyTrajectories], None],
    *,
    count: int | None = None,
    seconds: float | None = None,
    stopped: threading.Event | None = None,
    consumers: str = TRAINER_GROUP,
    name: str | None = None,
) -> int:
    """Give ready entries to `sink`, one at a time; what it returned from is acknowledged and does not come again.

    Nothing is judged: there is no `Selection` here. The sink sees by the entry (`ready.delivery.group`) what of a group
    is late, and what was published of it before.

    At least once: where this process dies between the two, the entry comes again, to the next one of this name at once,
    to others of the consumer group after 300 s.

    Args:
        store: of the run.
        sink: must have kept it, durably, when it returns.
        count: end after so many entries.
        seconds: end after so many seconds.
        stopped: end as soon as it is set.
        consumers: consumer group. Each gets everything, its consumers share it; one that is new begins with what the
            ready streams still hold, and they keep for it what it has not acknowledged, for ever if nobody reads on
            (`trajstore consumers --remove` ends that).
        name: of this consumer in the group, default one that nobody had.

    Returns:
        How many entries were taken.

    Raises:
        Unavailable: the server does not answer.
        Exception: what `sink` raises; the entry at hand is not acknowledged.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    taken = 0
    with TrajectoryReader(store, group=consumers, consumer=name) as reader:
        while taken != count and not (stopped is not None and stopped.is_set()):
            left = _BLOCK if deadline is None else deadline - time.monotonic()
            found = reader.poll(1, max(0.0, min(_BLOCK, left)))
            for ready in found:
                sink(ready)
                reader.acknowledge([ready])
                taken += 1
            if left <= 0 and not found:
                break
    return taken


def write_ready(folder: str | os.PathLike[str], ready: ReadyTrajectories) -> Path:
    """Write an entry as one file of trajectories (`trajstore_trainer.read_trajectories`), durably.

    It is named by its place in the ready streams, `PARTITION-ENTRY.msgpack`: an entry that comes again replaces itself.
    """
    path = Path(folder) / f"{ready.delivery.partition:02}-{ready.delivery.at}.msgpack"
    write_trajectories(path, ready.trajectories)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return path
