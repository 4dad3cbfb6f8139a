"""Rows that a comparison reads, looked at on the way: zeros, impossible experts, stale rows, dead layers."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trajstore.archive.verify.soundness import check_rows
from trajstore.history import Recording, merge_spans
from trajstore.recorded import RecordedRows
from trajstore.routing import RoutingArray
from trajstore_audit.faults import runs_of, screen
from trajstore_audit.one_pair import Block
from trajstore_audit.pairs import Pair
from trajstore_audit.result import Finding, Rows

__all__ = ["WHAT_TO_DO", "Look"]

WHAT_TO_DO = "do not train on this recording; see its engine"
"""About a recording that cannot be right, whatever another one says."""


class Look:
    """Looks at rows of one trajectory, at each row of each recording once.

    Args:
        recorded: of the trajectory.

    Attributes:
        findings: what is wrong.
    """

    def __init__(self, recorded: RecordedRows) -> None:
        self._recorded = recorded
        self._seen: dict[str, list[tuple[int, int]]] = {}
        self._twice: dict[str, npt.NDArray[np.int64]] = {}
        self._told: set[tuple[str, str]] = set()
        self._rows = Rows()
        self.findings: list[Finding] = []

    def of(self, pair: Pair) -> Callable[[Block], None]:
        """What looks at the blocks of a pair."""

        def look(block: Block) -> None:
            self._look(pair.first, block, block.first, block.first_repeats)
            self._look(pair.second, block, block.second, block.second_repeats)

        return look

    def has_told(self, kind: str, event: str) -> bool:
        """Whether a finding of that kind names that recording."""
        return (kind, event) in self._told

    def into(self, rows: Rows) -> None:
        """Add what was counted."""
        rows.read += self._rows.read
        rows.zero += self._rows.zero
        rows.duplicates += sum(map(len, self._twice.values()))
        rows.repeated += self._rows.repeated

    def _look(self, recording: Recording, block: Block, rows: RoutingArray, repeats: npt.NDArray[np.int64]) -> None:
        fresh = self._fresh(recording, block.positions)
        if fresh.any():
            self._screen(recording, block.positions[fresh], rows if fresh.all() else rows[fresh])
        if len(repeats):
            self._name_repeats(recording, block.positions, rows, repeats)

    def _fresh(self, recording: Recording, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows of a recording were not looked at before, bool `[rows]`; they are now.

        Pairs do not come in the order of positions: an earlier segment may be compared in a later part first.
        """
        seen = self._seen.get(recording.event, [])
        bounds = np.array(seen, np.int64).reshape(-1)
        fresh: npt.NDArray[np.bool_] = np.searchsorted(bounds, positions, side="right") % 2 == 0
        self._seen[recording.event] = merge_spans([*seen, *runs_of(positions)])
        return fresh

    def _screen(self, recording: Recording, positions: npt.NDArray[np.int64], rows: RoutingArray) -> None:
        starts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist()]
        found = screen(rows, starts, num_experts=self._recorded.spec.num_experts)
        self._rows.read += len(rows)
        self._rows.zero += found.zero
        self._rows.repeated += found.repeated
        if found.zero:
            self._name_zero(recording, int(positions[found.zero_row]), found.zero_layer, found.zero)
        if found.beyond:
            row, layer = found.beyond_row, found.beyond_layer
            experts = rows[row, layer]
            say = f"names expert {int(experts.max())} of {self._recorded.spec.num_experts}"
            self._name_experts(recording, int(positions[row]), layer, experts, say, found.beyond)
        for first, stop in found.doubtful:
            self._doubt(recording, rows[first:stop], int(positions[first]))

    def _name_repeats(
        self,
        recording: Recording,
        positions: npt.NDArray[np.int64],
        rows: RoutingArray,
        repeats: npt.NDArray[np.int64],
    ) -> None:
        """Cells that name an expert twice; what is all zeros is named as such."""
        index, layers = np.divmod(repeats, rows.shape[1])
        known = self._twice.get(recording.event, np.empty(0, np.int64))
        self._twice[recording.event] = np.union1d(known, positions[index])
        other = rows[index, layers].any(axis=1)
        if other.any():
            row, layer = int(index[other][0]), int(layers[other][0])
            experts, times = np.unique(rows[row, layer], return_counts=True)
            often = "twice" if times.max() == 2 else f"{int(times.max())} times"
            say = f"names expert {int(experts[times.argmax()])} {often}"
            count = len(np.unique(index[other]))
            self._name_experts(recording, int(positions[row]), layer, rows[row, layer], say, count)

    def _name_experts(
        self, recording: Recording, row: int, layer: int, experts: npt.NDArray[np.unsignedinteger], say: str, count: int
    ) -> None:
        layer_id = self._recorded.spec.layer_ids[layer]
        more = f", and {count - 1} more rows likewise" if count > 1 else ""
        what = f"row {row}, layer {layer_id} of event {recording.event} {say}: {experts.tolist()}{more}"
        self._tell("experts", recording, row, layer_id, what)

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
                what_to_do=WHAT_TO_DO,
            )
        )
