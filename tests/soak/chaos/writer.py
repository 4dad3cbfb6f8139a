"""A writer of a chaos run: `python -m tests.soak.chaos.writer URL NAME SEED ACK LEDGER`.

It begins trajectories, takes over those of others, writes a turn of several at a time, and keeps its ledger, until
SIGTERM. Whatever error the library reports about a trajectory is entered, and the trajectory left to whoever comes.
"""

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from tests.soak.chaos.clock import follow
from tests.soak.chaos.ledger import Journal
from tests.soak.chaos.stacks import tell_when_asked
from tests.soak.chaos.turns import Turn, create, draw, play
from tests.soak.patience import once_there
from tests.soak.writer import errors_of

ACTIVE = 6
TOGETHER = 3
TIMEOUT = 10.0
PAUSE = 0.5


class Writer:
    """What one process writes."""

    def __init__(self, store: trajstore.Store, ledger: Journal, *, name: str, seed: int) -> None:
        self._store = store
        self._ledger = ledger
        self._name = name
        self._rng = np.random.default_rng([seed, *name.encode()])
        self._active: dict[str, Any] = {}
        self._others: list[str] = []
        self._begun = 0
        self._keys = 0
        self._rounds = 0

    def round(self) -> None:
        """A turn of some trajectories, all of them on their way together."""
        self._rounds += 1
        if self._rounds % 40 == 1:
            self._look_for_others()
        going: list[Turn] = []
        for _ in range(ACTIVE - len(self._active)):
            if self._others and self._rng.random() < 0.3:
                self._take_over()
            else:
                going += self._create()
        if not self._active:
            threading.Event().wait(PAUSE)  # the server is away
            return
        count = min(TOGETHER, len(self._active))
        for id in self._rng.choice(sorted(self._active), size=count, replace=False):
            turn = draw(self._rng, self._active[id], self._key())
            self._ledger.begin(turn)
            try:
                play(turn, self._active[id], between=self._between)
            except trajstore.TrajstoreError as error:
                self._give_up(turn, error)
            else:
                going.append(turn)
        self._settle(going)

    def _create(self) -> list[Turn]:
        id = f"{self._name}-{self._begun}"
        self._begun += 1
        turn = Turn(id, 1, "create", self._key())
        self._ledger.begin(turn)
        try:
            self._active[id] = create(self._store, id)
        except trajstore.TrajstoreError as error:
            self._give_up(turn, error)
            return []
        return [turn]

    def _take_over(self) -> None:
        id = self._others.pop(int(self._rng.integers(len(self._others))))
        if id in self._active:
            return
        try:
            handle = self._store.get(id)
        except trajstore.TrajstoreError as error:
            self._ledger.report(error, id=id)
            return
        if handle.status in ("open", "aborted"):
            self._active[id] = handle

    def _look_for_others(self) -> None:
        try:
            found = [one.id for one in self._store.list(status=("open", "aborted"))]
        except trajstore.TrajstoreError as error:
            self._ledger.report(error)
            return
        self._others = list(self._rng.permutation(found)[:30].tolist())

    def _settle(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            try:
                self._store.flush(turn.id)
            except trajstore.TrajstoreError as error:
                self._give_up(turn, error)
                continue
            self._ledger.acknowledge(turn)
            if turn.kind == "close" and (turn.status != "aborted" or self._rng.random() < 0.5):
                self._active.pop(turn.id, None)

    def _give_up(self, turn: Turn, error: Exception) -> None:
        self._ledger.report(error, key=turn.key, id=turn.id)
        self._active.pop(turn.id, None)

    def _between(self) -> None:
        """Now and then a turn takes long enough to be several entries, and to be interrupted."""
        if self._rng.random() < 0.1:
            threading.Event().wait(float(self._rng.uniform(0, 0.03)))

    def _key(self) -> str:
        self._keys += 1
        return f"{self._name}/{self._keys}"


def main(url: str, name: str, seed: str, ack: Any, path: str) -> None:
    """Write until SIGTERM."""
    follow()
    tell_when_asked()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ledger = Journal(Path(path))
    store = once_there(lambda: trajstore.open(url, ack=ack, create=False, timeout=TIMEOUT))
    writer = Writer(store, ledger, name=name, seed=int(seed))
    while not stop.is_set():
        writer.round()
    for error in errors_of(store.close):
        ledger.report(error, id=str(error).partition(":")[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
