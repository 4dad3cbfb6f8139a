"""Recorded logprobs against another party's, and how drift of routing goes with their difference. Pure."""

import numpy as np
import numpy.typing as npt

from trajstore_audit.result import TAUS, LogprobDrift

__all__ = ["compare_logprobs"]

_LEAST = -40
"""Powers of 2 of |given - recorded| are told apart from here on, 64 of them."""


def compare_logprobs(
    recorded: npt.NDArray[np.float32],
    given: npt.NDArray[np.floating],
    sampled: npt.NDArray[np.bool_],
    drift: npt.NDArray[np.int64],
) -> LogprobDrift:
    """Compare the logprobs of one trajectory's sampled tokens.

    Args:
        recorded: float32 `[T]`.
        given: another party's, `[T]`; NaN where it has none.
        sampled: bool `[T]`.
        drift: per row, in how many layers it differs, int64 `[T]`; -1 where it was not compared.
    """
    both = sampled & np.isfinite(recorded) & np.isfinite(given)
    log_ratio = given[both].astype(np.float64) - recorded[both].astype(np.float64)
    size = np.abs(log_ratio)
    own = np.full(len(recorded), -1, np.int64)
    own[1:] = drift[:-1]  # row t - 1 decided token t
    known = own[both] >= 0
    x, y = own[both][known].astype(np.float64), size[known]
    joint = np.zeros((65, 64), np.int64)
    powers = np.clip(np.frexp(y)[1] - _LEAST, 0, 63)
    np.add.at(joint, (np.minimum(own[both][known], 64), np.where(y > 0, powers, 0)), 1)
    with np.errstate(over="ignore"):
        k3 = np.expm1(log_ratio) - log_ratio
    return LogprobDrift(
        tokens=len(log_ratio),
        k3=float(k3.sum()),
        difference=float(size.sum()),
        extreme=[int(np.count_nonzero(size > np.log(tau))) for tau in TAUS],
        compared=len(y),
        x=float(x.sum()),
        y=float(y.sum()),
        xx=float(x @ x),
        yy=float(y @ y),
        xy=float(x @ y),
        joint=joint,
    )
