"""What goes into the engine and comes out of it, and what it knows of a request in between. No model here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trajstore import SchemaError
from trajstore.ingest import check_count, check_finite
from trajstore.routing import RoutingArray

__all__ = ["FinishReason", "Request", "RequestOutput", "SamplingParams", "TokenIds"]

FinishReason: TypeAlias = Literal["", "stop", "length", "abort"]
TokenIds: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one request.

    Attributes:
        max_tokens: output tokens at most, at least 1.
        temperature: the logits are divided by it. 0 takes the likeliest token and reports its logprob at temperature 1.
        stop_token_ids: any of these ends the output, and is part of it.

    Raises:
        SchemaError: a number out of its range.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if check_count(self.max_tokens, name="max_tokens") < 1:
            raise SchemaError("max_tokens is 0; a request must be allowed at least one token")
        if check_finite(self.temperature, name="temperature") < 0:
            raise SchemaError(f"temperature is {self.temperature}; use 0 for greedy or a positive number")
        stops = tuple(check_count(token, name="a stop token id") for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stops)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestOutput:
    """News of one request: the tokens since its previous output. Every array owns its memory.

    P prompt tokens, O output tokens, H hidden layers (dense ones too), K experts per token.

    Attributes:
        request_id: as given.
        token_ids: int32 `[n]`, sampled since the previous output.
        logprobs: float32 `[n]`, natural log of the probability under the distribution that was sampled from, after the
            temperature (temperature 0: the model's own distribution).
        finished: this is the request's last output.
        finish_reason: stop, length or abort; "" while not finished.
        num_prompt_tokens: P.
        routed_experts: uint8 or uint16 `[P + O - 1, H, K]` on the last output: row i is the routing used when the token
            at position i was the input; ids by falling weight, all 0 in dense layers. None on other outputs, and where
            the request was aborted before its first forward.
    """

    request_id: str
    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    finished: bool
    finish_reason: FinishReason
    num_prompt_tokens: int
    routed_experts: RoutingArray | None = None


class Request:
    """A request that has not delivered its last output.

    Attributes:
        id: as given.
        prompt: int32 `[P]`.
        params: as given.
        limit: output tokens at most, by `params` and by the model's context length.
        tokens: sampled so far.
        finish_reason: "" while it is not finished.
    """

    def __init__(self, id: str, prompt: TokenIds, params: SamplingParams, limit: int) -> None:
        self.id = id
        self.prompt = prompt
        self.params = params
        self.limit = limit
        self.tokens: list[int] = []
        self.finish_reason: FinishReason = ""
        self._logprobs: list[float] = []
        self._rows: list[RoutingArray] = []
        self._reported = 0

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def has_news(self) -> bool:
        """There are tokens or an end that no output has told."""
        return self.finish_reason != "" or self._reported < len(self.tokens)

    def take(self, token: int, logprob: float, rows: RoutingArray) -> None:
        """What one forward brought.

        Args:
            rows: `[n, H, K]` of the n tokens that were its input, owned from now on.
        """
        self.tokens.append(token)
        self._logprobs.append(logprob)
        self._rows.append(rows)
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"

    def report(self) -> RequestOutput:
        """The next output: everything since the previous one."""
        since, self._reported = self._reported, len(self.tokens)
        finished = self.finish_reason != ""
        return RequestOutput(
            request_id=self.id,
            token_ids=np.array(self.tokens[since:], np.int32),
            logprobs=np.array(self._logprobs[since:], np.float32),
            finished=finished,
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.prompt),
            routed_experts=np.concatenate(self._rows) if finished and self._rows else None,
        )
