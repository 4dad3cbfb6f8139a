"""Rows that a comparison reads, looked at on the way: zeros, stale rows, layers that never change."""

from collections.abc import Callable, Set

import numpy as np

from trajstore.archive.verify.soundness import check_rows
from trajstore.history import Recording
from trajstore.recorded import RecordedRows
from trajstore.routing import RoutingArray
from trajstore_audit.faults import screen
from trajstore_audit.one_pair import Block
from trajstore_audit.pairs import Pair
from trajstore_audit.result import Finding, Rows

__all__ = ["Look"]

_WHAT_TO_DO = "do not train on this recording; see its engine"


class Look:
    """Looks at rows of one trajectory, at each only once as far as can be told.

    Args:
        recorded: of the trajectory.
        seconds: events of the recordings that are second in some pair: they are looked at there.

    Attributes:
        findings: what is wrong.
    """

    def __init__(self, recorded: RecordedRows, seconds: Set[str]) -> None:
        self._recorded = recorded
        self._seconds = seconds
        self._upto: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()
        self._rows = Rows()
        self.findings: list[Finding] = []

    def of(self, pair: Pair) -> Callable[[Block], None]:
        """What looks at the blocks of a pair."""

        def look(block: Block) -> None:
            self._rows.duplicates += block.repeats
            self._look(pair.second, block, block.second)
            if pair.first.event not in self._seconds:
                self._look(pair.first, block, block.first)

        return look

    def into(self, rows: Rows) -> None:
        """Add what was counted."""
        rows.read += self._rows.read
        rows.zero += self._rows.zero
        rows.duplicates += self._rows.duplicates
        rows.repeated += self._rows.repeated

    def _look(self, recording: Recording, block: Block, rows: RoutingArray) -> None:
        upto = self._upto.get(recording.event, -1)
        skip = int(np.searchsorted(block.positions, upto))
        if skip == len(rows):
            return
        self._upto[recording.event] = int(block.positions[-1]) + 1
        positions, rows = block.positions[skip:], rows[skip:]
        starts = [0, *(start - skip for start in block.starts if start > skip)]
        found = screen(rows, starts)
        self._rows.read += len(rows)
        self._rows.zero += found.zero
        self._rows.repeated += found.repeated
        if found.zero:
            self._name_zero(recording, int(positions[found.zero_row]), found.zero_layer, found.zero)
        for first, stop in found.doubtful:
            self._doubt(recording, rows[first:stop], int(positions[first]))

    def _name_zero(self, recording: Recording, row: int, layer: int, count: int) -> None:
        layer_id = self._recorded.spec.layer_ids[layer]
        what = f"layer {layer_id} of row {row} of event {recording.event} is all zeros, as are {count - 1} more rows"
        self._tell("zero-layer", recording, row, layer_id, what if count > 1 else what.partition(",")[0])

    def _doubt(self, recording: Recording, rows: RoutingArray, start: int) -> None:
        """A closer look at neighbouring rows, with the tokens that they are of."""
        spec = self._recorded.spec
        tokens = self._recorded.token_ids(recording)[start : start + len(rows)]
        for doubt in check_rows(spec, rows, tokens, start=start):
            same = (rows[1:] == rows[:-1]).all(axis=2)
            constant = np.flatnonzero(same.all(axis=0))
            if doubt.kind == "experts" and ("zero-layer", recording.event) in self._told:
                continue  # which says it better
            if doubt.kind == "constant-layer" and len(constant):
                self._tell(doubt.kind, recording, start, spec.layer_ids[int(constant[0])], doubt.what)
            else:
                stale = np.flatnonzero(same.all(axis=1))
                row = start + int(stale[0]) if doubt.kind == "repeated-rows" else start
                self._tell(doubt.kind, recording, row, None, doubt.what)

    def _tell(self, kind: str, recording: Recording, row: int, layer: int | None, what: str) -> None:
        """Once for each kind and recording: what was found first says where to look."""
        if (kind, recording.event) in self._told:
            return
        self._told.add((kind, recording.event))
        self.findings.append(
            Finding(
                kind=kind,
                id=self._recorded.id,
                group=self._recorded.history.opened.group,
                event=recording.event,
                row=row,
                layer=layer,
                what=what,
                what_to_do=_WHAT_TO_DO,
            )
        )
