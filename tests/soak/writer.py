"""A writer of the crash loop: `python -m tests.soak.writer URL NAME SEED ACK LEDGER OPTIONS`, OPTIONS in JSON.

It goes on with several trajectories in turn, and keeps its ledger, until SIGTERM. A server that is away is waited for;
an error that the library reports about a trajectory ends the trajectory.
"""

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import trajstore
from tests.core.logs import Log
from tests.soak.ledger import Ledger, event_digests
from tests.soak.patience import PATIENCE, once_there
from tests.soak.script import Turn, create, life, open_log, play_to_log, play_to_store

ACTIVE = 4
PAUSE = 0.02


class Lost(Exception):
    """Errors that the store has reported and that are entered, by trajectory."""

    def __init__(self, errors: dict[str, Exception]) -> None:
        super().__init__(errors)
        self.errors = errors


class Going:
    """A trajectory that is being written: its handle, its turns, and the log that it should have."""

    def __init__(self, store: trajstore.Store, id: str, seed: int) -> None:
        self.id = id
        self.turns: list[Turn] = [[], *life(seed, id)]
        self.done = 0
        self.log: Log = open_log()
        self.handle: Any = once_there(lambda: create(store, id))

    def finished(self) -> bool:
        return self.done == len(self.turns)


def go_on(store: trajstore.Store, ledger: Ledger, going: Going, *, anew: bool) -> None:
    """One more turn, flushed and entered."""
    turn = going.turns[going.done]
    if anew and going.done:
        going.handle = handle_of(store, ledger, going)
    ledger.begin(going.id, going.done + 1)
    play_to_store(turn, going.handle)
    store.flush(going.id)
    known = event_digests(going.log) if going.done else {}
    play_to_log(turn, going.log)
    going.done += 1
    ledger.acknowledge(
        going.id, going.done, {id: one for id, one in event_digests(going.log).items() if id not in known}
    )


def handle_of(store: trajstore.Store, ledger: Ledger, going: Going) -> trajstore.TrajectoryWriter:
    """A fresh handle that stands on everything acknowledged.

    What a crash of the server has taken the store's flusher brings back, or says that it cannot.

    Raises:
        Lost: it says so, of this trajectory or of others.
    """
    deadline = time.monotonic() + PATIENCE
    expected = (going.log.events[-1].at.epoch, len(going.log.token_ids))
    while True:
        found: object
        try:
            handle = store.get(going.id)
            found = (handle._epoch, len(handle))
            if found == expected:
                return handle
        except (trajstore.Unavailable, trajstore.NotFound) as error:
            found = error
        errors = {enter(ledger, error): error for error in errors_of(store.flush)}
        if errors:
            raise Lost(errors)
        if time.monotonic() > deadline:
            raise AssertionError(f"{going.id} stands at {found}, not {expected}, and no error has said so")
        threading.Event().wait(0.05)


def close_what_is_left(store: trajstore.Store, id: str) -> None:
    """Take the next turn on what the server still has: if the archive had more, the two would contradict each other."""
    with contextlib.suppress(trajstore.TrajstoreError):  # away again, or final
        store.get(id).close("aborted", takeover=True)
        store.flush(id)


def main(url: str, name: str, seed: str, ack: Any, path: str, options: str) -> None:
    """Write until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    rng = np.random.default_rng([int(seed), *name.encode()])
    ledger = Ledger(Path(path))
    archive_options = msgspec.json.decode(options)
    store = once_there(lambda: trajstore.open(url, ack=ack, archive_options=archive_options, create=False))
    active: list[Going] = []
    begun = 0
    while not stop.is_set():
        while len(active) < ACTIVE:
            ledger.begin(f"{name}-{begun}", 1)
            active.append(Going(store, f"{name}-{begun}", int(seed)))
            begun += 1
        going = active[int(rng.integers(ACTIVE))]
        try:
            go_on(store, ledger, going, anew=rng.random() < 0.3)
        except trajstore.TrajstoreError as error:
            ledger.report(going.id, error)
            active.remove(going)
            close_what_is_left(store, going.id)
        except Lost as lost:
            for one in [one for one in active if one.id in lost.errors]:
                active.remove(one)
                close_what_is_left(store, one.id)
        else:
            if going.finished():
                active.remove(going)
        stop.wait(PAUSE)
    for error in errors_of(store.close):
        enter(ledger, error)


def errors_of(call: Callable[[], None]) -> list[Exception]:
    """What the store says of all trajectories."""
    try:
        call()
    except trajstore.TrajstoreError as error:
        return [error]
    except ExceptionGroup as group:
        return list(group.exceptions)
    return []


def enter(ledger: Ledger, error: Exception) -> str:
    """Enter an error that the store has reported; the id that its message names, "" for none."""
    named = re.match(r"w[0-9]+-[0-9]+", str(error))
    id = named[0] if named else ""
    ledger.report(id, error)
    return id


if __name__ == "__main__":
    main(*sys.argv[1:])
