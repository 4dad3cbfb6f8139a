"""A manifest record: one numbered step of a partition's archive, and how it is written."""

import hashlib
from collections.abc import Sequence

import msgspec

from trajstore.archive.sealed import seal, unseal
from trajstore.archive.storage.protocol import Storage
from trajstore.errors import UNREADABLE, Corrupt

__all__ = [
    "RECORD_FORMAT",
    "FileDigest",
    "PackCounts",
    "Record",
    "decode_record",
    "encode_record",
    "record_path",
    "require_listed",
]

RECORD_FORMAT = 2
"""Of the records that this version writes; it reads older ones."""


class FileDigest(msgspec.Struct, frozen=True):
    """Size in bytes and SHA-256 (hex) of one file of a pack."""

    size: int
    sha256: str


class PackCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a pack.

    Attributes:
        trajectories, entries, notes: parts of trajectories, and lines of `events`.
        tokens: rows of `tokens`.
        rows: rows of `routed`, stored once.
        recorded_rows: routing rows of all recordings, repeated ones too.
    """

    trajectories: int = 0
    entries: int = 0
    notes: int = 0
    tokens: int = 0
    rows: int = 0
    recorded_rows: int = 0


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a partition's archive.

    Attributes:
        format: of the record.
        number: 1, 2, 3, ... without gap.
        partition: whose.
        created: Unix seconds.
        writer: which archiver.
        pack: name of the pack that this step adds, "" for none.
        files: every file of the pack by its path in it.
        counts: what is in it.
        newest: wall clock of its newest entry, Unix seconds, by which retention counts its age.
        codecs: how the chunks of each array are compressed, see `docs/format.md`.
        replaces: numbers of records whose packs this one's pack holds instead (a compaction).
        drops: numbers of records whose packs, with all their trajectories, are gone for good (retention).
        lost: those of `drops` that were damaged and given up: of these not even the list of trajectories is needed.
    """

    format: int
    number: int
    partition: int
    created: float
    writer: str
    pack: str = ""
    files: dict[str, FileDigest] = {}
    counts: PackCounts = PackCounts()
    newest: float = 0.0
    codecs: dict[str, str] = {}
    replaces: Sequence[int] = ()
    drops: Sequence[int] = ()
    lost: Sequence[int] = ()


def encode_record(record: Record) -> bytes:
    """A record as it is written."""
    return seal(record)


def decode_record(data: bytes, *, partition: int, number: int, where: str) -> Record:
    """A record as it was read from the place of record `number`.

    Raises:
        Corrupt: it is damaged, or another one.
        SchemaError: of a newer format.
    """
    fields = unseal(data, newest=RECORD_FORMAT, what=f"the manifest record {where}")
    try:
        record = msgspec.convert(fields, Record)
    except UNREADABLE as error:
        raise Corrupt(f"the manifest record {where} cannot be read: {error}") from error
    if (record.number, record.partition) != (number, partition):
        raise Corrupt(
            f"the manifest record {where} says that it is number {record.number} of partition {record.partition}: "
            "somebody has copied or renamed it"
        )
    return record


def record_path(partition: int, number: int) -> str:
    """Where a record lies below the archive's root."""
    return f"manifest/{partition:02}/{number:08}.json"


def require_listed(storage: Storage, record: Record) -> None:
    """Before a pack's list of trajectories is believed: its files are those of the record, not another pack's.

    Raises:
        Corrupt: a file is missing, or its digest is another.
    """
    for name, file in record.files.items():
        if name.startswith("trajectories/"):
            path = f"packs/{record.pack}/{name}"
            try:
                found = hashlib.sha256(storage.read(path)).hexdigest()
            except FileNotFoundError as error:
                raise Corrupt(f"pack {record.pack} is damaged: {name} is missing; restore it from a copy") from error
            if found != file.sha256:
                raise Corrupt(
                    f"pack {record.pack} is damaged: {name} is not what record {record.number} says; restore it from a "
                    "copy"
                )
