"""What became of a write: decided by reading back, after a refusal, a lost reply, or a reconnect. Pure.

An ambiguous write is never blindly repeated. The writer reads the id back, the first entry of its epoch and the newest
id, and `judge` says what follows. Two more rules meet here: after a server crash the log may end earlier than what was
acknowledged, and a writer never writes above such a hole; and what is not in the hot log may have been archived.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from trajstore.entries import EntryStamp, entry_digest
from trajstore.errors import Fenced, SequenceGap, TrajstoreError
from trajstore.events import EventId
from trajstore.log.batch import Batch

__all__ = [
    "ArchiveIndex",
    "Landed",
    "Nothing",
    "Refused",
    "Renumber",
    "Resend",
    "Seen",
    "Verdict",
    "judge",
]


class ArchiveIndex(Protocol):
    """Looks entries up in a fresh manifest of the archive, by trajectory id and entry id.

    Raises NotFound for a trajectory that retention has dropped: nobody may write it on.
    """

    def entry(self, id: str, at: EventId) -> EntryStamp | None: ...
    def note(self, id: str, at: EventId) -> EntryStamp | None: ...
    def last_note(self, id: str) -> int:
        """Number of the newest archived note, 0 for none."""
        ...

    def last_entry(self, id: str) -> EventId | None:
        """Id of the newest archived entry."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server shows of one trajectory's stream.

    Attributes:
        last: newest id that it ever took; None if the stream does not exist.
        last_event: id of the last event of the newest entry that it still holds; None if it holds none.
        first_nonce: of the entry `e-0` of the newest acknowledged epoch; None if it is not there.
        at_head: bytes at the id of the batch in question, where none is of the newest kept one; None if there are none.
        last_nonce: of the newest entry that it still holds; None if it holds none.
        is_deleted: that entry is a tombstone, with which all before it went.
    """

    last: EventId | None
    last_event: EventId | None
    first_nonce: int | None
    at_head: bytes | None
    last_nonce: int | None = None
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class Landed:
    """The batch is in the log, or was and has been archived."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """All is as it was left."""


@dataclass(frozen=True, slots=True)
class Resend:
    """Send these batches, in this order, the same bytes; what was acknowledged ends with `acked`.

    Attributes:
        creates: the first of them, a note, may make the stream, which is not there any more.
    """

    batches: Sequence[Batch]
    acked: EventId | None
    creates: bool = False


@dataclass(frozen=True, slots=True)
class Renumber:
    """Write the note under this number."""

    number: int
    creates: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The writer's turn is over."""

    error: TrajstoreError


_WITHOUT = "and another writer has gone on without them"

Verdict: TypeAlias = Landed | Nothing | Resend | Renumber | Refused


def judge(
    id: str,
    seen: Seen,
    *,
    acked_nonce: int | None,
    head: Batch | None,
    acked: EventId | None,
    kept: Sequence[Batch],
    holds_open: bool,
    archive: ArchiveIndex,
) -> Verdict:
    """Decide for one writer of one trajectory.

    Args:
        id: of the trajectory.
        seen: read from the server just now.
        head: the batch in question, None to look after what was acknowledged only.
        acked: id of the newest entry known to be in the log; None for a trajectory that is being created.
        acked_nonce: nonce of that entry, None where not known.
        kept: acknowledged batches that a server crash might still lose, oldest first.
        holds_open: the writer has an open segment, so that a newer epoch concerns it even when nothing is in question.
        archive: what was archived and trimmed.
    """
    if head is not None and seen.at_head is not None:
        return Landed() if seen.at_head == head.entry else _fenced(id, head.at)
    if head is not None and head.sent and (seen.last is None or seen.last >= head.at):
        copy = archive.entry(id, head.at)  # taken, archived and trimmed before its reply was read back
        if copy is not None:
            return Landed() if _is_copy(copy, head) else _fenced(id, head.at)
    if seen.last is None:
        return _without_stream(id, seen, head, acked, acked_nonce, kept, archive)
    held = head.at if head is not None else acked
    if held is None:
        return Nothing()
    told_so = holds_open or head is not None  # is fenced below
    if not told_so and kept and acked is not None and seen.last > acked and _is_gone(kept[-1], seen, archive):
        return _lost(id, seen, acked, _WITHOUT)
    if not told_so and acked is not None and seen.last > acked and _is_anothers(id, seen, acked, acked_nonce, archive):
        return _lost(id, seen, acked, _WITHOUT)
    if seen.last > held or (head is not None and seen.last == head.at):
        return _fenced(id, held, seen.last) if head is not None or holds_open else Nothing()
    if acked is not None and None not in (seen.first_nonce, acked_nonce) and seen.first_nonce != acked_nonce:
        return _fenced(id, held, seen.last)
    if acked is not None and seen.first_nonce is None and seen.last == acked:  # trimmed: was it this writer's?
        goes_on = holds_open and (head is None or head.at.epoch == acked.epoch)  # its own is not, while it goes on
        copy = archive.entry(id, acked) if kept or goes_on else None
        if copy is not None and acked_nonce not in (None, copy.nonce):
            return _lost(id, seen, acked, _WITHOUT)
    if acked is not None and seen.last < acked:
        if seen.is_deleted:  # by another, anew; and the server would take what follows
            return _fenced(id, held, seen.last)
        copy = archive.entry(id, acked)
        if copy is not None and acked_nonce not in (None, copy.nonce):
            return _lost(id, replace(seen, last=archive.last_entry(id)), acked, _WITHOUT)
        if copy is not None:  # a replica took over that lacks what was archived: nothing is lost
            return Resend([head], acked) if head is not None else Nothing()
        return _after_loss(id, seen, head, acked, kept, archive)
    if acked is not None and seen.last > acked:
        return _fenced(id, held, seen.last)
    return Resend([head], acked) if head is not None else Nothing()


