"""Drawing the next token of each request from its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trajstore import SchemaError
from trajstore_transformers.request import Request

__all__ = ["Sampler", "sample"]


class Sampler:
    """Draws for requests from one stream of random numbers: the same seed and the same calls give the same tokens."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, requests: Sequence[Request], logits: Tensor) -> tuple[list[int], list[float]]:
        """The next token of each request, and its logprob.

        Args:
            logits: `[B, V]`, one row per request.

        Raises:
            SchemaError: logits without a finite maximum.
        """
        bad = (~logits.amax(-1).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise SchemaError(
                f"the model's logits are not finite for request {requests[bad[0]].id!r}; look at its weights, "
                "and abort what is in flight before loading others"
            )
        temperature = torch.tensor([request.params.temperature for request in requests], dtype=torch.float64)
        tokens, logprobs = sample(logits, temperature.to(logits.device), self._generator)
        return tokens.tolist(), logprobs.tolist()


def sample(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token per row, and its logprob under the distribution that it was drawn from.

    Args:
        logits: floating `[B, V]`; half precisions are widened to float32.
        temperature: float64 `[B]`. Where it is 0, the likeliest token is taken and its logprob is that at 1.
        generator: on the device of `logits`. Greedy rows take nothing from it.

    Returns:
        int64 `[B]` and the natural log of its probability `[B]`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    drawn = temperature > 0
    # With the maximum at 0 and the divisor above it, no temperature makes an inf - inf.
    divisor = torch.where(drawn, temperature, 1.0).to(logits.dtype).clamp_min(torch.finfo(logits.dtype).tiny)
    logprobs = torch.log_softmax((logits - logits.amax(-1, keepdim=True)) / divisor[:, None], -1)
    tokens = logprobs.argmax(-1)
    if drawn.any():
        tokens[drawn] = torch.multinomial(logprobs[drawn].exp(), 1, generator=generator)[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
