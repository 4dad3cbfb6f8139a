"""RouterReplay: a `transformers` model whose routers choose the experts that were recorded.

A replay holds no queue. Each router's rows are found by its global layer id, and every call of a router within the
block, however often it comes, sees the same rows: there is nothing that a forward could leave for the next.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trajstore.errors import Conflict, RoutingError, SchemaError
from trajstore_trainer.replay.gating import GATINGS, Gating
from trajstore_trainer.replay.rows import ReplayRows, RoutedBatch
from trajstore_transformers.capture import find_routers, read_answer

__all__ = ["RouterReplay"]

Checkpoint: TypeAlias = Callable[..., Any]
"""What `transformers` calls as `checkpoint(function, *args)`: runs the function now, and again in the backward."""


class RouterReplay:
    """Forces recorded experts in a model's forward.

    with replay.forcing(batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, ...).logits
    loss(logits).backward()

    The weights of the forced experts come from the live router's scores, in the family's own way (`gating`), and their
    gradient reaches the router. Where `batch.routing_mask` is False the live router decides. Logits that the routers
    give out, as for an auxiliary loss, stay the live ones. Under gradient checkpointing of `transformers` a layer that
    is recomputed sees the rows of its forward, even if the block is over or another one is open by then. With another
    implementation of checkpointing the backward must run within the block.

    Args:
        model: a mixture-of-experts model of `transformers` whose routers are of known classes; itself, not what wraps
            it (DDP, `torch.compile`): its own modules are hooked, whoever calls them.
        gatings: of router classes that `GATINGS` does not have, or has otherwise, by class name.

    Attributes:
        layer_ids: global ids of the layers that route, ascending.
        num_hidden_layers: all decoder layers.

    Raises:
        SchemaError: no routers, or one of an unknown class.
    """

    def __init__(self, model: PreTrainedModel, *, gatings: Mapping[str, Gating] = MappingProxyType({})) -> None:
        self._name = type(model).__name__
        found, self.num_hidden_layers = find_routers(model)
        self.layer_ids = tuple(found)
        self._layers: nn.ModuleList = model.get_decoder().layers  # type: ignore[no-untyped-call]
        known = {**GATINGS, **gatings}
        self._routers: dict[int, _Router] = {}
        for layer_id, module in found.items():
            name = type(module).__name__
            if name not in known:
                raise SchemaError(
                    f"{name} (layer {layer_id} of {self._name}) weighs its experts in a way that is not known here, so "
                    f"it cannot weigh others; pass gatings={{{name!r}: ...}}, see trajstore_trainer.replay.gating"
                )
            self._routers[layer_id] = _Router(layer_id, module, known[name])

    @contextmanager
    def forcing(self, batch: RoutedBatch) -> Iterator[None]:
        """Replay the rows of a batch in every forward of the model within the block.

        Args:
            batch: `PaddedBatch`, `PackedBatch` or the like; the model must be called with all of its tokens, in its
                order.

        Raises:
            SchemaError: the batch has no routing, or that of another model: layers, experts or experts per token
                differ; or the family's gating is not what this model's routers do.
            RoutingError: the rows do not fit the tokens that the model was called with, or an expert is out of range.
            Conflict: another replay is open on this model, or no forward of it ran within the block.
        """
        rows = ReplayRows(batch)
        self._require_same_model(rows)
        hooks = {layer_id: _ForcedRouter(router, rows) for layer_id, router in self._routers.items()}
        with ExitStack() as attached:
            for layer_id, hook in hooks.items():
                module = self._routers[layer_id].module
                if _forced_hooks(module):
                    raise Conflict(
                        f"layer {layer_id} of {self._name} is already under a replay; replays do not nest. Leave the "
                        "outer block first"
                    )
                attached.callback(module.register_forward_hook(hook).remove)
                attached.enter_context(_recomputed_under(hook, self._layers[layer_id], module))
            yield
        idle = [layer_id for layer_id, hook in hooks.items() if hook.calls == 0]
        if idle:
            raise Conflict(
                f"the routers of layers {idle} of {self._name} did not run under their hooks within the block, so "
                "nothing was replayed there. Call the model that RouterReplay was made for; one that "
                "torch.compile compiled before it had hooks does not see them: compile it within the first block"
            )

    def _require_same_model(self, rows: ReplayRows) -> None:
        spec = rows.spec
        if (spec.layer_ids, spec.num_hidden_layers) != (self.layer_ids, self.num_hidden_layers):
            missing = sorted(set(self.layer_ids) - set(spec.layer_ids))
            foreign = sorted(set(spec.layer_ids) - set(self.layer_ids))
            raise SchemaError(
                f"the batch's routing is not of this model: {self._name} has {self.num_hidden_layers} layers, of which "
                f"{list(self.layer_ids)} route; the rows are of {list(spec.layer_ids)} of {spec.num_hidden_layers}"
                + (f"; layers {missing} have no rows" if missing else "")
                + (f"; layers {foreign} have no router" if foreign else "")
            )


class _Router:
    """One router of the model.

    Attributes:
        layer_id: global id of its layer.
        module: itself.
    """

    def __init__(self, layer_id: int, module: nn.Module, gating: Gating) -> None:
        self.layer_id = layer_id
        self.module = module
        self._gating = gating
        self._proven = False

    def weigh(self, logits: Tensor, experts: Tensor, *, own_weights: Tensor, own_experts: Tensor) -> Tensor:
        """Weights `[N, K]` of chosen experts. The first time, the router's own choice proves the gating.

        Raises:
            SchemaError: the router weighs its own choice otherwise.
        """
        if not self._proven:
            with torch.no_grad():
                self._prove(self._gating(self.module, logits, own_experts).to(own_weights.dtype), own_weights)
            self._proven = True
        return self._gating(self.module, logits, experts).to(own_weights.dtype)

    def _prove(self, found: Tensor, own: Tensor) -> None:
        near = max(1e-5, 4 * torch.finfo(own.dtype).eps)
        if not torch.allclose(found, own, rtol=near, atol=near, equal_nan=True):
            raise SchemaError(
                f"{type(self.module).__name__} of layer {self.layer_id} weighs its experts otherwise than its gating "
                f"says (off by up to {float((found - own).abs().max()):.3g}); pass RouterReplay gatings= that fit this "
                "version of transformers"
            )


class _ForcedRouter:
    """The forward hook of one router for one batch.

    Attributes:
        calls: how often the router ran.
    """

    def __init__(self, router: _Router, rows: ReplayRows) -> None:
        self._router = router
        self._rows = rows
        self.calls = 0

    def __call__(self, module: nn.Module, _: Any, output: Any) -> tuple[Any, ...]:
        layer_id, spec = self._router.layer_id, self._rows.spec
        logits, weights, experts = read_answer(layer_id, module, output)
        if (logits.shape[-1], experts.shape[-1]) != (spec.num_experts, spec.top_k):
            raise SchemaError(
                f"the router of layer {layer_id} picks {experts.shape[-1]} of {logits.shape[-1]} experts, the batch's "
                f"rows {spec.top_k} of {spec.num_experts}; they are of another model"
            )
        if len(experts) != len(self._rows):
            raise RoutingError(
                f"the router of layer {layer_id} saw {len(experts)} tokens, the batch has {len(self._rows)}; call the "
                "model with all tokens of the batch, in its order, and without a cache",
                layer=layer_id,
            )
        recorded, known = self._rows.layer(layer_id, experts.device)
        chosen = torch.where(known, recorded, experts)
        forced = self._router.weigh(logits, chosen, own_weights=weights, own_experts=experts)
        self.calls += 1
        return (output[0], forced, chosen, *output[3:])


@contextmanager
def _recomputed_under(hook: _ForcedRouter, layer: nn.Module, router: nn.Module) -> Iterator[None]:
    """While the block is open, what gradient checkpointing keeps of this layer's forward is kept with its rows."""
    checkpoint: Checkpoint | None = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        yield
        return

    def with_rows(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def under_hook(*inner: Any, **options: Any) -> Any:
            with _only(router, hook):
                return function(*inner, **options)

        return checkpoint(under_hook, *args, **kwargs)

    layer._gradient_checkpointing_func = with_rows  # type: ignore[assignment]
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]


@contextmanager
def _only(router: nn.Module, hook: _ForcedRouter) -> Iterator[None]:
    """This hook on the router, and no other replay's; as it was afterwards."""
    others = _forced_hooks(router)
    if list(others.values()) == [hook]:
        yield
        return
    for key in others:
        del router._forward_hooks[key]
    handle = router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        router._forward_hooks.update(others)


def _forced_hooks(router: nn.Module) -> dict[int, _ForcedRouter]:
    return {key: hook for key, hook in router._forward_hooks.items() if isinstance(hook, _ForcedRouter)}
