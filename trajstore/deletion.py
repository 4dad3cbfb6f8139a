"""Deleting a trajectory: its tombstone, and the removal of what the hot log holds of it.

The tombstone comes first, as the one entry of the next epoch: so it is ordered and fences every writer like any other
turn, and nothing is readable from then on. What the keys still hold is removed after it, and again by whoever meets the
tombstone (`delete` once more, a materializer, the archiver's trim), so a crash in between leaves nothing behind.
"""

from trajstore.events import EventId, TrajectoryDeleted
from trajstore.log.batch import Turn
from trajstore.log.flusher import Flusher
from trajstore.log.keys import Keys
from trajstore.log.wire import Command
from trajstore.summary import Summary

__all__ = ["removal", "write_tombstone"]


def write_tombstone(
    flusher: Flusher,
    id: str,
    header: TrajectoryDeleted,
    *,
    after: EventId,
    in_hot: bool,
    summary: Summary | None,
) -> EventId:
    """Write a tombstone and wait until it is acknowledged.

    Args:
        after: newest id that it has, in the hot log or the archive.
        in_hot: the stream exists; else it was archived and removed, and the tombstone makes it again.
        summary: of the trajectory as of the newest entry.

    Returns:
        Id of the tombstone.

    Raises:
        Fenced: another writer has taken the epoch meanwhile; read the trajectory again.
        StoreFull, Unavailable: it could not be written before the deadline.
    """
    turn = Turn(after.epoch + 1, creates=not in_hot)
    lane = flusher.lane(id, acked=after if in_hot else None, summary=summary)
    flusher.append(lane, turn, header)
    flusher.drain(id)
    if lane.error is not None:
        flusher.told(lane.error)
        raise lane.error.with_traceback(None)
    return EventId(turn.epoch, 0)


def removal(keys: Keys, id: str, tombstone: EventId) -> list[Command]:
    """Commands that remove all that the hot log holds of a trajectory but its tombstone; a full server lets them pass.

    A close opens an epoch, so there are at most as many published versions as there were epochs before the tombstone.
    """
    versions = range(1, tombstone.epoch)
    return [
        ("UNLINK", keys.payloads(id)),
        ("UNLINK", keys.notes(id)),
        ("XTRIM", keys.entries(id), "MINID", str(tombstone)),
        ("UNLINK", keys.ready_payload(id, 0), *(keys.ready_payload(id, version) for version in versions)),
    ]
