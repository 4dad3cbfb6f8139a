"""Writing a pack: collect entries, write the Zarr group into staging, publish it with a manifest record."""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import zarr
from ulid import ULID

from trajstore.archive.manifest import FileDigest, Manifest, PackedTrajectory, Record
from trajstore.archive.pack import PackedEntry, encode_entries, payload_array, write_array
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot, sync_tree
from trajstore.entries import Buffer, Entry, check_payload, entry_digest
from trajstore.errors import Corrupt, Fenced, Unavailable
from trajstore.events import EventId, Header, Tokens, payload_of
from trajstore.routing import RoutingSpec
from trajstore.summary import Summary

__all__ = ["PackWriter", "PublishStep", "StagedEntry"]

PublishStep = str
"""Names the steps of a publish, as `on_step` hears them: staged, synced, moved, recorded."""


class StagedEntry(NamedTuple):
    """An entry to archive, as read from the hot log just now.

    Attributes:
        at, note: its id, and whether it is a note.
        data: its bytes.
        entry: the same, decoded; every event known.
        payloads: per event its bytes, b"" for none.
    """

    at: EventId
    note: bool
    data: bytes
    entry: Entry
    payloads: Sequence[Buffer]


class PackWriter:
    """Builds one pack of one partition. All its recordings share one routing shape and dtype.

    Args:
        root, info: of the archive.
        partition: whose trajectories these are.
        spec: gives L, K and the dtype of `routed`; None for a pack without routing.
    """

    def __init__(self, root: ArchiveRoot, info: ArchiveInfo, partition: int, spec: RoutingSpec | None) -> None:
        self._root = root
        self._info = info
        self._partition = partition
        self._spec = spec
        self._tokens: list[Buffer] = []
        self._logprobs: list[Buffer] = []
        self._routed: list[Buffer] = []
        self._token_count = 0
        self._row_count = 0
        self._events: list[bytes] = []
        self._event_bytes = 0
        self._trajectories: list[PackedTrajectory] = []

    def add(self, id: str, entries: Sequence[StagedEntry], *, summary: Summary | None) -> None:
        """Take entries of one trajectory, oldest first, notes last.

        Raises:
            Corrupt: a payload does not match its header.
        """
        packed = [self._pack(id, staged) for staged in entries]
        lines = encode_entries(packed)
        ids = [staged.at for staged in entries if not staged.note]
        self._trajectories.append(
            PackedTrajectory(
                id=id,
                first=str(ids[0]) if ids else "",
                last=str(ids[-1]) if ids else "",
                last_note=max((staged.at.epoch for staged in entries if staged.note), default=0),
                offset=self._event_bytes,
                length=len(lines),
                summary=summary if ids else None,
            )
        )
        self._events.append(lines)
        self._event_bytes += len(lines)

    def publish(
        self, manifest: Manifest, number: int, *, writer: str, on_step: Callable[[PublishStep], None]
    ) -> Record:
        """Write, fsync, move into place, then write the record: only with it does the pack exist.

        Args:
            number: of the record, one above the newest that was known when this pack's content was decided.

        Raises:
            Fenced: another archiver has written the record of this number.
            Unavailable: the folder cannot be written, a full disk say.
        """
        name = str(ULID())
        pack = f"{self._partition:02}/{number:08}-{name}"
        staged = self._root.stage(name)
        try:
            files = self._stage(staged / "pack", on_step)
            self._root.publish(staged / "pack", pack)
        except OSError as error:
            raise Unavailable(
                f"a pack cannot be written to {self._root.path}: {error}. Nothing is lost, it stays in the hot log; "
                "free space or mend the folder"
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # empty by now, or half a pack on a full disk
        on_step("moved")
        record = Record(
            format=ARCHIVE_FORMAT,
            number=number,
            partition=self._partition,
            pack=pack,
            created=time.time(),
            writer=writer,
            files=files,
            trajectories=self._trajectories,
        )
        try:
            manifest.append(record)
        except Fenced:
            shutil.rmtree(self._root.pack_path(pack))  # no record names it, and none ever will
            raise
        on_step("recorded")
        return record

    def _stage(self, path: Path, on_step: Callable[[PublishStep], None]) -> dict[str, FileDigest]:
        """Write the pack's files durably; returns them by their path in it."""
        self._write(path)
        on_step("staged")
        files = {str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
        sync_tree(path.parent)
        on_step("synced")
        return files

    def _pack(self, id: str, staged: StagedEntry) -> PackedEntry:
        extents = [
            self._place(id, header, data) for header, data in zip(staged.entry.events, staged.payloads, strict=True)
        ]
        return PackedEntry(
            id=str(staged.at),
            v=staged.entry.v,
            nonce=f"{staged.entry.nonce:016x}",
            digest=entry_digest(staged.data),
            time=staged.entry.time,
            events=staged.entry.events,
            extents=extents,
            note=staged.note,
        )

    def _place(self, id: str, header: Header, data: Buffer) -> list[tuple[int, int]]:
        payload, array = payload_of(header), payload_array(header)
        if payload is None or array is None:
            return []
        check_payload(data, payload, what=f"{id}: the payload of a {type(header).__name__}")
        if array == "routed":
            if self._spec is None:
                raise Corrupt(f"{id}: a recording of a trajectory without a routing spec")
            rows = len(data) // self._spec.row_bytes
            self._routed.append(data)
            self._row_count += rows
            return [(self._row_count - rows, rows)]
        with_logprobs = isinstance(header, Tokens) and header.logprobs
        count = len(data) // (8 if with_logprobs else 4)
        view = memoryview(data)
        self._tokens.append(view[: 4 * count])
        self._logprobs.append(view[4 * count :] if with_logprobs else _nans(count))
        self._token_count += count
        return [(self._token_count - count, count)]

    def _write(self, path: Path) -> None:
        spec = self._spec
        about: dict[str, Any] = {
            "format": ARCHIVE_FORMAT,
            "run": self._info.run,
            "incarnation": self._info.incarnation,
            "partition": self._partition,
        }
        group = zarr.create_group(store=path, zarr_format=3, attributes={"trajstore": about})
        write_array(group, "tokens", np.frombuffer(b"".join(self._tokens), "<i4"))
        write_array(group, "logprobs", np.frombuffer(b"".join(self._logprobs), "<f4"))
        if spec is not None:
            write_array(group, "routed", spec.from_bytes(b"".join(self._routed)))
        write_array(group, "events", np.frombuffer(b"".join(self._events), "u1"))
        index = b"".join(msgspec.json.encode(packed) + b"\n" for packed in self._trajectories)
        write_array(group, "trajectories", np.frombuffer(index, "u1"))


def _nans(count: int) -> bytes:
    return np.full(count, np.nan, "<f4").tobytes()


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return FileDigest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
