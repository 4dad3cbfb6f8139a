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
from trajstore.routing import RoutingArray, RoutingSpec
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


class _Probe(NamedTuple):
    """Rows of a recording that are looked for: hashes, and all tokens up to them, of the suspect with this number."""

    suspect: int
    event: str
    spec: RoutingSpec
    hashes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int32]


def find_sources(archive: Archive, part: Part, *, top: int) -> None:
    """Turn a part's suspects into findings. Each recording that may hold their rows is read once."""
    suspects, part.suspects = part.suspects, []
    if not suspects:
        return
    claims = _claims(archive, suspects)
    every = [claim for some in claims for claim in some]
    for suspect, own in zip(suspects, claims, strict=True):
        finding = _finding(suspect, own, every)
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


def _claims(archive: Archive, suspects: Sequence[Suspect]) -> list[list[_Claim]]:
    """For each suspect, where the rows of either recording are found, the second one's first.

    Of several places the first counts: in its own trajectory, then in its group by id.
    """
    probes: list[_Probe] = []
    for number, suspect in enumerate(suspects):
        probes += _probes_of(archive, suspect, number)
    members = _members(archive, {one.group for one in suspects if one.group is not None})
    wanted: dict[str, list[int]] = {}
    for i, probe in enumerate(probes):
        suspect = suspects[probe.suspect]
        for id in dict.fromkeys([suspect.id, *members.get(suspect.group or "", ())]):
            wanted.setdefault(id, []).append(i)
    found: dict[int, tuple[bool, str, int, _Claim]] = {}
    for id in sorted(wanted):
        for i, order, claim in _places(archive, id, [(i, probes[i]) for i in wanted[id]], suspects):
            place = (id != claim.suspect.id, id, order, claim)
            if i not in found or place[:3] < found[i][:3]:
                found[i] = place
    claims: list[list[_Claim]] = [[] for _ in suspects]
    for i in sorted(found):
        claims[probes[i].suspect].append(found[i][3])
    return claims


def _probes_of(archive: Archive, suspect: Suspect, number: int) -> Iterator[_Probe]:
    try:
        recorded = archive.recordings(suspect.id)
        known = {one.event: one for one in _recordings(recorded)}
        for event in (suspect.second_event, suspect.first_event):
            stop = min(suspect.stop, suspect.start + _PROBES)
            rows = recorded.rows(known[event], [(suspect.start, stop)])
            yield _Probe(number, event, recorded.spec, _hashes(rows), recorded.token_ids(known[event])[:stop])
    except _DAMAGED:  # has been told where it was compared
        return


def _places(
    archive: Archive, id: str, wanted: Sequence[tuple[int, _Probe]], suspects: Sequence[Suspect]
) -> Iterator[tuple[int, int, _Claim]]:
    """Which of the wanted probes a trajectory holds: their number, that of the recording, and the claim."""
    try:
        recorded = archive.recordings(id)
        if recorded.history.opened.routing is None:
            return
        for order, recording in enumerate(_recordings(recorded)):
            asked = [
                (i, probe, suspects[probe.suspect])
                for i, probe in wanted
                if probe.spec == recorded.spec and (suspects[probe.suspect].id, probe.event) != (id, recording.event)
            ]
            if not asked:
                continue
            hashes = _hashes_of(recorded, recording)
            ascending = np.argsort(hashes, kind="stable")
            for i, probe, suspect in asked:
                at = _find(hashes, ascending, probe)
                if at is None:
                    continue
                start = recording.start + at
                if start == suspect.start and _is_of(recorded, recording, probe.tokens):
                    continue  # they are where they should be: of a prompt that was sent again, say, or of a group's
                stop = start + suspect.stop - suspect.start
                yield i, order, _Claim(suspect, probe.event, id, recording.event, start, stop)
    except _DAMAGED:
        return


def _is_of(recorded: RecordedRows, recording: Recording, tokens: npt.NDArray[np.int32]) -> bool:
    """Whether a recording is of a sequence that begins so."""
    return np.array_equal(recorded.token_ids(recording)[: len(tokens)], tokens)


def _hashes_of(recorded: RecordedRows, recording: Recording) -> npt.NDArray[np.uint64]:
    step = max(1, _BLOCK_BYTES // recorded.spec.row_bytes)
    blocks = range(recording.start, recording.stop, step)
    hashes = [_hashes(recorded.rows(recording, [(at, min(at + step, recording.stop))])) for at in blocks]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def _find(hashes: npt.NDArray[np.uint64], ascending: npt.NDArray[np.int64], probe: _Probe) -> int | None:
    """Where a recording has these rows in order, enough of them; as an index of its rows."""
    if not len(hashes):
        return None
    places = np.searchsorted(hashes, probe.hashes, sorter=ascending)
    there = ascending[np.minimum(places, len(hashes) - 1)]
    hit = (places < len(hashes)) & (hashes[there] == probe.hashes)
    if not hit.any():
        return None
    offsets, counts = np.unique_counts(there[hit] - np.flatnonzero(hit))
    best = int(counts.argmax())
    if not enough_rows(probe.spec, int(counts[best])):
        return None
    return max(0, int(offsets[best]))


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
    what, event = suspect.what, suspect.event or suspect.second_event
    what_to_do = "compare both with `trajstore diff`; unless new weights explain it, do not train on them"
    if suspect.event:
        own = [claim for claim in own if claim.event == suspect.event]
        what_to_do = "do not train on this recording; see its recorder"
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
