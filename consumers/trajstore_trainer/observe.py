"""A trainer's own routing, captured in a forward and recorded beside the rollout's, for audits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trajstore.errors import Conflict, RoutingError
from trajstore.store import Store
from trajstore_trainer.batch import PaddedBatch
from trajstore_trainer.packed import PackedBatch
from trajstore_trainer.replay.rows import token_places
from trajstore_transformers.capture import find_routers, read_answer

__all__ = ["observing"]


@contextmanager
def observing(
    model: PreTrainedModel,
    batch: PaddedBatch | PackedBatch,
    store: Store,
    *,
    weight_version: str,
    source: str = "trainer",
) -> Iterator[None]:
    """Record what the model's routers choose in the one forward within the block, with `traj.observe`.

    with observing(model, batch, store, weight_version="v4"):
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, ...)
    loss(output.logits).backward()

    Every token of every trajectory of the batch gets its row, the last one too; ids go by falling weight. Under a
    replay it is what the routers would have chosen, given what the replay made of the layers below. Nothing is recorded
    if the block raises. Written by the store's flusher: `store.flush()` waits for it.

    Args:
        model: a mixture-of-experts model of `transformers`; itself, not what wraps it.
        batch: with what the model is called: all of its tokens, in its order.
        weight_version: label of the model's weights.
        source: who observes.

    Raises:
        SchemaError: the model's routers cannot be read.
        Conflict: not just one forward of this model ran in the block. The backward belongs after it: with gradient
            checkpointing it runs the layers again.
        RoutingError: the model was called with other tokens; or its routing is not of the trajectories' spec.
        NotFound: a trajectory was deleted since.
    """
    routers, num_hidden_layers = find_routers(model)
    captured: dict[int, list[Tensor]] = {layer_id: [] for layer_id in routers}
    with ExitStack() as hooks:
        for layer_id, router in routers.items():
            # In front of a replay's hook, whichever was registered first.
            handle = router.register_forward_hook(_capture(layer_id, captured[layer_id]), prepend=True)
            hooks.callback(handle.remove)
        yield
    runs = {layer_id: len(calls) for layer_id, calls in captured.items()}
    if set(runs.values()) != {1}:
        raise Conflict(
            f"the routers of {type(model).__name__} ran this often within the block, by layer: {runs}; observe one "
            "forward of the observed model at a time, and run the backward after the block"
        )
    for id, rows in zip(batch.ids, _rows_of_each(batch, captured, num_hidden_layers), strict=True):
        if len(rows):
            store.get(id).observe(rows, start=0, source=source, weight_version=weight_version)


def _capture(layer_id: int, calls: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(router: nn.Module, _: Any, output: Any) -> None:
        logits, weights, experts = read_answer(layer_id, router, output)
        order = weights.detach().argsort(dim=-1, descending=True, stable=True)
        # Narrow, for it is held until the block ends; torch lacks operators for uint16.
        calls.append(experts.gather(-1, order).to(torch.uint8 if logits.shape[-1] <= 256 else torch.int32))

    return hook


def _rows_of_each(
    batch: PaddedBatch | PackedBatch, captured: Mapping[int, Sequence[Tensor]], num_hidden_layers: int
) -> Iterator[npt.NDArray[Any]]:
    """Rows `[T, H, K]` of each trajectory, 0 in dense layers."""
    tokens = batch.input_ids.numel()
    layers = {layer_id: call.cpu().numpy() for layer_id, (call,) in captured.items()}
    for layer_id, experts in layers.items():
        if len(experts) != tokens:
            raise RoutingError(
                f"the router of layer {layer_id} saw {len(experts)} tokens, the batch has {tokens}; call the model "
                "with all tokens of the batch, in its order",
                layer=layer_id,
            )
    first = next(iter(layers.values()))
    for start, stop in token_places(batch):
        rows = np.zeros((stop - start, num_hidden_layers, first.shape[-1]), first.dtype)
        for layer_id, experts in layers.items():
            rows[:, layer_id] = experts[start:stop]
        yield rows
