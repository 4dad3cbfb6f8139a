"""One forward of a causal language model over a KV cache, with the routing of its input."""

import inspect

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trajstore import RoutingSpec, SchemaError
from trajstore.routing import RoutingArray
from trajstore_transformers.capture import Recorded, RouterCapture

__all__ = ["Forward"]


class Forward:
    """Calls the model. Knows what its arguments are called, and what its routers look like.

    Args:
        model: in eval mode.

    Attributes:
        device: of its input.
        spec: what its routers do.

    Raises:
        SchemaError: its routers or its cache cannot be read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        layers = {type(layer) for layer in DynamicCache(config=config).layers} - {
            DynamicLayer,
            DynamicSlidingWindowLayer,
        }
        if layers:
            raise SchemaError(
                f"{type(model).__name__} caches {', '.join(sorted(layer.__name__ for layer in layers))}; batches of "
                "this engine can be put together from keys and values of plain attention only"
            )
        arguments = inspect.signature(model.forward).parameters
        self.device = model.device
        self._model = model
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"  # renamed within transformers 5
        # The auxiliary loss, where a training configuration asks for it, fails on a mask that is longer than the input.
        self._quiet = {"output_router_logits": False} if "output_router_logits" in arguments else {}
        self._capture = RouterCapture(model)
        try:
            self.spec = self._probe()
        except BaseException:
            self._capture.close()
            raise

    def __call__(
        self, token_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, RoutingArray]:
        """Run S new tokens of B requests behind the W - S that are cached.

        Args:
            token_ids, position_ids: int64 `[B, S]`.
            mask: int64 `[B, W]`, 0 where padded on the left.
            cache: extended in place.

        Returns:
            Logits `[B, V]` of each last token, and the routing `[B, S, H, K]` in the spec's dtype, padding included.
        """
        logits, recorded = self._run(token_ids, mask, position_ids, cache, keep=1)
        rows = self._rows(recorded, token_ids.numel())
        return logits[:, -1], rows.reshape(*token_ids.shape, *rows.shape[1:])

    def read(
        self, token_ids: Tensor, start: int, cache: DynamicCache
    ) -> tuple[Tensor, RoutingArray, npt.NDArray[np.float32]]:
        """Run S tokens of one request behind the `start` that are cached, for what the model says of each.

        Args:
            token_ids: int64 `[S]`.
            cache: extended in place.

        Returns:
            Logits `[S, V]`, the routing `[S, H, K]` in the spec's dtype, and its margins float32 `[S, H]` (see
            `Recorded.margins`).
        """
        stop = start + len(token_ids)
        mask = token_ids.new_ones((1, stop))
        positions = torch.arange(start, stop, device=token_ids.device)[None]
        logits, recorded = self._run(token_ids[None], mask, positions, cache, keep=0)
        return logits[0], self._rows(recorded, len(token_ids)), recorded.margins().cpu().numpy()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._capture.close()

    def _run(
        self, token_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache, *, keep: int
    ) -> tuple[Tensor, Recorded]:
        """One forward; logits of the last `keep` tokens, 0 for all."""
        with self._capture.recording() as recorded:
            output = self._model(
                input_ids=token_ids,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=True,
                logits_to_keep=keep,
                **{self._cache_name: cache},
                **self._quiet,
            )
        return output.logits, recorded

    def _rows(self, recorded: Recorded, tokens: int) -> RoutingArray:
        """Routing `[tokens, H, K]` in the spec's dtype."""
        experts = recorded.experts(tokens).to(torch.int32).cpu().numpy()
        return experts.astype(self.spec.dtype)

    def _probe(self) -> RoutingSpec:
        """The routing spec as the routers show it on one token: configurations name these numbers in many ways."""
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._model.device)
        with torch.inference_mode(), self._capture.recording() as recorded:
            self._model(input_ids=token, use_cache=False, **self._quiet)
        num_experts, top_k = recorded.shape()
        return RoutingSpec(
            layer_ids=self._capture.layer_ids,
            top_k=top_k,
            num_experts=num_experts,
            num_hidden_layers=self._capture.num_hidden_layers,
        )
