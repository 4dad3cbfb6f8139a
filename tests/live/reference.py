"""What a plain forward of transformers routes and expects, and that a trajectory agrees with it row by row.

No engine here: one sequence at a time, read from its beginning. Where an engine went on under new weights over keys and
values of the old ones, the forward here does the same.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, Qwen3MoeForCausalLM

from trajstore import Trajectory

__all__ = ["Forward", "assert_logprobs", "assert_rows", "forward"]

_TIE = 1e-5
"""Routers' probabilities that are closer than this may fall either way: engines add up in another order."""

_LOGPROB = 1e-4


class Forward(NamedTuple):
    """One reading of T tokens.

    Attributes:
        routers: float64 `[T, L, E]`, the probabilities of each MoE layer's experts.
        logprobs: float64 `[T]` of each token given those before it, NaN for the first.
    """

    routers: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.float64]


def forward(token_ids: npt.ArrayLike, *parts: tuple[Path, int | None]) -> Forward:
    """Read `token_ids`, int `[T]`: up to each part's end (None: the end) with the model in its folder.

    The keys and values of earlier parts stay as they are, as in an engine whose cache outlives a change of weights.
    """
    ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.int64)[None]
    seen, start = DynamicCache(), 0
    routers, logits = [], []
    for folder, stop in parts:
        piece = ids[:, start:stop]
        with torch.inference_mode():
            model = _model(folder)
            output = model(input_ids=piece, use_cache=True, output_router_logits=True, **{_cache_name(model): seen})
        routers.append(torch.stack([layer.reshape(piece.shape[1], -1) for layer in output.router_logits], dim=1))
        logits.append(output.logits[0])
        start += piece.shape[1]
    assert start == ids.shape[1], "the parts must end with the tokens"
    scores = torch.log_softmax(torch.cat(logits).double(), -1)
    sampled = scores[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return Forward(torch.softmax(torch.cat(routers).double(), -1).numpy(), np.concatenate([[np.nan], sampled.numpy()]))


def assert_rows(rows: npt.NDArray[np.integer], expected: Forward, start: int = 0) -> None:
    """Rows `[n, L, K]` from position `start` on name the K likeliest experts of every layer, the likeliest first."""
    assert len(rows) > 0
    routers = expected.routers[start : start + len(rows)]
    assert rows.shape[:2] == routers.shape[:2]
    chosen = np.take_along_axis(routers, rows.astype(np.int64), -1)
    others = routers.copy()
    np.put_along_axis(others, rows.astype(np.int64), -1.0, -1)
    wrong = (chosen.min(-1) < others.max(-1) - _TIE) | (np.diff(chosen) > _TIE).any(-1)
    assert not wrong.any(), f"rows {start + np.flatnonzero(wrong.any(-1))} of {start} to {start + len(rows) - 1} differ"


def assert_logprobs(trajectory: Trajectory, expected: Forward, tokens: Sequence[int] | range) -> None:
    """The recorded logprobs of these positions, sampled ones all, are those of the forward."""
    assert len(tokens) > 0
    assert trajectory.loss_mask[list(tokens)].all()
    positions = np.asarray(tokens)
    recorded, computed = trajectory.logprobs[positions], expected.logprobs[positions]
    wrong = ~(np.abs(recorded - computed) <= _LOGPROB)
    assert not wrong.any(), f"tokens {positions[wrong]}: {recorded[wrong]} recorded, {computed[wrong]} computed"


def _cache_name(model: Any) -> str:
    """Renamed within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@cache
def _model(folder: Path) -> Any:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
