"""The audit of one trajectory: its pairs compared, its rows looked at, what is wrong named."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trajstore.archive.verify.soundness import improbable_steps
from trajstore.recorded import RecordedRows
from trajstore_audit.load import choose_rows, count_experts
from trajstore_audit.logprobs import compare_logprobs
from trajstore_audit.looking import WHAT_TO_DO, Look
from trajstore_audit.missing import missing_rows
from trajstore_audit.one_pair import Change, PairOutcome, changes_outside, compare_pair
from trajstore_audit.pairs import Pair, left_out, observation_pairs, same_conditions, segment_pairs, version_gap
from trajstore_audit.result import LATER, Counts, Finding, PairDrift, Parameters, Spread, WorstTrajectory
from trajstore_audit.suspicion import Explanation, explain, find_culprit
from trajstore_audit.tally import DriftTally, Part, Suspect, add_counts, add_to, count_in

__all__ = ["audit_trajectory"]

_MOST_GAP = 1000
"""Version gaps beyond it count as it."""


def audit_trajectory(
    recorded: RecordedRows, parameters: Parameters, logprobs: npt.NDArray[np.float32] | None = None
) -> Part:
    """Audit one trajectory.

    Args:
        logprobs: another party's, float32 `[T]`.

    Raises:
        Corrupt: stored bytes are damaged or gone.
    """
    history = recorded.history
    part = Part(trajectories=1)
    if history.opened.routing is None:
        return part
    part.with_routing = 1
    part.recordings = len(history.observations) + sum(len(segment.recordings) for segment in history.segments)
    part.rows.total = history.length
    part.rows.missing = missing_rows(recorded.plan)
    pairs: list[Pair] = []
    if parameters.against != "observations":
        pairs += segment_pairs(history)
    if parameters.against != "segments":
        pairs += observation_pairs(recorded.plan)
        part.rows.left_out = left_out(history)
    look = Look(recorded)
    audit = _Trajectory(recorded, parameters, part, look, keep_drift=logprobs is not None)
    for pair in pairs:
        audit.take(pair)
    audit.count_load(pairs)
    audit.finish()
    if logprobs is not None:
        folded = recorded.without_routing()
        part.logprobs = compare_logprobs(folded.logprobs, logprobs, folded.loss_mask, audit.drift)
    return part


class _Trajectory:
    """What is known of it so far."""

    def __init__(
        self, recorded: RecordedRows, parameters: Parameters, part: Part, look: Look, *, keep_drift: bool
    ) -> None:
        self.recorded = recorded
        self.parameters = parameters
        self.part = part
        self.keep_drift = keep_drift
        self.drift = np.full(recorded.history.length, -1, np.int64)
        self.look = look
        self._first_pair: dict[str, PairDrift] = {}
        self._named: dict[tuple[str, str], npt.NDArray[np.int64]] = {}

    def take(self, pair: Pair) -> None:
        """Compare a pair."""
        outcome = compare_pair(self.recorded, pair, look=self.look.of(pair), keep_drift=self.keep_drift)
        tally = self.part.drift(pair.against)
        counts = _counts(outcome, self.recorded.spec.top_k)
        add_counts(tally.total, counts)
        line = self._line(pair, counts, outcome)
        self.part.pairs.append(line)
        _divide(tally, line, counts)
        grid = tally.grid(self.recorded.spec)
        grid.pairs += 1
        grid.referenced += outcome.referenced
        grid.cells += outcome.rows_by_bucket
        grid.differing += outcome.by_bucket
        grid.order_changes += outcome.reordered
        grid.shared += outcome.shared
        self.part.bytes_read += 2 * (outcome.tokens - outcome.referenced) * self.recorded.spec.row_bytes
        if outcome.differing:
            self._first_pair.setdefault(pair.against, line)
            self._name_faults(pair, outcome)
        if self.keep_drift:
            self._keep_drift(pair, outcome)

    def count_load(self, pairs: Sequence[Pair]) -> None:
        """Count experts in the rows that stand for all, or in all."""
        wanted = self.parameters.load_rows
        for against in ("segments", "observations"):
            some = [pair for pair in pairs if pair.against == against]
            if wanted is None:
                chosen = [(pair, pair.start, pair.stop) for pair in some]
            else:
                one = choose_rows(self.recorded.id, some, rows=wanted, seed=self.parameters.seed)
                chosen = [] if one is None else [one]
            for pair, start, stop in chosen:
                self._count(pair, start, stop)

    def _count(self, pair: Pair, start: int, stop: int) -> None:
        spec = self.recorded.spec
        grid = self.part.drift(pair.against).grid(spec)
        if grid.load is None:
            grid.load = np.zeros((2, spec.num_layers, spec.num_experts), np.int64)
        step = max(1, (8 << 20) // spec.row_bytes)
        for at in range(start, stop, step):
            runs = [(at, min(at + step, stop))]
            for side, recording in enumerate((pair.first, pair.second)):
                grid.load[side] += count_experts(self.recorded.rows(recording, runs), spec.num_experts)
        grid.load_rows += stop - start
        self.part.bytes_read += 2 * (stop - start) * spec.row_bytes

    def finish(self) -> None:
        """Once all pairs were taken: what counts once for a trajectory."""
        spread = self.parameters.sample < 1
        self.look.into(self.part.rows)
        for finding in self.look.findings:
            self._find(finding)
        for against in ("segments", "observations"):
            tally = self.part.drift(against)
            for counts in (tally.total, *(one for table in tally.tables() for one in table.values())):
                if counts.tokens:
                    counts.trajectories = 1
                    counts.spread = _spread(counts) if spread else None
            for grid in tally.grids:
                grid.trajectories = int(grid.pairs > 0)
                if spread:
                    cells, differing = float(grid.cells.sum()), grid.differing.sum(axis=1).astype(np.float64)
                    grid.cc = np.full(len(differing), cells * cells)
                    grid.cd, grid.dd = cells * differing, differing * differing
            first = self._first_pair.get(against)
            if first is not None and first.row is not None and first.layer is not None:
                worst = WorstTrajectory(
                    id=first.id,
                    group=first.group,
                    against=first.against,
                    pairs=tally.total.pairs,
                    cells=tally.total.cells,
                    differing=tally.total.differing,
                    first_event=first.first_event,
                    second_event=first.second_event,
                    first_segment=first.first_segment,
                    second_segment=first.second_segment,
                    row=first.row,
                    layer=first.layer,
                )
                tally.worst.append(worst)

    def _line(self, pair: Pair, counts: Counts, outcome: PairOutcome) -> PairDrift:
        segments = self.recorded.history.segments
        one, other = pair.first, pair.second
        engines = [segments[side.segment].engine if side.segment >= 0 else "" for side in (one, other)]
        layer_ids = self.recorded.spec.layer_ids
        return PairDrift(
            id=self.recorded.id,
            group=self.recorded.history.opened.group,
            against=pair.against,
            first_event=one.event,
            second_event=other.event,
            first_segment=one.segment,
            second_segment=other.segment,
            start=pair.start,
            stop=pair.stop,
            first_version=one.weight_version,
            second_version=other.weight_version,
            gap=version_gap(one.weight_version, other.weight_version),
            first_engine=engines[0],
            second_engine=engines[1],
            first_origin=one.origin,
            second_origin=other.origin,
            source=other.source,
            tokens=counts.tokens,
            tokens_differing=counts.tokens_differing,
            cells=counts.cells,
            differing=counts.differing,
            order_changes=counts.order_changes,
            jaccard=counts.jaccard,
            referenced=counts.referenced,
            row=outcome.change.row if outcome.change is not None else None,
            layer=layer_ids[outcome.change.layer] if outcome.change is not None else None,
        )

    def _name_faults(self, pair: Pair, outcome: PairOutcome) -> None:
        count, change = outcome.differing, outcome.change
        found = explain(self.recorded, pair, outcome.suspicious) if len(outcome.suspicious) else None
        for one in found.explanations if found is not None else ():
            if one.kind == "repeated-rows":
                self._name_stale(one)
            else:
                self._name_fault(pair, one)
        if not same_conditions(pair, self.recorded.history):
            return
        if found is not None and found.explanations:
            explained = np.unique(np.concatenate([one.rows for one in found.explanations]))
            offsets = sorted({one.offset for one in found.explanations if one.offset})
            count, change = changes_outside(self.recorded, pair, explained, offsets=offsets, unseen=found.unseen)
        if change is not None:
            self._find(self._unexpected(pair, change, count, outcome.cells))

    def _name_stale(self, one: Explanation) -> None:
        """Name stale rows once, unless they are so many that a look at the recording by itself told of them."""
        long = len(one.rows) >= improbable_steps(self.recorded.spec, self.recorded.spec.num_layers)
        known = self._named.get((one.kind, one.event), np.empty(0, np.int64))
        if (long and self.look.has_told(one.kind, one.event)) or np.isin(one.rows, known).any():
            return
        self._named[one.kind, one.event] = np.union1d(known, one.rows)
        self._find(
            Finding(
                kind=one.kind,
                id=self.recorded.id,
                group=self.recorded.history.opened.group,
                event=one.event,
                row=int(one.rows[0]),
                what=one.what,
                what_to_do=WHAT_TO_DO,
            )
        )

    def _name_fault(self, pair: Pair, one: Explanation) -> None:
        """Name the recording that is wrong, once: the pairs before and after it both show it."""
        third = find_culprit(self.recorded, pair, one)
        event = "" if third is None else third[0].event
        if third is not None:
            known = self._named.get((one.kind, event), np.empty(0, np.int64))
            if np.isin(one.rows, known).any():
                return
            self._named[one.kind, event] = np.union1d(known, one.rows)
            right = pair.first if event == pair.second.event else pair.second
            what = f"{one.what}: event {event} {one.which}, for event {third[1].event} agrees with {right.event}"
        else:
            what = f"{one.what}: one of both {one.which}{one.unless}"
        id, group, start = self.recorded.id, self.recorded.history.opened.group, int(one.rows[0])
        if one.kind == "shifted":
            what_to_do = "do not train on the shifted one; see its engine's start"
            if not event:
                what_to_do = f"a third recording tells which of both; {what_to_do}"
            row, event = start, event or pair.second.event
            found = Finding(kind=one.kind, id=id, group=group, event=event, row=row, what=what, what_to_do=what_to_do)
            self._find(found)
            return
        suspect = Suspect(
            id=id,
            group=group,
            first_event=pair.first.event,
            second_event=pair.second.event,
            event=event,
            start=start,
            stop=int(one.rows[-1]) + 1,
            what=what,
        )
        add_to(self.part.findings_by_kind, {one.kind: 1})
        self.part.suspects.append(suspect)

    def _unexpected(self, pair: Pair, change: Change, count: int, cells: int) -> Finding:
        layer = self.recorded.spec.layer_ids[change.layer]
        more = f", and {count - 1} more" if count > 1 else ""
        return Finding(
            kind="unexpected-change",
            id=self.recorded.id,
            group=self.recorded.history.opened.group,
            event=pair.second.event,
            row=change.row,
            layer=layer,
            what=f"row {change.row}, layer {layer} was {list(change.before)} in event {pair.first.event} and is "
            f"{list(change.after)} in event {pair.second.event}{more}, of {cells} cells, though weight version "
            f"{pair.first.weight_version} and engine are the same",
            what_to_do="an engine that batches otherwise may change a few; if it should not, compare both with `diff`",
        )

    def _keep_drift(self, pair: Pair, outcome: PairOutcome) -> None:
        """Drift by row, of rows that are still the trajectory's tokens."""
        segment = pair.second.segment if pair.second.segment >= 0 else pair.first.segment
        stop = min(self.recorded.history.segments[segment].counts, len(self.drift), pair.stop)
        if pair.start < stop:
            self.drift[pair.start : stop] = 0
            for places, number in outcome.drift:
                kept = places < stop
                self.drift[places[kept]] = number[kept]

    def _find(self, finding: Finding) -> None:
        add_to(self.part.findings_by_kind, {finding.kind: 1})
        self.part.findings.append(finding)


