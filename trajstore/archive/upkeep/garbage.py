"""Files of an archive that nothing needs any more, found and removed; and those that are not ours, found and left.

Manifest records and lookup tables stay for good. So does of each ended pack its list of trajectories: a reader that
makes its lookup tables anew reads it, and by the list of a dropped pack ids are known to be taken.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from trajstore.archive.manifest import Manifest
from trajstore.archive.pack import decode_entries, decode_trajectory
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.storage.protocol import StoredFile, staged_since
from trajstore.archive.upkeep.ledger import Ledger, Ledgers, Noted
from trajstore.errors import Corrupt, SchemaError

__all__ = ["ORPHAN_SECONDS", "Garbage", "find_foreign", "find_garbage", "remove_garbage"]

ORPHAN_SECONDS = 3600.0
"""What a crash left behind is not touched for so long."""

_STAYS = ("zarr.json", "trajectories/")

_ULID = r"[0-7][0-9A-HJKMNP-TV-Z]{25}"
_PACK = re.compile(rf"packs/([0-9]{{2,}})/([0-9]{{8,}})-{_ULID}")
_RECORD = re.compile(r"manifest/([0-9]{2,})/([0-9]{8,})\.json")
_TABLE = re.compile(r"index/([0-9]{2,})/[0-9]{8,}-[0-9]{8,}\.safetensors")
_TEMPORARY = re.compile(r"(manifest/[0-9]{2,}/|index/[0-9]{2,}/)?\.[0-9a-z.-]+\.[0-9]+-[0-9]+")
"""Of older versions; this one writes into staging first."""


class Garbage(NamedTuple):
    """Files that can go together.

    Attributes:
        path: their folder, or the one file.
        reason: why nothing needs them.
        files: their paths.
        nbytes: of all files.
    """

    path: str
    reason: str
    files: tuple[str, ...]
    nbytes: int


def find_garbage(
    reader: ArchiveReader,
    *,
    now: float,
    grace: float,
    dropping: Iterable[Noted] = (),
    ledgers: Ledgers | None = None,
    on_corrupt: Callable[[Corrupt], None] | None = None,
) -> Iterator[Garbage]:
    """Files that nothing needs. Never one that a live record names, nor of a pack whose record is damaged, nor of one
    that a pack was compacted from that is given up at this moment.

    Args:
        now: Unix seconds.
        grace: seconds since a pack was replaced or dropped, during which readers that found it before go on.
        dropping: records that count as dropped at this moment.
        ledgers: what was read of the records before.
        on_corrupt: hears which records cannot be read; what they may need stays.

    Raises:
        Corrupt: without `on_corrupt`, if a record cannot be read.
    """
    ledgers = ledgers or Ledgers(reader)
    ending = {(one.partition, one.number) for one in dropping}
    for partition in range(reader.info.partitions):
        listed = _by_folder(reader.root.storage.list(f"packs/{partition:02}"), depth=3)
        ledger = ledgers.of(partition)
        ledger.read()  # after the listing: a pack that was listed before its record was there has it now
        for error in ledger.errors:
            if on_corrupt is None:
                raise error
            on_corrupt(error)
        if ledger.failure is not None:
            continue
        ended = {**ledger.ended, **{number: now for part, number in ending if part == partition}}
        for number in ledger.spared():
            ended.pop(number, None)
        for folder, files in sorted(listed.items()):
            found = _garbage_of(reader, ledger, folder, files, ended, now=now, grace=grace)
            if found is not None:
                yield found
    yield from _left_over(reader, now)


def find_foreign(reader: ArchiveReader, *, ledgers: Ledgers | None = None) -> Iterator[StoredFile]:
    """Files that are no part of an archive. They are nobody's garbage.

    Args:
        ledgers: what was read of the records before.
    """
    ledgers = ledgers or Ledgers(reader)
    for partition in range(reader.info.partitions):
        ledgers.of(partition).read()
    for file in reader.root.storage.list(""):
        if not _is_ours(reader, file.path, ledgers):
            yield file


def remove_garbage(reader: ArchiveReader, found: Sequence[Garbage]) -> None:
    """Remove files; those that are gone already do no harm."""
    reader.root.storage.remove(path for garbage in found for path in garbage.files)
    for garbage in found:
        if garbage.path.startswith("packs/"):
            reader.packs.forget(garbage.path.removeprefix("packs/"))


def _is_elsewhere(reader: ArchiveReader, manifest: Manifest, pack: str) -> bool:
    """Every entry of a pack without a record lies in packs that have one, or is of a trajectory that is gone for good.

    Where records were lost, it may be the only copy: `trajstore rebuild` then gives it a record.
    """
    try:
        for text in reader.packs.whole(pack, "trajectories").splitlines():
            line = decode_trajectory(text, pack=pack)
            archived = manifest.find(line.id)
            if archived.dropped or (archived.summary is not None and archived.summary.status == "deleted"):
                continue
            held = {(entry.note, entry.at, entry.digest) for entry in reader.read_parts(line.id, archived)}
            lines = reader.packs.text(pack, "events", line.offset, line.offset + line.length)
            own = decode_entries(lines, pack=pack, id=line.id)
            if not held.issuperset((entry.note, entry.at, entry.digest) for entry in own):
                return False
    except (Corrupt, SchemaError):  # nobody can say what is in it
        return False
    return True


def _garbage_of(
    reader: ArchiveReader,
    ledger: Ledger,
    folder: str,
    files: Sequence[StoredFile],
    ended: Mapping[int, float],
    *,
    now: float,
    grace: float,
) -> Garbage | None:
    match = _PACK.fullmatch(folder)
    if match is None:
        return None
    number = int(match[2])
    record = ledger.get(number)
    if record is None:
        return None  # it may still be written, or cannot be read
    if f"packs/{record.pack}" != folder:
        recent = max(file.modified for file in files) > now - ORPHAN_SECONDS
        if recent or not _is_elsewhere(reader, ledger.manifest, folder.removeprefix("packs/")):
            return None
        return _garbage(folder, f"record {number} is another pack's, and others hold all that is in it", files)
    if number not in ended or ended[number] > now - grace:
        return None
    names = {f"{folder}/{name}" for name in record.files if not name.startswith(_STAYS)}
    going = [file for file in files if file.path in names]
    return _garbage(folder, "replaced or dropped", going) if going else None


def _left_over(reader: ArchiveReader, now: float) -> Iterator[Garbage]:
    """What killed processes left: staged packs, and temporary files."""
    storage = reader.root.storage
    for folder, files in sorted(_by_folder(storage.list("staging"), depth=2).items()):
        since = staged_since(folder.removeprefix("staging/"))
        newest = max([since or now, *(file.modified for file in files)])
        if since is not None and newest < now - ORPHAN_SECONDS:
            yield _garbage(folder, "staged and never published", files)
    for top in ("manifest", "index"):
        for file in storage.list(top):
            if _TEMPORARY.fullmatch(file.path) and file.modified < now - ORPHAN_SECONDS:
                yield _garbage(file.path, "a temporary file", [file])


def _is_ours(reader: ArchiveReader, path: str, ledgers: Ledgers) -> bool:
    if path == "archive.json" or _TEMPORARY.fullmatch(path):
        return True
    parts = path.split("/")
    if parts[0] == "staging":
        return len(parts) > 1 and staged_since(parts[1]) is not None
    folder = "/".join(parts[:3])
    match = _RECORD.fullmatch(path) or _TABLE.fullmatch(path) or _PACK.fullmatch(folder)
    if match is None or match[1] != f"{int(match[1]):02}" or int(match[1]) >= reader.info.partitions:
        return False
    if parts[0] == "index":
        return True
    if parts[0] == "manifest":
        return int(match[2]) > 0 and parts[2] == f"{int(match[2]):08}.json"
    record = ledgers.of(int(match[1])).get(int(match[2]))
    if record is None:
        return int(match[2]) > 0
    return f"packs/{record.pack}" != folder or "/".join(parts[3:]) in record.files


def _by_folder(files: Iterable[StoredFile], *, depth: int) -> dict[str, list[StoredFile]]:
    found: dict[str, list[StoredFile]] = {}
    for file in files:
        found.setdefault("/".join(file.path.split("/")[:depth]), []).append(file)
    return found


def _garbage(path: str, reason: str, files: Sequence[StoredFile]) -> Garbage:
    return Garbage(path, reason, tuple(sorted(file.path for file in files)), sum(file.size for file in files))
