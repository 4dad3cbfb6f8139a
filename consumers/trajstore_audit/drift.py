"""Drift by layer of some trajectories: the short way to the numbers that are asked for most, without an audit."""

from collections.abc import Iterable

import msgspec

from trajstore.reading import Archive
from trajstore_audit.finish import layer_table
from trajstore_audit.one_pair import compare_pair
from trajstore_audit.pairs import segment_pairs
from trajstore_audit.tally import DriftTally

__all__ = ["DriftByLayer", "drift_by_layer"]


class DriftByLayer(msgspec.Struct, frozen=True, kw_only=True):
    """Drift between consecutive recordings of the same rows, over some trajectories.

    Attributes:
        layer_ids: global ids of the layers that route, ascending.
        rows: per layer, rows compared. A row that was recorded three times is compared twice.
        differing: per layer, rows whose expert set differs.
        tokens: rows compared, whatever their layers.
        tokens_differing: rows whose expert set differs in any layer.
    """

    layer_ids: tuple[int, ...]
    rows: tuple[int, ...]
    differing: tuple[int, ...]
    tokens: int
    tokens_differing: int

    @property
    def shares(self) -> tuple[float, ...]:
        """Per layer, differing / rows; 0 where nothing was compared."""
        return tuple(n / rows if rows else 0.0 for n, rows in zip(self.differing, self.rows, strict=True))

    @property
    def token_share(self) -> float:
        """tokens_differing / tokens; 0 if nothing was compared."""
        return self.tokens_differing / self.tokens if self.tokens else 0.0


def drift_by_layer(store: Archive, ids: Iterable[str]) -> DriftByLayer:
    """Drift over trajectories, per layer: each recording of a row against the previous one of the same row.

    Not over all pairs: of a row recorded by three segments, the second is compared with the first and the third with
    the second. Rows of other tokens (a later segment rewound below them) and observations are left out. A block of rows
    is held at a time.

    Args:
        store: a store or an archive.
        ids: of trajectories; those without routing count for nothing.

    Raises:
        NotFound, Corrupt, SequenceGap, SchemaError: as `store.load`.
    """
    tally = DriftTally()
    layers: set[int] = set()
    for id in ids:
        recorded = store.recordings(id)
        if recorded.history.opened.routing is None:
            continue
        layers.update(recorded.spec.layer_ids)
        grid = tally.grid(recorded.spec)
        for pair in segment_pairs(recorded.history):
            outcome = compare_pair(recorded, pair, look=lambda _: None)
            tally.total.tokens += outcome.tokens
            tally.total.tokens_differing += outcome.tokens_differing
            grid.cells += outcome.rows_by_bucket
            grid.differing += outcome.by_bucket
            grid.order_changes += outcome.reordered
            grid.shared += outcome.shared
    counts = {one.layer: one.counts for one in layer_table(tally.grids)}
    ordered = sorted(layers)
    return DriftByLayer(
        layer_ids=tuple(ordered),
        rows=tuple(counts[layer].cells if layer in counts else 0 for layer in ordered),
        differing=tuple(counts[layer].differing if layer in counts else 0 for layer in ordered),
        tokens=tally.total.tokens,
        tokens_differing=tally.total.tokens_differing,
    )
