"""What an audit returns: counts that add up over trajectories, the tables made of them, and what each number means.

Its parts are in `counts.py` and `distributions.py`. Nothing here compares or reads. Every count is an integer (but for
sums over logprobs and squares), so that parts which were counted apart add up to the same numbers in any order.
Definitions and sources: `docs/audit.md`.
"""

from typing import Literal, TypeAlias

import msgspec

from trajstore_audit.counts import (
    LATER,
    OTHERS,
    Counts,
    EnginePair,
    LayerDrift,
    OriginPair,
    SegmentPair,
    SourceDrift,
    Spread,
    VersionGap,
    ratio,
)
from trajstore_audit.distributions import TAUS, Load, LogprobDrift, PositionDrift, bucket_bounds
from trajstore_audit.sampling import Interval, ratio_interval

__all__ = [
    "LATER",
    "OTHERS",
    "TAUS",
    "Against",
    "Audit",
    "Counts",
    "Drift",
    "EnginePair",
    "Finding",
    "LayerDrift",
    "Load",
    "LogprobDrift",
    "OriginPair",
    "PairDrift",
    "Parameters",
    "PositionDrift",
    "Rows",
    "SegmentPair",
    "SourceDrift",
    "Spread",
    "Totals",
    "VersionGap",
    "WorstTrajectory",
    "bucket_bounds",
]

Against: TypeAlias = Literal["segments", "observations", "all"]


class WorstTrajectory(msgspec.Struct, kw_only=True):
    """One of the trajectories with the highest share of differing cells.

    Attributes:
        id, group: of the trajectory.
        against: "segments" or "observations".
        pairs, cells, differing: as in `Counts`.
        first_event, second_event: of the first pair that differs; arguments for `trajstore diff`.
        first_segment, second_segment: their segments, -1 for an observation.
        row, layer: the first row that differs there, and its first layer (global id).
    """

    id: str
    group: str | None
    against: Literal["segments", "observations"]
    pairs: int
    cells: int
    differing: int
    first_event: str
    second_event: str
    first_segment: int
    second_segment: int
    row: int
    layer: int

    @property
    def share(self) -> float:
        """differing / cells."""
        return ratio(self.differing, self.cells)


class PairDrift(msgspec.Struct, kw_only=True, frozen=True):
    """Drift between two recordings of rows `[start, stop)` of one trajectory: a row of the table of pairs.

    Attributes:
        id, group: of the trajectory.
        against: "segments" or "observations".
        first_event, second_event: events that carry the recordings.
        first_segment, second_segment: -1 for an observation.
        start, stop: rows compared.
        first_version, second_version, gap: weight versions; their difference, None where a label has no number.
        first_engine, second_engine, first_origin, second_origin: of both recordings.
        source: of the second one: "" a segment, "late", or who observed.
        tokens, tokens_differing, cells, differing, order_changes, jaccard, referenced: as in `Counts`.
        row, layer: the first that differs, None where none does; `layer` is a global id.
    """

    id: str
    group: str | None
    against: Literal["segments", "observations"]
    first_event: str
    second_event: str
    first_segment: int
    second_segment: int
    start: int
    stop: int
    first_version: str
    second_version: str
    gap: int | None
    first_engine: str
    second_engine: str
    first_origin: str
    second_origin: str
    source: str
    tokens: int
    tokens_differing: int
    cells: int
    differing: int
    order_changes: int
    jaccard: float
    referenced: int
    row: int | None
    layer: int | None


class Finding(msgspec.Struct, kw_only=True, frozen=True):
    """Something that is wrong, or that cannot be drift.

    Attributes:
        kind: `zero-layer`, `constant-layer`, `repeated-rows`, `experts` (one recording cannot be right); `shifted`,
            `swapped`, `other-sequence` (rows of another position or sequence); `unexpected-change` (drift although
            weights and engine are the same); `unreadable` (damaged, incomplete or gone).
        id, group: of the trajectory.
        event: of the recording that is wrong; "" where it is about the whole trajectory.
        row, layer: the first that is concerned, None where it is about all; `layer` is a global id.
        what: a sentence with the evidence.
        what_to_do: a sentence, "" where nothing can be done.
    """

    kind: str
    id: str
    group: str | None = None
    event: str = ""
    row: int | None = None
    layer: int | None = None
    what: str = ""
    what_to_do: str = ""


