"""Where a prompt stands in a trajectory: a new turn, one to go on with, or one that was generated before. Pure.

verl's agent loops send the whole sequence each time and know nothing of what a dead process generated, so the log says
what a prompt means.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajstore import Conflict
from trajstore.history import History

__all__ = ["Turn", "find_turn"]


class Turn(NamedTuple):
    """The output that follows a prompt.

    Attributes:
        base: tokens of the trajectory that the next engine call's input begins with.
        context: int32, tokens that it adds.
        start: position of the turn's first output token: the prompt's length.
        stop: position after the output that the trajectory has of it.
        finish_reason: how it ended, stop or length; "" where the engine is to go on.
    """

    base: int
    context: npt.NDArray[np.int32]
    start: int
    stop: int
    finish_reason: str


def find_turn(history: History, token_ids: npt.NDArray[np.int32], prompt: npt.NDArray[np.int32]) -> Turn:
    """What a prompt asks for, given what was recorded.

    A prompt that goes on from the trajectory opens its next turn. One that the trajectory goes on from asks for the
    turn that follows it there: the rest of it, or all of it again. One that differs from some token on rewinds.

    Args:
        token_ids: of the trajectory, int32 `[T]`.
        prompt: int32 `[P]`.

    Raises:
        Conflict: it differs within the trajectory's first prompt, so it belongs to another rollout.
    """
    known = len(token_ids)
    shared = min(known, len(prompt))
    differing = np.flatnonzero(token_ids[:shared] != prompt[:shared])
    same = int(differing[0]) if len(differing) else shared
    first = history.segments[0].context if history.segments else 0
    if same < min(first, known):
        raise Conflict(
            f"the prompt ({len(prompt)} tokens) differs from position {same} on from the {first} tokens that this "
            "trajectory began with: it is another rollout, which needs an id of its own"
        )
    stop = _sampled_until(history, len(prompt)) if same == len(prompt) else len(prompt)
    if stop == len(prompt):  # nothing of this turn is there
        return Turn(same, prompt[same:], len(prompt), len(prompt), "")
    ended = _finish_reason(history, stop)
    if stop < known:  # a later turn follows
        return Turn(stop, prompt[:0], len(prompt), stop, ended if ended in ("stop", "length") else "stop")
    return Turn(stop, prompt[:0], len(prompt), stop, ended if ended in ("stop", "length") else "")


def _sampled_until(history: History, position: int) -> int:
    """The end of the sampled tokens from `position` on; `position` where none was sampled there."""
    for span in history.spans:
        if span.start <= position < span.stop and span.sampled:
            position = span.stop
    return position


def _finish_reason(history: History, stop: int) -> str:
    """How the segment ended that brought the token before `stop`."""
    segment = next(span.segment for span in history.spans if span.start < stop <= span.stop)
    return history.segments[segment].finish_reason
