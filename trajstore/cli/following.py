"""What `trajstore tail` does: prints the run's feed as it grows."""

import threading
import time

import click
import msgspec

from trajstore.cli.documents import hint_document, hint_time
from trajstore.cli.terminal import STATUS_STYLES, local_time, print_text, say
from trajstore.errors import TrajstoreError
from trajstore.log.feed import FeedTail, Hint
from trajstore.store import Store
from trajstore.summary import Summary

__all__ = ["follow"]

_BLOCK = 0.5  # seconds within which a signal is noticed
_HAPPENED = {
    "SegmentClosed": "segment closed",
    "Rewarded": "rewarded",
    "TrajectoryClosed": "trajectory closed",
    "TrajectoryDeleted": "trajectory deleted",
    "RoutingObserved": "routing observed",
    "LateRouting": "late routing",
}


def follow(
    store: Store,
    stopped: threading.Event,
    *,
    count: int | None,
    seconds: float | None,
    from_start: bool,
    as_json: bool,
) -> None:
    """Print hints until `count` are printed, `seconds` are over, or `stopped` is set."""
    tail = FeedTail(store.wire, store.keys, from_start=from_start)
    deadline = None if seconds is None else time.monotonic() + seconds
    say(f"following {store.location}; Ctrl-C ends")
    lines = _JsonLines() if as_json else _Lines()
    lines.begin()
    try:
        left = count
        while not stopped.is_set() and left != 0:
            wait = _BLOCK if deadline is None else min(_BLOCK, deadline - time.monotonic())
            if wait <= 0:
                break
            for hint in tail.poll(count=100 if left is None else min(left, 100), block=wait)[:left]:
                lines.add(hint, _summary(store, hint))
                left = None if left is None else left - 1
    except TrajstoreError:
        lines.end()  # what was printed is a document still; the error goes to stderr
        raise
    lines.end()


class _Lines:
    """For people."""

    def begin(self) -> None: ...

    def add(self, hint: Hint, summary: Summary | None) -> None:
        happened = f"{_HAPPENED.get(hint.kind, hint.kind)} ({'note ' if hint.is_note else ''}{hint.event})"
        parts: list[str | tuple[str, str]] = [f"{local_time(hint_time(hint))}  {hint.id}  {happened:<26}  "]
        if summary is not None:
            parts.append((f"{summary.status:<9}", STATUS_STYLES.get(summary.status, "")))
            parts.append(f"  {summary.tokens} tokens  {summary.segments} segments")
        print_text(*parts)

    def end(self) -> None: ...


class _JsonLines:
    """One array, an element to a line. The comma leads, so that every element is complete when it is printed."""

    def __init__(self) -> None:
        self._comma = b""

    def begin(self) -> None:
        click.echo(b"[")

    def add(self, hint: Hint, summary: Summary | None) -> None:
        click.echo(self._comma + msgspec.json.encode(hint_document(hint, summary)))
        self._comma = b","

    def end(self) -> None:
        click.echo(b"]")


def _summary(store: Store, hint: Hint) -> Summary | None:
    """How the trajectory stands now: in the hot log, or, removed there, in the archive."""
    found = store.hot.summary(hint.id)
    if found is not None or store.archive is None:
        return found
    return store.archive.find(hint.id).summary
