"""Rows that differ in most layers, looked at again: are they those of a neighbouring position, or of no such token?"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.recorded import RecordedRows
from trajstore_audit.faults import OFFSETS, agreement, enough_rows, longest_run, matches
from trajstore_audit.pairs import Pair

__all__ = ["Explanation", "explain"]

_WINDOW = 2048
_WINDOWS = 8
"""Suspicious rows are looked at in so many windows of so many rows; the rest of a pair is taken to be like them."""

_RUN = 16


class Explanation(NamedTuple):
    """What suspicious rows are.

    Attributes:
        kind: "shifted" or "other-sequence".
        start, stop: positions that are concerned, in one run or several.
        rows: the positions that are explained, int64.
        what: the evidence.
    """

    kind: str
    start: int
    stop: int
    rows: npt.NDArray[np.int64]
    what: str


def explain(recorded: RecordedRows, pair: Pair, suspicious: npt.NDArray[np.int64]) -> list[Explanation]:
    """Explanations that cannot be chance; usually none, for weights that changed much make suspicious rows, too.

    Args:
        suspicious: positions of the pair that differ in most layers, int64, ascending.
    """
    exact: dict[int, list[npt.NDArray[np.int64]]] = {}
    found: list[Explanation] = []
    at = 0
    for _ in range(_WINDOWS):
        if at >= len(suspicious):
            break
        low = int(suspicious[at])
        high = min(low + _WINDOW, pair.stop)
        upto = int(np.searchsorted(suspicious, high))
        begin = max(pair.first.start, low + OFFSETS[0])
        end = min(pair.first.stop, high + OFFSETS[-1])
        first = recorded.rows(pair.first, [(begin, end)])
        second = recorded.rows(pair.second, [(low, high)])
        wanted = suspicious[at:upto]
        for offset, rows in matches(first, second, wanted - low, ahead=low - begin).items():
            exact.setdefault(offset, []).append(rows + low)
        start, stop = longest_run(wanted)
        inside = wanted[(wanted >= start) & (wanted < stop)]
        if stop - start >= _RUN and 5 * len(inside) >= 4 * (stop - start):
            found += _judge(pair, first[: stop - begin + OFFSETS[-1]], second[start - low : stop - low], begin, start)
        at = upto
    return [*_exact(recorded, pair, exact), *found] if exact else found


def _judge(
    pair: Pair, first: npt.NDArray[np.unsignedinteger], second: npt.NDArray[np.unsignedinteger], begin: int, start: int
) -> list[Explanation]:
    stop = start + len(second)
    agreed = agreement(first, second, ahead=start - begin)
    rows = np.arange(start, stop)
    if agreed.is_shifted:
        what = (
            f"rows {start} to {stop - 1} of event {pair.second.event} agree with rows {start + agreed.offset} to "
            f"{stop - 1 + agreed.offset} of event {pair.first.event} ({agreed.best:.0%} of experts in common), not "
            f"with their own ({agreed.own:.0%}): one of both is shifted by {abs(agreed.offset)}"
        )
        return [Explanation("shifted", start, stop, rows, what)]
    if agreed.is_other:
        what = (
            f"rows {start} to {stop - 1} of events {pair.first.event} and {pair.second.event} have {agreed.own:.0%} of "
            f"experts in common, as rows of any two tokens have ({agreed.chance:.0%}): one of both recorded rows of "
            f"another sequence{_or_weights(pair)}"
        )
        return [Explanation("other-sequence", start, stop, rows, what)]
    return []


def _or_weights(pair: Pair) -> str:
    """What explains the same where weights changed: a model that was trained anew, say."""
    return "" if pair.first.weight_version == pair.second.weight_version else ", or the weights have nothing in common"


def _exact(recorded: RecordedRows, pair: Pair, exact: dict[int, list[npt.NDArray[np.int64]]]) -> list[Explanation]:
    """Rows that equal another position's in all layers, where they are too many for chance."""
    offset, parts = max(exact.items(), key=lambda one: (sum(map(len, one[1])), -abs(one[0])))
    rows = np.concatenate(parts)
    if not enough_rows(recorded.spec, len(rows)):
        return []
    start, stop = int(rows[0]), int(rows[-1]) + 1
    which = f"row {start}" if len(rows) == 1 else f"{len(rows)} of the rows {start} to {stop - 1}"
    theirs = (
        f"row {start + offset}" if len(rows) == 1 else f"those {abs(offset)} {'later' if offset > 0 else 'earlier'}"
    )
    what = (
        f"{which} of event {pair.second.event} {'is' if len(rows) == 1 else 'are'} {theirs} of event "
        f"{pair.first.event} in all layers: one of both is shifted by {abs(offset)}"
    )
    return [Explanation("shifted", start, stop, rows, what)]
