"""Counts of what was compared and what of it differs, and rows of tables that divide them. Data, with its ratios."""

import math

import msgspec

__all__ = [
    "LATER",
    "OTHERS",
    "Counts",
    "EnginePair",
    "LayerDrift",
    "OriginPair",
    "SegmentPair",
    "SourceDrift",
    "Spread",
    "VersionGap",
    "ratio",
]

LATER = 16
"""Segment indices are told apart up to here; 16 stands for the 17th segment and all later ones."""

OTHERS = "(others)"
"""Stands for the engines, or sources, that a table has no row of their own for; see `trajstore_audit.finish`."""


class Spread(msgspec.Struct, kw_only=True):
    """Sums of squares over trajectories, of a sampled audit: what a confidence interval needs.

    Of each trajectory c cells, d of them differing, t tokens, u of them differing.

    Attributes:
        cc, cd, dd: sums of c*c, c*d, d*d.
        tt, tu, uu: sums of t*t, t*u, u*u.
    """

    cc: float = 0.0
    cd: float = 0.0
    dd: float = 0.0
    tt: float = 0.0
    tu: float = 0.0
    uu: float = 0.0


class Counts(msgspec.Struct, kw_only=True):
    """How much was compared, and how much of it differs. A cell is one layer of one row (token).

    Attributes:
        trajectories: that have any such row.
        pairs: pieces of pairs of recordings.
        tokens: rows compared. A row that was recorded three times is compared twice.
        tokens_differing: of them, those whose expert set differs in any layer.
        cells: (token, layer) compared.
        differing: of them, those whose expert set differs.
        order_changes: of them, those with the same experts in another order.
        shared: of the differing cells: top_k → how many have 0, 1, ..., top_k - 1 experts in common.
        referenced: of `tokens`, those that the archive stores as a reference: equal, and not read.
        spread: for confidence intervals; None unless trajectories were sampled.
    """

    trajectories: int = 0
    pairs: int = 0
    tokens: int = 0
    tokens_differing: int = 0
    cells: int = 0
    differing: int = 0
    order_changes: int = 0
    shared: dict[int, list[int]] = {}
    referenced: int = 0
    spread: Spread | None = None

    @property
    def share(self) -> float:
        """Router disagreement: differing / cells; NaN if nothing was compared."""
        return ratio(self.differing, self.cells)

    @property
    def token_share(self) -> float:
        """tokens_differing / tokens; NaN if nothing was compared."""
        return ratio(self.tokens_differing, self.tokens)

    @property
    def layers_per_token(self) -> float:
        """Mean number of layers of a token whose expert set differs: differing / tokens."""
        return ratio(self.differing, self.tokens)

    @property
    def order_share(self) -> float:
        """order_changes / cells."""
        return ratio(self.order_changes, self.cells)

    @property
    def jaccard(self) -> float:
        """Mean over cells of the Jaccard index of both expert sets, |A and B| / |A or B|; 1 where they are equal."""
        unequal = math.fsum(
            count * (common / (2 * top_k - common))
            for top_k, some in self.shared.items()
            for common, count in enumerate(some)
        )
        return ratio(self.cells - self.differing + unequal, self.cells)


class LayerDrift(msgspec.Struct, kw_only=True):
    """Drift in one layer, by its global id. `counts.tokens` and `counts.cells` are the same here."""

    layer: int
    counts: Counts


class SegmentPair(msgspec.Struct, kw_only=True):
    """Drift between recordings of two segments, by index (`LATER`: that one or a later one); -1: an observation."""

    first: int
    second: int
    counts: Counts


class VersionGap(msgspec.Struct, kw_only=True):
    """Drift by how many weight versions lie between both recordings; None: a label does not end with an integer."""

    gap: int | None
    counts: Counts


class EnginePair(msgspec.Struct, kw_only=True):
    """Drift by the engines that made both recordings; "" where none is recorded. `OTHERS`: all but the commonest."""

    first: str
    second: str
    counts: Counts


class OriginPair(msgspec.Struct, kw_only=True):
    """Drift by what both recordings are, see `trajstore.routing.Origin`."""

    first: str
    second: str
    counts: Counts


class SourceDrift(msgspec.Struct, kw_only=True):
    """Drift by who made the second recording: "" a segment, "late", or the source of an observation; or `OTHERS`."""

    source: str
    counts: Counts


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN where there is nothing."""
    return part / whole if whole else math.nan
