"""The fold while a log grows, event by event: it always agrees with the oracle, and what was once folded stays so."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.builders import SPEC
from tests.core.logs import Log
from tests.core.oracle import expected_fold
from tests.core.test_fold_properties import assert_same
from trajstore.blob import to_blob
from trajstore.fold import POLICIES

ORIGINS = st.sampled_from(["computed", "computed", "cached", "recomputed", "unknown"])


class GrowingLog(RuleBasedStateMachine):
    """One trajectory, written to in every order that handles allow."""

    @initialize()
    def create(self):
        self.log = Log()
        self.ends: list[int] = []
        self.over: list[bool] = []
        self.rows_made = 0
        self.folded: dict[tuple[str, str], bytes] = {}
        self.notes_then = 0

    @property
    def is_open(self):
        return bool(self.over) and not self.over[-1]

    @rule(cut=st.floats(0, 1), context=st.integers(0, 3))
    def segment(self, cut, context):
        length = len(self.log.token_ids)
        if self.over:
            self.over[-1] = True
        self.log.segment(length if cut > 0.4 else int(cut * length), range(100 + length, 100 + length + context))
        self.ends.append(len(self.log.token_ids))
        self.over.append(False)

    @precondition(lambda self: self.is_open)
    @rule(count=st.integers(1, 4), logprob=st.sampled_from([None, -0.5, float("nan"), float("-inf")]))
    def tokens(self, count, logprob):
        start = 1000 + len(self.log.events)
        self.log.tokens(list(range(start, start + count)), None if logprob is None else [logprob] * count)
        self.ends[-1] = len(self.log.token_ids)

    @precondition(lambda self: self.is_open and self.ends[-1])
    @rule(data=st.data(), origin=ORIGINS)
    def routing(self, data, origin):
        start, made = self._rows(data, self.ends[-1])
        self.log.routing(made, start, origin=origin)

    @precondition(lambda self: self.is_open)
    @rule(reason=st.sampled_from(["stop", "length", "abort", "error"]))
    def finish(self, reason):
        self.log.finish(reason)
        self.over[-1] = True

    @precondition(lambda self: any(over and end for over, end in zip(self.over, self.ends, strict=True)))
    @rule(data=st.data(), origin=ORIGINS)
    def late(self, data, origin):
        done = [i for i, over in enumerate(self.over) if over and self.ends[i]]
        segment = data.draw(st.sampled_from(done))
        start, made = self._rows(data, self.ends[segment])
        self.log.late(segment, made, start, origin=origin)

    @precondition(lambda self: self.log.token_ids)
    @rule(data=st.data())
    def observe(self, data):
        start, made = self._rows(data, len(self.log.token_ids))
        self.log.observe(made, start)

    @rule(reward=st.floats(-1, 1))
    def reward(self, reward):
        self._take_over()
        self.log.reward(reward)

    @rule(status=st.sampled_from(["aborted", "completed"]))
    def close(self, status):
        self._take_over()
        self.log.close(status)

    @invariant()
    def agrees_with_the_oracle(self):
        for policy in POLICIES:
            loaded = self.log.load(policy)
            expected = expected_fold(self.log, policy)
            assert_same(loaded, expected, SPEC)
            assert (loaded.status, loaded.version) == (expected.status, expected.version)

    @invariant()
    def past_states_stay_as_they_were(self):
        """`until` an old event folds as it did then: later turns and rewinds are not seen."""
        if len(self.log.notes) != self.notes_then:  # late recordings count whenever they come
            self.folded, self.notes_then = {}, len(self.log.notes)
        for policy in POLICIES:
            for (event, under), blob in self.folded.items():
                if under == policy:
                    assert to_blob(self.log.load(policy, until=event)) == blob
            self.folded[self.log.events[-1].id, policy] = to_blob(self.log.load(policy, until=self.log.events[-1].id))

    def _take_over(self):
        if self.over:
            self.over[-1] = True

    def _rows(self, data, end):
        """Where they start, and rows that no other recording has."""
        self.rows_made = self.rows_made % 7 + 1
        start = data.draw(st.integers(0, end - 1))
        count = data.draw(st.integers(1, end - start))
        made = np.empty((count, SPEC.num_layers, SPEC.top_k), SPEC.dtype)
        made[..., 0], made[..., 1] = self.rows_made, 0
        return start, made


def test_fold_of_a_growing_log_agrees_with_the_oracle_at_every_event():
    run_state_machine_as_test(
        GrowingLog,
        settings=settings(
            max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
