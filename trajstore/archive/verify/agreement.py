"""Whether hot log and archive agree: the same entries, the same folds, summaries that the log bears out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from trajstore.archive.pack import ReadEntry
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.verify.findings import Finding
from trajstore.entries import Buffer, Event, entry_digest
from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.events import EventId
from trajstore.fold import Policy, plan
from trajstore.log.reader import HotEntry, HotReader
from trajstore.log.stream import nonce_of
from trajstore.summary import Summary, summarize
from trajstore.trajectory import Trajectory

__all__ = ["check_agreement"]

_POLICIES: tuple[Policy, ...] = ("last_segment_wins", "as_sampled")

_Fetch: TypeAlias = Callable[[str, Sequence[Event]], Iterator[Buffer | None]]

_ARRAYS = (
    "token_ids",
    "logprobs",
    "loss_mask",
    "segment_ids",
    "weight_version_ids",
    "routed_experts",
    "routing_mask",
    "routing_source",
)


class _Unreadable(Exception):
    """A payload is no longer in the hot log."""


def check_agreement(hot: HotReader, archive: ArchiveReader | None, ids: Iterable[str]) -> Iterator[Finding]:
    """Compare the hot log of these trajectories with what is archived of them.

    Writers and archivers may go on meanwhile.
    """
    trajectories = events = nbytes = 0
    for id in ids:
        held, notes = hot.read(id)  # hot first: a trim in between then shows as an entry in both
        try:
            old, old_notes = archive.read(id) if archive is not None else ([], [])
        except (Corrupt, SchemaError) as error:
            yield _about(id, "payload", f"the archived part cannot be read: {error}", "restore the pack from a copy")
            continue
        except NotFound:
            continue  # dropped, or deleted: what is left in the hot log expires
        contradictions = [*_contradictions(id, held, old), *_contradictions(id, notes, old_notes, note=True)]
        yield from contradictions
        try:
            waiting = [*_waiting(held, old), *_waiting(notes, old_notes, note=True)]
            trajectories += bool(waiting)
            events += len(waiting)
            nbytes += sum(event.payload.nbytes for event in waiting if event.payload is not None)
            if not contradictions:
                yield from _folds(id, hot, archive, (held, notes), (old, old_notes))
                yield from _summary(id, hot, archive)
        except SchemaError as error:
            yield _about(id, "events", str(error), "upgrade trajstore")
    if trajectories:
        yield Finding(
            kind="backlog",
            severity="information",
            what=f"not archived yet: {events} events of {trajectories} trajectories, with {nbytes} payload bytes",
            what_to_do="archivers take what is finished",
        )


def _contradictions(
    id: str, hot: Sequence[HotEntry], old: Sequence[ReadEntry], *, note: bool = False
) -> Iterator[Finding]:
    archived = {entry.at: entry for entry in old}
    for entry in hot:
        copy = archived.get(entry.at)
        if copy is not None and (copy.nonce, copy.digest) != (nonce_of(entry.data), entry_digest(entry.data)):
            yield Finding(
                kind="contradiction",
                severity="error",
                pack=copy.events[0].stored if copy.events else "",
                trajectory=id,
                event=f"note {entry.at}" if note else str(entry.at),
                what=f"it is {entry_digest(entry.data)} of writer {nonce_of(entry.data):016x} in the hot log, and "
                f"{copy.digest} of writer {copy.nonce:016x} in the archive",
                what_to_do="the hot log was lost and written anew above what had been archived; load raises Corrupt",
            )


def _waiting(hot: Sequence[HotEntry], old: Sequence[ReadEntry], *, note: bool = False) -> list[Event]:
    """Events that are not archived yet."""
    last = old[-1].at if old else EventId(0, 0)
    return [event for entry in hot if entry.at > last for event in entry.events(note=note)]


def _folds(
    id: str,
    hot: HotReader,
    archive: ArchiveReader | None,
    held: tuple[Sequence[HotEntry], Sequence[HotEntry]],
    old: tuple[Sequence[ReadEntry], Sequence[ReadEntry]],
) -> Iterator[Finding]:
    """Both folds of what is archived, where the hot log still has all of it."""
    there = [{entry.at: entry for entry in some} for some in held]
    if archive is None or not old[0] or not all(e.at in of for of, some in zip(there, old, strict=True) for e in some):
        return
    hot_log, old_log = (
        (
            [event for entry in old[0] for event in there[0][entry.at].events()],
            [event for entry in old[1] for event in there[1][entry.at].events(note=True)],
        ),
        ([event for entry in old[0] for event in entry.events], [event for entry in old[1] for event in entry.events]),
    )
    for policy in _POLICIES:
        try:
            before = _fold(id, hot_log, policy, hot.payloads)
            after = _fold(id, old_log, policy, archive.payloads)
        except (_Unreadable, SequenceGap):
            return  # trimmed meanwhile; or a gap, which is there in both
        except (Corrupt, NotFound, RoutingError) as error:
            yield _about(id, "fold", f"what is in hot log and archive cannot be folded: {error}", "see load")
            return
        different = [name for name in _ARRAYS if not _equal(getattr(before, name), getattr(after, name))]
        if different:
            yield _about(
                id,
                "fold",
                f"under {policy} the fold from the archive is not the fold from the hot log: {', '.join(different)}",
                "keep the hot log, and report it: this must not happen",
            )


def _fold(id: str, log: tuple[list[Event], list[Event]], policy: Policy, payloads: _Fetch) -> Trajectory:
    def fetch(events: Sequence[Event]) -> Iterator[Buffer]:
        for data in payloads(id, events):
            if data is None:
                raise _Unreadable
            yield data

    return plan(log[0], policy, notes=log[1]).apply(fetch, id=id)


def _equal(before: object, after: object) -> bool:
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        same = before.dtype == after.dtype and before.shape == after.shape
        return same and before.tobytes() == after.tobytes()
    return before is None and after is None


def _summary(id: str, hot: HotReader, archive: ArchiveReader | None) -> Iterator[Finding]:
    """The hash of summaries against the log. Read until nobody writes in between."""
    while True:
        before = hot.summary(id)
        held, _ = hot.read(id)
        computed = _computed(id, held, archive)
        if hot.summary(id) == before:
            break
    if before == computed or (before is None and not held):
        return  # what is final and archived has its summary in the archive only
    if before is not None and computed is not None and before.status == computed.status == "deleted":
        return  # when it was created is known to nobody any more
    if before is not None and computed is not None and EventId.parse(before.last) > EventId.parse(computed.last):
        return  # its entry came after the log was read
    said = "is missing" if before is None else "is not what its log says"
    yield Finding(
        kind="summary",
        severity="warning",
        trajectory=id,
        what=f"the trajectory's summary in the hot log {said}",
        what_to_do="Store.rebuild_summaries writes it anew",
    )


def _computed(id: str, held: Sequence[HotEntry], archive: ArchiveReader | None) -> Summary | None:
    old = archive.read(id)[0] if archive is not None else []
    events = {entry.at: entry.events for entry in old} | {entry.at: entry.events() for entry in held}
    return summarize(id, [event for at in sorted(events) for event in events[at]])


def _about(id: str, kind: str, what: str, what_to_do: str) -> Finding:
    return Finding(kind=kind, severity="error", trajectory=id, what=what, what_to_do=what_to_do)
