"""Tiny random models of several families, and what a plain forward of theirs says: the engine's measure."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

__all__ = [
    "CONTEXT",
    "DEEPSEEK_ROUTER_CHOOSES",
    "FAMILIES",
    "VOCABULARY",
    "PlainForward",
    "plain_forward",
    "prompt",
    "tiny_model",
]

VOCABULARY = 64
CONTEXT = 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    # Wide weights keep routers decided: a near tie would fall this way in one batch and that way in another.
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": []}

FAMILIES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, _QWEN),
    "qwen3_moe_dense_first": (Qwen3MoeForCausalLM, Qwen3MoeConfig, _QWEN | {"mlp_only_layers": [0, 2]}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 8}),
    # A window that most rows outgrow.
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 8, "head_dim": 16, "sliding_window": 5, "rope_parameters": {"rope_type": "default"}},
    ),
    # Two dense layers, keys and values of different widths, and a router that does not sort its choice.
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
        },
    ),
}
"""Model class, configuration class, and what the family's configuration needs beyond `_COMMON`."""


DEEPSEEK_ROUTER_CHOOSES = "topk_indices" in DeepseekV3TopkRouter.forward.__code__.co_varnames
"""Early transformers 5 chose DeepSeek's experts outside its router; the engine refuses such a model."""


def tiny_model(family="qwen3_moe", *, dtype=torch.float64, seed=0, **changes) -> PreTrainedModel:
    """A random model of 4 layers and 8 experts in eval mode. float64 takes eager experts: grouped_mm has none."""
    model_class, config_class, needs = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(_COMMON | needs | changes))).to(dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


def prompt(length, seed=0) -> np.ndarray:
    """Random token ids int32 `[length]`."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


@dataclass(frozen=True)
class PlainForward:
    """One forward over a whole sequence of T tokens, without cache, batch or padding.

    Attributes:
        experts: int64 `[T, L, K]`, by falling router logit; L = the layers that route.
        gaps: float64 `[T, L]`, the smallest distance between neighbours among the K logits that were chosen.
        logits: float64 `[T, V]`.
    """

    experts: np.ndarray
    gaps: np.ndarray
    logits: np.ndarray

    def logprobs(self, token_ids, temperature=1.0) -> np.ndarray:
        """float64 `[T - 1]`: of each token but the first."""
        scaled = torch.log_softmax(torch.from_numpy(self.logits) / temperature, -1).numpy()
        return scaled[np.arange(len(token_ids) - 1), token_ids[1:]]


def plain_forward(model, token_ids) -> PlainForward:
    """The routing by the router logits that the model itself gives out, which the engine does not use."""
    with torch.inference_mode():
        output = model(
            input_ids=torch.from_numpy(np.asarray(token_ids, np.int64))[None],
            use_cache=False,
            output_router_logits=True,
        )
    logits = torch.stack([layer.double() for layer in output.router_logits], 1)
    best, experts = logits.sort(dim=-1, descending=True, stable=True)
    top_k = model.config.num_experts_per_tok
    gaps = (best[..., : top_k - 1] - best[..., 1:top_k]).amin(-1)
    return PlainForward(experts[..., :top_k].numpy(), gaps.numpy(), output.logits[0].double().numpy())
