"""What the suites ask of a vLLM on this CPU: sampling parameters, other weights, and what it has delivered so far."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from trajstore_vllm_demo.cpu import engine_arguments

__all__ = ["Watched", "engine_options", "load_weights", "sampling"]


def engine_options(model: Path) -> dict[str, Any]:
    """Arguments of every engine here: eight requests run together, more wait."""
    return engine_arguments(model, max_model_len=1024, max_num_seqs=8)


def sampling(max_tokens: int, **options: Any) -> Any:
    """Sampling parameters of a request that ends at `max_tokens`.

    No seed: one per request kills the CPU engine of 0.30 where it prefills in chunks.
    """
    from vllm import SamplingParams

    return SamplingParams(
        **({"max_tokens": max_tokens, "temperature": 1.0, "ignore_eos": True, "detokenize": False} | options)
    )


async def load_weights(engine: Any, folder: Path, *, reset: bool) -> None:
    """Other weights for an `AsyncLLM` in which nothing runs; `reset`: and none of what the old ones have cached."""
    await engine.collective_rpc("load_folder", args=(str(folder),))
    if reset:
        assert await engine.reset_prefix_cache()


class Watched:
    """An `AsyncLLM` of which one can wait until a request has delivered so many tokens."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._delivered: Counter[str] = Counter()
        self._news = asyncio.Condition()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        """As the engine's."""
        async for output in self._engine.generate(prompt, params, request_id):
            async with self._news:
                self._delivered[request_id] = len(output.outputs[0].token_ids)
                self._news.notify_all()
            yield output

    def delivered(self, request_id: str) -> int:
        """Tokens so far."""
        return self._delivered[request_id]

    async def wait(self, enough: Callable[["Counter[str]"], bool]) -> None:
        """Until what was delivered, by request id, is enough."""
        async with self._news:
            await self._news.wait_for(lambda: enough(self._delivered))
