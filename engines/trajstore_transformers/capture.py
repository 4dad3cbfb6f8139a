"""Reading the routers of a model as it runs: where they are, and which experts they chose.

Layers go by their position in the decoder, dense ones included, never by the order in which routers were found.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trajstore import SchemaError

__all__ = ["ROUTERS", "Recorded", "RouterCapture", "find_routers", "read_answer"]

ROUTERS = ("TopKRouter", "TopkRouter", "TokenChoiceRouter", "MoEV1Gate")
"""Endings of the names of router classes whose forward returns `(logits [N, E], weights [N, K], expert ids [N, K])`, or
more behind these: Qwen3-MoE, Mixtral, OLMoE and most families of transformers 5. Each answer is checked."""


def find_routers(model: PreTrainedModel) -> tuple[dict[int, nn.Module], int]:
    """Each router by the global id of its decoder layer, and the number of hidden layers H.

    Raises:
        SchemaError: no decoder layers, no router that can be read, or several in one layer.
    """
    name = type(model).__name__
    layers = getattr(model.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise SchemaError(f"{name} keeps no decoder layers in get_decoder().layers, so its routers cannot be numbered")
    hidden = list(layers)[: model.config.get_text_config(decoder=True).num_hidden_layers]  # what follows them is MTP
    routers: dict[int, nn.Module] = {}
    for layer_id, layer in enumerate(hidden):
        found = [module for module in layer.modules() if type(module).__name__.endswith(ROUTERS)]
        if len(found) > 1:
            raise SchemaError(
                f"layer {layer_id} of {name} has {len(found)} routers; one row per layer cannot hold them"
            )
        if found:
            routers[layer_id] = found[0]
    if not routers:
        raise SchemaError(
            f"{name} has no router that can be read. Supported are mixture-of-experts models of transformers >= 5.0 "
            f"whose router classes are named *{', *'.join(ROUTERS)} (Qwen3-MoE, Mixtral, OLMoE and the like)"
        )
    return routers, len(hidden)


class RouterCapture:
    """Hooks on a model's routers. They cost nothing outside `recording`; `close` removes them.

    Attributes:
        layer_ids: global ids of the layers that route, ascending.
        num_hidden_layers: H.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        routers, self.num_hidden_layers = find_routers(model)
        self.layer_ids = tuple(routers)
        self._calls: list[tuple[int, nn.Module, Any]] | None = None
        self._hooks = [self._watch(layer_id, router) for layer_id, router in routers.items()]

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorded"]:
        """What the routers do within the block."""
        self._calls = []
        try:
            yield Recorded(self, self._calls)
        finally:
            self._calls = None

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, layer_id: int, router: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if self._calls is not None:
                self._calls.append((layer_id, module, output))

        return router.register_forward_hook(hook)


class Recorded:
    """The routers' outputs of one forward."""

    def __init__(self, capture: RouterCapture, calls: list[tuple[int, nn.Module, Any]]) -> None:
        self._capture = capture
        self._calls = calls

    def shape(self) -> tuple[int, int]:
        """Experts E and experts per token K.

        Raises:
            SchemaError: the layers differ, or a router returns something else.
        """
        shapes = {
            layer_id: (int(logits.shape[-1]), int(experts.shape[-1])) for layer_id, logits, _, experts in self._read()
        }
        first = next(iter(shapes.values()))
        for layer_id, shape in shapes.items():
            if shape != first:
                raise SchemaError(
                    f"layer {layer_id} picks {shape[1]} of {shape[0]} experts, others {first[1]} of {first[0]}; a "
                    "routing spec has one top_k and one num_experts"
                )
        return first

    def experts(self, tokens: int) -> Tensor:
        """Expert ids int64 `[tokens, H, K]` by falling weight, 0 in dense layers.

        Raises:
            SchemaError: a router was not called just once with that many tokens, or returns something else.
        """
        result: Tensor | None = None
        for layer_id, _, weights, experts in self._read():
            if len(experts) != tokens:
                raise SchemaError(f"the router of layer {layer_id} saw {len(experts)} tokens, the model {tokens}")
            if result is None:
                result = experts.new_zeros((tokens, self._capture.num_hidden_layers, experts.shape[-1]))
            # Some routers leave their choice unsorted; the stable sort keeps the order of those that do not.
            order = weights.argsort(dim=-1, descending=True, stable=True)
            result[:, layer_id] = experts.gather(-1, order).to(result.device)
        assert result is not None, "a capture has at least one router"
        return result

    def margins(self) -> Tensor:
        """By how much the logit of the last expert chosen exceeds that of the best one left out, float32 `[tokens, H]`.

        NaN in dense layers, and where a router does not choose by its logits alone (DeepSeek's groups and biases).
        """
        result: Tensor | None = None
        for layer_id, logits, _, experts in self._read():
            if result is None:
                result = logits.new_full((len(logits), self._capture.num_hidden_layers), torch.nan, dtype=torch.float32)
            chosen = logits.gather(-1, experts).amin(-1)
            left_out = logits.scatter(-1, experts, -torch.inf).amax(-1)
            margin = (chosen - left_out).float().to(result.device)
            result[:, layer_id] = torch.where(margin >= 0, margin, torch.nan)
        assert result is not None, "a capture has at least one router"
        return result

    def _read(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Layer id, logits `[N, E]`, weights `[N, K]` and expert ids `[N, K]`, in order of the layers."""
        layers = [layer_id for layer_id, _, _ in self._calls]
        if tuple(layers) != self._capture.layer_ids:
            raise SchemaError(f"routers of layers {layers} ran in one forward, expected {self._capture.layer_ids}")
        for layer_id, router, output in self._calls:
            yield layer_id, *read_answer(layer_id, router, output)


def read_answer(layer_id: int, router: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a router's forward returned: logits `[N, E]`, weights `[N, K]` and expert ids `[N, K]`.

    Raises:
        SchemaError: it is something else.
    """
    logits, weights, experts = output[:3] if isinstance(output, tuple) and len(output) >= 3 else (None,) * 3
    if not (
        isinstance(logits, Tensor)
        and isinstance(weights, Tensor)
        and isinstance(experts, Tensor)
        and experts.ndim == 2
        and weights.shape == experts.shape
        and not experts.is_floating_point()
    ):
        raise SchemaError(
            f"{type(router).__name__} of layer {layer_id} does not return (logits, weights, expert ids), the "
            "last two [tokens, top_k]; its routing cannot be read with this version of transformers"
        )
    return logits, weights, experts
