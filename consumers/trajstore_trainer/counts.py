"""What a dataset has handed out and passed over, in numbers."""

from collections import Counter

import msgspec

from trajstore_trainer.selection import Verdict

__all__ = ["Counts"]


class Counts(msgspec.Struct):
    """What one dataset object has done, in this process.

    Attributes:
        groups, trajectories, tokens: handed out to be trained on; trajectories without a group count as one.
        passed_over: groups of which nothing was handed out, by reason.
        filtered: trajectories that were not handed out, by reason; those of groups passed over too.
        acknowledged: entries, handed out or passed over.
        again: entries that came because an earlier process of this rank had them and did not acknowledge.
        taken_over: entries that came because another consumer had been silent for the lease.
    """

    groups: int = 0
    trajectories: int = 0
    tokens: int = 0
    passed_over: Counter[str] = msgspec.field(default_factory=Counter)
    filtered: Counter[str] = msgspec.field(default_factory=Counter)
    acknowledged: int = 0
    again: int = 0
    taken_over: int = 0

    def add(self, verdict: Verdict) -> None:
        """Count what became of an entry."""
        self.filtered.update(verdict.reasons.values())
        if verdict.keep:
            self.groups += 1
            self.trajectories += len(verdict.keep)
            self.tokens += sum(map(len, verdict.keep))
        else:
            self.passed_over[verdict.why] += 1

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.passed_over.items()))
        return (
            f"{self.groups} groups to train on and passed {self.passed_over.total()} over"
            f"{f' ({reasons})' if reasons else ''}"
        )