def judge_note(head: Batch, seen: Seen, archive: ArchiveIndex) -> Verdict:
    """Decide for a note. Notes fence nobody: one whose number is taken gets the next.

    One that went out keeps its number and its bytes where it can: it may yet arrive, and then one of both is refused.
    """
    if seen.at_head is not None and seen.at_head == head.entry:
        return Landed()
    if _is_copy(archive.note(head.id, head.at), head):
        return Landed()
    newest = max(seen.last.epoch if seen.last is not None else 0, archive.last_note(head.id))
    if newest < head.at.epoch and (seen.last is not None or head.creates or head.sent):
        return Resend([head], None, creates=seen.last is None)
    return Renumber(newest + 1, creates=seen.last is None)


def _is_copy(copy: EntryStamp | None, head: Batch) -> bool:
    return copy == EntryStamp(head.turn.nonce, entry_digest(head.entry))


def _without_stream(
    id: str,
    seen: Seen,
    head: Batch | None,
    acked: EventId | None,
    acked_nonce: int | None,
    kept: Sequence[Batch],
    archive: ArchiveIndex,
) -> Verdict:
    if acked is not None and _was_archived(id, acked, acked_nonce, archive):
        if head is None:
            return Nothing()
        return Refused(
            Fenced(f"{id} was finished, archived and removed from the hot log; store.get({id!r}) opens what is there")
        )
    if acked is None and head is not None:
        if head.creates:
            return Resend([head], None)
        return Refused(
            Fenced(f"{id} is no longer in the hot log (archived and removed); store.get({id!r}) opens it again")
        )
    if acked is None:
        return Nothing()
    newest = archive.last_entry(id)
    if newest is not None:  # of what the writer knows nothing: its own is nowhere
        return _lost(id, replace(seen, last=newest), acked, _WITHOUT)
    return _after_loss(id, seen, head, acked, kept, archive)


def _was_archived(id: str, acked: EventId, nonce: int | None, archive: ArchiveIndex) -> bool:
    """The entry is archived, or a newer one is and none before: of a deleted trajectory it tells its tombstone only.

    Not if another writer's has its id, which was written anew where a server had lost this one.
    """
    copy = archive.entry(id, acked)
    if copy is not None:
        return nonce in (None, copy.nonce)
    newest = archive.last_entry(id)
    return newest is not None and newest > acked and archive.entry(id, EventId(1, 0)) is None


def _after_loss(
    id: str, seen: Seen, head: Batch | None, acked: EventId, kept: Sequence[Batch], archive: ArchiveIndex
) -> Verdict:
    """The server came back with a shorter log: write the lost batches again, if all of them are still at hand."""
    last = seen.last
    lost = [batch for batch in kept if last is None or batch.at > last]
    if lost and lost[0].before == last and (last is not None or lost[0].creates):
        copy = archive.entry(id, last) if last is not None and seen.last_nonce is None else None  # it was trimmed
        if copy is not None and archive.entry(id, EventId(1, 0)) is None:  # it has a tombstone only
            return _fenced(id, lost[0].at, last)
        last_nonce = seen.last_nonce if copy is None else copy.nonce
        if None not in (last_nonce, lost[0].before_nonce) and last_nonce != lost[0].before_nonce:
            return _fenced(id, lost[0].at, last)  # another has written anew what this writer's turn followed
        return Resend([*lost, *([head] if head is not None else [])], last)
    return _lost(id, seen, acked, "and they are no longer at hand; nothing was written above the gap")


def _is_gone(newest: Batch, seen: Seen, archive: ArchiveIndex) -> bool:
    """The newest batch that a server crash might have lost is not in the log, was not archived, and is not deleted."""
    archived = _was_archived(newest.id, newest.at, newest.turn.nonce, archive)
    return seen.at_head != newest.entry and not seen.is_deleted and not archived


def _is_anothers(id: str, seen: Seen, acked: EventId, acked_nonce: int | None, archive: ArchiveIndex) -> bool:
    """The epoch of the acknowledged entry was written anew by another, which its next one would follow unrefused."""
    nonce = seen.first_nonce
    if nonce is None and seen.last is not None and seen.last.epoch == acked.epoch:  # it was trimmed
        copy = archive.entry(id, EventId(acked.epoch, 0))
        nonce = copy.nonce if copy is not None else None
    return not seen.is_deleted and None not in (nonce, acked_nonce) and nonce != acked_nonce


def _lost(id: str, seen: Seen, acked: EventId, what: str) -> Refused:
    good = "" if seen.last is None else str(seen.last_event or seen.last)
    since = "" if seen.last is not None and seen.last >= acked else f", from after {good or 'the start'}"
    return Refused(
        SequenceGap(
            f"{id}: the server came back without acknowledged entries{since} up to {acked}, {what}. "
            f"store.get({id!r}) resumes from what is left",
            last_good=good,
        )
    )


def _fenced(id: str, held: EventId, last: EventId | None = None) -> Refused:
    newest = f" (newest is {last})" if last is not None else ""
    return Refused(
        Fenced(
            f"{id}: entry {held} belongs to another writer or a newer epoch exists{newest}; this writer's turn is "
            f"over. store.get({id!r}) shows the state and can take the next turn"
        )
    )
