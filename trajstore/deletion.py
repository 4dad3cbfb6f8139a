"""Deleting a trajectory: its tombstone, and the removal of what the hot log holds of it.

The tombstone comes first, as the one entry of the next epoch: so it is ordered and fences every writer like any other
turn, and nothing is readable from then on. What the keys still hold is removed after it, and again by whoever meets the
tombstone (`delete` once more, a materializer, the archiver's trim), so a crash in between leaves nothing behind.
"""

from trajstore.errors import StoreFull
from trajstore.events import EventId, TrajectoryDeleted
from trajstore.log.batch import Turn
from trajstore.log.flusher import Flusher
from trajstore.log.keys import Keys
from trajstore.log.wire import Command, Wire
from trajstore.summary import Summary

__all__ = ["removal", "remove_deleted", "write_tombstone"]

_TRIES = 10
"""Others who meet the tombstone remove the same."""


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


def remove_deleted(wire: Wire, keys: Keys, id: str, tombstone: EventId, *, archived: bool = False) -> None:
    """Remove all that the hot log holds of a trajectory but its tombstone, which must be there still.

    A server that crashed may have lost it, and somebody may have gone on with the trajectory meanwhile. A full server
    may refuse to look and remove in one; then the archiver's trim removes it.

    Args:
        archived: the tombstone is in the archive, and cannot be lost.

    Raises:
        Unavailable: the server does not answer; whoever meets the tombstone removes the rest.
    """
    commands, entries = removal(keys, id, tombstone), keys.entries(id)
    if archived:
        wire.call_all(commands)
        return
    for _ in range(_TRIES):
        with wire.watching(entries) as watch:
            if not watch.call("XRANGE", entries, str(tombstone), str(tombstone)):
                return
            try:
                if wire.transaction(commands, watch=watch) is not None:
                    return
            except StoreFull:
                return


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
