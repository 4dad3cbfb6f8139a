"""Rows of one recording that hold the row beside them again where another recording of the same tokens does not. Pure.

A recording by itself shows a stale row only once it comes so often that chance is out of the question
(`trajstore.archive.verify.soundness`). Beside another one a single stale row stands out where what it repeats agrees.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.routing import RoutingArray, RoutingSpec
from trajstore_audit.faults import CLOSE, FARTHER, common_share, enough_rows

__all__ = ["StaleRun", "stale_runs"]


class StaleRun(NamedTuple):
    """Rows `[start, stop)` that are row `source` again, as indices; `common`: their share of experts with their own."""

    start: int
    stop: int
    source: int
    common: float


def stale_runs(
    spec: RoutingSpec, rows: RoutingArray, others: RoutingArray, suspicious: npt.NDArray[np.bool_]
) -> list[StaleRun]:
    """Runs of one row in which the other recording agrees with one place, and has other rows at the rest.

    Whether the token is another one there is left to the caller. A run beside more suspicious rows is none of them:
    rows that are shifted end with a row that comes twice.

    Args:
        rows: `[rows, L, K]`, of the recording that may be stale.
        others: `[rows, L, K]`, of the other one at the same positions.
        suspicious: rows that differ in most layers.
    """
    count = len(rows)
    # From an agreeing row to a suspicious one, or back: few, but where all has drifted much.
    steps = np.flatnonzero(suspicious[1:] != suspicious[:-1])
    steps = steps[(rows[steps] == rows[steps + 1]).all(axis=(1, 2))]
    found = []
    done = 0
    for step in steps.tolist():
        source, start = (step, step + 1) if suspicious[step + 1] else (step + 1, step)
        stop = start + 1
        while stop < count and suspicious[stop] and (rows[stop] == rows[source]).all():
            stop += 1
        while start > 0 and suspicious[start - 1] and (rows[start - 1] == rows[source]).all():
            start -= 1
        ends = (start > 0 and suspicious[start - 1]) or (stop < count and suspicious[stop])
        if start < done or ends or not enough_rows(spec, stop - start):
            continue
        agreed = common_share(rows[source : source + 1], others[source : source + 1])
        common = common_share(rows[start:stop], others[start:stop])
        if agreed > CLOSE and agreed - common > FARTHER:
            found.append(StaleRun(start, stop, source, common))
            done = stop
    return found
