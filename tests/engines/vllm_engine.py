"""Stand-ins for vLLM's `AsyncLLM` and `LLM` that a test drives step by step, with their manners and no model.

They hand out what the real ones do: one growing list of tokens in all outputs of a request, news that replace older
ones that nobody took yet, an abort that brings a last output. Their routing says of which weights and position it is.
"""

import asyncio
import copy
from types import SimpleNamespace

import numpy as np

from tests.builders import SPEC
from tests.engines.vllm_fixtures import Kind

__all__ = ["FakeAsyncLLM", "FakeLLM", "Params", "routed", "soon"]


class Params:
    """As `vllm.SamplingParams`, with what matters here."""

    def __init__(self, max_tokens=4, **changed):
        self.n = 1
        self.max_tokens = max_tokens
        self.temperature = 1.0
        self.stop_token_ids = []
        self.logprobs = None
        self.output_kind = Kind.DELTA
        self.routed_experts_prompt_start = 0
        for name, value in changed.items():
            setattr(self, name, value)

    def clone(self):
        return copy.deepcopy(self)


def routed(start, stop, weights=0):
    """Rows `[start, stop)` that a model with these weights makes: `[stop - start, L, K]`."""
    at = np.arange(start, stop) + weights
    return np.stack([at % 8, (at + 3) % 8], axis=-1)[:, None, :].repeat(SPEC.num_layers, axis=1).astype(np.uint8)


async def soon(condition, what):
    """Let the loop run until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
    assert condition(), what


class Request:
    """One request in the engine."""

    def __init__(self, engine, prompt, params):
        self.engine = engine
        self.prompt = list(prompt["prompt_token_ids"])
        self.params = params
        self.tokens = []
        self.logprobs = []
        self.rows = []
        self.total = 0.0
        self.pending = None
        self.news = asyncio.Event()
        self.finished = False

    def step(self):
        """One token, and the rows of what was its input."""
        token = (len(self.prompt) + len(self.tokens)) % 500
        first = getattr(self.params, "routed_experts_prompt_start", 0) if not self.tokens else self.end - 1
        self.rows.append(routed(first, self.end, self.engine.weights))
        self.tokens.append(token)
        self.logprobs.append({token: SimpleNamespace(logprob=float(np.float32(-0.1 * len(self.tokens))))})
        self.total += self.logprobs[-1][token].logprob
        self.put("length" if len(self.tokens) >= self.params.max_tokens else None)

    @property
    def end(self):
        return len(self.prompt) + len(self.tokens)

    def put(self, finish_reason):
        self.finished = finish_reason is not None
        choice = SimpleNamespace(
            index=0,
            token_ids=self.tokens,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            cumulative_logprob=self.total,
            finish_reason=finish_reason,
            routed_experts=np.concatenate(self.rows) if self.finished and self.rows else None,
        )
        self.pending = SimpleNamespace(
            request_id="",
            prompt_token_ids=self.prompt,
            outputs=[choice],
            finished=self.finished,
            num_cached_tokens=0,
            metrics=None,
        )
        self.engine.spoil(self.pending)
        self.news.set()


class FakeAsyncLLM:
    """Attributes:
    requests: by id, while they are in the engine.
    asked: `(prompt, params)` of all requests, in order.
    aborted: ids of all `abort` calls.
    weights: a number, of the weights that it has.
    deaf: True makes it ignore aborts.
    spoil: changes an output before it is handed out.
    """

    def __init__(self):
        self.requests = {}
        self.asked = []
        self.aborted = []
        self.weights = 0
        self.deaf = False
        self.error = None
        self.spoil = lambda output: None

    async def generate(self, prompt, sampling_params, request_id):
        assert sampling_params.output_kind is Kind.CUMULATIVE
        request = self.requests[request_id] = Request(self, prompt, sampling_params)
        self.asked.append((request.prompt, sampling_params))
        try:
            while True:
                await request.news.wait()
                if self.error is not None:
                    raise self.error
                output, request.pending = request.pending, None
                request.news.clear()
                yield output
                if output.finished:
                    return
        finally:
            del self.requests[request_id]

    async def abort(self, request_id):
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.aborted += ids
        for id in ids:
            request = self.requests.get(id)
            if request is not None and not request.finished and not self.deaf:
                request.put("abort")

    def fail(self, error):
        """What the requests' generators raise from now on."""
        self.error = error
        for request in self.requests.values():
            request.news.set()

    async def step(self, count=1):
        """A token for each request that has not finished, and the loop's turns in which outputs are taken."""
        for _ in range(count):
            for request in list(self.requests.values()):
                if not request.finished:
                    request.step()
            for _ in range(3):
                await asyncio.sleep(0)

    async def run(self):
        """Steps until no request is left."""
        async with asyncio.timeout(20):
            while self.requests:
                await self.step()


class FakeLLM:
    """As `vllm.LLM`: whole batches, last outputs alone."""

    def __init__(self, weights=0):
        self.weights = weights
        self.asked = []
        self.spoil = lambda output: None

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert use_tqdm is False
        self.asked += zip(prompts, sampling_params, strict=True)
        done = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            request = Request(self, prompt, params)
            while not request.finished:
                request.step()
            done.append(request.pending)
        return done