def _counts(outcome: PairOutcome, top_k: int) -> Counts:
    return Counts(
        pairs=1,
        tokens=outcome.tokens,
        tokens_differing=outcome.tokens_differing,
        cells=outcome.cells,
        differing=outcome.differing,
        order_changes=outcome.order_changes,
        shared={top_k: outcome.shared.sum(axis=0).tolist()} if outcome.differing else {},
        referenced=outcome.referenced,
    )


def _divide(tally: DriftTally, line: PairDrift, counts: Counts) -> None:
    """Count a pair in each table."""
    gap = line.gap if line.gap is None else max(-_MOST_GAP, min(_MOST_GAP, line.gap))
    count_in(tally.segment_pairs, (min(line.first_segment, LATER), min(line.second_segment, LATER)), counts)
    count_in(tally.version_gaps, gap, counts)
    count_in(tally.engines, (line.first_engine, line.second_engine), counts)
    count_in(tally.origins, (line.first_origin, line.second_origin), counts)
    count_in(tally.sources, line.source, counts)


def _spread(counts: Counts) -> Spread:
    c, d, t, u = counts.cells, counts.differing, counts.tokens, counts.tokens_differing
    return Spread(cc=c * c, cd=c * d, dd=d * d, tt=t * t, tu=t * u, uu=u * u)
