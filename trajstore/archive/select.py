"""Which entries of a trajectory may be archived now. Pure."""

from collections.abc import Mapping, Sequence

from trajstore.entries import Event
from trajstore.events import EventId, Rewarded, SegmentClosed, TrajectoryClosed, TrajectoryOpened

__all__ = ["finished_entries", "ripe_prefix"]


def ripe_prefix(
    found: Sequence[tuple[EventId, str]], seen: Mapping[EventId, str], archived: EventId | None
) -> list[EventId]:
    """Entries not archived yet that were there, the same, when they were first looked at.

    Args:
        found: id and digest of the entries in the hot log now, by id.
        seen: the same at the first look, a fsync horizon ago.
        archived: newest archived entry.
    """
    ripe = []
    for at, digest in found:
        if archived is not None and at <= archived:
            continue
        if seen.get(at) != digest:
            break
        ripe.append(at)
    return ripe


def finished_entries(entries: Sequence[tuple[EventId, Sequence[Event]]]) -> int:
    """How many of these entries, from the first, belong to finished epochs.

    An epoch is finished when it has its closing event, or when a newer epoch exists.
    """
    if not entries:
        return 0
    newest = entries[-1][0].epoch
    closing = (TrajectoryOpened, SegmentClosed, Rewarded, TrajectoryClosed)
    if any(isinstance(event.header, closing) for at, events in entries if at.epoch == newest for event in events):
        return len(entries)
    return sum(at.epoch < newest for at, _ in entries)
