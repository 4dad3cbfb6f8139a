"""The page of `trajstore show`: what is said about a folded trajectory, as text. Pure; `read.py` prints it."""

import string
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.history import Recording, Segment
from trajstore.trajectory import Trajectory

__all__ = [
    "SEGMENT_COLUMNS",
    "Strip",
    "header_fields",
    "letter_strips",
    "positions",
    "runs",
    "segment_row",
    "segment_runs",
    "strips",
    "token_runs",
]

SEGMENT_COLUMNS = (
    "segment",
    "epoch",
    "base",
    "context",
    "output",
    "engine",
    "weights",
    "finish",
    "recordings",
    "absent",
)

_GLYPHS = string.digits + string.ascii_letters
_SHOWN_RUNS = 30
_STRIP_TOKENS = 2000
"""Longer trajectories are told by their runs only."""


class Strip(NamedTuple):
    """Some positions of a trajectory, one letter per token.

    Attributes:
        start: first position.
        brought: index of the segment that brought each token, upper line.
        routed: index of the segment whose recording gave each row, `·` for none.
    """

    start: int
    brought: str
    routed: str


def header_fields(trajectory: Trajectory) -> list[tuple[str, str]]:
    """Name and value of what stands in the header."""
    tokens, sampled = len(trajectory), int(np.count_nonzero(trajectory.loss_mask))
    fields = [
        ("status", trajectory.status + (f" ({trajectory.finish_reason})" if trajectory.finish_reason else "")),
        ("group", _group(trajectory)),
        ("tokens", f"{tokens}: {tokens - sampled} context, {sampled} sampled"),
        ("reward", _reward(trajectory)),
        ("routing", _coverage(trajectory)),
        ("fold", f"{trajectory.policy}, at event {trajectory.at}"),
    ]
    if trajectory.nonfinite_logprobs:
        fields.append(("logprobs", f"{trajectory.nonfinite_logprobs} of sampled tokens are NaN or infinite"))
    if trajectory.metadata:
        fields.append(("metadata", msgspec.json.encode(trajectory.metadata).decode()))
    return fields


def segment_row(segment: Segment) -> tuple[str, ...]:
    """A segment's cells under `SEGMENT_COLUMNS`."""
    finish = segment.finish_reason or "open"
    if segment.kept < segment.end:
        finish += f", rewound from {segment.kept}"
    return (
        str(segment.index),
        str(segment.epoch),
        str(segment.base),
        str(segment.context),
        str(segment.output),
        segment.engine,
        _segment_weights(segment),
        finish,
        "; ".join(map(_recording, segment.recordings)) or "none",
        "; ".join(segment.absent),
    )


def token_runs(trajectory: Trajectory) -> list[tuple[str, str]]:
    """Runs of positions: who brought the tokens, which weights sampled them, who won the rows, under which weights."""
    source, segments = trajectory.routing_source, trajectory.segments
    by_weights: dict[str, int] = {}
    index = np.array([by_weights.setdefault(one.weight_version, len(by_weights)) for one in segments] + [-1], np.int32)
    versions, routed_by = trajectory.weight_versions, list(by_weights)
    tokens_of, rows_of = segment_runs(trajectory.segment_ids, source)
    lines = [
        tokens_of,
        ("sampled by", _runs_text(trajectory.weight_version_ids, lambda i: versions[i] or "unnamed weights", none="")),
    ]
    if trajectory.routing is not None:
        lines += [
            rows_of,
            ("rows under", _runs_text(index[source], lambda i: routed_by[i] or "unnamed weights", none="missing")),
        ]
    return lines


def segment_runs(
    segment_ids: npt.NDArray[np.int16], routing_source: npt.NDArray[np.int16]
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Of `token_runs`, who brought the tokens and who won the rows, from the two arrays `[T]` alone."""
    return (
        ("tokens of", _runs_text(segment_ids, lambda i: f"segment {i}")),
        ("rows of", _runs_text(routing_source, lambda i: f"segment {i}", none="missing")),
    )


def strips(trajectory: Trajectory, width: int) -> list[Strip]:
    """The trajectory letter by letter, `width` tokens to a strip; empty if it is too long for that."""
    return letter_strips(trajectory.segment_ids, trajectory.routing_source, width)


def letter_strips(segment_ids: npt.NDArray[np.int16], routing_source: npt.NDArray[np.int16], width: int) -> list[Strip]:
    """As `strips`, from the two arrays `[T]` alone."""
    if len(segment_ids) > _STRIP_TOKENS:
        return []
    brought, routed = _letters(segment_ids), _letters(routing_source)
    return [
        Strip(start, brought[start : start + width], routed[start : start + width])
        for start in range(0, len(segment_ids), width)
    ]


def runs(values: npt.NDArray[np.signedinteger]) -> list[tuple[int, int, int]]:
    """Runs of equal values as (start, stop, value)."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(start, stop, int(values[start])) for start, stop in pairwise(edges) if start < stop]


def _runs_text(values: npt.NDArray[np.signedinteger], name: Callable[[int], str], *, none: str = "") -> str:
    """`0-6 v1, 7-8 v2, 9 missing`; runs of -1 are called `none`, and left out if that is empty."""
    shown = [
        f"{positions(start, stop)} {name(value) if value >= 0 else none}"
        for start, stop, value in runs(values)
        if value >= 0 or none
    ]
    more = len(shown) - _SHOWN_RUNS
    return (", ".join(shown[:_SHOWN_RUNS]) or "none") + (f", and {more} more runs" if more > 0 else "")


def positions(start: int, stop: int) -> str:
    """`[start, stop)` as people write it: `5-7`, `5`."""
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}" if stop > start else f"none at {start}"


def _letters(indices: npt.NDArray[np.int16]) -> str:
    letters = {i: _GLYPHS[i] if i < len(_GLYPHS) else "+" for i in np.unique(indices).tolist() if i >= 0}
    return "".join(letters.get(i, "·") for i in indices.tolist())


def _group(trajectory: Trajectory) -> str:
    if trajectory.group is None:
        return "none"
    return trajectory.group + (f" (of {trajectory.group_size})" if trajectory.group_size else "")


def _reward(trajectory: Trajectory) -> str:
    if trajectory.reward is None:
        return "none"
    parts = ", ".join(f"{name} {value:g}" for name, value in trajectory.reward_components.items())
    return f"{trajectory.reward:g}" + (f" ({parts})" if parts else "")


def _coverage(trajectory: Trajectory) -> str:
    spec = trajectory.routing
    if spec is None:
        return "not recorded"
    known, tokens = int(np.count_nonzero(trajectory.routing_mask)), len(trajectory)
    share = f" ({known / tokens:.1%})" if tokens else ""
    return f"{known} of {tokens} rows{share}; {spec.num_layers} layers, top {spec.top_k} of {spec.num_experts} experts"


def _segment_weights(segment: Segment) -> str:
    """The version that it opened with, and the spans of its output where the engine told them."""
    spans = ", ".join(f"{positions(span.start, span.end)} {span.version}" for span in segment.weight_versions)
    return f"{segment.weight_version} (output {spans})" if spans else segment.weight_version


def _recording(recording: Recording) -> str:
    late = f", {recording.source}" if recording.source else ""
    return f"{positions(recording.start, recording.stop)} {recording.origin}{late}"
