"""Rows that differ in most layers, looked at again: stale, those of a neighbouring position, or of no such token?"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore.history import Recording
from trajstore.overlaps import SameTokens
from trajstore.recorded import RecordedRows
from trajstore.routing import RoutingArray
from trajstore_audit.faults import (
    OFFSETS,
    Agreement,
    Near,
    agreement,
    common_share,
    enough_rows,
    longest_run,
    matches,
    near_matches,
    runs_of,
)
from trajstore_audit.pairs import Pair
from trajstore_audit.stale import stale_runs

__all__ = ["Explained", "Explanation", "explain", "find_culprit"]

_WINDOW = 2048
_WINDOWS = 8
"""Suspicious rows are looked at in so many windows of so many rows; the rest of a pair is taken to be like them."""

_RUN = 16

_WITNESS_ROWS = 256
"""Rows at which a third recording is asked."""

_CLEARLY = 0.3
"""By so much more of its experts it must agree with one side."""


class Explanation(NamedTuple):
    """What suspicious rows are.

    Attributes:
        kind: "repeated-rows", "shifted" or "other-sequence".
        offset: by how much they are shifted; 0 for the others.
        rows: the positions that are explained, int64, ascending.
        what: the evidence.
        which: what is wrong with one of both recordings, as "is shifted by 1".
        unless: what explains the same, "" where nothing does.
        event: the recording that is wrong, "" where both may be.
    """

    kind: str
    offset: int
    rows: npt.NDArray[np.int64]
    what: str
    which: str
    unless: str = ""
    event: str = ""


class Explained(NamedTuple):
    """All explanations of a pair, one for each stale run, and for each other kind and offset.

    Attributes:
        unseen: rows from this position on were not looked at.
    """

    explanations: list[Explanation]
    unseen: int


class _Judged(NamedTuple):
    """Rows `[start, stop)`, and how they agree."""

    start: int
    stop: int
    agreed: Agreement


def explain(recorded: RecordedRows, pair: Pair, suspicious: npt.NDArray[np.int64]) -> Explained:
    """Explanations that cannot be chance; usually none, for weights that changed much make suspicious rows, too.

    Args:
        suspicious: positions of the pair that differ in most layers, int64, ascending.
    """
    stale: list[Explanation] = []
    exact: dict[int, list[npt.NDArray[np.int64]]] = {}
    near: dict[int, list[Near]] = {}
    judged: dict[int, list[_Judged]] = {}  # by offset; 0 is another sequence
    at = 0
    for _ in range(_WINDOWS):
        if at >= len(suspicious):
            break
        low = int(suspicious[at])
        high = min(low + _WINDOW, pair.stop)
        upto = int(np.searchsorted(suspicious, high))
        begin = max(pair.first.start, low + OFFSETS[0])
        end = min(pair.first.stop, high + OFFSETS[-1])
        left, right = max(pair.start, low - 1), min(pair.stop, high + 1)
        first = recorded.rows(pair.first, [(begin, end)])
        second = recorded.rows(pair.second, [(left, right)])
        wanted = suspicious[at:upto]
        at = upto
        some = _stale(recorded, pair, first[left - begin : right - begin], second, suspicious, start=left)
        if some:
            stale += some
            wanted = np.setdiff1d(wanted, np.concatenate([one.rows for one in some]))
            if not len(wanted):
                continue
        second = second[low - left : high - left]
        for offset, rows in matches(first, second, wanted - low, ahead=low - begin).items():
            exact.setdefault(offset, []).append(rows + low)
        for offset, hit in near_matches(recorded.spec, first, second, wanted - low, ahead=low - begin).items():
            near.setdefault(offset, []).append(Near(hit.rows + low, hit.layers))
        start, stop = longest_run(wanted)
        inside = wanted[(wanted >= start) & (wanted < stop)]
        if stop - start >= _RUN and 5 * len(inside) >= 4 * (stop - start):
            agreed = agreement(
                first[: stop - begin + OFFSETS[-1]], second[start - low : stop - low], ahead=start - begin
            )
            if agreed.is_shifted or agreed.is_other:
                offset = agreed.offset if agreed.is_shifted else 0
                judged.setdefault(offset, []).append(_Judged(start, stop, agreed))
    copies = dict(_copies(recorded, exact))
    found = []
    for offset in [*copies, *sorted(near.keys() - copies.keys())]:
        rows = copies.get(offset, np.empty(0, np.int64))
        other = [some for place, some in copies.items() if place != offset]
        close = _without(near.get(offset, []), np.concatenate([rows[:0], *other]))
        if len(rows) or len(close.rows):
            found.append(_shifted(recorded, pair, offset, rows, close, judged.pop(offset, [])))
    nothing = np.empty(0, np.int64)
    for offset, parts in sorted(judged.items()):
        found.append(
            _shifted(recorded, pair, offset, nothing, Near(nothing, nothing), parts) if offset else _other(pair, parts)
        )
    if at == len(suspicious):
        return Explained([*stale, *found], pair.stop)
    unseen = int(suspicious[at])
    what = f" (rows from {unseen} on were not looked at)"
    return Explained([*stale, *(one._replace(what=one.what + what) for one in found)], unseen)


def _stale(
    recorded: RecordedRows,
    pair: Pair,
    first: RoutingArray,
    second: RoutingArray,
    suspicious: npt.NDArray[np.int64],
    *,
    start: int,
) -> list[Explanation]:
    """Stale rows of either recording; both are `[rows, L, K]` from `start` on. Equal tokens may route alike."""
    marked = np.zeros(len(second), np.bool_)
    inside = suspicious[(suspicious >= start) & (suspicious < start + len(second))]
    marked[inside - start] = True
    found = []
    for side, other, rows, others in (
        (pair.first, pair.second, first, second),
        (pair.second, pair.first, second, first),
    ):
        for run in stale_runs(recorded.spec, rows, others, marked):
            places = np.arange(start + run.start, start + run.stop)
            tokens = recorded.token_ids(side)
            if places[-1] >= len(tokens) or (tokens[places] == tokens[start + run.source]).any():
                continue
            are = "is" if len(places) == 1 else "are"
            what = (
                f"{_named(places)} of event {side.event} {are} its row {start + run.source} again, in all "
                f"{recorded.spec.num_layers} layers, though the token is another one; event {other.event} has other "
                f"rows there ({run.common:.0%} of experts in common): a stale row"
            )
            found.append(Explanation("repeated-rows", 0, places, what, "", event=side.event))
    return found


def _without(parts: Sequence[Near], rows: npt.NDArray[np.int64]) -> Near:
    """All of them but these rows."""
    nothing = np.empty(0, np.int64)
    places = np.concatenate([nothing, *(part.rows for part in parts)])
    layers = np.concatenate([nothing, *(part.layers for part in parts)])
    kept = ~np.isin(places, rows)
    return Near(places[kept], layers[kept])


def _copies(
    recorded: RecordedRows, exact: dict[int, list[npt.NDArray[np.int64]]]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Offsets at which rows equal others in all layers, where they are too many for chance; each row but once."""
    left = {offset: np.concatenate(parts) for offset, parts in exact.items()}
    while left:
        offset = max(left, key=lambda one: (len(left[one]), -abs(one)))
        rows = left.pop(offset)
        if not enough_rows(recorded.spec, len(rows)):
            return
        yield offset, rows
        left = {other: np.setdiff1d(some, rows, assume_unique=True) for other, some in left.items()}


