"""What `verify` asks of one pack: its files, their digests, arrays that decode, lines and counts that agree."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.archive.arrays.codecs import chain_of
from trajstore.archive.index import Line, Table, make_table
from trajstore.archive.pack import PackedTrajectory, ReadEntry, decode_entries, decode_trajectory
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import PackCounts, Record
from trajstore.archive.storage.protocol import Storage
from trajstore.archive.verify.findings import Finding
from trajstore.entries import partition_of
from trajstore.errors import UNREADABLE, Corrupt, SchemaError
from trajstore.events import LateRouting, Routing, RoutingObserved

__all__ = ["OpenPack", "check_files"]

_RESTORE = "restore the pack from a copy"
_ARRAYS = ("tokens", "logprobs", "events", "trajectories")
_STAYS = ("zarr.json", "trajectories/")


def check_files(storage: Storage, record: Record, *, digests: bool, ended: bool = False) -> Iterator[Finding]:
    """Files of a pack against its record: all there, none more, sizes, SHA-256. Holds one file.

    Args:
        digests: compare SHA-256, not only sizes.
        ended: the pack was replaced or dropped; only its list of trajectories must be there still.
    """
    pack = record.pack
    folder = f"packs/{pack}/"
    found = {file.path.removeprefix(folder): file.size for file in storage.list(f"packs/{pack}")}
    if not found:
        yield _wrong(pack, "missing-file", f"the pack is gone: none of its {len(record.files)} files is there")
        return
    for name, about in record.files.items():
        if ended and not name.startswith(_STAYS):
            continue
        if name not in found:
            yield _wrong(pack, "missing-file", f"file {name} of the pack is missing")
        elif found[name] != about.size:
            yield _wrong(pack, "size", f"file {name} has {found[name]} bytes instead of {about.size}")
        elif digests:
            try:
                digest = hashlib.sha256(storage.read(folder + name)).hexdigest()
            except FileNotFoundError:
                yield _wrong(pack, "missing-file", f"file {name} of the pack is missing")
                continue
            if digest != about.sha256:
                yield _wrong(pack, "digest", f"file {name} is not what was written: its SHA-256 is {digest}")
    for name in sorted(found.keys() - record.files.keys()):
        yield Finding(
            kind="foreign-file",
            severity="warning",
            pack=pack,
            what=f"file {name} lies in the pack, but its record does not name it",
            what_to_do="somebody put it there; move it away",
        )


class OpenPack:
    """A pack whose arrays are decoded whole and held in memory; rows of other packs are read as they are asked for.

    Attributes:
        record: of the pack.
        lines: of its `trajectories`; empty where they cannot be read.
    """

    def __init__(self, reader: ArchiveReader, record: Record) -> None:
        self.record = record
        self.lines: list[PackedTrajectory] = []
        self._reader = reader
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._damaged: dict[str, Corrupt] = {}
        self._table: Table | None = None

    def read(self, pack: str, array: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `[start, stop)` of an array of any pack.

        Raises:
            Corrupt: they are damaged or not there.
        """
        if pack != self.record.pack:
            return self._reader.packs.rows(pack, array, start, stop)
        if array in self._damaged:
            raise self._damaged[array]
        held = self._arrays.get(array)
        if held is None or stop > len(held):
            raise Corrupt(f"pack {pack} has no rows {start} to {stop} of {array}")
        return held[start:stop]

    def entries(self, id: str, line: PackedTrajectory) -> list[ReadEntry]:
        """Entries and notes of one trajectory in this pack.

        Raises:
            Corrupt, SchemaError: they cannot be read.
        """
        text = self.read(self.record.pack, "events", line.offset, line.offset + line.length).tobytes()
        return decode_entries(text, pack=self.record.pack, id=id)

    def check_arrays(self) -> Iterator[Finding]:
        """Decode every array, and compare the group's attribute and the codecs with the record."""
        pack = self.record.pack
        routed = ("routed",) if any(name.startswith("routed/") for name in self.record.files) else ()
        for array in (*_ARRAYS, *routed):
            try:
                self._arrays[array] = self._reader.packs.rows(pack, array, 0, self._reader.packs.length(pack, array))
            except Corrupt as error:
                self._damaged[array] = error
                yield _wrong(pack, "array", str(error))
        yield from self._check_attribute()
        for array, codec in self.record.codecs.items():
            if array in self._arrays and not self._has_codec(array, codec):
                yield _wrong(pack, "record", f"its record says that {array} is compressed as {codec!r}; it is not")

    def check_lines(self) -> Iterator[Finding]:
        """Lines of `trajectories` and of `events` against each other and the record's counts."""
        pack = self.record.pack
        if "trajectories" not in self._arrays or "events" not in self._arrays:
            return  # told by `check_arrays`
        try:
            texts = self._arrays["trajectories"].tobytes().splitlines(keepends=True)
            self.lines = [decode_trajectory(text, pack=pack) for text in texts]
        except Corrupt as error:
            yield _wrong(pack, "lines", str(error))
            return
        offsets = np.cumsum([0, *map(len, texts)])
        places = [Line(line.id, int(at), len(text)) for line, at, text in zip(self.lines, offsets, texts, strict=False)]
        self._table = make_table(self.record.number, places)
        if len({line.id for line in self.lines}) != len(self.lines):
            yield _wrong(pack, "lines", "its list of trajectories names one twice")
        counted = {"trajectories": len(self.lines), "entries": 0, "notes": 0, "recorded_rows": 0}
        counted |= {"tokens": len(self._arrays.get("tokens", ())), "rows": len(self._arrays.get("routed", ()))}
        end = 0
        for line in self.lines:
            yield from self._check_line(line, end, counted)
            end = line.offset + line.length
        length = len(self._arrays["events"])
        if end != length:
            yield _wrong(pack, "lines", f"its trajectories take {end} of the {length} bytes of events")
        if len(self._arrays.get("logprobs", ())) != counted["tokens"] and not self._damaged:
            yield _wrong(pack, "counts", "tokens and logprobs differ in length")
        if self.record.format > 1 and not self._damaged and PackCounts(**counted) != self.record.counts:
            said = msgspec.structs.asdict(self.record.counts)
            wrong = [name for name in said if counted[name] != said[name]]
            differ = ", ".join(f"{counted[name]} {name} (said: {said[name]})" for name in wrong)
            yield _wrong(pack, "counts", f"the pack holds other counts than its record says: {differ}")

    def check_tables(self, tables: Sequence[Table]) -> Iterator[Finding]:
        """The lookup tables that cover this pack must say where its lines are, and no more."""
        if self._table is None:
            return
        hashes, _, offsets, lengths = self._table.columns
        for table in tables:
            all_hashes, all_numbers, all_offsets, all_lengths = table.columns
            mine = np.flatnonzero(all_numbers == self.record.number)
            order, own = np.lexsort((all_offsets[mine], all_hashes[mine])), np.lexsort((offsets, hashes))
            pairs = ((all_hashes, hashes), (all_offsets, offsets), (all_lengths, lengths))
            if not all(np.array_equal(theirs[mine][order], ours[own]) for theirs, ours in pairs):
                yield Finding(
                    kind="lookup-table",
                    severity="error",
                    pack=self.record.pack,
                    what=f"the lookup table of records {table.first} to {table.last} of partition "
                    f"{self.record.partition} does not say where the pack's trajectories are",
                    what_to_do="`trajstore rebuild` makes it anew",
                )

    def _check_line(self, line: PackedTrajectory, end: int, counted: dict[str, int]) -> Iterator[Finding]:
        record = self.record
        if line.offset != end:
            yield _wrong(record.pack, "lines", f"its events begin at byte {line.offset} instead of {end}", line.id)
        if partition_of(line.id, self._reader.info.partitions) != record.partition:
            yield _wrong(
                record.pack, "lines", f"the trajectory belongs to another partition than {record.partition}", line.id
            )
        try:
            entries = self.entries(line.id, line)
        except (Corrupt, SchemaError) as error:
            yield _wrong(record.pack, "lines", str(error), line.id)
            return
        ids = [entry.at for entry in entries if not entry.note]
        notes = [entry.at for entry in entries if entry.note]
        counted["entries"] += len(ids)
        counted["notes"] += len(notes)
        counted["recorded_rows"] += sum(
            event.header.rows
            for entry in entries
            for event in entry.events
            if isinstance(event.header, Routing | LateRouting | RoutingObserved)
        )
        found = (str(ids[0]) if ids else "", str(ids[-1]) if ids else "", notes[-1].epoch if notes else 0)
        if found != (line.first, line.last, line.last_note):
            yield _wrong(
                record.pack, "lines", f"it says entries {line.first} to {line.last}; they are {found}", line.id
            )
        if ids != sorted(set(ids)) or notes != sorted(set(notes)):
            yield _wrong(record.pack, "lines", "its entries do not ascend", line.id)

    def _check_attribute(self) -> Iterator[Finding]:
        """The attribute `trajstore` repeats what the record and `archive.json` say."""
        record, info = self.record, self._reader.info
        expected: dict[str, Any] = {"run": info.run, "incarnation": info.incarnation, "partition": record.partition}
        if record.format > 1:
            expected |= {"partitions": info.partitions, "number": record.number, "created": record.created}
            expected |= {"writer": record.writer, "newest": record.newest, "replaces": list(record.replaces)}
            expected["counts"] = msgspec.structs.asdict(record.counts)
        expected["format"] = record.format
        try:
            data = self._reader.root.storage.read(f"packs/{record.pack}/zarr.json")
            found = msgspec.json.decode(data)["attributes"]["trajstore"]
            different = [name for name, value in expected.items() if found.get(name) != value]
        except FileNotFoundError:
            return  # told by `check_files`
        except (*UNREADABLE, KeyError, TypeError, AttributeError) as error:
            yield _wrong(record.pack, "array", f"zarr.json of the pack cannot be read: {error}")
            return
        if different:
            yield Finding(
                kind="record",
                severity="error",
                pack=record.pack,
                what=f"the pack, its record and archive.json contradict each other about {', '.join(different)}",
                what_to_do="where the pack's digests are right, restore the record or archive.json from a copy, or "
                "make it anew with `trajstore rebuild`",
            )

    def _has_codec(self, array: str, codec: str) -> bool:
        try:
            document = msgspec.json.decode(
                self._reader.root.storage.read(f"packs/{self.record.pack}/{array}/zarr.json")
            )
            chain = document["codecs"][0]["configuration"]["codecs"][1:]
            return bool(chain == chain_of(codec, np.dtype(document["data_type"])))
        except (OSError, *UNREADABLE, KeyError, TypeError, IndexError):
            return False


def _wrong(pack: str, kind: str, what: str, trajectory: str = "") -> Finding:
    return Finding(kind=kind, severity="error", pack=pack, trajectory=trajectory, what=what, what_to_do=_RESTORE)
