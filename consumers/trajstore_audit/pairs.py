"""Which recordings are compared with which, over which rows. Pure; reads headers only."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from trajstore.fold import Plan
from trajstore.history import History, Recording
from trajstore.overlaps import Overlap, SameTokens

__all__ = ["Pair", "left_out", "observation_pairs", "same_conditions", "segment_pairs", "successive", "version_gap"]

_TRAILING = re.compile(r"(?<![0-9])[0-9]{1,18}\Z")
"""All digits at the end: of a longer number, a hash say, the last ones would tell nothing."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two recordings of rows `[start, stop)`, the older one first.

    Attributes:
        against: what the second one is: "segments" or "observations".
        start, stop: positions.
        first, second: the recordings.
        base: from how many tokens the second one's segment resumed; with an observation, the first one's.
    """

    against: Literal["segments", "observations"]
    start: int
    stop: int
    first: Recording
    second: Recording
    base: int


def segment_pairs(history: History) -> Iterator[Pair]:
    """Each row of each recording with the newest earlier recording of the same token, oldest first.

    A row that was recorded three times makes two pairs. Rows of other tokens (a later segment rewound below them) make
    none. A pair of recordings comes in parts where another one lies between.
    """
    newest: list[tuple[int, int, Recording]] = []  # ascending, without overlap
    for segment in history.segments:
        newest = [(start, min(stop, segment.base), one) for start, stop, one in newest if start < segment.base]
        for recording in segment.recordings:
            for start, stop, other in newest:
                low, high = max(start, recording.start), min(stop, recording.stop)
                if low < high:
                    yield Pair(
                        against="segments", start=low, stop=high, first=other, second=recording, base=segment.base
                    )
            newest = _laid_over(newest, recording)


def observation_pairs(plan: Plan) -> Iterator[Pair]:
    """Each observation with the recordings that win its rows under the plan's policy.

    Rows of tokens that the trajectory no longer has, or may have lost since, are left out: see `left_out`.
    """
    same = SameTokens(plan.history)
    bases = [segment.base for segment in plan.history.segments]
    for observation in plan.history.observations:
        limit = min(observation.stop, same.now_below(observation))
        for start, stop, winner in plan.placements:
            low, high = max(start, observation.start), min(stop, limit)
            if low < high:
                base = bases[winner.segment]
                yield Pair(against="observations", start=low, stop=high, first=winner, second=observation, base=base)


def left_out(history: History) -> dict[str, int]:
    """Rows of observations that are compared with nothing, by reason.

    "rewound": a segment that opened since brought other tokens there. "unknown tokens": one may have, for the
    observation does not say which tokens it saw.
    """
    same = SameTokens(history)
    found: dict[str, int] = {}
    for one in history.observations:
        count = one.stop - max(one.start, same.now_below(one))
        if count > 0:
            reason = "rewound" if one.epoch else "unknown tokens"
            found[reason] = found.get(reason, 0) + count
    return found


def successive(overlaps: Sequence[Overlap]) -> Iterator[Overlap]:
    """Of all pairs of recordings, those of consecutive ones: each row with its previous recording only.

    A pair falls into parts where another recording lies between. Observations by other parties are left out.

    Args:
        overlaps: of one trajectory, from `store.overlaps`.
    """
    by_second: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        if overlap.second.segment >= 0:
            by_second.setdefault(overlap.second.event, []).append(overlap)
    for pairs in by_second.values():
        holes = [(min(pair.start for pair in pairs), max(pair.stop for pair in pairs))]
        for pair in reversed(pairs):  # the newest earlier recording first
            left = []
            for start, stop in holes:
                low, high = max(start, pair.start), min(stop, pair.stop)
                if low >= high:
                    left.append((start, stop))
                    continue
                yield msgspec.structs.replace(pair, start=low, stop=high)
                left += [hole for hole in ((start, low), (high, stop)) if hole[0] < hole[1]]
            holes = left


def version_gap(first: str, second: str) -> int | None:
    """By how much the integers at the end of two weight versions' labels differ; None where one has none.

    Nor where it has more than 18 digits.
    """
    numbers = [_TRAILING.search(label) for label in (first, second)]
    return int(numbers[1][0]) - int(numbers[0][0]) if numbers[0] and numbers[1] else None


def same_conditions(pair: Pair, history: History) -> bool:
    """Whether the same weights and engine, as far as they are recorded, made both recordings, neither by a re-run.

    Then routing has no reason to change, but for how the engine batched. Segments whose weights changed midway, and
    rows from a cache, which may be older than their segment's weights, tell nothing.
    """
    one, other = pair.first, pair.second
    if one.segment < 0 or other.segment < 0:
        return False
    segments = [history.segments[one.segment], history.segments[other.segment]]
    return (
        one.weight_version == other.weight_version != ""
        and segments[0].engine == segments[1].engine != ""
        and not {one.origin, other.origin} & {"recomputed", "cached"}
        and all({span.version for span in segment.weight_versions} <= {one.weight_version} for segment in segments)
    )


def _laid_over(newest: Sequence[tuple[int, int, Recording]], top: Recording) -> list[tuple[int, int, Recording]]:
    """Which recording is the newest of each row once `top` is."""
    left = [(top.start, top.stop, top)]
    for start, stop, one in newest:
        if start < top.start:
            left.append((start, min(stop, top.start), one))
        if stop > top.stop:
            left.append((max(start, top.stop), stop, one))
    return sorted(left, key=lambda piece: piece[0])
