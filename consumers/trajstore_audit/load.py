"""How often each expert is chosen: counts by layer, and which rows of a trajectory stand for all. Pure."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trajstore.routing import RoutingArray
from trajstore_audit.pairs import Pair

__all__ = ["choose_rows", "count_experts"]

_ROWS = 1 << 12


def count_experts(rows: RoutingArray, num_experts: int) -> npt.NDArray[np.int64]:
    """How often each layer chose each expert, int64 `[L, num_experts]`; ids beyond are left out.

    Args:
        rows: `[rows, L, K]`.
    """
    layers = rows.shape[1]
    found = np.zeros((layers, num_experts), np.int64)
    for at in range(0, len(rows), _ROWS):
        block = rows[at : at + _ROWS]
        for layer in range(layers):
            found[layer] += np.bincount(block[:, layer].reshape(-1), minlength=num_experts)[:num_experts]
    return found


def choose_rows(id: str, pairs: Sequence[Pair], *, rows: int, seed: int) -> tuple[Pair, int, int] | None:
    """Which rows of a trajectory are counted: a block of them in one of its pairs, the same for the same seed.

    Returns:
        The pair, and positions `[start, stop)` in it; None where there is none.
    """
    if not pairs or rows <= 0:
        return None
    digest = hashlib.blake2b(f"{seed} {id}".encode(), digest_size=16).digest()
    which, where = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    ends = np.cumsum([pair.stop - pair.start for pair in pairs])
    pair = pairs[int(np.searchsorted(ends, which % int(ends[-1]), side="right"))]
    spare = max(0, pair.stop - pair.start - rows)
    start = pair.start + where % (spare + 1)
    return pair, start, min(start + rows, pair.stop)
