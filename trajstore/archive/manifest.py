"""The manifest of a partition: numbered records, each written once. The truth about which packs exist.

Record *n + 1* can be created by one archiver only, so the number is also the fence: a zombie's record is refused. A
reader that has seen *n* records asks for *n + 1* and never lists a folder. Where a trajectory lies is looked up in the
tables of `index.py`, so that what a process holds does not grow with the run.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from trajstore.archive.archived import Archived, OfPack
from trajstore.archive.index import Hit, Line, Table, hash_of, make_table
from trajstore.archive.pack import PackedTrajectory, decode_trajectory, encode_trajectory
from trajstore.archive.pack_arrays import PackArrays
from trajstore.archive.record import Record, decode_record, encode_record, record_path, require_listed
from trajstore.archive.storage.protocol import Storage
from trajstore.archive.stored_tables import StoredTables
from trajstore.errors import Corrupt, Fenced, SchemaError
from trajstore.events import EventId
from trajstore.summary import Summary

__all__ = ["Manifest"]

log = logging.getLogger(__name__)

_RECORDS = 1024


class Manifest:
    """The records of one partition, read incrementally. Thread-safe.

    Args:
        storage, incarnation: of the archive.
        partition: whose.
        packs: the archive's.
    """

    def __init__(self, storage: Storage, partition: int, packs: PackArrays, *, incarnation: str) -> None:
        self._storage = storage
        self._partition = partition
        self._packs = packs
        self._stored = StoredTables(storage, partition, incarnation=incarnation)
        self._lock = threading.RLock()
        self._newest = 0
        self._is_whole = False
        self._tables: list[Table] = []
        self._unlisted: set[int] = set()
        self._listed: set[int] = set()
        self._unstored: set[int] = set()
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._replaced: frozenset[int] = frozenset()
        self._dropped: frozenset[int] = frozenset()

    def refresh(self, *, without: Collection[int] = ()) -> int:
        """Notice records written since; returns the number of the newest.

        A damaged record is passed over where a lookup table says what it did; whoever needs the record is told.

        Args:
            without: records whose packs are about to be given up, so that nobody needs their lists of trajectories.

        Raises:
            Corrupt: a record, or the list of trajectories of its pack, cannot be read.
            SchemaError: a record of a newer format.
        """
        with self._lock:
            before = self._newest
            while (table := self._next()) is not None:
                self._take(table)
            if self._newest > before:
                self._tables = self._stored.consolidated(self._tables, self._newest, write=False)
            if not self._is_whole:
                self._require_whole()
            for number in sorted(self._unlisted.difference(without)):
                self._list_again(number)
            return self._newest

    def _next(self) -> Table | None:
        """The table of the records that follow, None if there are none yet."""
        number = self._newest + 1
        try:
            record = self._load(number)
        except Corrupt:
            table = self._stored.after(self._newest)
            if table is None:
                raise
            return table
        if record is None:
            return None
        table = self._stored.after(self._newest)
        if table is not None:
            return table
        try:
            made = self._made_table(record)
            self._unstored.add(number)
            return made
        except Corrupt:  # a later record may have given it up
            self._unlisted.add(number)
            return make_table(number, (), replaced=record.replaces, dropped=record.drops)

    def _list_again(self, number: int) -> None:
        """A pack's list that could not be read: needed no more, or restored from a copy, or an error still."""
        if number in self._replaced or self.is_given_up(number):
            self._unlisted.discard(number)
            return
        single = next((i for i, known in enumerate(self._tables) if known.first == known.last == number), None)
        if single is not None:  # else a larger table, which knows its lines, has come in its place
            self._tables[single] = self._made_table(self.record(number))
            self._unstored.add(number)
        self._unlisted.discard(number)

    def _require_whole(self) -> None:
        """Once: is the newest record really that? One that is gone would hide all later ones."""
        number = self._newest + 1
        later = self._load(number + 1) is not None or self._stored.after(self._newest) is not None
        if later and self._load(number) is None:  # in this order: all may be written meanwhile
            raise Corrupt(
                f"the manifest record {self._where(number)} is missing, though what is written after it is there; "
                "`trajstore rebuild` makes it anew"
            )
        self._is_whole = True

    def append(self, record: Record, packed: Sequence[PackedTrajectory]) -> None:
        """Publish a record durably, then the lookup tables that it completes, and those that were found missing.

        Its number is one above the newest that the archiver knew when it decided what to archive: a record written
        since by another makes that decision stale, and has taken the number.

        Args:
            packed: the lines of its pack's `trajectories`.

        Raises:
            Fenced: another archiver has written this number.
        """
        try:
            self._storage.create(self._path(record.number), encode_record(record))
        except FileExistsError as error:
            if not self._is_written(record):
                raise Fenced(
                    f"record {record.number} of partition {record.partition} was written by another archiver; this "
                    "one's lease is over, and its pack stays unpublished"
                ) from error
        with self._lock:
            lines, offset = [], 0
            for line in packed:
                length = len(encode_trajectory(line))
                lines.append(Line(line.id, offset, length))
                offset += length
            table = make_table(record.number, lines, replaced=record.replaces, dropped=record.drops)
            if record.number == self._newest + 1:  # else a reader of this process has read it meanwhile
                self._remember(record)
                self._take(table)
            self._stored.write(table)
            self._tables = self._stored.consolidated(self._tables, self._newest, write=True)
            for known in self._tables:
                if known.first == known.last and known.first in self._unstored:
                    self._stored.write(known)
            self._unstored.clear()

    def _is_written(self, record: Record) -> bool:
        """Whoever stands between may send a put twice, and the answer to the second is that the first was there."""
        try:
            return self._storage.read(self._path(record.number)) == encode_record(record)
        except FileNotFoundError:
            return False

    def is_refused(self, number: int, pack: str) -> bool:
        """A record is another pack's, so no record will ever name this one. False where that cannot be told."""
        try:
            return self.record(number).pack != pack
        except (Corrupt, SchemaError):
            return False

    def find(self, id: str, *, listed: Iterable[int] = ()) -> Archived:
        """What is archived of a trajectory, as of the last refresh.

        Args:
            listed: records whose packs are known to list it.

        Raises:
            Corrupt: a record or a pack's list of trajectories cannot be read, or the lookup tables lead to another
                trajectory, or not to one of `listed`.
        """
        with self._lock:
            hits = self._hits(id)
            replaced, dropped = self._replaced, self._dropped
        if any(self._holds(hit, id) for hit in hits if hit.number in dropped and hit.number not in replaced):
            return Archived([], True)
        parts: list[tuple[Record, PackedTrajectory]] = []
        for hit in hits:
            if hit.number in replaced or hit.number in dropped:
                continue
            try:
                record = self.record(hit.number)
                line = self._line(record, hit, id)
            except Corrupt as error:
                raise Corrupt(f"trajectory {id}: {error}") from error
            if line.id == id:
                parts.append((record, line))
        missing = set(listed).difference(replaced, dropped, (record.number for record, _ in parts))
        if missing:
            raise Corrupt(
                f"trajectory {id} lies in the pack of record {min(missing)} of partition {self._partition}, to which "
                f"the lookup tables in {self._storage.location} do not lead; `trajstore rebuild` makes them anew"
            )
        return Archived(parts, False)

    def record(self, number: int) -> Record:
        """A record by its number.

        Raises:
            Corrupt: it is gone or cannot be read.
        """
        record = self._load(number)
        if record is None:
            raise Corrupt(f"the manifest record {self._where(number)} is missing; `trajstore rebuild` makes it anew")
        return record

    def is_live(self, number: int) -> bool:
        """False if a later record replaced or dropped this one's pack, as of the last refresh."""
        with self._lock:
            return number not in self._replaced and number not in self._dropped

    def is_dropped(self, id: str) -> bool:
        """Retention has dropped a trajectory, as of the last refresh. Reads nothing if it has not."""
        with self._lock:
            hits = self._hits(id) if self._dropped else []
            gone = [hit for hit in hits if hit.number in self._dropped and hit.number not in self._replaced]
        return any(self._holds(hit, id) for hit in gone)

    def has_dropped(self, number: int) -> bool:
        """A later record dropped this one's pack, as of the last refresh."""
        with self._lock:
            return number in self._dropped

    def is_given_up(self, number: int) -> bool:
        """A later record dropped this one's pack as a damaged one. Reads records only if the pack was dropped.

        Raises:
            Corrupt: a record cannot be read.
        """
        if not self.has_dropped(number):
            return False
        return any(number in self.record(other).lost for other in range(number + 1, self._newest + 1))

    def records(self) -> Iterator[Record]:
        """Every record up to the last refresh, oldest first."""
        return (self.record(number) for number in range(1, self._newest + 1))

    def live_numbers(self) -> list[int]:
        """Numbers of the records whose packs count, and of those that have none, as of the last refresh."""
        with self._lock:
            ended = self._replaced | self._dropped
            return [number for number in range(1, self._newest + 1) if number not in ended]

    def live(self) -> Iterator[Record]:
        """Records whose packs count, as of now, oldest first.

        Raises:
            Corrupt: one of them cannot be read.
        """
        return (record for record in map(self.record, self.live_numbers()) if record.pack)

    def lines(self, record: OfPack) -> Iterator[PackedTrajectory]:
        """What a record's pack holds of each trajectory.

        Raises:
            Corrupt: the list cannot be read, or is another pack's.
        """
        self._require_listed(record)
        data = self._packs.whole(record.pack, "trajectories")
        return (decode_trajectory(line, pack=record.pack) for line in data.splitlines())

    def summaries(self, *, on_corrupt: Callable[[Corrupt], None] | None = None) -> list[Summary]:
        """The newest archived summary of every trajectory, as of the last refresh. Holds them all.

        Args:
            on_corrupt: hears which records and packs cannot be read; trajectories that have a part there are left out.

        Raises:
            Corrupt: without `on_corrupt`, at the first.
        """
        newest: dict[str, Summary] = {}
        unread: set[int] = set()
        for number in self.live_numbers():
            try:
                record = self.record(number)
                for line in self.lines(record) if record.pack else ():
                    found, known = line.summary, newest.get(line.id)
                    if found is not None and (known is None or EventId.parse(known.last) < EventId.parse(found.last)):
                        newest[line.id] = found
            except Corrupt as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                unread.add(number)
        if unread:  # what else is known of these may be an older state
            newest = {id: one for id, one in newest.items() if unread.isdisjoint(hit.number for hit in self._hits(id))}
        return [summary for id, summary in newest.items() if not self.is_dropped(id)]

    def _hits(self, id: str) -> list[Hit]:
        wanted = hash_of(id)
        with self._lock:
            return [hit for table in self._tables for hit in table.find_hash(wanted)]

    def _holds(self, hit: Hit, id: str) -> bool:
        """A dropped pack held a trajectory. Where its list is damaged, the hash of the id says so."""
        try:
            return self._line(self.record(hit.number), hit, id).id == id
        except Corrupt:
            return True

    def _line(self, record: Record, hit: Hit, id: str) -> PackedTrajectory:
        """The line that was found for an id: its own, or that of one with the same hash."""
        data = self._packs.text(record.pack, "trajectories", hit.offset, hit.offset + hit.length)
        line = decode_trajectory(data, pack=record.pack)
        if line.id != id and hash_of(line.id) != hash_of(id):
            raise Corrupt(
                f"pack {record.pack} lists trajectory {line.id} where the lookup tables lead: its list is another "
                "pack's and is to be restored from a copy, or the tables are wrong and `trajstore rebuild` makes them "
                "anew"
            )
        return line

    def _made_table(self, record: Record) -> Table:
        """The table of one record, from its pack."""
        lines = [Line(*place) for place in self._lines_of(record)]
        return make_table(record.number, lines, replaced=record.replaces, dropped=record.drops)

    def _lines_of(self, record: Record) -> Iterator[Line]:
        if not record.pack:
            return
        self._require_listed(record)
        offset = 0
        for text in self._packs.whole(record.pack, "trajectories").splitlines(keepends=True):
            yield Line(decode_trajectory(text, pack=record.pack).id, offset, len(text))
            offset += len(text)

    def _require_listed(self, record: OfPack) -> None:
        """Once in a process: a pack's list of trajectories is that of its record."""
        if record.number not in self._listed:
            require_listed(self._storage, record if isinstance(record, Record) else self.record(record.number))
            self._listed.add(record.number)

    def _take(self, table: Table) -> None:
        self._tables.append(table)
        self._newest = table.last
        self._replaced |= table.replaced
        self._dropped |= table.dropped

    def _remember(self, record: Record) -> None:
        self._records[record.number] = record
        if len(self._records) > _RECORDS:
            self._records.popitem(last=False)

    def _load(self, number: int) -> Record | None:
        with self._lock:
            known = self._records.get(number)
            if known is not None:
                self._records.move_to_end(number)
                return known
        try:
            data = self._storage.read(self._path(number))
        except FileNotFoundError:
            return None
        record = decode_record(data, partition=self._partition, number=number, where=self._where(number))
        with self._lock:
            self._remember(record)
        return record

    def _where(self, number: int) -> str:
        return f"{self._path(number)} in {self._storage.location}"

    def _path(self, number: int) -> str:
        return record_path(self._partition, number)