def _shifted(
    recorded: RecordedRows,
    pair: Pair,
    offset: int,
    rows: npt.NDArray[np.int64],
    near: Near,
    judged: Sequence[_Judged],
) -> Explanation:
    """Rows that equal others in all layers, or in most, rows that agree with others, or several of these."""
    by = f"those {abs(offset)} {'later' if offset > 0 else 'earlier'} of event {pair.first.event}"
    said = []
    layers = recorded.spec.num_layers
    only = np.setdiff1d(near.rows, rows)
    if len(only):
        equal = len(rows) * layers + int(near.layers[np.isin(near.rows, only)].sum())
        rows = np.union1d(rows, only)
        by = by if len(rows) > 1 else f"row {rows[0] + offset} of event {pair.first.event}"
        said.append(
            f"{_named(rows)} of event {pair.second.event} {'are' if len(rows) > 1 else 'is'} {by} in {equal} of "
            f"{len(rows) * layers} cells"
        )
    elif len(rows) == 1:
        said.append(
            f"row {rows[0]} of event {pair.second.event} is row {rows[0] + offset} of event {pair.first.event} in all "
            "layers"
        )
    elif len(rows):
        said.append(f"{_named(rows)} of event {pair.second.event} are {by} in all layers")
    if judged:
        held = _rows_of(judged)
        own, best = (_mean(judged, name) for name in ("own", "best"))
        # A recording need not begin or end where the other one does.
        low, high = max(int(held[0]) + offset, pair.first.start), min(int(held[-1]) + offset, pair.first.stop - 1)
        if len(rows) and np.isin(held, rows).all():
            said[0] += f", and have {own:.0%} of experts in common with their own"
        else:
            said.append(
                f"{_named(held)} of event {pair.second.event} agree with rows {low} to {high} of event "
                f"{pair.first.event} ({best:.0%} of experts in common), not with their own ({own:.0%})"
            )
        rows = np.union1d(rows, held)
    return Explanation("shifted", offset, rows, "; ".join(said), f"is shifted by {abs(offset)}")


