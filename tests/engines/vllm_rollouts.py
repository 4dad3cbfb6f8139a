"""Rollouts through `AsyncLLMRecorder` over the stand-in engine, one step at a time."""

import asyncio
import threading

from tests.engines.vllm_engine import Params, soon

__all__ = ["PROMPT", "Held", "aborted", "begin", "complete", "repeat_an_expert", "run"]

PROMPT = [11, 12, 13, 14, 15]


def run(coroutine):
    """One test on a loop of its own."""

    async def main():
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(main())


async def begin(engine, recorder, trajectory, context=(), params=None, **options):
    """A call of `generate` whose request is in the engine."""
    before = len(engine.asked)
    task = asyncio.create_task(recorder.generate(trajectory, context, params or Params(), **options))
    await soon(lambda: len(engine.asked) > before or task.done(), "the request was sent")
    return task


async def complete(engine, recorder, trajectory, context=(), params=None, **options):
    """A request that runs to its end."""
    task = await begin(engine, recorder, trajectory, context, params, **options)
    await engine.run()
    return await task


async def aborted(engine, recorder, trajectory, tokens, context=(), params=None, **options):
    """A request that is aborted after some tokens."""
    task = await begin(engine, recorder, trajectory, context, params or Params(max_tokens=100), **options)
    await engine.step(tokens)
    await recorder.abort()
    return await task


def repeat_an_expert(output):
    if output.finished:
        output.outputs[0].routed_experts[2] = 5


class Held(Params):
    """Parameters at which the opening of a segment waits, in its thread."""

    opening, may_open = threading.Event(), threading.Event()

    def clone(self):
        self.opening.set()
        assert self.may_open.wait(30)
        return super().clone()
