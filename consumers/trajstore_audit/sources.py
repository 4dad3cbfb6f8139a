"""Recordings that agree with another one no better than chance: whose rows are they?

Asked once all was compared, for the few that an audit names: their rows are looked for, equal in all layers, among
the other recordings of the trajectory and of its group. Two recordings that hold each other's rows were swapped.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.history import Recording
from trajstore.reading import Archive
from trajstore.recorded import RecordedRows
from trajstore.routing import RoutingArray
from trajstore_audit.faults import enough_rows
from trajstore_audit.result import Finding
from trajstore_audit.tally import Part, Suspect, add_to, merge

__all__ = ["find_sources"]

_PROBES = 64
"""Rows of a recording that are looked for."""

_MEMBERS = 64
"""Trajectories of a group that are searched."""

_BLOCK_BYTES = 8 << 20

_DAMAGED = (Corrupt, NotFound, RoutingError, SchemaError, SequenceGap)


class _Claim(NamedTuple):
    """Rows of a recording are those of another place."""

    suspect: Suspect
    event: str
    other_id: str
    other_event: str
    start: int
    stop: int


def find_sources(archive: Archive, part: Part, *, top: int) -> None:
    """Turn a part's suspects into findings."""
    suspects, part.suspects = part.suspects, []
    if not suspects:
        return
    members = _members(archive, {one.group for one in suspects if one.group is not None})
    claims = {id(one): list(_claims(archive, one, members.get(one.group or "", ()))) for one in suspects}
    every = [claim for some in claims.values() for claim in some]
    for suspect in suspects:
        finding = _finding(suspect, claims[id(suspect)], every)
        if finding.kind != "other-sequence":
            add_to(part.findings_by_kind, {"other-sequence": -1})
            if not part.findings_by_kind["other-sequence"]:
                del part.findings_by_kind["other-sequence"]
            add_to(part.findings_by_kind, {finding.kind: 1})
        merge(part, Part(findings=[finding]), top=top)


def _members(archive: Archive, groups: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {group: [] for group in groups}
    if not groups:
        return found
    for partition in range(archive.partitions):
        for summary in archive.list(partition=partition, on_corrupt=lambda _: None):
            if summary.group in groups:
                found[summary.group].append(summary.id)
    return {group: sorted(ids)[:_MEMBERS] for group, ids in found.items()}


def _claims(archive: Archive, suspect: Suspect, members: Sequence[str]) -> Iterator[_Claim]:
    """Where the rows of either recording are found, the second one's first."""
    try:
        recorded = archive.recordings(suspect.id)
        known = {one.event: one for one in _recordings(recorded)}
        for event in (suspect.second_event, suspect.first_event):
            rows = recorded.rows(known[event], [(suspect.start, min(suspect.stop, suspect.start + _PROBES))])
            for other in dict.fromkeys([suspect.id, *members]):
                place = _search(archive, recorded, other, rows, (suspect.id, event))
                if place is not None:
                    found, start = place
                    stop = start + suspect.stop - suspect.start
                    yield _Claim(suspect, event, other, found, start, stop)
                    break
    except _DAMAGED:  # has been told where it was compared
        return


def _search(
    archive: Archive, recorded: RecordedRows, id: str, rows: RoutingArray, own: tuple[str, str]
) -> tuple[str, int] | None:
    """The recording of a trajectory that holds rows, and the position of the first of them there."""
    try:
        other = recorded if id == recorded.id else archive.recordings(id)
        if other.history.opened.routing != recorded.spec:
            return None
        probes = _hashes(rows)
        for recording in _recordings(other):
            if (id, recording.event) == own:
                continue
            start = _find(other, recording, probes)
            if start is not None:
                return recording.event, start
    except _DAMAGED:
        pass
    return None


def _find(other: RecordedRows, recording: Recording, probes: npt.NDArray[np.uint64]) -> int | None:
    """Where a recording has these rows in order, enough of them."""
    step = max(1, _BLOCK_BYTES // other.spec.row_bytes)
    hashes = np.concatenate(
        [
            _hashes(other.rows(recording, [(at, min(at + step, recording.stop))]))
            for at in range(recording.start, recording.stop, step)
        ]
    )
    order = np.argsort(hashes, kind="stable")
    places = np.searchsorted(hashes[order], probes)
    hit = (places < len(hashes)) & (hashes[order[np.minimum(places, len(hashes) - 1)]] == probes)
    if not hit.any():
        return None
    offsets, counts = np.unique_counts(order[places[hit]] - np.flatnonzero(hit))
    best = int(counts.argmax())
    if not enough_rows(other.spec, int(counts[best])):
        return None
    return recording.start + max(0, int(offsets[best]))


def _hashes(rows: RoutingArray) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row: a sum of its bytes times odd numbers."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    factors = np.random.default_rng(1).integers(0, 1 << 63, flat.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    found = np.empty(len(flat), np.uint64)
    for at in range(0, len(flat), 512):
        mixed = (flat[at : at + 512].astype(np.uint64) + np.uint64(1)) * factors
        mixed ^= mixed >> np.uint64(29)
        found[at : at + 512] = mixed.sum(axis=1, dtype=np.uint64)
    return found


def _recordings(recorded: RecordedRows) -> Iterable[Recording]:
    for segment in recorded.history.segments:
        yield from segment.recordings
    yield from recorded.history.observations


def _finding(suspect: Suspect, own: Sequence[_Claim], every: Sequence[_Claim]) -> Finding:
    """What is known of a suspect in the end."""
    for claim in own:
        for other in every:
            witnesses = {claim.other_event, other.other_event}
            if suspect.id == other.suspect.id and witnesses & {claim.event, other.event}:
                continue  # a third recording must say so: of two, either may be wrong
            if _holds(claim, other) and _holds(other, claim):
                where = "" if other.suspect.id == suspect.id else f" of trajectory {other.suspect.id}"
                return Finding(
                    kind="swapped",
                    id=suspect.id,
                    group=suspect.group,
                    event=claim.event,
                    row=suspect.start,
                    what=f"rows {suspect.start} to {suspect.stop - 1} of event {claim.event} and rows "
                    f"{other.suspect.start} to {other.suspect.stop - 1} of event {other.event}{where} hold each "
                    f"other's routing, as events {claim.other_event} and {other.other_event} show",
                    what_to_do="train on neither; their recorder mixed up two requests",
                )
    what, event = suspect.what, suspect.second_event
    what_to_do = "compare both with `trajstore diff`; unless new weights explain it, do not train on them"
    if own:
        claim = own[0]
        event, what_to_do = claim.event, "do not train on this recording; its recorder mixed up two requests"
        where = "" if claim.other_id == suspect.id else f" of trajectory {claim.other_id}"
        what += f"; those of event {claim.event} are rows {claim.start} on of event {claim.other_event}{where}"
    return Finding(
        kind="other-sequence",
        id=suspect.id,
        group=suspect.group,
        event=event,
        row=suspect.start,
        what=what,
        what_to_do=what_to_do,
    )


def _holds(claim: _Claim, other: _Claim) -> bool:
    """The rows of one recording are those of the place of the other."""
    return (
        (claim.suspect.id, claim.event) != (other.suspect.id, other.event)
        and claim.other_id == other.suspect.id
        and claim.start < other.suspect.stop
        and other.suspect.start < claim.stop
    )
