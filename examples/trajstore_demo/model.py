"""The model: a small Qwen3-MoE made from a seed, and its weights on their way from the trainer to the engine."""

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trajstore_demo.task import END, VOCABULARY

__all__ = ["WeightFiles", "make_model"]


def make_model(seed: int) -> PreTrainedModel:
    """A randomly initialised Qwen3-MoE: 6 layers, of which the first is dense, 16 experts, top-4."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=48,
        num_hidden_layers=6,
        mlp_only_layers=[0],
        num_attention_heads=3,  # of 32: vLLM serves no smaller ones on a CPU
        num_key_value_heads=1,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=END,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(config)


class WeightFiles:
    """Numbered weights in a folder: version `v3` is `3.safetensors`, there as a whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def publish(self, number: int, model: torch.nn.Module) -> None:
        """Write a version."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f"{number}.new"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
        temporary.replace(self._folder / f"{number}.safetensors")

    def wait_for_first(self, seconds: float) -> None:
        """Block until some version is there.

        Raises:
            TimeoutError: none came.
        """
        deadline = time.monotonic() + seconds
        while self.newest() < 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no weights in {self._folder} after {seconds:g} s; did the trainer start?")
            time.sleep(0.05)

    def newest(self) -> int:
        """Number of the newest version, -1 if there is none."""
        return max((int(path.stem) for path in self._folder.glob("*.safetensors")), default=-1)

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """Tensors of a version by parameter name."""
        return load_file(self._folder / f"{number}.safetensors")
