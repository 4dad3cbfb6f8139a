"""What `verify` asks of an archive as a place: archive.json, the records, the lookup tables, files of nobody's."""

import re
from collections.abc import Collection, Iterator, Mapping

import msgspec

from trajstore.archive.index import Table, decode_table, spans
from trajstore.archive.manifest import Manifest
from trajstore.archive.record import RECORD_FORMAT, Record, encode_record, record_path
from trajstore.archive.root import ArchiveRoot
from trajstore.archive.sealed import seal
from trajstore.archive.storage.protocol import Storage
from trajstore.archive.verify.findings import Finding, Severity
from trajstore.errors import Corrupt, NotFound, SchemaError
from trajstore.limits import MAX_PARTITIONS

__all__ = ["Tables", "check_identity", "check_record", "check_strays", "record_numbers"]

_REBUILD = "restore it from a copy, or make it anew with `trajstore rebuild`"
_ANEW = "the next archiver that starts writes it anew, or `trajstore rebuild`"
_RECORD = re.compile(r"manifest/([0-9]{2,})/([0-9]{8,})\.json")
_TABLE = re.compile(r"index/([0-9]{2,})/([0-9]{8,})-([0-9]{8,})\.safetensors")
_SET_ASIDE = re.compile(r"(archive|manifest/[0-9]{2,}/[0-9]{8,})\.json\.damaged(-[0-9]+)?")
_PACK = re.compile(r"packs/(([0-9]{2,})/([0-9]{8,})-[0-9A-Z]{26})/.+")


def check_identity(root: ArchiveRoot) -> Iterator[Finding]:
    """`archive.json`: it is there, can be read, and says what it can say.

    Raises:
        NotFound: nothing here is an archive's.
    """
    try:
        info = root.info()
        data = None if info is None else root.storage.read("archive.json")
    except (Corrupt, SchemaError) as error:
        yield _of_place("identity", str(error), _REBUILD)
        return
    if info is None:
        if not any(_RECORD.fullmatch(file.path) or _PACK.fullmatch(file.path) for file in root.storage.list("")):
            raise NotFound(f"there is no archive in {root.location} (no archive.json)")
        yield _of_place("identity", f"archive.json of {root.location} is missing", _REBUILD)
    elif info.format < 1 or not 1 <= info.partitions <= MAX_PARTITIONS:
        yield _of_place("identity", f"archive.json says format {info.format}, {info.partitions} partitions", _REBUILD)
    elif data not in (seal(info), msgspec.json.format(msgspec.json.encode(info))):  # the latter in format 1
        yield _of_place(
            "identity", "archive.json is not byte for byte what was written", "somebody has edited it", "warning"
        )


def record_numbers(storage: Storage, partition: int) -> set[int]:
    """Numbers of the records that are there."""
    found = (_RECORD.fullmatch(file.path) for file in storage.list(f"manifest/{partition:02}"))
    return {int(match[2]) for match in found if match is not None}


def check_record(storage: Storage, manifest: Manifest, partition: int, number: int) -> Iterator[Finding]:
    """One record: there, readable, byte for byte as an archiver writes it, naming a pack of its own."""
    path = record_path(partition, number)
    try:
        data = storage.read(path)
        record = manifest.record(number)
    except FileNotFoundError:
        yield _of_place("record", f"the manifest record {path} is missing, though later ones are there", _REBUILD)
        return
    except (Corrupt, SchemaError) as error:
        yield _of_place("record", str(error), "upgrade trajstore" if isinstance(error, SchemaError) else _REBUILD)
        return
    where = f"the manifest record {path}"
    if record.format < 1:
        yield _of_place("record", f"{where} has format {record.format}", _REBUILD)
    elif record.format == RECORD_FORMAT and data != encode_record(record):
        yield _of_place("record", f"{where} is not byte for byte what an archiver writes", _REBUILD)
    if record.pack and not names_own_pack(record):
        yield _of_place("record", f"{where} names the pack {record.pack!r:.200}, which is not its own", _REBUILD)
    ended = [*record.replaces, *record.drops]
    if len(set(ended)) != len(ended) or any(not 0 < other < number for other in ended):
        yield _of_place("record", f"{where} replaces or drops records {ended}, not all of them earlier ones", _REBUILD)
    if not set(record.lost) <= set(record.drops):
        yield _of_place("record", f"{where} gives up records {list(record.lost)}, not all of which it drops", _REBUILD)


def names_own_pack(record: Record) -> bool:
    """The pack's name is made of the record's partition and number."""
    match = _PACK.fullmatch(f"packs/{record.pack}/x")
    return match is not None and (int(match[2]), int(match[3])) == (record.partition, record.number)


