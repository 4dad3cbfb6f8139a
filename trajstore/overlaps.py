"""Which recordings speak of the same rows: the raw material of every drift audit. Pure; reads headers only."""

import msgspec

from trajstore.history import History, Recording

__all__ = ["Overlap", "find_overlaps"]


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """Two recordings of rows `[start, stop)` of the same tokens; `first` is the older one.

    The rows themselves come from `store.recorded_rows`.
    """

    start: int
    stop: int
    first: Recording
    second: Recording


def find_overlaps(history: History) -> list[Overlap]:
    """Every pair of recordings that share rows of the same tokens, older segments first.

    A later segment that rewound below a row recorded other tokens there, so such pairs are left out. Observations come
    last and pair with every recording that counts.
    """
    earlier: list[tuple[Recording, int]] = []  # with the least base of the segments since: rows below are the same
    found: list[Overlap] = []

    def pair(recording: Recording) -> None:
        for other, limit in earlier:
            start, stop = max(other.start, recording.start), min(other.stop, recording.stop, limit)
            if start < stop:
                found.append(Overlap(start=start, stop=stop, first=other, second=recording))

    for segment in history.segments:
        earlier = [(other, min(limit, segment.base)) for other, limit in earlier]
        for recording in segment.recordings:
            pair(recording)
            earlier.append((recording, segment.end))
    for observation in history.observations:
        pair(observation)
        earlier.append((observation, history.length))
    return found
