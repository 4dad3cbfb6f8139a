"""Dropping from the hot log what the archive holds.

Only commands that a full server lets pass, and each by itself: Redis 7.0 refuses even these inside `MULTI` while its
memory is full. Their order makes every crash in between repeatable: payloads go before the entries that name them, and
the hints that lead here are acknowledged last.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence

from trajstore.archive.manifest import Manifest
from trajstore.archive.ripening import Part
from trajstore.deletion import removal
from trajstore.events import FINAL_STATUSES
from trajstore.log.batch import payload_field
from trajstore.log.keys import Keys
from trajstore.log.reader import HotEntry
from trajstore.log.stream import stream_last_id
from trajstore.log.wire import Command, Wire

__all__ = ["free", "trim"]

log = logging.getLogger(__name__)


def trim(wire: Wire, keys: Keys, manifest: Manifest, parts: Sequence[Part], *, grace: float) -> None:
    """Trim trajectories of one partition to what the manifest does not name; of those that retention dropped, all goes.

    Args:
        grace: seconds after which the emptied keys of a final trajectory go, together.

    Raises:
        Unavailable: the server did not answer; trim again.
    """
    gone = [part.id for part in parts if manifest.is_dropped(part.id)]
    if gone:
        free(wire, keys, gone)
        log.warning("%d trajectories that retention has dropped were removed from the hot log: %s", len(gone), gone[0])
    wire.call_all([command for part in parts for command in _drop_archived(keys, manifest, part)])
    over = _unmoved(wire, keys, manifest, [part for part in parts if _is_over(manifest, part)])
    wire.call_all([("PEXPIRE", key, int(grace * 1000)) for part in over for key in _keys_of(keys, part)])
    # A note that came in between must not expire; one that came after the PEXPIRE has undone it in its own batch.
    still = _unmoved(wire, keys, manifest, over)
    moved = [part for part in over if part not in still]
    wire.call_all([("PERSIST", key) for part in moved for key in _keys_of(keys, part)])
    wire.call_all([("HDEL", keys.summaries(keys.partition(part.id)), part.id) for part in still])


def free(wire: Wire, keys: Keys, ids: Sequence[str]) -> None:
    """Remove all that the hot log holds of trajectories that are gone for good.

    Without the stream a writer's next append is refused, and it learns from the archive what became of the trajectory.

    Raises:
        Unavailable: the server did not answer; do it again.
    """
    wire.call_all([("UNLINK", keys.payloads(id), keys.notes(id), keys.entries(id)) for id in ids])
    wire.call_all([("HDEL", keys.summaries(keys.partition(id)), id) for id in ids])


def _unmoved(wire: Wire, keys: Keys, manifest: Manifest, parts: Sequence[Part]) -> list[Part]:
    """Those whose streams have taken nothing that is not archived."""
    infos = iter(wire.exchange([("XINFO", "STREAM", key) for part in parts for key in _keys_of(keys, part)[:2]]))
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
