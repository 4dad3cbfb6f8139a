"""Dropping from the hot log what the archive holds.

Only commands that a full server lets pass, and each by itself: Redis 7.0 refuses even these inside `MULTI` while its
memory is full. Their order makes every crash in between repeatable: payloads go before the entries that name them, and
the hints that lead here are acknowledged last. Each names what it drops, so that it may arrive at any time. Only keys
cannot be let go so: that is a transaction, and waits for room.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

from trajstore.archive.manifest import Manifest
from trajstore.archive.ripening import Part
from trajstore.deletion import removal
from trajstore.errors import StoreFull, Unavailable
from trajstore.events import FINAL_STATUSES
from trajstore.log.batch import payload_field
from trajstore.log.keys import Keys
from trajstore.log.reader import HotEntry
from trajstore.log.stream import stream_last_id
from trajstore.log.wire import Command, Watch, Wire

__all__ = ["free", "trim"]

log = logging.getLogger(__name__)

_TOGETHER = 256
"""Trajectories whose keys are let go in one transaction."""


def trim(wire: Wire, keys: Keys, manifest: Manifest, parts: Sequence[Part], *, grace: float) -> set[str]:
    """Trim trajectories of one partition to what the manifest does not name; of those that retention dropped, all goes.

    Args:
        grace: seconds after which the emptied keys of a final trajectory go, together.

    Returns:
        Ids of those whose keys should go and could not be let go now, as on a full server: trim them again.

    Raises:
        Unavailable: the server did not answer; trim again.
    """
    gone = [part.id for part in parts if manifest.is_dropped(part.id)]
    if gone:
        free(wire, keys, gone)
        log.warning("%d trajectories that retention has dropped were removed from the hot log: %s", len(gone), gone[0])
    wire.call_all([command for part in parts for command in _drop_archived(keys, manifest, part)])
    return _let_go(wire, keys, manifest, [part for part in parts if _is_over(manifest, part)], grace=grace)


def free(wire: Wire, keys: Keys, ids: Sequence[str]) -> None:
    """Remove all that the hot log holds of trajectories that are gone for good.

    Without the stream a writer's next append is refused, and it learns from the archive what became of the trajectory.

    Raises:
        Unavailable: the server did not answer; do it again.
    """
    wire.call_all([("UNLINK", keys.payloads(id), keys.notes(id), keys.entries(id)) for id in ids])
    wire.call_all([("HDEL", keys.summaries(keys.partition(id)), id) for id in ids])


def _let_go(wire: Wire, keys: Keys, manifest: Manifest, parts: Sequence[Part], *, grace: float) -> set[str]:
    """Let keys of trajectories that are over expire; returns the ids of those of which that has to be tried again."""
    left = list(parts)
    again: set[str] = set()
    try:
        while left:
            again |= _let_expire(wire, keys, manifest, left[:_TOGETHER], grace=grace)
            del left[:_TOGETHER]
    except (StoreFull, Unavailable) as error:  # of a full server, or of a cluster's slot that moves: it is no hurry
        log.warning("the emptied keys of %d trajectories stay for now: %s", len(left), error)
    return again | {part.id for part in left}


def _let_expire(wire: Wire, keys: Keys, manifest: Manifest, parts: Sequence[Part], *, grace: float) -> set[str]:
    """Under a watch, so that no note and no tombstone that came meanwhile expires unarchived.

    A PEXPIRE by itself may arrive long after its sender has given it up, or be the last thing that an archiver does.
    """
    streams = [key for part in parts for key in _keys_of(keys, part)[:2]]
    with wire.watching(*streams) as watch:
        still = _unmoved(watch, keys, manifest, parts)
        commands: list[Command] = []
        for part in still:
            commands += [("PEXPIRE", key, int(grace * 1000)) for key in _keys_of(keys, part)]
            commands.append(("HDEL", keys.summaries(keys.partition(part.id)), part.id))
        if not commands or wire.transaction(commands, watch=watch) is not None:
            return set()
    if len(parts) == 1:
        return {parts[0].id}
    half = len(parts) // 2  # one of them was written to: it holds up no other
    return {id for some in (parts[:half], parts[half:]) for id in _let_expire(wire, keys, manifest, some, grace=grace)}


def _unmoved(watch: Watch, keys: Keys, manifest: Manifest, parts: Sequence[Part]) -> list[Part]:
    """Those whose streams have taken nothing that is not archived."""
    commands = [("XINFO", "STREAM", key) for part in parts for key in _keys_of(keys, part)[:2]]
    infos = iter(watch.session.exchange(commands))
    found = []
    for part in parts:
        entry, note = stream_last_id(next(infos)), stream_last_id(next(infos))
        archived = manifest.find(part.id)
        if (entry is None or entry == archived.last) and (note is None or note.epoch == archived.last_note):
            found.append(part)
    return found


def _drop_archived(keys: Keys, manifest: Manifest, part: Part) -> Iterator[Command]:
    archived = manifest.find(part.id)
    last, last_note = archived.last, archived.last_note
    fields: list[str] = []
    if last is not None:
        fields += _payload_fields((entry for entry in part.entries if entry.at <= last), note=False)
    fields += _payload_fields((note for note in part.notes if note.at.epoch <= last_note), note=True)
    if fields:
        yield "HDEL", keys.payloads(part.id), *fields
    if last is not None and archived.summary is not None and archived.summary.status == "deleted":
        yield from removal(keys, part.id, last)
    if last is not None:
        yield "XTRIM", keys.entries(part.id), "MINID", f"{last.epoch}-{last.seq + 1}"
    if last_note:
        yield "XTRIM", keys.notes(part.id), "MINID", f"{last_note + 1}-0"


def _is_over(manifest: Manifest, part: Part) -> bool:
    """The trajectory is final, and all that the hot log had of it is archived."""
    archived = manifest.find(part.id)
    last, last_note, summary = archived.last, archived.last_note, archived.summary
    left = any(last is None or entry.at > last for entry in part.entries)
    if summary is None or summary.status != "deleted":  # of a deleted one no note is archived
        left |= any(note.at.epoch > last_note for note in part.notes)
    return summary is not None and summary.status in (*FINAL_STATUSES, "deleted") and not left


def _keys_of(keys: Keys, part: Part) -> tuple[str, str, str]:
    return keys.entries(part.id), keys.notes(part.id), keys.payloads(part.id)


def _payload_fields(entries: Iterable[HotEntry], *, note: bool) -> list[str]:
    return [
        payload_field(event.at, event.nonce, note=note)
        for entry in entries
        for event in entry.events(note=note)
        if event.payload is not None and event.payload.inline is None
    ]
