"""Our way to keep rollouts: packs written by the pack writer alone, without a hot log, and read as any archive.

What the writer gets is made as a store makes it, and as the archiver would have read it from the hot log.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ulid import ULID

import trajstore
from benchmarks.corpora import Rollout
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.repeats import known_rows
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.archive.writer import PackWriter, StagedEntry
from trajstore.entries import Buffer, Entry, decode_entry, encode_entry
from trajstore.events import (
    SCHEMA_VERSION,
    EventId,
    Header,
    PayloadInfo,
    Rewarded,
    Routing,
    SegmentClosed,
    SegmentOpened,
    Tokens,
    TrajectoryClosed,
    TrajectoryOpened,
)
from trajstore.summary import Summary, summarize

__all__ = ["Packs", "Part", "stage", "whole"]


class Part(NamedTuple):
    """What goes into one pack of a trajectory: its next entries, and its summary as of the last of them."""

    id: str
    entries: list[StagedEntry]
    summary: Summary | None


def stage(
    rollout: Rollout,
    spec: trajstore.RoutingSpec,
    *,
    segments: int = 1,
    again: npt.NDArray[np.uint8] | None = None,
) -> list[Part]:
    """A rollout as the hot log holds it, in a part for each segment.

    Args:
        segments: it was aborted and resumed so often, after equal numbers of tokens; each time the rows of all tokens
            so far were recorded anew.
        again: what all segments but the first record, uint8 `[T, L, K]`; default the rollout's routing, unchanged.
    """
    id, length = str(ULID()), len(rollout.tokens)
    ends = [length * number // segments for number in range(1, segments + 1)]
    epochs: list[list[tuple[list[Header], list[Buffer]]]] = []
    base = 0
    for number, end in enumerate(ends):
        rows = rollout.routed if again is None or not number else again
        entry = _segment(rollout, rows[:end], base, end, "stop" if end == length else "abort", f"v{number + 1}")
        epochs.append([entry])
        base = end
    epochs[0].insert(0, ([TrajectoryOpened(routing=spec)], [b""]))
    epochs[-1] += [([Rewarded(reward=1.0)], [b""]), ([TrajectoryClosed(status="completed")], [b""])]
    parts: list[Part] = []
    events: list[Any] = []
    epoch = 0
    for entries in epochs:
        staged: list[StagedEntry] = []
        for headers, payloads in entries:
            epoch += 1
            at = EventId(epoch, 0)
            data = encode_entry(Entry(SCHEMA_VERSION, zlib.crc32(id.encode()) + epoch, 1.7e9 + epoch, headers))
            staged.append(StagedEntry.from_hot(at, data, payloads))
            events += decode_entry(at, data)
        parts.append(Part(id, staged, summarize(id, events)))
    return parts


def whole(parts: Sequence[Part]) -> Part:
    """Parts of one trajectory that go into one pack."""
    return Part(parts[0].id, [entry for part in parts for entry in part.entries], parts[-1].summary)


class Packs:
    """An archive of one partition, used as a `benchmarks.rivals.Rival`."""

    def __init__(self, folder: Path, spec: trajstore.RoutingSpec) -> None:
        self.folder = folder
        self.spec = spec
        self.ids: list[str] = []
        self._root = ArchiveRoot.at(folder)
        self._info = ArchiveInfo(format=ARCHIVE_FORMAT, run="benchmark", incarnation=str(ULID()), partitions=1)
        self._root.claim(self._info)
        self._writing = ArchiveReader(self._root, self._info)
        self.archive = trajstore.open_archive(folder)

    def write(self, rollouts: Sequence[Rollout]) -> None:
        """Store a batch as one pack."""
        self.publish([whole(stage(rollout, self.spec)) for rollout in rollouts])

    def publish(self, parts: Sequence[Part], *, resumed: bool = False) -> None:
        """Write one pack.

        Args:
            resumed: earlier parts of the trajectories are archived, and may hold the same rows.
        """
        manifest = self._writing.manifest(0)
        newest = manifest.refresh()
        writer = PackWriter(self._root, self._info, 0, self.spec)
        for part in parts:
            known = None
            if resumed:
                old = self._writing.read_parts(part.id, manifest.find(part.id))
                known = known_rows(self._writing, part.id, old, part.entries, self.spec.row_bytes)
            else:
                self.ids.append(part.id)
            writer.add(part.id, part.entries, summary=part.summary, known=known)
        writer.publish(manifest, newest + 1, writer="benchmark", on_step=lambda _: None)

    def read(self, number: int) -> Rollout:
        """One rollout, folded."""
        loaded = self.archive.load(self.ids[number])
        assert loaded.routed_experts is not None
        return Rollout(loaded.token_ids, loaded.logprobs, _bytes(loaded.routed_experts))

    def routed(self, number: int) -> npt.NDArray[np.uint8]:
        """Its routing alone."""
        return _bytes(self.archive.load_routing(self.ids[number]).routed_experts)

    def some_layers(self, number: int, layers: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Some layers of its routing, which is what a stage of a training pipeline needs."""
        return _bytes(self.archive.load_routing(self.ids[number], layers=layers).routed_experts)

    def scan(self) -> Iterator[Rollout]:
        """All rollouts in order."""
        return map(self.read, range(len(self.ids)))


def _segment(
    rollout: Rollout, routed: npt.NDArray[np.uint8], base: int, end: int, reason: Any, weight_version: str
) -> tuple[list[Header], list[Buffer]]:
    """The entry of a segment that took the tokens up to `base`, brought those up to `end` and recorded all rows."""
    begin = max(base, rollout.prompt)
    context = rollout.tokens[base:begin].tobytes()
    sampled = rollout.tokens[begin:end].tobytes() + rollout.logprobs[begin:end].tobytes()
    rows = routed.tobytes()
    headers: list[Header] = [
        SegmentOpened(
            base=base,
            context=begin - base,
            engine="benchmark/1",
            weight_version=weight_version,
            payload=PayloadInfo.of(context) if context else None,
        ),
        Tokens(start=begin, count=end - begin, payload=PayloadInfo.of(sampled), logprobs=True),
        Routing(start=0, rows=end, payload=PayloadInfo.of(rows)),
        SegmentClosed(finish_reason=reason),
    ]
    return headers, [context, sampled, rows, b""]


def _bytes(rows: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.uint8]:
    assert rows.dtype == np.uint8
    return rows.view(np.uint8)
