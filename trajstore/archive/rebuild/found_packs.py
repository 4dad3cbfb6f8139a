"""Packs as they lie in the storage, without a manifest: which there are, and what each says of itself."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from ulid import ULID

from trajstore.archive.arrays.codecs import CODECS, chain_of
from trajstore.archive.index import Line, Table, make_table
from trajstore.archive.pack import PackedTrajectory, ReadEntry, decode_entries, decode_trajectory
from trajstore.archive.pack_arrays import PackArrays
from trajstore.archive.record import RECORD_FORMAT, FileDigest, PackCounts, Record
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import UNREADABLE
from trajstore.events import LateRouting, Routing, RoutingObserved

__all__ = [
    "FoundPack",
    "PackAbout",
    "describe",
    "entries_of",
    "find_packs",
    "lines_of",
    "pack_names",
    "read_about",
    "table_of",
]

_PACK = re.compile(r"packs/(([0-9]{2,})/([0-9]{8,})-([0-7][0-9A-HJKMNP-TV-Z]{25}))/(.+)")
_STAYS = ("zarr.json", "trajectories/")
_IN_ORDER = ("tokens", "logprobs", "events", "trajectories", "routed")
"""Arrays as a record lists their codecs."""


class FoundPack(NamedTuple):
    """A folder below `packs/`.

    Attributes:
        name: "<pp>/<nnnnnnnn>-<ULID>".
        number: of the record that it was written for.
        ulid: when, and told apart from others of that number.
        files: size of each by its path in the pack.
    """

    name: str
    number: int
    ulid: str
    files: dict[str, int]

    @property
    def ended(self) -> bool:
        """It has been replaced or dropped, and what it held has been removed: only its list of trajectories stays."""
        return all(name.startswith(_STAYS) for name in self.files)


class PackAbout(msgspec.Struct, frozen=True, kw_only=True):
    """The attribute `trajstore` of a pack's group. Version 1 has the first four only."""

    format: int
    run: str
    incarnation: str
    partition: int
    partitions: int = 0
    number: int = 0
    created: float = 0.0
    writer: str = ""
    newest: float = 0.0
    counts: PackCounts | None = None
    replaces: Sequence[int] = ()


class _Attributes(msgspec.Struct):
    trajstore: PackAbout


class _Group(msgspec.Struct):
    attributes: _Attributes


def find_packs(storage: Storage, partition: int) -> list[FoundPack]:
    """Packs of a partition, by number and age."""
    found: dict[str, FoundPack] = {}
    for file in storage.list(f"packs/{partition:02}"):
        match = _PACK.fullmatch(file.path)
        if match is not None:
            pack = found.setdefault(match[1], FoundPack(match[1], int(match[3]), match[4], {}))
            pack.files[match[5]] = file.size
    return sorted(found.values(), key=lambda pack: (pack.number, pack.ulid))


def pack_names(storage: Storage) -> Iterator[str]:
    """Names of all packs whose group is there, in any order."""
    for file in storage.list("packs"):
        match = _PACK.fullmatch(file.path)
        if match is not None and match[5] == "zarr.json":
            yield match[1]


def read_about(storage: Storage, pack: str) -> PackAbout | None:
    """What a pack says of itself; None if that cannot be read."""
    try:
        return msgspec.json.decode(storage.read(f"packs/{pack}/zarr.json"), type=_Group).attributes.trajstore
    except (FileNotFoundError, *UNREADABLE):
        return None


def lines_of(packs: PackArrays, pack: str) -> Iterator[tuple[Line, PackedTrajectory]]:
    """A pack's trajectories, and where their lines lie.

    Raises:
        Corrupt: the list cannot be read.
    """
    offset = 0
    for text in packs.whole(pack, "trajectories").splitlines(keepends=True):
        line = decode_trajectory(text, pack=pack)
        yield Line(line.id, offset, len(text)), line
        offset += len(text)


def table_of(packs: PackArrays, record: Record) -> Table:
    """The lookup table of one record.

    Raises:
        Corrupt: its pack's list of trajectories cannot be read.
    """
    lines = [place for place, _ in lines_of(packs, record.pack)] if record.pack else []
    return make_table(record.number, lines, replaced=record.replaces, dropped=record.drops)


def entries_of(packs: PackArrays, pack: str, line: PackedTrajectory) -> list[ReadEntry]:
    """Entries and notes that a pack holds of a trajectory.

    Raises:
        Corrupt: they cannot be read.
    """
    return decode_entries(packs.text(pack, "events", line.offset, line.offset + line.length), pack=pack, id=line.id)


def describe(storage: Storage, packs: PackArrays, found: FoundPack) -> Record:
    """The record of a pack, from the pack alone. Reads each of its files.

    Raises:
        Corrupt: its list of trajectories, or of events, cannot be read.
    """
    about = read_about(storage, found.name)
    counts, newest = PackCounts(), 0.0
    if about is not None and about.counts is not None:
        counts, newest = about.counts, about.newest
        for _ in lines_of(packs, found.name):
            pass
    elif not found.ended:
        counts, newest = _count(packs, found)
    return Record(
        format=min(about.format, RECORD_FORMAT) if about is not None else RECORD_FORMAT,
        number=found.number,
        partition=int(found.name.partition("/")[0]),
        created=about.created if about is not None and about.created else ULID.from_str(found.ulid).timestamp,
        writer=about.writer if about is not None and about.writer else "rebuild",
        pack=found.name,
        files={name: _digest(storage.read(f"packs/{found.name}/{name}")) for name in sorted(found.files)},
        counts=counts,
        newest=newest,
        codecs=_codecs(storage, found),
        replaces=tuple(about.replaces) if about is not None else (),
    )


def _count(packs: PackArrays, found: FoundPack) -> tuple[PackCounts, float]:
    """What a pack holds, and the time of its newest entry."""
    trajectories = entries = notes = recorded = 0
    newest = 0.0
    for _, line in lines_of(packs, found.name):
        trajectories += 1
        for entry in entries_of(packs, found.name, line):
            entries += not entry.note
            notes += entry.note
            newest = max(newest, entry.time)
            headers = [event.header for event in entry.events]
            recorded += sum(h.rows for h in headers if isinstance(h, Routing | LateRouting | RoutingObserved))
    return (
        PackCounts(
            trajectories=trajectories,
            entries=entries,
            notes=notes,
            tokens=packs.length(found.name, "tokens"),
            rows=packs.length(found.name, "routed") if "routed/zarr.json" in found.files else 0,
            recorded_rows=recorded,
        ),
        newest,
    )


def _codecs(storage: Storage, found: FoundPack) -> dict[str, str]:
    """How each array is compressed, as far as it is one of our ways."""
    names: dict[str, str] = {}
    for array in _IN_ORDER:
        if f"{array}/zarr.json" not in found.files:
            continue
        try:
            document = msgspec.json.decode(storage.read(f"packs/{found.name}/{array}/zarr.json"))
            chain = document["codecs"][0]["configuration"]["codecs"][1:]
            dtype = np.dtype(document["data_type"])
        except (*UNREADABLE, KeyError, TypeError, IndexError):
            continue
        codec = next((codec for codec in CODECS if chain_of(codec, dtype) == chain), None)
        if codec is not None:
            names[array] = codec
    return names


def _digest(data: bytes) -> FileDigest:
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())
