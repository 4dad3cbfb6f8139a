"""A request in flight: what its outputs have brought so far, and under which weights. Nothing here writes or waits."""

from collections.abc import Sized
from typing import Any, NamedTuple

from trajstore import SchemaError, SegmentWriter
from trajstore.events import WeightVersionSpan
from trajstore_vllm.outputs import choice_of, token_ids_of

__all__ = ["Flight", "Seen"]


class Seen(NamedTuple):
    """An output, and the number of its tokens when it came: vLLM goes on appending to the lists in it."""

    output: Any
    tokens: int


class Flight:
    """A request that has not ended.

    Attributes:
        request_id: as the engine knows it.
        segment: once it is open.
        aborting: somebody wants it to end.
        sent: the engine has been asked.
        ended: its last output has come.
        delivered: output tokens that have come.
        last: the newest output.
        before: the one before it.
        versions: labels of the weights, by the output token from which on they sample.
    """

    def __init__(self, request_id: str, weight_version: str) -> None:
        self.request_id = request_id
        self.segment: SegmentWriter | None = None
        self.aborting = False
        self.sent = False
        self.ended = False
        self.delivered = 0
        self.last: Any = None
        self.before: Seen | None = None
        self.versions = [(0, weight_version)]
        self._token_ids: Sized = ()

    def see(self, output: Any) -> bool:
        """Count what a cumulative output brings.

        Returns:
            False where that cannot be counted: whoever reads the output learns why.
        """
        finished = bool(getattr(output, "finished", False))
        try:
            choice = choice_of(output, 0)
            if choice is None and not finished:
                return True  # it brings nothing
            token_ids = self._token_ids if choice is None else token_ids_of(choice)
        except SchemaError:
            token_ids = None
        if self.last is not None:
            self.before = Seen(self.last, self.delivered)
        self.last = output
        if token_ids is None:
            return False
        self._token_ids, self.delivered = token_ids, len(token_ids)
        self.ended = finished or getattr(choice, "finish_reason", None) is not None
        return True

    def switch(self, weight_version: str) -> None:
        """Other weights sample from here on.

        What the engine has appended to the list of tokens since its newest output was read still is the old ones'.
        """
        if self.sent:
            self.versions.append((len(self._token_ids), weight_version))
        else:
            self.versions = [(0, weight_version)]

    def spans(self, total: int) -> tuple[WeightVersionSpan, ...]:
        """Weight versions of `total` output tokens; none where they never changed."""
        if len(self.versions) == 1:
            return ()
        starts = [min(start, total) for start, _ in self.versions]
        return tuple(
            WeightVersionSpan(name, start, end)
            for (_, name), start, end in zip(self.versions, starts, [*starts[1:], total], strict=True)
            if start < end
        )
