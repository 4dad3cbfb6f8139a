"""How far a rerun agrees with the record: which rows and tokens are compared, and the counts. Pure.

k3 is Schulman's estimate of KL(record || engine), (r - 1) - log r with r = p_engine / p_record
(joschu.net/blog/kl-approx.html); F(tau) the share of tokens with r outside [1/tau, tau] (R3, arXiv:2510.11370).
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.fold import row_version_pieces
from trajstore.trajectory import Trajectory

__all__ = [
    "Agreement",
    "LogprobAgreement",
    "RoutingAgreement",
    "WorstRow",
    "WorstToken",
    "logprob_agreement",
    "routing_agreement",
    "row_versions",
    "worst_rows",
    "worst_tokens",
]

Mask = npt.NDArray[np.bool_]


class LogprobAgreement(msgspec.Struct, kw_only=True, frozen=True):
    """Sampled tokens of one weight version: the record's logprobs against the engine's.

    Attributes:
        weight_version: that sampled them; None: of all versions together.
        tokens: with a finite logprob on both sides.
        mean_difference, max_difference: of |engine - record|, nats.
        mean_k3: per token, nats.
        extreme_share: F(tau).
    """

    weight_version: str | None
    tokens: int
    mean_difference: float
    max_difference: float
    mean_k3: float
    extreme_share: float


class RoutingAgreement(msgspec.Struct, kw_only=True, frozen=True):
    """Rows of one weight version and origin: the record's routing against the engine's. A cell is one layer of a row.

    Attributes:
        weight_version: under which they were computed; of cached rows that of the segment that recorded them. None: of
            all versions together.
        origin: see `trajstore.routing.Origin`; None: of all.
        rows, rows_differing: compared; of them, those whose expert set differs in any layer.
        cells, differing: likewise for cells.
        near_ties: of the differing cells, those that the engine's router itself nearly decided otherwise.
        order_changes: cells with the same experts in another order.
        layers: per layer of the routing spec, differing cells.
    """

    weight_version: str | None
    origin: str | None
    rows: int
    rows_differing: int
    cells: int
    differing: int
    near_ties: int
    order_changes: int
    layers: tuple[int, ...]

    @property
    def share(self) -> float:
        """differing / cells; NaN if nothing was compared."""
        return self.differing / self.cells if self.cells else math.nan


class WorstRow(msgspec.Struct, kw_only=True, frozen=True):
    """A row that differs in many layers; the experts of the first of them.

    Attributes:
        row, segment: position; index of the segment whose recording it is.
        weight_version: see `RoutingAgreement`.
        differing, near_ties: cells.
        layer: global id of the first layer that differs.
        recorded, engine: expert ids there.
        margin: of the engine's router there, see `trajstore.engine.Scored`; NaN where it is not known.
    """

    row: int
    segment: int
    weight_version: str
    differing: int
    near_ties: int
    layer: int
    recorded: tuple[int, ...]
    engine: tuple[int, ...]
    margin: float


class WorstToken(msgspec.Struct, kw_only=True, frozen=True):
    """A sampled token whose logprob differs much.

    Attributes:
        position, token_id, segment, weight_version: of the token.
        recorded, engine: logprobs.
    """

    position: int
    token_id: int
    segment: int
    weight_version: str
    recorded: float
    engine: float


class Agreement(msgspec.Struct, kw_only=True, frozen=True):
    """The outcome of a rerun, in numbers.

    Attributes:
        id, at, policy: of the fold that was compared, see `Trajectory`.
        engine: its name and version.
        start, stop: positions compared.
        weight_version: only what this version recorded was compared; None: everything.
        tau, tie_tolerance: as asked for.
        assumed: engines that sampled at a temperature other than 1, and of which it is not known whether the logprobs
            that they tell are those after it; their tokens were scored at 1.
        tokens: that the engine was given.
        unscored: sampled tokens of these positions without a finite logprob, recorded or engine's.
        missing: rows of these positions that the record or the engine does not have; the last token's normally is one.
        logprobs: of all, then of each weight version.
        routing: likewise, and of each origin; empty without routing.
        layer_ids: global ids of the layers of `RoutingAgreement.layers`.
        worst_rows, worst_tokens: the worst first.
    """

    id: str
    at: str
    policy: str
    engine: str
    start: int
    stop: int
    weight_version: str | None
    tau: float
    tie_tolerance: float
    assumed: tuple[str, ...]
    tokens: int
    unscored: int
    missing: int
    logprobs: tuple[LogprobAgreement, ...]
    routing: tuple[RoutingAgreement, ...]
    layer_ids: tuple[int, ...]
    worst_rows: tuple[WorstRow, ...]
    worst_tokens: tuple[WorstToken, ...]


def row_versions(trajectory: Trajectory) -> npt.NDArray[np.object_]:
    """The weight version that each row was computed under, object `[T]` of strings; "" where it is missing."""
    versions = np.full(len(trajectory), "", np.object_)
    for segment in trajectory.segments:
        mine = trajectory.routing_source == segment.index
        for start, stop, version in row_version_pieces(segment):
            versions[start:stop][mine[start:stop]] = version
    return versions


def logprob_agreement(
    trajectory: Trajectory, difference: npt.NDArray[np.float64], *, tau: float
) -> tuple[LogprobAgreement, ...]:
    """Of all tokens together, then by weight version in order of appearance.

    Args:
        difference: float64 `[T]`, engine - record; NaN where nothing is compared.
    """
    compared = np.isfinite(difference)

    def of(weight_version: str | None, some: Mask) -> LogprobAgreement:
        log_ratio = difference[some]
        return LogprobAgreement(
            weight_version=weight_version,
            tokens=len(log_ratio),
            mean_difference=_mean(np.abs(log_ratio)),
            max_difference=float(np.abs(log_ratio).max()) if len(log_ratio) else math.nan,
            mean_k3=_mean(np.expm1(log_ratio) - log_ratio),
            extreme_share=_mean(np.abs(log_ratio) > math.log(tau)),
        )

    parts = [
        of(version, compared & (trajectory.weight_version_ids == index))
        for index, version in enumerate(trajectory.weight_versions)
    ]
    return (of(None, compared), *(part for part in parts if part.tokens))


def routing_agreement(
    versions: npt.NDArray[np.object_],
    origins: npt.NDArray[np.object_],
    *,
    compared: Mask,
    differing: Mask,
    near_ties: Mask,
    order_changes: Mask,
) -> tuple[RoutingAgreement, ...]:
    """Of all rows together, then by weight version and origin in order of appearance.

    Args:
        versions, origins: `[T]`, of each row.
        compared: `[T]`.
        differing, near_ties, order_changes: `[T, L]`, False where nothing is compared.
    """

    def of(weight_version: str | None, origin: str | None, some: Mask) -> RoutingAgreement:
        cells = differing[some]
        return RoutingAgreement(
            weight_version=weight_version,
            origin=origin,
            rows=len(cells),
            rows_differing=int(np.count_nonzero(cells.any(axis=1))),
            cells=cells.size,
            differing=int(np.count_nonzero(cells)),
            near_ties=int(np.count_nonzero(near_ties[some])),
            order_changes=int(np.count_nonzero(order_changes[some])),
            layers=tuple(np.count_nonzero(cells, axis=0).tolist()),
        )

    keys = dict.fromkeys(zip(versions[compared], origins[compared], strict=True))
    parts = [of(version, origin, compared & (versions == version) & (origins == origin)) for version, origin in keys]
    return (of(None, None, compared), *parts)


def worst_rows(
    trajectory: Trajectory,
    versions: npt.NDArray[np.object_],
    engine: npt.NDArray[np.integer[Any]],
    margins: npt.NDArray[np.float32],
    *,
    differing: Mask,
    near_ties: Mask,
    count: int,
) -> tuple[WorstRow, ...]:
    """Rows that differ in most layers, near ties apart; earlier ones first among equals.

    Args:
        engine: `[T, L, K]`, the engine's routing.
        margins: `[T, L]`.
    """
    assert trajectory.routed_experts is not None
    assert trajectory.routing is not None
    per_row = differing.sum(axis=1)
    decided = per_row - near_ties.sum(axis=1)
    order = np.lexsort((np.arange(len(per_row)), -per_row, -decided))
    found = []
    for row in order[:count].tolist():
        if not per_row[row]:
            break
        at = int(differing[row].argmax())
        found.append(
            WorstRow(
                row=row,
                segment=int(trajectory.routing_source[row]),
                weight_version=versions[row],
                differing=int(per_row[row]),
                near_ties=int(near_ties[row].sum()),
                layer=trajectory.routing.layer_ids[at],
                recorded=tuple(trajectory.routed_experts[row, at].tolist()),
                engine=tuple(engine[row, at].tolist()),
                margin=float(margins[row, at]),
            )
        )
    return tuple(found)


def worst_tokens(
    trajectory: Trajectory,
    logprobs: npt.NDArray[np.float32],
    difference: npt.NDArray[np.float64],
    *,
    count: int,
) -> tuple[WorstToken, ...]:
    """Tokens with the largest |difference|, if there is any.

    Args:
        logprobs: float32 `[T]`, the engine's.
        difference: float64 `[T]`, see `logprob_agreement`.
    """
    size = np.nan_to_num(np.abs(difference))
    return tuple(
        WorstToken(
            position=at,
            token_id=int(trajectory.token_ids[at]),
            segment=int(trajectory.segment_ids[at]),
            weight_version=trajectory.weight_version(at),
            recorded=float(trajectory.logprobs[at]),
            engine=float(logprobs[at]),
        )
        for at in np.argsort(-size, kind="stable")[:count].tolist()
        if size[at] > 0
    )


def _mean(values: npt.NDArray[Any] | Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
