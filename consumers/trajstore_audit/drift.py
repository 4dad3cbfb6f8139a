"""How routing differs between recordings of the same rows: compared as sets of experts, counted by layer."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.history import Recording
from trajstore.overlaps import Overlap
from trajstore.reading import Archive
from trajstore.routing import RoutingArray

__all__ = ["DriftByLayer", "differing_sets", "drift_by_layer", "order_changes", "successive"]


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


def differing_sets(first: RoutingArray, second: RoutingArray) -> npt.NDArray[np.bool_]:
    """Where two routings of the same rows use different experts, whatever their order.

    Args:
        first, second: `[rows, L, K]`, distinct experts within a layer.

    Returns:
        bool `[rows, L]`.

    Raises:
        ValueError: the shapes differ.
    """
    return _compare(first, second)[1]


def order_changes(first: RoutingArray, second: RoutingArray) -> npt.NDArray[np.bool_]:
    """Where two routings of the same rows use the same experts in another order. As `differing_sets`."""
    unequal, differing = _compare(first, second)
    return unequal & ~differing


def successive(overlaps: Sequence[Overlap]) -> Iterator[Overlap]:
    """Of all pairs of recordings, those of consecutive ones: each row with its previous recording only.

    A pair falls into parts where another recording lies between. Observations by other parties are left out.

    Args:
        overlaps: of one trajectory, from `store.overlaps`.
    """
    by_second: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        if overlap.second.segment >= 0:
            by_second.setdefault(overlap.second.event, []).append(overlap)
    for pairs in by_second.values():
        holes = [(min(pair.start for pair in pairs), max(pair.stop for pair in pairs))]
        for pair in reversed(pairs):  # the newest earlier recording first
            left = []
            for start, stop in holes:
                low, high = max(start, pair.start), min(stop, pair.stop)
                if low >= high:
                    left.append((start, stop))
                    continue
                yield msgspec.structs.replace(pair, start=low, stop=high)
                left += [hole for hole in ((start, low), (high, stop)) if hole[0] < hole[1]]
            holes = left


def drift_by_layer(store: Archive, ids: Iterable[str]) -> DriftByLayer:
    """Drift over trajectories, per layer: each recording of a row against the previous one of the same row.

    Not over all pairs: of a row recorded by three segments, the second is compared with the first and the third with
    the second. Rows of other tokens (a later segment rewound below them) and observations are left out. One trajectory
    is held at a time.

    Args:
        store: a store or an archive.
        ids: of trajectories; those without routing count for nothing.

    Raises:
        NotFound, Corrupt, SequenceGap, SchemaError: as `store.load`.
    """
    rows: dict[int, int] = {}
    differing: dict[int, int] = {}
    tokens = tokens_differing = 0
    for id in ids:
        spec = store.plan(id).history.opened.routing
        if spec is None:
            continue
        for layer in spec.layer_ids:
            rows.setdefault(layer, 0)
            differing.setdefault(layer, 0)
        recorded: dict[str, RoutingArray] = {}
        for pair in successive(store.overlaps(id)):
            first, second = (
                _recorded(store, id, recording, recorded)[pair.start - recording.start : pair.stop - recording.start]
                for recording in (pair.first, pair.second)
            )
            cells = differing_sets(first, second)
            tokens += len(cells)
            tokens_differing += int(np.count_nonzero(cells.any(axis=1)))
            for layer, count in zip(spec.layer_ids, np.count_nonzero(cells, axis=0), strict=True):
                rows[layer] += len(cells)
                differing[layer] += int(count)
    layers = sorted(rows)
    return DriftByLayer(
        layer_ids=tuple(layers),
        rows=tuple(rows[layer] for layer in layers),
        differing=tuple(differing[layer] for layer in layers),
        tokens=tokens,
        tokens_differing=tokens_differing,
    )


def _recorded(store: Archive, id: str, recording: Recording, known: dict[str, RoutingArray]) -> RoutingArray:
    """Rows of a recording, read once per trajectory."""
    if recording.event not in known:
        known[recording.event] = store.recorded_rows(id, recording)
    return known[recording.event]


def _compare(first: RoutingArray, second: RoutingArray) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Cells `[rows, L]` that are not equal as they stand, and those not equal as sets."""
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"routings to compare must both be [rows, L, K], not {first.shape} and {second.shape}")
    unequal = (first != second).any(axis=2)
    differing = np.zeros_like(unequal)
    # Most cells are equal as they stand: only the others are worth sorting.
    differing[unequal] = (np.sort(first[unequal], axis=1) != np.sort(second[unequal], axis=1)).any(axis=1)
    return unequal, differing