class Rows(msgspec.Struct, kw_only=True):
    """Rows of the folded trajectories (`last_segment_wins`) and of the recordings that were read.

    Attributes:
        total: T of all trajectories with routing.
        missing: reason → rows without routing: "last token" (normal), "not recorded", or as the recorder said.
        read: rows of recordings that were read and looked at.
        zero: of them, rows with a layer of which every expert id is 0.
        duplicates: of them, rows with a layer that names an expert twice.
        repeated: of them, rows equal to the row before in every layer.
        left_out: reason → rows of observations that were compared with nothing: "rewound", they are of tokens that the
            trajectory no longer has; "unknown tokens", they may be, for the note does not say.
    """

    total: int = 0
    missing: dict[str, int] = {}
    read: int = 0
    zero: int = 0
    duplicates: int = 0
    repeated: int = 0
    left_out: dict[str, int] = {}


class Drift(msgspec.Struct, kw_only=True):
    """The tables of one kind of comparison, each row of any table a `Counts`. Rows ascend by their key.

    Attributes:
        total: everything.
        layers, segment_pairs, version_gaps, engines, origins, sources: the same, divided.
        positions: by layer and position.
        load: of the experts.
        worst: trajectories, highest share of differing cells first; only those that differ at all.
    """

    total: Counts
    layers: list[LayerDrift]
    segment_pairs: list[SegmentPair]
    version_gaps: list[VersionGap]
    engines: list[EnginePair]
    origins: list[OriginPair]
    sources: list[SourceDrift]
    positions: PositionDrift
    load: Load
    worst: list[WorstTrajectory]


class Totals(msgspec.Struct, kw_only=True):
    """What an audit went through.

    Attributes:
        population: trajectories that match ids, group and status.
        trajectories: of them, those that were audited: all, or the sample.
        with_routing: of these, those with a routing spec.
        skipped: reason → trajectories that were not audited: "deleted", "damaged", "events missing", "not found", ...
        recordings: of the audited ones, observations too.
        bytes_read: of routing, uncompressed.
        seconds: by the clock, of this call; what an earlier, killed one did does not count.
    """

    population: int = 0
    trajectories: int = 0
    with_routing: int = 0
    skipped: dict[str, int] = {}
    recordings: int = 0
    bytes_read: int = 0
    seconds: float = 0.0


class Parameters(msgspec.Struct, kw_only=True, frozen=True):
    """What an audit was asked for. Two audits with equal parameters of an unchanged place give equal numbers.

    Attributes:
        place: location of the store or archive.
        ids: only these trajectories; None for all.
        group, status: only these; None for any (and all but deleted).
        against: "segments", "observations" or "all".
        sample, seed: share of trajectories, and what it was drawn with.
        load_rows: see `audit`.
        top: how many worst trajectories, and findings, are kept.
        logprobs: another party's logprobs were given.
        trajstore: version of the library.
    """

    place: str
    ids: tuple[str, ...] | None = None
    group: str | None = None
    status: tuple[str, ...] | None = None
    against: Against = "all"
    sample: float = 1.0
    seed: int = 0
    load_rows: int | None = None
    top: int = 20
    logprobs: bool = False
    trajstore: str = ""


class Audit(msgspec.Struct, kw_only=True):
    """The outcome of an audit.

    Attributes:
        parameters: what was asked for.
        totals: what was gone through.
        rows: missing and doubtful rows.
        segments: each recording of a segment against the one before it of the same rows; None if not asked for.
        observations: each observation (a trainer's routing) against the recording that wins the row; None likewise.
        logprobs: None unless another party's were given.
        findings: the first of them, by trajectory id.
        findings_by_kind: kind → how many there are in all.
    """

    parameters: Parameters
    totals: Totals
    rows: Rows
    segments: Drift | None
    observations: Drift | None
    logprobs: LogprobDrift | None
    findings: list[Finding]
    findings_by_kind: dict[str, int]

    def _repr_html_(self) -> str:
        from trajstore_audit.notebook import audit_cell  # which imports this module

        return audit_cell(self)

    def interval(self, counts: Counts, of: Literal["cells", "tokens"] = "cells") -> Interval | None:
        """95 % confidence interval of `counts.share` (or of `counts.token_share`) over all trajectories.

        None unless trajectories were sampled, or where fewer than two of them were, or none has any such cell. Where no
        cell differs it reaches from 0 to 3 / trajectories, see `trajstore_audit.sampling.ratio_interval`.
        """
        spread = counts.spread
        if spread is None:
            return None
        if of == "cells":
            sums = (counts.cells, counts.differing, spread.cc, spread.cd, spread.dd)
        else:
            sums = (counts.tokens, counts.tokens_differing, spread.tt, spread.tu, spread.uu)
        totals = self.totals
        return ratio_interval(
            *sums, sampled=totals.trajectories, population=totals.population, clusters=counts.trajectories
        )
