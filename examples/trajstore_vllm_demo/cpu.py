"""What makes a vLLM run on a CPU: its environment, and the arguments of its engine. No rollout here."""

from pathlib import Path
from typing import Any

__all__ = ["BLOCK", "ENVIRONMENT", "engine_arguments"]

BLOCK = 32
"""Tokens of a cache block; smaller ones fail on a CPU. A cached prefix is a multiple of it."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
"""To be set before vLLM is started."""


def engine_arguments(model: Path, *, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
    """Arguments of `LLM` and `AsyncEngineArgs`, and as flags of the server.

    In float32: a plain forward of transformers then agrees to the last expert.

    Args:
        model: folder with configuration and weights, as `save_pretrained` writes it.
        max_model_len: tokens of a trajectory at most.
        max_num_seqs: requests that run together.
    """
    return {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": BLOCK,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": 1024,
        "enable_return_routed_experts": True,
        "distributed_executor_backend": "uni",
        "worker_extension_cls": "trajstore_vllm_demo.worker.LoadsFolders",
    }
