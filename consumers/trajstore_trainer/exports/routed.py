"""Routing as other trainers hold it: over all hidden layers, and a missing row by a convention instead of a mask."""

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trajstore.routing import RoutingSpec

__all__ = ["MissingRow", "all_layers"]

MissingRow: TypeAlias = Literal[0, -1]
"""Every id of a row that is not known. 0 is what verl, slime and miles fill in, and what they replay as expert 0; -1
tells NeMo-RL to let the live router decide."""


def all_layers(
    routed: npt.NDArray[Any],
    known: npt.NDArray[np.bool_],
    spec: RoutingSpec,
    *,
    dtype: npt.DTypeLike,
    missing_row: MissingRow = 0,
) -> npt.NDArray[Any]:
    """Rows `[..., L, K]` as engines deliver them: `[..., H, K]` over all `num_hidden_layers`, zeros in dense layers.

    Args:
        known: bool `[...]`; elsewhere the whole row becomes `missing_row`.
    """
    wide = np.zeros((*known.shape, spec.num_hidden_layers, spec.top_k), dtype)
    wide[..., list(spec.layer_ids), :] = routed
    wide[~known] = missing_row
    return wide
