"""The requests in flight and their keys and values, padded on the left to one width."""

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trajstore_transformers.forward import Forward
from trajstore_transformers.request import Request
from trajstore_transformers.sampling import Sampler

__all__ = ["Batch"]


class Batch:
    """B requests over one cache of W columns. A call that fails leaves requests and cache as they were.

    Attributes:
        requests: one per row.
    """

    def __init__(self, requests: Sequence[Request], cache: DynamicCache, mask: Tensor) -> None:
        self.requests = list(requests)
        self._cache = cache
        self._mask = mask

    @classmethod
    def prefill(cls, requests: Sequence[Request], forward: Forward, sampler: Sampler) -> Self:
        """Run the prompts of new requests, and give each its first token."""
        lengths = [len(request.prompt) for request in requests]
        width = max(lengths)
        token_ids = torch.zeros((len(requests), width), dtype=torch.int64)
        mask = torch.zeros_like(token_ids)
        for i, request in enumerate(requests):
            token_ids[i, width - lengths[i] :] = torch.from_numpy(request.prompt)
            mask[i, width - lengths[i] :] = 1
        token_ids, mask = token_ids.to(forward.device), mask.to(forward.device)
        # Without a configuration the cache keeps every column, those behind a sliding window too: caches of all layers
        # have one width then and can be joined, and the mask does the sliding.
        cache = DynamicCache()
        logits, rows = forward(token_ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), cache)
        tokens, logprobs = sampler(requests, logits)
        for i, request in enumerate(requests):
            request.take(tokens[i], logprobs[i], rows[i, width - lengths[i] :].copy())
        return cls(requests, cache, mask)

    def decode(self, forward: Forward, sampler: Sampler) -> None:
        """Run the newest token of each request, and give each the next one."""
        width = self._mask.shape[1]
        mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        token_ids = torch.tensor([[request.tokens[-1]] for request in self.requests], device=mask.device)
        positions = torch.tensor([[request.length - 1] for request in self.requests], device=mask.device)
        try:
            logits, rows = forward(token_ids, mask, positions, self._cache)
            tokens, logprobs = sampler(self.requests, logits)
        except BaseException:
            _replace(self._cache, lambda states: states[..., :width, :])
            raise
        self._mask = mask
        for i, request in enumerate(self.requests):
            request.take(tokens[i], logprobs[i], rows[i].copy())

    def drop_finished(self) -> None:
        """Let go of the rows of finished requests, and of the columns that are padding in all others."""
        kept = [i for i, request in enumerate(self.requests) if request.finish_reason == ""]
        if len(kept) == len(self.requests):
            return
        self.requests = [self.requests[i] for i in kept]
        rows = torch.tensor(kept, dtype=torch.int64, device=self._mask.device)
        mask = self._mask[rows]
        padding = int(mask.argmax(-1).min()) if kept else mask.shape[1]
        self._mask = mask[:, padding:]
        _replace(self._cache, lambda states: states[..., padding:, :][rows.to(states.device)])

    def join(self, other: "Batch") -> None:
        """Take over the requests and the cache of another batch."""
        own, its = self._mask.shape[1], other._mask.shape[1]
        width = max(own, its)
        for (layer, *ours), (_, *theirs) in zip(_states(self._cache), _states(other._cache), strict=True):
            layer.keys, layer.values = (
                torch.cat([_widen(mine, width), _widen(new, width)]) for mine, new in zip(ours, theirs, strict=True)
            )
        masks = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, other._mask)]
        self._mask = torch.cat(masks)
        self.requests += other.requests


def _replace(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> None:
    """Change keys and values of every layer."""
    for layer, keys, values in _states(cache):
        layer.keys, layer.values = change(keys), change(values)


def _states(cache: DynamicCache) -> Iterator[tuple[DynamicLayer, Tensor, Tensor]]:
    """Layers with their keys and values `[B, heads, W, D]`."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            yield layer, layer.keys, layer.values


def _widen(states: Tensor, width: int) -> Tensor:
    """Keys or values `[B, heads, W, D]` padded on the left to `width` columns."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
