"""Which trajectories a sampled audit takes, and how sure its shares are. Pure."""

import hashlib
import math
from typing import NamedTuple

__all__ = ["Interval", "is_sampled", "ratio_interval"]

_NORMAL_95 = 1.959963984540054

_UNSEEN = 0.05
"""How likely it may be that a sample missed what it has none of."""


class Interval(NamedTuple):
    """Where a share lies, with 95 % confidence."""

    low: float
    high: float


def is_sampled(id: str, *, share: float, seed: int) -> bool:
    """Whether a sample of this share has a trajectory: by a hash, so that every process and every run agrees.

    A sample of a larger share with the same seed holds that of a smaller one.
    """
    digest = hashlib.blake2b(id.encode(), digest_size=8, salt=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


def ratio_interval(
    x: float, y: float, xx: float, xy: float, yy: float, *, sampled: int, population: int, clusters: int
) -> Interval | None:
    """95 % interval of the ratio y / x of two sums, where whole clusters (trajectories) were sampled.

    The ratio estimator's variance by linearisation with finite population correction (Cochran, Sampling Techniques,
    1977, eq. 6.13): R = y / x, s2 = sum (y_i - R x_i)^2 / (n - 1), var R = (1 - n / N) n s2 / x^2. R is near normal
    for some dozens of clusters and more. Clipped to [0, 1].

    Where y is 0 the variance is, too, and would promise a share of exactly 0. Then the share reaches up to that of
    clusters of which, with the probability 0.05, none was drawn: 3 / m ("rule of three") of m clusters that have any x,
    less where much of the population was drawn. It takes clusters to be of one size. Likewise where y is x.

    Args:
        x, y, xx, xy, yy: sums over sampled clusters.
        sampled, population: n and N; clusters in which x is 0 count.
        clusters: m, sampled ones in which x is not 0.

    Returns:
        None where fewer than two clusters were sampled, or x is 0.
    """
    if sampled < 2 or x <= 0:
        return None
    if sampled < population and y in (0, x):
        drawn = sampled / population
        unseen = min(1.0, drawn * math.log(_UNSEEN) / math.log1p(-drawn) / clusters)
        return Interval(0.0, unseen) if y == 0 else Interval(1.0 - unseen, 1.0)
    ratio = y / x
    squares = max(0.0, yy - 2 * ratio * xy + ratio * ratio * xx)
    variance = (1 - sampled / population) * sampled * squares / (sampled - 1) / (x * x)
    half = _NORMAL_95 * math.sqrt(max(0.0, variance))
    return Interval(max(0.0, ratio - half), min(1.0, ratio + half))
