"""The log as a state machine: several handles of several stores on one trajectory, against a log in memory.

Whoever wrote last holds the trajectory. Every handle that has fallen behind is fenced at its next write, and nothing of
what it handed in is seen. Everything else is, event for event and folded, in the hot log and in the archive.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ulid import ULID

import trajstore
from tests.builders import SPEC, rows
from tests.core.logs import Log
from trajstore.archiver import Archiver
from trajstore.blob import to_blob
from trajstore.errors import Conflict, Fenced, NotFound
from trajstore.events import FINAL_STATUSES
from trajstore.fold import POLICIES

ARCHIVINGS = 3


class Handle:
    """A handle, the store that it belongs to, and the epoch that it knows as the newest."""

    def __init__(self, store: trajstore.Store, trajectory: Any, epoch: int) -> None:
        self.store = store
        self.trajectory = trajectory
        self.epoch = epoch
        self.fenced = False


class LogMachine(RuleBasedStateMachine):
    """Two stores of one run and one trajectory at a time; `url` and `archive` are set by the test."""

    url: str
    archive: Path
    handles = Bundle("handles")

    @initialize(target=handles)
    def create(self):
        self.open = contextlib.ExitStack()
        run = f"machine-{ULID()}"
        place = self.archive / run
        self.stores = [
            self.open.enter_context(trajstore.open(f"{self.url}?run={run}", archive=place, partitions=1, timeout=10.0))
            for _ in range(2)
        ]
        self.log = Log()
        self.ends: list[int] = []
        self.status = "open"
        self.deleted = False
        self.archived = 0
        first = self.stores[0].create(id="t", routing=SPEC)
        self.stores[0].flush()
        return Handle(self.stores[0], first, 1)

    @property
    def epoch(self):
        return self.log.events[-1].at.epoch

    @rule(target=handles, store=st.integers(0, 1))
    def get(self, store):
        if self.deleted:
            with pytest.raises(NotFound):
                self.stores[store].get("t")
            return multiple()
        return Handle(self.stores[store], self.stores[store].get("t"), self.epoch)

    @rule(handle=handles, cut=st.floats(0, 1), data=st.data())
    def segment(self, handle, cut, data):
        """A whole segment, with payloads that ride in the header and payloads that do not."""
        length = len(handle.trajectory)  # as it knows them: it may have fallen behind
        base = length if cut > 0.3 else int(cut * length)
        context = list(range(base, base + data.draw(st.integers(0 if base else 1, 40))))
        outputs = data.draw(st.lists(st.sampled_from([1, 7, 150]), max_size=3))
        recorded = data.draw(st.booleans())

        def write():
            with handle.trajectory.segment(base=base, context=context) as segment:
                for count in outputs:
                    segment.tokens(range(count), np.full(count, -0.5))
                if recorded:
                    segment.routing(rows(segment.end, seed=segment.end), start=0)
                segment.close("stop")

        if self._wrote(handle, write):
            self.log.segment(base, context, weight_version="")
            for count in outputs:
                self.log.tokens(list(range(count)), [-0.5] * count)
            end = len(self.log.token_ids)
            if recorded:
                self.log.routing(rows(end, seed=end), 0)
            else:
                self.log.absent("not recorded")
            self.log.finish("stop")
            self.ends.append(end)
            self.status = "open"

    @rule(handle=handles, reward=st.floats(-1, 1))
    def reward(self, handle, reward):
        if self._wrote(handle, lambda: handle.trajectory.reward(reward)):
            self.log.reward(reward)

    @rule(handle=handles, status=st.sampled_from(["aborted", "aborted", "completed"]))
    def close(self, handle, status):
        if self._wrote(handle, lambda: handle.trajectory.close(status)):
            self.log.close(status)
            self.status = status

    @precondition(lambda self: not self.deleted and self.log.token_ids)
    @rule(store=st.integers(0, 1), count=st.integers(1, 200))
    def observe(self, store, count):
        """Notes fence nobody and come at any time."""
        made = rows(min(count, len(self.log.token_ids)), seed=count)
        self.stores[store].get("t").observe(made, start=0, source="trainer")
        self.stores[store].flush()
        self.log.observe(made, 0)

    @precondition(lambda self: not self.deleted and any(self.ends))
    @rule(store=st.integers(0, 1), data=st.data())
    def late(self, store, data):
        number = data.draw(st.sampled_from([i for i, end in enumerate(self.ends) if end]))
        made = rows(data.draw(st.integers(1, self.ends[number])), seed=number)
        self.stores[store].get("t").late_routing(made, segment=number, start=0)
        self.stores[store].flush()
        self.log.late(number, made, 0)

    @precondition(lambda self: len(self.log.events) > 8)
    @rule(store=st.integers(0, 1))
    def delete(self, store):
        assert self.stores[store].delete("t") == (not self.deleted)
        self.deleted = True

    @precondition(lambda self: self.archived < ARCHIVINGS)
    @rule(store=st.integers(0, 1))
    def archive_what_is_there(self, store):
        self.archived += 1
        assert Archiver(self.stores[store]).run(once=True).refused == 0
        assert self.stores[store].hot.read("t") == ([], [])

    @invariant()
    def both_stores_read_what_was_written(self):
        if not hasattr(self, "log"):
            return
        for store in self.stores:
            if self.deleted:
                with pytest.raises(NotFound):
                    store.load("t")
                continue
            assert [(event.id, event.type) for event in store.events("t")] == [
                (event.id, event.type) for event in self.log.events
            ]
            assert len(store.notes("t")) == len(self.log.notes)
            for policy in POLICIES:
                fold = self.log.plan(policy).apply(self.log.fetch, id="t")
                assert to_blob(store.load("t", policy=policy)) == to_blob(fold)

    def teardown(self):
        if hasattr(self, "open"):
            with contextlib.suppress(trajstore.TrajstoreError, ExceptionGroup):  # the fenced have been looked at
                self.open.close()

    def _wrote(self, handle, write):
        """Write by a handle and wait; whether it may: nobody has written since it last knew the state."""
        current = not self.deleted and handle.epoch == self.epoch and not handle.fenced
        try:
            write()
            handle.store.flush("t")
        except Conflict:
            assert handle.trajectory.status in FINAL_STATUSES
            return False
        except NotFound:  # its tokens, which a handle reads when it first needs them
            assert self.deleted
            return False
        except (Fenced, ExceptionGroup):
            pass  # of this handle, or of another one of this store: the error is the trajectory's
        handle.fenced = isinstance(handle.trajectory._lane.error, Fenced)
        assert handle.fenced != current, "who has fallen behind is fenced, and nobody else"
        if current:
            handle.epoch = self.epoch + 1
        return current


def test_handles_that_take_turns_and_fall_behind_write_one_history(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.archiver.FSYNC_HORIZON", 0.0)  # this server is not going to lose anything
    machine: Any = type("Machine", (LogMachine,), {"url": backend.url("x").partition("?")[0], "archive": tmp_path})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=20,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes: every step waits
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
