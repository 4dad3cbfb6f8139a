"""New weights into a running vLLM on a CPU, as its `worker_extension_cls`; `collective_rpc("load_folder")` calls it.

vLLM's own `reload_weights` is no way on a CPU: the backend of 0.30 has packed the linear layers and thrown their plain
weights away, and after a `reload_weights` the model is neither the old nor the new one, with a warning at most.
"""

from typing import Any

from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

__all__ = ["LoadsFolders"]


class LoadsFolders:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def load_folder(self, folder: str) -> None:
        """Load the model in `folder` as at a start. The attention layers stay, and with them what is cached."""
        runner = self.model_runner
        layers = runner.compilation_config.static_forward_context
        before = dict(layers)
        layers.clear()  # the new layers enter themselves as they are made
        runner.compilation_config.static_all_moe_layers.clear()
        runner.model_config.model = folder
        with set_current_vllm_config(runner.vllm_config):
            runner.load_model()
        for name, layer in before.items():
            if isinstance(layer, AttentionLayerBase):
                runner.model.set_submodule(name, layer)
                layers[name] = layer
        bind_routed_experts_capturer(runner.model, runner.routed_experts_capturer)
