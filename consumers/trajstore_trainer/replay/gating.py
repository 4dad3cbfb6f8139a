"""How each family of routers weighs the experts that were chosen, so that others can be weighed in their place.

Formulas and their names are those of the router classes of `transformers` (`models/*/modeling_*.py`). A choice that is
replayed is weighed from the scores over all experts: an expert that the live router would not have chosen has a score
there, and its gradient reaches the router.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["GATINGS", "Gating", "Scores"]


class Gating(Protocol):
    """The weights of chosen experts."""

    def __call__(self, router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
        """Weigh.

        Args:
            router: whose settings count.
            logits: `[N, E]`, as the router returned them.
            experts: int64 `[N, K]`, chosen of E.

        Returns:
            `[N, K]`, differentiable in `logits`. The dtype does not matter: it becomes that of the router's own.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A gating of the usual form: score, choose, normalise, scale.

    Attributes:
        score: "softmax" over all experts, "sigmoid" of each, or "softmax of chosen": over the K chosen logits.
        normalise: whether the K weights are divided by their sum; a string names the router's attribute that says it.
        epsilon: added to that sum.
        floor: attribute of the router that holds the least value of that sum; "" for none.
        scale: attribute of the router that the weights are multiplied by; "" for none.
        dtype: to which the logits are converted before they are scored; None leaves them as they are.
    """

    score: Literal["softmax", "sigmoid", "softmax of chosen"]
    normalise: bool | str = False
    epsilon: float = 0.0
    floor: str = ""
    scale: str = ""
    dtype: torch.dtype | None = torch.float32

    def __call__(self, router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
        """As `Gating`."""
        scored = logits if self.dtype is None else logits.to(self.dtype)
        if self.score == "softmax of chosen":
            weights = scored.gather(-1, experts).softmax(-1)
        else:
            scores = scored.softmax(-1) if self.score == "softmax" else scored.sigmoid()
            weights = scores.gather(-1, experts)
        if self.normalise if isinstance(self.normalise, bool) else _setting(router, self.normalise):
            total = weights.sum(-1, keepdim=True) + self.epsilon
            weights = weights / (total.clamp_min(_setting(router, self.floor)) if self.floor else total)
        return weights * _setting(router, self.scale) if self.scale else weights


_NORMALISED = Scores(score="softmax", normalise=True)
_BY_SETTING = Scores(score="softmax", normalise="norm_topk_prob")
_SCALED_SIGMOID = Scores(
    score="sigmoid", normalise="norm_topk_prob", epsilon=1e-20, scale="routed_scaling_factor", dtype=None
)
_SIGMOID = Scores(score="sigmoid", normalise=True)
_SCALED_SOFTMAX = Scores(score="softmax", scale="routed_scaling_factor")

GATINGS: Mapping[str, Gating] = MappingProxyType(
    {
        "Qwen2MoeTopKRouter": _BY_SETTING,
        "Qwen3MoeTopKRouter": _BY_SETTING,
        "Qwen3NextTopKRouter": _BY_SETTING,
        "OlmoeTopKRouter": _BY_SETTING,
        "FlexOlmoTopKRouter": _BY_SETTING,
        "MixtralTopKRouter": _NORMALISED,
        "MiniMaxTopKRouter": _NORMALISED,
        "Qwen3_5MoeTopKRouter": _NORMALISED,
        "Qwen3VLMoeTextTopKRouter": _NORMALISED,
        "HunYuanMoEV1Gate": _NORMALISED,
        "JambaTopKRouter": Scores(score="softmax"),
        "Ernie4_5_MoeTopKRouter": Scores(score="softmax", normalise=True, floor="norm_min"),
        "DeepseekV2TopkRouter": _SCALED_SOFTMAX,
        "DeepseekV3TopkRouter": _SCALED_SIGMOID,
        "DeepseekV32TopkRouter": _SCALED_SIGMOID,
        "Glm4MoeTopkRouter": _SCALED_SIGMOID,
        "Glm4MoeLiteTopkRouter": _SCALED_SIGMOID,
        "GlmMoeDsaTopkRouter": _SCALED_SIGMOID,
        "Dots1TopkRouter": _SCALED_SIGMOID,
        "ExaoneMoeTopkRouter": _SCALED_SIGMOID,
        "MiMoV2FlashTopkRouter": _SCALED_SIGMOID,
        "NemotronHTopkRouter": _SCALED_SIGMOID,
        "SolarOpenTopkRouter": _SCALED_SIGMOID,
        "MiniMaxM2TopKRouter": _SIGMOID,
        "AfmoeTokenChoiceRouter": Scores(
            score="sigmoid", normalise=True, epsilon=1e-20, scale="route_scale", dtype=None
        ),
        "GptOssTopKRouter": Scores(score="softmax of chosen", dtype=None),
        "GraniteMoeTopKRouter": Scores(score="softmax of chosen", dtype=None),
        "GraniteMoeHybridTopKRouter": Scores(score="softmax of chosen", dtype=None),
    }
)
"""By the name of the router's class."""


def _setting(router: nn.Module, name: str) -> Any:
    return getattr(router, name)
