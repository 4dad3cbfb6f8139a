"""Writing a pack: collect entries, lay out their payloads, publish the Zarr group with a manifest record."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from ulid import ULID

from trajstore.archive.arrays.builder import ShardBuilder, layer_chunks_for
from trajstore.archive.digests import Digests
from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import (
    PackedEntry,
    PackedTrajectory,
    Piece,
    encode_entries,
    encode_trajectory,
    payload_array,
)
from trajstore.archive.pieces import Known, SharedRows, joined, row_view
from trajstore.archive.record import RECORD_FORMAT, PackCounts, Record
from trajstore.archive.root import ArchiveInfo, ArchiveRoot
from trajstore.entries import Buffer, check_payload, decode_known, entry_digest
from trajstore.errors import Corrupt, Fenced
from trajstore.events import (
    SCHEMA_VERSION,
    EventId,
    Header,
    LateRouting,
    Routing,
    RoutingObserved,
    SegmentOpened,
    Tokens,
    payload_of,
)
from trajstore.routing import RoutingSpec
from trajstore.summary import Summary

__all__ = ["PACK_FORMAT", "PackWriter", "PublishStep", "StagedEntry"]

PACK_FORMAT = 2
"""Of the packs that this version writes."""

_SMALL_CHUNK_BYTES = 64 << 10
"""For all arrays but `routed`: of them a trajectory has little, and a read decodes whole chunks."""

_SMALL: dict[str, tuple[np.dtype[Any], str]] = {
    "tokens": (np.dtype("<i4"), "shuffle-quick"),
    "logprobs": (np.dtype("<f4"), "shuffle-lz4"),
    "events": (np.dtype("u1"), "zstd"),
    "trajectories": (np.dtype("u1"), "zstd"),
}
"""Their dtypes and codecs, see `benchmarks/codecs.py`."""

PublishStep: TypeAlias = str
"""Names the steps of a publish, as `on_step` hears them: staged, synced, moved, recorded."""


class StagedEntry(NamedTuple):
    """An entry to archive.

    Attributes:
        at, note: its id, and whether it is a note.
        nonce, digest, time: as the hot log held it.
        events: its headers, every one known.
        payloads: per event its bytes, b"" for none.
    """

    at: EventId
    note: bool
    nonce: int
    digest: str
    time: float
    events: Sequence[Header]
    payloads: Sequence[Buffer]

    @classmethod
    def from_hot(cls, at: EventId, data: bytes, payloads: Sequence[Buffer], *, note: bool = False) -> "StagedEntry":
        """From the bytes of a hot entry, every event of which is known."""
        entry = decode_known(data)
        return cls(at, note, entry.nonce, entry_digest(data), entry.time, entry.events, payloads)


class PackWriter:
    """Builds one pack of one partition. All its recordings share one routing shape and dtype.

    Args:
        root, info: of the archive.
        partition: whose trajectories these are.
        spec: gives L, K and the dtype of `routed`; None for a pack without routing.
    """

    def __init__(self, root: ArchiveRoot, info: ArchiveInfo, partition: int, spec: RoutingSpec | None) -> None:
        self._storage = root.storage
        self._info = info
        self._partition = partition
        self._spec = spec
        self._arrays = {
            name: ShardBuilder((), dtype, chunk_bytes=_SMALL_CHUNK_BYTES, codec=codec)
            for name, (dtype, codec) in _SMALL.items()
        }
        if spec is not None:
            row_shape = (spec.num_layers, spec.top_k)
            self._arrays["routed"] = ShardBuilder(row_shape, spec.dtype, layer_chunks=layer_chunks_for(spec.num_layers))
        self._counts = dict.fromkeys(PackCounts.__struct_fields__, 0)
        self._newest = 0.0
        self._event_bytes = 0
        self._trajectories: list[PackedTrajectory] = []
        self._contexts: dict[bytes, tuple[int, int]] = {}
        self._prompts: dict[str, SharedRows] = {}

    def add(
        self, id: str, entries: Sequence[StagedEntry], *, summary: Summary | None, known: Known | None = None
    ) -> None:
        """Take entries of one trajectory, oldest first, notes last.

        Args:
            summary: as of the last entry; its group says whose prompt rows may be shared.
            known: recorded rows that the archive holds of it already.

        Raises:
            Corrupt: a payload does not match its header.
        """
        rows = known or (None if self._spec is None else Known(self._spec.row_bytes))
        packed = [self._pack(id, staged, rows, summary.group if summary else None) for staged in entries]
        lines = encode_entries(packed)
        ids = [staged.at for staged in entries if not staged.note]
        line = PackedTrajectory(
            id=id,
            first=str(ids[0]) if ids else "",
            last=str(ids[-1]) if ids else "",
            last_note=max((staged.at.epoch for staged in entries if staged.note), default=0),
            offset=self._event_bytes,
            length=len(lines),
            summary=summary if ids else None,
        )
        self._trajectories.append(line)
        self._append("trajectories", encode_trajectory(line))
        self._append("events", lines)
        self._event_bytes += len(lines)
        self._newest = max([self._newest, *(staged.time for staged in entries)])
        self._counts["trajectories"] += 1
        self._counts["entries"] += len(ids)
        self._counts["notes"] += len(entries) - len(ids)

    def publish(
        self,
        manifest: Manifest,
        number: int,
        *,
        writer: str,
        on_step: Callable[[PublishStep], None] = lambda _: None,
        replaces: Sequence[int] = (),
    ) -> Record:
        """Write the pack's files durably, then the record: only with it does the pack exist.

        Args:
            number: of the record, one above the newest that was known when this pack's content was decided.
            replaces: records whose packs this one holds instead.

        Raises:
            Fenced: another archiver has written the record of this number.
            Unavailable: the archive cannot be written, a full disk say.
        """
        pack = f"{self._partition:02}/{number:08}-{ULID()}"
        record = Record(
            format=RECORD_FORMAT,
            number=number,
            partition=self._partition,
            created=time.time(),
            writer=writer,
            pack=pack,
            counts=PackCounts(**self._counts),
            newest=self._newest,
            replaces=replaces,
        )
        files, codecs = self._files(record)
        with Digests() as digests:
            watched = {name: digests.watch(name, parts) for name, parts in files.items()}
            self._storage.publish(f"packs/{pack}", watched, on_step)
            record = msgspec.structs.replace(record, codecs=codecs, files=digests.files())
        try:
            manifest.append(record, self._trajectories)
        except Fenced:
            if manifest.is_refused(number, pack):  # else `gc` finds out
                self._storage.remove(f"packs/{pack}/{name}" for name in files)
            raise
        on_step("recorded")
        return record

    def _pack(self, id: str, staged: StagedEntry, known: Known | None, group: str | None) -> PackedEntry:
        extents: list[Sequence[Piece]] = []
        for i, (header, data) in enumerate(zip(staged.events, staged.payloads, strict=True)):
            payload, array = payload_of(header), payload_array(header)
            if payload is None or array is None:
                extents.append(())
                continue
            at = EventId(staged.at.epoch, staged.at.seq + i)
            event = f"note {at}" if staged.note else str(at)
            check_payload(data, payload, what=f"{id}: the payload of {type(header).__name__} {event}")
            if array == "tokens":
                extents.append(self._place_tokens(header, data))
            else:
                extents.append(self._place_rows(id, event, header, data, known, group))
            if (
                isinstance(header, SegmentOpened)
                and not header.base
                and group not in (None, *self._prompts)
                and self._spec
            ):
                self._prompts[str(group)] = SharedRows(self._spec.row_bytes, header.context)
        return PackedEntry(
            id=str(staged.at),
            v=SCHEMA_VERSION,
            nonce=f"{staged.nonce:016x}",
            digest=staged.digest,
            time=staged.time,
            events=staged.events,
            extents=extents,
            note=staged.note,
        )

    def _place_tokens(self, header: Header, data: Buffer) -> list[Piece]:
        with_logprobs = isinstance(header, Tokens) and header.logprobs
        count = len(data) // (8 if with_logprobs else 4)
        if isinstance(header, SegmentOpened):  # a group's prompts are the same tokens
            digest = hashlib.blake2b(data, digest_size=16).digest()
            place = self._contexts.setdefault(digest, (self._counts["tokens"], count))
            if place[0] != self._counts["tokens"]:
                return [place]
        view = memoryview(data)
        self._append("tokens", view[: 4 * count])
        self._append("logprobs", view[4 * count :] if with_logprobs else _nans(count))
        self._counts["tokens"] += count
        return [(self._counts["tokens"] - count, count)]

    def _place_rows(
        self, id: str, event: str, header: Header, data: Buffer, known: Known | None, group: str | None
    ) -> list[Piece]:
        if self._spec is None or known is None or not isinstance(header, Routing | LateRouting | RoutingObserved):
            raise Corrupt(f"{id}: a recording of a trajectory without a routing spec")
        rows = row_view(data, self._spec.row_bytes)
        self._counts["recorded_rows"] += len(rows)
        prompt = self._prompts.get(group) if group is not None else None
        pieces: list[Piece] = []
        for a, b, reference in known.place(event, header.start, rows):
            if reference is not None:
                pieces.append(reference)
                continue
            shared = [(a, b, None)] if prompt is None else prompt.place(header.start + a, rows[a:b])
            for first, last, place in _shifted(shared, 0 if prompt is None else a):
                if place is not None:
                    pieces.append(place)
                    continue
                row = self._counts["rows"]
                part = memoryview(data)[first * self._spec.row_bytes : last * self._spec.row_bytes]
                self._arrays["routed"].append(self._spec.from_bytes(part))
                self._counts["rows"] += last - first
                pieces.append((row, last - first))
                if prompt is not None:
                    prompt.learn(header.start + first, rows[first:last], row)
        return joined(pieces)

    def _append(self, array: str, data: Buffer) -> None:
        """Rows of an array of one axis."""
        self._arrays[array].append(np.frombuffer(data, _SMALL[array][0]))

    def _files(self, record: Record) -> tuple[dict[str, Iterable[bytes]], dict[str, str]]:
        """The pack's files by their path in it, each in parts; and each array's codec."""
        about = {
            "format": PACK_FORMAT,
            "run": self._info.run,
            "incarnation": self._info.incarnation,
            "partitions": self._info.partitions,
            "partition": record.partition,
            "number": record.number,
            "created": record.created,
            "writer": record.writer,
            "newest": record.newest,
            "counts": record.counts,
            "replaces": record.replaces,
        }
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"trajstore": about}}
        arrays = {name: array.finish() for name, array in self._arrays.items()}
        files: dict[str, Iterable[bytes]] = {"zarr.json": [msgspec.json.format(msgspec.json.encode(group))]}
        # The largest first: while it is written and its digest made, the last chunks of the others are compressed.
        for name, array in reversed(arrays.items()):
            files |= {f"{name}/{path}": parts for path, parts in array.files.items()}
        return files, {name: array.codec for name, array in arrays.items()}


def _shifted(
    runs: "Sequence[tuple[int, int, Piece | None]] | Iterator[tuple[int, int, Piece | None]]", by: int
) -> Iterator[tuple[int, int, Piece | None]]:
    return ((a + by, b + by, piece) for a, b, piece in runs)


def _nans(count: int) -> bytes:
    return np.full(count, np.nan, "<f4").tobytes()