class Tables:
    """The lookup tables of one partition along its records, at most one of each level open."""

    def __init__(self, storage: Storage, partition: int, newest: int, *, incarnation: str) -> None:
        self._storage = storage
        self._partition = partition
        self._incarnation = incarnation
        self._newest = newest
        self._open: dict[int, Table] = {}

    def covering(self, number: int) -> list[Table]:
        """Those that cover a record, of those that could be opened."""
        return [table for table in self._open.values() if table.first <= number <= table.last]

    def enter(self, number: int, ended: Mapping[int, Record]) -> Iterator[Finding]:
        """Open the tables that begin with a record.

        Args:
            ended: records of the partition that replaced or dropped others.
        """
        for first, last in spans(number - 1):
            if last > self._newest:
                continue
            path = f"index/{self._partition:02}/{first:08}-{last:08}.safetensors"
            try:
                table = decode_table(
                    self._storage.open_map(path), incarnation=self._incarnation, partition=self._partition, path=path
                )
            except FileNotFoundError:
                if last > first and not self.covering(number):
                    yield _of_place("lookup-table", f"{path} is missing", _ANEW, "information")
                continue
            except SchemaError as error:
                yield _of_place("lookup-table", f"{error}: it is not used", _ANEW, "information")
                continue
            except Corrupt as error:
                yield _of_place("lookup-table", str(error), _ANEW, "warning")
                continue
            if (table.first, table.last) != (first, last):
                said = f"{path} says that it is of records {table.first} to {table.last}"
                yield _of_place("lookup-table", said, _ANEW, "warning")
                continue
            self._open[last - first] = table
            within = [record for at, record in ended.items() if first <= at <= last]
            replaced = frozenset(other for record in within for other in record.replaces)
            dropped = frozenset(other for record in within for other in record.drops)
            hashes = table.columns[0]
            if table.replaced != replaced or table.dropped != dropped or (hashes[1:] < hashes[:-1]).any():
                said = f"{path} is not what its records say"
                yield _of_place("lookup-table", said, "`trajstore rebuild` makes it anew")


def check_strays(
    root: ArchiveRoot, manifests: Mapping[int, Manifest], numbers: Mapping[int, Collection[int]]
) -> Iterator[Finding]:
    """Every file of the archive that no record names: leftovers of crashes, and what is not trajstore's.

    Args:
        manifests, numbers: of each partition, and the numbers of its records.
    """
    told: set[str] = set()
    for file in root.storage.list(""):
        path = file.path
        pack = _PACK.fullmatch(path)
        if pack is not None and int(pack[2]) in numbers:
            if pack[1] not in told and not _is_named(manifests[int(pack[2])], pack[1], int(pack[3])):
                told.add(pack[1])
                yield _leftover(pack[1], int(pack[3]), max(numbers[int(pack[2])], default=0))
            continue
        table = _TABLE.fullmatch(path)
        if table is not None and int(table[1]) in numbers:
            first, last = int(table[2]), int(table[3])
            if last > max(numbers[int(table[1])], default=0) and not _is_there(manifests[int(table[1])], last):
                yield _of_place("record", f"{path} covers records that are gone", _REBUILD)
            elif (first, last) not in spans(first - 1):
                yield _foreign(path)
            continue
        record = _RECORD.fullmatch(path)
        if (record is None or int(record[1]) not in numbers) and path != "archive.json":
            top, _, name = path.rpartition("/")
            if path.startswith("staging/"):
                top = "/".join(path.split("/")[:2])  # a staged pack has folders of its own
            if _SET_ASIDE.fullmatch(path):
                yield _of_place("leftover", f"{path} is a damaged file that a rebuild has replaced", "", "information")
            elif path.startswith("staging/") or re.fullmatch(r"\..+\.[0-9]+-[0-9]+", name):
                if top not in told:
                    told.add(top)
                    what = f"{top or root.location} holds what an archiver is writing, or was when it was killed"
                    yield _of_place("leftover", what, "archivers remove it after an hour", "information")
            else:
                yield _foreign(path)


def _is_there(manifest: Manifest, number: int) -> bool:
    """A record was written since the records were listed."""
    try:
        return bool(manifest.record(number))
    except (Corrupt, SchemaError):
        return False


def _is_named(manifest: Manifest, pack: str, number: int) -> bool:
    try:
        return manifest.record(number).pack == pack
    except (Corrupt, SchemaError):
        return False


def _leftover(pack: str, number: int, newest: int) -> Finding:
    if number <= newest:
        return Finding(
            kind="leftover",
            severity="information",
            pack=pack,
            what=f"no record names the pack {pack}: an archiver was killed or fenced before it was published",
            what_to_do="`trajstore gc` removes it if other packs hold all that is in it; if records were lost, "
            "`trajstore rebuild` takes it in",
        )
    return Finding(
        kind="leftover",
        severity="warning",
        pack=pack,
        what=f"no record names the pack {pack}, which is newer than the newest record: an archiver was killed before "
        "it wrote the record, or the record has been lost",
        what_to_do="let an archiver of the run publish what is still in the hot log; if the hot log does not have what "
        "this pack holds, `trajstore rebuild` takes it in",
    )


def _foreign(path: str) -> Finding:
    return _of_place("foreign-file", f"{path} is not trajstore's", "somebody put it there; move it away", "warning")


def _of_place(kind: str, what: str, what_to_do: str, severity: Severity = "error") -> Finding:
    return Finding(kind=kind, severity=severity, what=what, what_to_do=what_to_do)
