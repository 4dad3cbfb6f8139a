"""Fold throughput against numpy copying the output's bytes, with more and more superseded segments.

The fold is plan and apply over headers and payloads that are in memory: fetching is the log's part. A superseded
segment costs its headers, some microseconds, and none of its payload bytes.

    python -m benchmarks.fold
"""

from collections.abc import Sequence

import numpy as np

import trajstore
from benchmarks.measure import compare
from trajstore.entries import Buffer, Event
from trajstore.events import (
    EventId,
    Header,
    PayloadInfo,
    Routing,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryOpened,
)
from trajstore.fold import plan

SPEC = trajstore.RoutingSpec(layer_ids=tuple(range(48)), top_k=8, num_experts=128, num_hidden_layers=48)
LENGTHS = (16384, 131072)
SUPERSEDED = (0, 4, 16, 64)
COLUMNS = (
    "token_ids",
    "logprobs",
    "loss_mask",
    "segment_ids",
    "weight_version_ids",
    "routed_experts",
    "routing_mask",
    "routing_source",
)
STEP = 64
"""Tokens that each resumed segment adds."""


def history(length: int, superseded: int) -> tuple[list[Event], dict[str, bytes]]:
    """A rollout of `length` tokens, aborted and re-prefilled `superseded` times, each time with rows from 0 on."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 128, (length, SPEC.num_layers, SPEC.top_k), np.uint8).tobytes()
    events: list[Event] = []
    payloads: dict[str, bytes] = {}

    def take(epoch: int, headers: Sequence[tuple[Header, bytes]]) -> None:
        for seq, (header, data) in enumerate(headers):
            event = Event(at=EventId(epoch, seq), header=header, nonce=epoch, time=0.0)
            events.append(event)
            payloads[event.id] = data

    take(1, [(TrajectoryOpened(routing=SPEC), b"")])
    held = 0
    for segment in range(superseded + 1):
        end = length - (superseded - segment) * STEP
        ids = np.zeros(end - held, np.int32).tobytes()
        tokens = ids + np.zeros(end - held, np.float32).tobytes()
        routed = rows[: end * SPEC.row_bytes]
        info = [PayloadInfo(nbytes=len(data), crc=0) for data in (tokens, routed)]
        take(
            segment + 2,
            [
                (SegmentOpened(base=held, context=0), b""),
                (Tokens(start=held, count=end - held, payload=info[0], logprobs=True), tokens),
                (Routing(start=0, rows=end, payload=info[1]), routed),
                (SegmentClosed(finish_reason="abort"), b""),
            ],
        )
        held = end
    return events, payloads


def report(length: int, superseded: int) -> None:
    """Measure one size and print a line."""
    events, payloads = history(length, superseded)

    def fetch(wanted: Sequence[Event]) -> list[Buffer]:
        return [payloads[event.id] for event in wanted]

    def fold() -> trajstore.Trajectory:
        return plan(events).apply(fetch)

    folded = fold()
    columns = [getattr(folded, name) for name in COLUMNS]
    found = compare(fold, lambda: [column.copy() for column in columns], repeats=15)
    rate = sum(column.nbytes for column in columns) / 1e6
    print(
        f"fold of {length} tokens, {superseded} superseded segments: {rate / found.ours:.0f} MB/s, "
        f"numpy copy {rate / found.baseline:.0f} MB/s, ratio {found.ratio:.2f}"
    )


def main() -> None:
    """Print a line per length and number of superseded segments."""
    for length in LENGTHS:
        for superseded in SUPERSEDED:
            report(length, superseded)


if __name__ == "__main__":
    main()
