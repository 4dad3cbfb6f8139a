"""Packs that a compaction wrote anew and that are still there: what is live again where it is taken back.

Until `garbage.py` removes them, a compacted pack that is damaged is no loss. So it is not given up while they are sound
(`retention.py`); a rebuild takes the compaction back instead.
"""

from typing import NamedTuple

from trajstore.archive.manifest import Manifest
from trajstore.archive.record import Record
from trajstore.archive.storage.protocol import Storage
from trajstore.archive.verify.pack_check import check_files
from trajstore.errors import Corrupt

__all__ = ["Originals", "is_sound", "known", "originals_of", "replaced_by"]


class Originals(NamedTuple):
    """What a compaction can be taken back to.

    Attributes:
        packs: names of the packs that it replaced and that are there and sound; of one that is not, itself the pack of
            a compaction, those that this one replaced.
        undone: numbers of the compactions' records that say so.
    """

    packs: list[str]
    undone: set[int]


def originals_of(storage: Storage, manifest: Manifest, record: Record) -> Originals:
    """What a pack's record replaced, as far as it is still there. Reads all its files."""
    found = Originals([], {record.number})
    for old in _replaced(manifest, record):
        if is_sound(storage, old):
            found.packs.append(old.pack)
            continue
        deeper = originals_of(storage, manifest, old)
        if deeper.packs:
            found.packs.extend(deeper.packs)
            found.undone.update(deeper.undone)
    return found


def replaced_by(manifest: Manifest, record: Record) -> set[int]:
    """Numbers of all records whose packs a pack holds instead, also by way of other compactions."""
    older = [replaced_by(manifest, old) for old in _replaced(manifest, record)]
    return set(record.replaces).union(*older)


def is_sound(storage: Storage, record: Record) -> bool:
    """A pack's files are there and what its record says."""
    return all(finding.severity != "error" for finding in check_files(storage, record, digests=True))


def known(manifest: Manifest, number: int) -> Record | None:
    """A record, None where it cannot be read."""
    try:
        return manifest.record(number)
    except Corrupt:
        return None


def _replaced(manifest: Manifest, record: Record) -> list[Record]:
    """Records that this one replaced, but for those that cannot be read."""
    found = (known(manifest, number) for number in record.replaces if 0 < number < record.number)
    return [old for old in found if old is not None and old.pack]
