"""Running an engine to the end, and putting its deltas together."""

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Generated", "drain", "generate"]


@dataclass
class Generated:
    """All outputs of one request.

    Attributes:
        tokens, logprobs: of the output, in order.
        routing: of the last output.
        finish_reason: of the last output, "" while there is none.
        outputs: as they came.
    """

    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    routing: np.ndarray | None = None
    finish_reason: str = ""
    outputs: list = field(default_factory=list)

    def add(self, output):
        """Check what holds for every output, and append it."""
        assert self.finish_reason == "", "an output after the last one"
        assert output.token_ids.dtype == np.int32
        assert output.logprobs.dtype == np.float32
        assert len(output.token_ids) == len(output.logprobs)
        assert output.finished == (output.finish_reason != "")
        assert output.finished or output.routed_experts is None
        self.tokens += output.token_ids.tolist()
        self.logprobs += output.logprobs.tolist()
        self.routing = output.routed_experts
        self.finish_reason = output.finish_reason
        self.outputs.append(output)


def drain(engine, arrivals=None, *, steps=1000):
    """Step until nothing is unfinished; `arrivals` are requests by the step before which they come.

    Returns:
        `Generated` by request id.
    """
    arrivals = dict(arrivals or {})
    generated = {}
    for step in range(steps):
        for request in arrivals.pop(step, ()):
            engine.add_request(*request)
        if not arrivals and not engine.has_unfinished_requests:
            return generated
        for output in engine.step():
            generated.setdefault(output.request_id, Generated()).add(output)
    raise AssertionError(f"still running after {steps} steps")


def generate(engine, token_ids, params, request_id="only"):
    """One request alone, to its end."""
    return drain(engine, {0: [(request_id, token_ids, params)]})[request_id]
