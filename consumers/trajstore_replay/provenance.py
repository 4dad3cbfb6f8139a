"""Why a token and its routing row are what they are: who brought it, which recording won, what that overrode.

Reads headers, the payload of the event that brought the token, and the one row of each recording that has it.
"""

from collections.abc import Iterator, Sequence

import msgspec

from trajstore.errors import SchemaError
from trajstore.events import EventId
from trajstore.fold import Plan, Policy, row_version_pieces, split_tokens, version_pieces
from trajstore.history import History, Recording, Segment
from trajstore.overlaps import SameTokens
from trajstore.reading import Archive
from trajstore.routing import RoutingArray, RoutingSpec
from trajstore_audit import differing_sets
from trajstore_replay.steps import is_note, plan_at

__all__ = ["Provenance", "RowCandidate", "TokenOrigin", "why"]

_OUTCOMES = {
    "wins": "it gives the row",
    "overridden": "a later recording of the row wins",
    "rewound": "a later segment began at or below this row: it is of tokens that left the trajectory",
    "recomputed": "its rows were computed again after a retraction or preemption, and did not sample the next token",
    "did not sample the next token": "another segment brought the token after this one, and only its rows count",
    "observed": "another party's routing, which never enters a fold",
    "observed before a rewind": "another party's routing of a token that stood here before a rewind, or may have",
}

_DECIDED_NOTHING = "it is the last token's row: there is no next token yet that it could have sampled"
_HIDDEN = "a later recording of its segment has the row, and says that it was recomputed"


class TokenOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Who brought a token.

    Attributes:
        position: of the token.
        token_id: its id.
        segment: index of the segment that brought it.
        event: id of the event that carries it.
        sampled: False for prompt, tool and environment tokens.
        logprob: natural log, None where not sampled or not recorded.
        weight_version: of the weights that sampled it, "" where not sampled.
    """

    position: int
    token_id: int
    segment: int
    event: str
    sampled: bool
    logprob: float | None = None
    weight_version: str = ""


class RowCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A recording that has the row.

    Attributes:
        recording: which; its `segment` is -1 for an observation.
        outcome: "wins", or why not: "overridden", "rewound", "recomputed", "did not sample the next token", "observed",
            "observed before a rewind".
        because: the outcome in a sentence.
        engine, finish_reason: of its segment, "" for an observation.
        weight_version: of the weights that computed the row, as far as the engine told: those that sampled the next
            token, where the segment's output has several versions.
        experts: K ids per asked layer, `[layers][K]`.
        same_set, same_order: per asked layer, equal to the reference: as sets; as they stand. None for the reference.
    """

    recording: Recording
    outcome: str
    because: str
    engine: str = ""
    finish_reason: str = ""
    weight_version: str = ""
    experts: tuple[tuple[int, ...], ...] = ()
    same_set: tuple[bool, ...] | None = None
    same_order: tuple[bool, ...] | None = None


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of one position.

    Attributes:
        id, policy: of the trajectory and its fold.
        at: id of the last event folded, or of the note asked for.
        length: T at that event.
        token: who brought the token.
        next_token: who brought the token after it, which this row decided; None for the last one.
        layers: global ids of the layers asked for, the order of `experts`.
        candidates: recordings that have the row, newest segment first, then observations.
        reference: place in `candidates` of what the others are compared with: the winner, or the first; -1 for none.
        missing: why the fold has no such row, reason by reason; empty if it has one.
    """

    id: str
    policy: str
    at: str
    length: int
    token: TokenOrigin
    next_token: TokenOrigin | None
    layers: tuple[int, ...]
    candidates: tuple[RowCandidate, ...]
    reference: int
    missing: tuple[str, ...]

    @property
    def winner(self) -> RowCandidate | None:
        """The recording that gives the row."""
        return next((one for one in self.candidates if one.outcome == "wins"), None)


def why(
    store: Archive,
    id: str,
    token: int,
    *,
    layers: Sequence[int] | None = None,
    policy: Policy = "last_segment_wins",
    until: str | EventId | None = None,
) -> Provenance:
    """Explain one position of a trajectory.

    Args:
        store: a store or an archive.
        token: position, from the end if negative.
        layers: global layer ids; default all that route.
        policy, until: as `store.load`; until also a note, `"note 1-0"`: what had happened when it came, see
            `trajstore_replay.steps.timeline`.

    Raises:
        SchemaError: there is no such position, or no such layer.
        NotFound, SequenceGap, Corrupt: as `store.load`.
    """
    if until is not None and is_note(until):
        plan, at = plan_at(store, id, until, policy=policy), str(until)
    else:
        plan = store.plan(id, policy=policy, until=until)
        at = str(plan.history.last)
    history = plan.history
    spec = history.opened.routing
    row = token + history.length if token < 0 else token
    if not 0 <= row < history.length:
        raise SchemaError(f"{id} has {history.length} tokens at event {at}; there is no token {token}")
    columns = _columns(spec, layers)
    found = [(one.recording, one.outcome) for one in plan.why(row)]
    now = SameTokens(history).now_below if history.observations else None
    for one in history.observations:
        if now is not None and one.start <= row < one.stop:
            found.append((one, "observed" if row < now(one) else "observed before a rewind"))
    rows = [_row(store, id, recording, row)[columns] for recording, _ in found]
    reference = next((i for i, (_, outcome) in enumerate(found) if outcome == "wins"), 0 if found else -1)
    return Provenance(
        id=id,
        policy=policy,
        at=at,
        length=history.length,
        token=_token(store, id, history, row),
        next_token=_token(store, id, history, row + 1) if row + 1 < history.length else None,
        layers=() if spec is None else tuple(spec.layer_ids[column] for column in columns),
        candidates=tuple(
            _candidate(plan, row, recording, outcome, experts, None if i == reference else rows[reference])
            for i, ((recording, outcome), experts) in enumerate(zip(found, rows, strict=True))
        ),
        reference=reference,
        missing=() if any(outcome == "wins" for _, outcome in found) else tuple(_reasons(plan, row)),
    )


def _columns(spec: RoutingSpec | None, layers: Sequence[int] | None) -> list[int]:
    if spec is None:
        if layers:
            raise SchemaError("the trajectory was created without a routing spec and has no layers to ask for")
        return []
    unknown = [layer for layer in layers or () if layer not in spec.layer_ids]
    if unknown:
        raise SchemaError(
            f"layer {unknown[0]} does not route; layers are named by global id, and those that route are "
            f"{', '.join(map(str, spec.layer_ids))}"
        )
    return [spec.layer_ids.index(layer) for layer in layers or spec.layer_ids]


def _row(store: Archive, id: str, recording: Recording, row: int) -> RoutingArray:
    """`[L, K]`."""
    found: RoutingArray = store.recorded_rows(id, recording, rows=(row, row + 1))[0]
    return found


def _candidate(
    plan: Plan,
    row: int,
    recording: Recording,
    outcome: str,
    experts: RoutingArray,
    reference: RoutingArray | None,
) -> RowCandidate:
    segment = plan.history.segments[recording.segment] if recording.segment >= 0 else None
    same_set = same_order = None
    if reference is not None:
        same_order = tuple((experts == reference).all(axis=1).tolist())
        same_set = tuple((~differing_sets(experts[None], reference[None])[0]).tolist())
    return RowCandidate(
        recording=recording,
        outcome=outcome,
        because=_because(plan, row, outcome),
        engine=segment.engine if segment else "",
        finish_reason=segment.finish_reason if segment else "",
        weight_version=recording.weight_version if segment is None else _row_version(segment, row),
        experts=tuple(map(tuple, experts.tolist())),
        same_set=same_set,
        same_order=same_order,
    )


def _because(plan: Plan, row: int, outcome: str) -> str:
    """The outcome in a sentence. Under `as_sampled` a row may be missing although it is "overridden"."""
    if outcome == "did not sample the next token" and row + 1 == plan.history.length:
        return _DECIDED_NOTHING
    if outcome == "overridden" and not any(one.start <= row < one.stop for one in plan.placements):
        return _HIDDEN
    return _OUTCOMES[outcome]


def _row_version(segment: Segment, row: int) -> str:
    return _version_at(row_version_pieces(segment), row)


def _version_at(pieces: Iterator[tuple[int, int, str]], position: int) -> str:
    return next(version for start, stop, version in pieces if start <= position < stop)


def _token(store: Archive, id: str, history: History, position: int) -> TokenOrigin:
    span = next(one for one in history.spans if one.start <= position < one.stop)
    (payload,) = store.payloads(id, [span.event.id])
    ids, logprobs = split_tokens(span.event, payload)
    at = position - span.start
    return TokenOrigin(
        position=position,
        token_id=int(ids[at]),
        segment=span.segment,
        event=span.event.id,
        sampled=span.sampled,
        logprob=None if logprobs is None else float(logprobs[at]),
        weight_version=_version_at(version_pieces(history.segments[span.segment]), position) if span.sampled else "",
    )


def _reasons(plan: Plan, row: int) -> Iterator[str]:
    """Why no recording gives a row."""
    history = plan.history
    if history.opened.routing is None:
        yield "the trajectory was created without a routing spec: no routing is recorded"
        return
    held = [one for one in plan.why(row) if one.outcome != "rewound"]
    if row == history.length - 1:
        yield (
            "it is the last token: under as_sampled its row counts once whoever recorded it brings the next one"
            if held
            else "it is the last token, which has never been an input: a later segment records its row"
        )
        return
    if held:
        yield (
            "under as_sampled only the segment that brought the next token counts, with rows that it did not recompute"
        )
    for segment in history.segments:
        if segment.counts <= row or any(one.start <= row < one.stop for one in segment.recordings):
            continue
        yield from _absence(segment)


def _absence(segment: Segment) -> Iterator[str]:
    """Why a segment whose rows would count has none."""
    if not segment.finish_reason:
        yield f"segment {segment.index} is still open: its routing may come yet"
    elif segment.finish_reason == "lost":
        yield f"segment {segment.index} was lost: its writer vanished before it recorded the row"
    elif segment.absent:
        yield from (f"segment {segment.index} has no routing: {reason}" for reason in segment.absent)
    else:
        spans = ", ".join(f"{one.start}-{one.stop - 1}" for one in segment.recordings) or "none"
        ended = {"abort": "was aborted", "error": "failed"}.get(segment.finish_reason, "ended")
        yield f"segment {segment.index} {ended} and recorded other rows: {spans}"
