"""What a rebuild must know before it writes records: is a pack sound, is its record, is one without a record needed."""

from collections.abc import Mapping

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.rebuild.found_packs import FoundPack, PackAbout, describe, entries_of, lines_of
from trajstore.archive.record import RECORD_FORMAT, Record
from trajstore.archive.verify.pack_check import OpenPack, check_files
from trajstore.entries import check_payload
from trajstore.errors import Corrupt, SchemaError

__all__ = ["faults", "is_belied", "is_needed"]


def faults(reader: ArchiveReader, record: Record) -> list[str]:
    """What cannot be read in a pack: arrays, lines, and the payloads of its entries, in whichever packs their rows lie.

    Args:
        reader: in whose manifest the record stands.
    """
    if not any(name.startswith("events/") for name in record.files):
        return []
    found = _broken(reader, record)
    try:
        lines = [line for _, line in lines_of(reader.packs, record.pack)]
    except Corrupt:
        return found
    for line in lines:
        try:
            entries = reader.read_parts(line.id, reader.manifest(record.partition).find(line.id))
            events = [event for entry in entries for event in entry.events if event.stored == record.pack]
            for event, data in zip(events, reader.payloads(line.id, events), strict=True):
                if event.payload is not None and data is not None:
                    check_payload(data, event.payload, what=f"{line.id}: the payload of event {event.id}")
        except (Corrupt, SchemaError) as error:
            found.append(f"pack {record.pack}: {error}")
    return found


def is_belied(
    reader: ArchiveReader, record: Record, packs: Mapping[str, FoundPack], about: PackAbout | None, *, digests: bool
) -> bool:
    """The pack is sound and contradicts its record: so the record is damaged.

    Args:
        packs: all of the partition, by name.
        about: what the record's pack says of itself.
        digests: compare the content of files, not only their sizes.
    """
    pack = packs.get(record.pack)
    sizes = {name: file.size for name, file in record.files.items()}
    if pack is None:  # or there is one just like it under another name: then the name is wrong
        return bool(sizes) and any(one.number == record.number and one.files == sizes for one in packs.values())
    if pack.ended or record.format < RECORD_FORMAT:
        return False
    differs = pack.files != sizes or (
        about is not None
        and (
            about.number != record.number
            or (about.created, about.writer, about.newest) != (record.created, record.writer, record.newest)
            or about.counts != record.counts
            or list(about.replaces) != list(record.replaces)
        )
    )
    if not differs and not (digests and any(check_files(reader.root.storage, record, digests=True))):
        return False
    try:
        anew = describe(reader.root.storage, reader.packs, pack)
    except Corrupt:
        return False
    if anew.files.get("zarr.json") != record.files.get("zarr.json"):
        return False  # the pack's own word is not what it was
    return not _broken(reader, anew)


def is_needed(reader: ArchiveReader, pack: FoundPack) -> bool:
    """Some of what a pack without a record holds lies in no pack that has one. What was deleted is not needed.

    Args:
        reader: of the packs that have a record.
    """
    if pack.ended:
        return False
    manifest = reader.manifest(int(pack.name.partition("/")[0]))
    try:
        for _, line in lines_of(reader.packs, pack.name):
            archived = manifest.find(line.id)
            if archived.dropped or (archived.summary is not None and archived.summary.status == "deleted"):
                continue
            held = {(e.note, e.at, e.nonce, e.digest) for e in reader.read_parts(line.id, archived)}
            if any((e.note, e.at, e.nonce, e.digest) not in held for e in entries_of(reader.packs, pack.name, line)):
                return True
    except (Corrupt, SchemaError):
        return True
    return False


def _broken(reader: ArchiveReader, record: Record) -> list[str]:
    """What cannot be read in a pack, seen by itself."""
    pack = OpenPack(reader, record)
    return [finding.what for finding in (*pack.check_arrays(), *pack.check_lines()) if finding.severity == "error"]
