"""How drift is distributed: over layers and positions, over experts, and together with logprobs. Data, and formulas."""

import math
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore_audit.counts import ratio

__all__ = ["TAUS", "Load", "LogprobDrift", "PositionDrift", "bucket_bounds"]

TAUS = (1.25, 1.5, 2.0, 4.0, 8.0)
"""Thresholds at which F(tau) is counted."""


class PositionDrift(msgspec.Struct, kw_only=True):
    """Drift by layer and by how far a row lies from where the second segment resumed.

    A row at position p of a segment that resumed from `base` tokens is in bucket sign(p - base) * bit_length(|p -
    base|): -1 is the last row before the resume point, -2 the two before it, -3 the four before these; see
    `bucket_bounds`. With an observation it is the base of the segment that it is compared with.

    Attributes:
        layers: global ids, ascending.
        buckets: ascending.
        cells, differing: int64 `[layers, buckets]`.
    """

    layers: list[int]
    buckets: list[int]
    cells: npt.NDArray[np.int64]
    differing: npt.NDArray[np.int64]

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """differing / cells, float64 `[layers, buckets]`; NaN where nothing was compared."""
        with np.errstate(invalid="ignore"):
            found: npt.NDArray[np.float64] = self.differing / self.cells
        return found


class Load(msgspec.Struct, kw_only=True):
    """How often each expert was chosen, in the first and in the second recording of the same rows.

    Counted over rows that were read anyway and, where most are references, over some more: `rows` of all compared.

    Attributes:
        layers: global ids, ascending.
        num_experts: of each layer.
        first, second: int64 `[layers, experts]`, 0 beyond a layer's experts.
        rows: rows counted.
        of: rows compared.
    """

    layers: list[int]
    num_experts: list[int]
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    rows: int
    of: int

    @property
    def divergence(self) -> npt.NDArray[np.float64]:
        """Jensen-Shannon divergence of both loads, bits in [0, 1], float64 `[layers]` (Lin 1991); NaN without rows."""
        one, other = _distribution(self.first), _distribution(self.second)
        middle = (one + other) / 2
        return (_relative_entropy(one, middle) + _relative_entropy(other, middle)) / 2

    def max_violation(self, which: Literal["first", "second"] = "second") -> npt.NDArray[np.float64]:
        """MaxVio = max load / mean load - 1, float64 `[layers]` (arXiv:2408.15664); 0 is balance, NaN without rows."""
        load, mean = self._load(which)
        found: npt.NDArray[np.float64] = load.max(axis=1, initial=0) / mean - 1
        return found

    def min_violation(self, which: Literal["first", "second"] = "second") -> npt.NDArray[np.float64]:
        """1 - min load / mean load, float64 `[layers]`; 0 is balance, 1 an expert without any token."""
        load, mean = self._load(which)
        there = np.arange(load.shape[1]) < np.array(self.num_experts)[:, None]
        found: npt.NDArray[np.float64] = 1 - np.where(there, load, np.inf).min(axis=1, initial=np.inf) / mean
        return found

    def _load(self, which: Literal["first", "second"]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        load = (self.first if which == "first" else self.second).astype(np.float64)
        mean = load.sum(axis=1) / np.array(self.num_experts, np.float64)
        return load, np.where(mean > 0, mean, np.nan)


class LogprobDrift(msgspec.Struct, kw_only=True):
    """Recorded logprobs against another party's for the same tokens, and how drift goes with their difference.

    r is exp(given - recorded): the ratio of the training policy's probability to the rollout's. The drift of token t
    is the number of layers in which row t - 1, which decided it, differs in the newest pair of recordings of it.

    Attributes:
        tokens: sampled tokens with both logprobs, finite.
        k3: sum of (r - 1) - log r, an estimate of KL(rollout || given) (Schulman, joschu.net/blog/kl-approx.html).
        difference: sum of |given - recorded|, nats.
        extreme: for each of `TAUS`, tokens with r outside [1/tau, tau] (F(tau) of R3, arXiv:2510.11370, times tokens).
        compared: of `tokens`, those whose row was compared; the sums below are over these.
        x, y, xx, yy, xy: sums over drift x and |given - recorded| y.
        joint: int64 `[65, 64]`: tokens by drift (64: that many layers or more) and by y, in powers of 2 from 2^-40.
    """

    tokens: int = 0
    k3: float = 0.0
    difference: float = 0.0
    extreme: list[int] = msgspec.field(default_factory=lambda: [0] * len(TAUS))
    compared: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    joint: npt.NDArray[np.int64] = msgspec.field(default_factory=lambda: np.zeros((65, 64), np.int64))

    @property
    def mean_k3(self) -> float:
        """Mean k3 per token, nats; NaN without tokens."""
        return ratio(self.k3, self.tokens)

    @property
    def mean_difference(self) -> float:
        """Mean |given - recorded|, nats."""
        return ratio(self.difference, self.tokens)

    def extreme_share(self, tau: float) -> float:
        """F(tau): the share of tokens with r outside [1/tau, tau]; tau is one of `TAUS`."""
        return ratio(self.extreme[TAUS.index(tau)], self.tokens)

    @property
    def pearson(self) -> float:
        """Correlation of drift with |given - recorded|; NaN where either does not vary."""
        n = self.compared
        both = (n * self.xx - self.x**2) * (n * self.yy - self.y**2)
        return (n * self.xy - self.x * self.y) / math.sqrt(both) if both > 0 else math.nan

    @property
    def spearman(self) -> float:
        """Rank correlation of both, over the classes of `joint` (tokens of one class are ties)."""
        x, y = self.joint.sum(axis=1), self.joint.sum(axis=0)
        n = int(x.sum())
        if n == 0:
            return math.nan
        ranks = [np.cumsum(m) - (m + 1) / 2 - (n - 1) / 2 for m in (x, y)]
        both = float(x @ ranks[0] ** 2) * float(y @ ranks[1] ** 2)
        return float(ranks[0] @ self.joint @ ranks[1]) / math.sqrt(both) if both > 0 else math.nan


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """First and last distance p - base of a bucket: 0 → (0, 0), 3 → (4, 7), -3 → (-7, -4)."""
    if bucket == 0:
        return 0, 0
    low, high = 1 << (abs(bucket) - 1), (1 << abs(bucket)) - 1
    return (low, high) if bucket > 0 else (-high, -low)


def _distribution(load: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        found: npt.NDArray[np.float64] = load / load.sum(axis=1, keepdims=True)
    return found


def _relative_entropy(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(one == 0, 0.0, one * np.log2(one / other))
    found: npt.NDArray[np.float64] = terms.sum(axis=1)
    return found
