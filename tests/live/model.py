"""A tiny Qwen3-MoE on disk that vLLM and SGLang both serve, and others that differ from it by noise."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trajstore import RoutingSpec

__all__ = ["VOCABULARY", "make_model", "noisy_copy", "routing_spec"]

VOCABULARY = 256


def make_model(folder: Path, *, dense: tuple[int, ...] = (), seed: int = 0) -> Path:
    """Write a model of 4 layers, 8 experts, top-2, with its tokenizer; give back its folder.

    Args:
        dense: layers without experts.
        seed: of the weights, which are drawn wide enough that routing depends on the whole prefix.
    """
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(_config(dense))
    for name, weights in model.named_parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=1.0 if "embed_tokens" in name else 0.15)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def noisy_copy(folder: Path, *, of: Path, seed: int, noise: float = 0.05) -> Path:
    """Write the model `of` with so many standard deviations of noise on each of its matrices."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM.from_pretrained(of, dtype=torch.float32)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.add_(noise * weights.std() * torch.randn_like(weights))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def routing_spec(folder: Path) -> RoutingSpec:
    """What the routers of the model in `folder` do."""
    config = Qwen3MoeConfig.from_pretrained(folder)
    return RoutingSpec(
        layer_ids=tuple(layer for layer in range(config.num_hidden_layers) if layer not in config.mlp_only_layers),
        top_k=config.num_experts_per_tok,
        num_experts=config.num_experts,
        num_hidden_layers=config.num_hidden_layers,
    )


def _config(dense: tuple[int, ...]) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        mlp_only_layers=list(dense),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words `w4` to `w255`, each one token, and four special ones; a chat is its messages' words."""
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2, "<bos>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        bos_token="<bos>",
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )
