"""Stands in for the CPU build of `sgl_kernel`: top-k softmax of a router in torch; every other operator raises."""

from collections.abc import Callable
from typing import Any

import torch

__version__ = "0.4.10"  # SGLang asks for it


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

    missing.__name__ = name
    return missing


def _topk_softmax(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float `[N, K]` and expert ids int32 `[N, K]` from router logits `[N, E]`, by falling weight."""
    probabilities = torch.softmax(gating_output.float(), dim=-1)
    scores = probabilities if correction_bias is None else probabilities + correction_bias
    ids = torch.topk(scores, topk, dim=-1).indices
    weights = probabilities.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define(
    "topk_softmax_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, "
    "Tensor? correction_bias=None) -> (Tensor, Tensor)"
)
_library.impl("topk_softmax_cpu", _topk_softmax, "CPU")