def _other(pair: Pair, judged: Sequence[_Judged]) -> Explanation:
    rows = _rows_of(judged)
    own, chance = (_mean(judged, name) for name in ("own", "chance"))
    what = (
        f"{_named(rows)} of events {pair.first.event} and {pair.second.event} have {own:.0%} of experts in common, as "
        f"rows of any two tokens have ({chance:.0%})"
    )
    # A model that was trained anew, say.
    same = pair.first.weight_version == pair.second.weight_version
    unless = "" if same else ", or the weights have nothing in common"
    return Explanation("other-sequence", 0, rows, what, "recorded rows of another sequence", unless)


def find_culprit(recorded: RecordedRows, pair: Pair, one: Explanation) -> tuple[Recording, Recording] | None:
    """Which recording of a pair is wrong, as far as a third one of the same rows tells; and that third one.

    None where there is no such recording, or where it agrees with both or with neither.
    """
    history = recorded.history
    same = SameTokens(history)
    others = [recording for segment in history.segments for recording in segment.recordings]
    for third in (*reversed(others), *history.observations):
        if third.event in (pair.first.event, pair.second.event):
            continue
        limit = min(third.stop, same.below(pair.first, third), same.below(pair.second, third))
        rows = one.rows[(one.rows >= third.start) & (one.rows < limit)]
        rows = rows[rows < rows[0] + _WINDOW][:_WITNESS_ROWS] if len(rows) else rows
        if not len(rows):
            continue
        runs = runs_of(rows)
        seen, first, second = (recorded.rows(recording, runs) for recording in (third, pair.first, pair.second))
        more = common_share(seen, first) - common_share(seen, second)
        if abs(more) > _CLEARLY:
            return (pair.second if more > 0 else pair.first), third
    return None


def _named(rows: npt.NDArray[np.int64]) -> str:
    first, last = int(rows[0]), int(rows[-1])
    if len(rows) == last - first + 1:
        return f"rows {first} to {last}" if len(rows) > 1 else f"row {first}"
    return f"{len(rows)} of the rows {first} to {last}"


def _rows_of(judged: Sequence[_Judged]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(one.start, one.stop) for one in judged])


def _mean(judged: Sequence[_Judged], name: str) -> float:
    """Of a share, over rows."""
    rows = [one.stop - one.start for one in judged]
    return float(np.average([getattr(one.agreed, name) for one in judged], weights=rows))
