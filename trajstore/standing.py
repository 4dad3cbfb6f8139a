"""Why a trajectory stands as it does, in words: aborted, lost, failed, superseded, or waiting for somebody. Pure."""

from collections.abc import Iterator

from trajstore.history import History
from trajstore.summary import Summary

__all__ = ["details", "standing", "supersessions"]

_ENDED = {
    "stop": "ended",
    "length": "ran into its length limit",
    "abort": "was aborted",
    "error": "failed",
    "lost": "was lost: its writer vanished, and another one took over before it closed",
}

_CLOSED = {
    "completed": "closed as completed",
    "truncated": "closed as truncated",
    "failed": "closed as failed, for good",
    "aborted": "closed as aborted: it may be resumed",
}


def standing(summary: Summary) -> str:
    """One sentence from a summary alone."""
    if summary.status == "deleted":
        return "deleted"
    if not summary.segments:
        what = "no segment was begun"
    elif summary.has_open_segment:
        return f"segment {summary.segments - 1} is open: its writer is at work, or gone"
    else:
        what = f"segment {summary.segments - 1} {_ENDED.get(summary.finish_reason, summary.finish_reason)}"
    if summary.status == "aborted" and summary.finish_reason == "stop":
        return f"{what}; closed as aborted"  # there is nothing to resume: it ended by itself
    if summary.status != "open":
        return f"{what}; {_CLOSED[summary.status]}"
    if summary.finish_reason in ("abort", "error", "lost"):
        return f"{what}; nobody has resumed it"
    return f"{what}; nobody has gone on with it or closed it"


def details(history: History) -> Iterator[str]:
    """What the events tell beyond the summary: what was superseded, and why there is no routing."""
    yield from supersessions(history)
    for segment in history.segments:
        for reason in segment.absent:
            yield f"segment {segment.index} has no routing: {reason}"


def supersessions(history: History) -> Iterator[str]:
    """Lost segments that were gone on from, and rewound tokens."""
    for segment in history.segments[:-1]:
        if segment.finish_reason == "lost":
            yield f"segment {segment.index} was lost, and gone on from"
    for segment in history.segments:
        if segment.kept < segment.end:
            later = next(one for one in history.segments[segment.index + 1 :] if one.base <= segment.kept)
            yield (
                f"{segment.end - segment.kept} tokens of segment {segment.index} were superseded: segment "
                f"{later.index} began at {later.base}"
            )
