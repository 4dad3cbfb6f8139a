"""Which recordings speak of the same rows: the raw material of every drift audit. Pure; reads headers only."""

from bisect import bisect_right
from itertools import pairwise

import msgspec

from trajstore.history import History, Recording
from trajstore.limits import TOKENS

__all__ = ["Overlap", "SameTokens", "find_overlaps"]


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """Two recordings of rows `[start, stop)` of the same tokens; `first` is the older one.

    The rows themselves come from `store.recorded_rows`.
    """

    start: int
    stop: int
    first: Recording
    second: Recording


class SameTokens:
    """Up to which position two recordings of a trajectory are of the same tokens.

    That is the least base of the segments that opened between both: such a segment brought other tokens from there on.
    An observation is of the tokens that its writer knew. Where it does not say which (`Recording.epoch` 0), every
    segment that ever rewound may have done so since, and from its base on nothing can be told.
    """

    def __init__(self, history: History) -> None:
        self._bases = [segment.base for segment in history.segments]
        self._epochs = [segment.epoch for segment in history.segments]
        rewound = (new.base for old, new in pairwise(history.segments) if new.base < old.end)
        self._untold = min(rewound, default=TOKENS)
        self._limits: tuple[int, list[int]] = (-1, [])

    def below(self, one: Recording, other: Recording) -> int:
        """Rows of both below this position are of the same tokens."""
        limit = self._limits_of(self._segment(other))[self._segment(one)]
        return limit if one.epoch and other.epoch else min(limit, self._untold)

    def now_below(self, recording: Recording) -> int:
        """Rows of a recording below this position are of the tokens that the trajectory has now."""
        limit = self._limits_of(len(self._bases) - 1)[self._segment(recording)]
        return limit if recording.epoch else min(limit, self._untold)

    def _segment(self, recording: Recording) -> int:
        """The newest segment that had opened; 0 at least, for nothing can be recorded before it."""
        if recording.segment >= 0:
            return recording.segment
        if not recording.epoch:
            return len(self._bases) - 1
        return max(bisect_right(self._epochs, recording.epoch) - 1, 0)

    def _limits_of(self, segment: int) -> list[int]:
        """By index of another segment: up to where it has the same tokens."""
        known, found = self._limits
        if known != segment:
            found = [TOKENS] * len(self._bases)
            for older in range(segment - 1, -1, -1):
                found[older] = min(found[older + 1], self._bases[older + 1])
            for newer in range(segment + 1, len(found)):
                found[newer] = min(found[newer - 1], self._bases[newer])
            self._limits = segment, found
        return found


def find_overlaps(history: History) -> list[Overlap]:
    """Every pair of recordings that share rows of the same tokens, older segments first.

    A later segment that rewound below a row recorded other tokens there, so such pairs are left out. Observations come
    last and pair with every recording of the tokens that they saw.
    """
    same = SameTokens(history)
    earlier: list[Recording] = []
    found: list[Overlap] = []
    for recording in (*(one for segment in history.segments for one in segment.recordings), *history.observations):
        for other in earlier:
            start = max(other.start, recording.start)
            stop = min(other.stop, recording.stop, same.below(other, recording))
            if start < stop:
                found.append(Overlap(start=start, stop=stop, first=other, second=recording))
        earlier.append(recording)
    return found
