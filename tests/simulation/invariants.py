"""What must hold after each step: the server's writes, the archive's records and what readers see, against the ledger.

Two questions of the design are decided here for each command that removes something: is it stored elsewhere by now, and
does anybody still need it?
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from tests.simulation.disk import Disk, Files
from tests.simulation.ledger import Issue, Ledger
from tests.simulation.server import Group, Id, Server, Stream, Unit
from trajstore.archive.reader import ArchiveReader
from trajstore.archive.record import decode_record
from trajstore.archive.root import ArchiveRoot
from trajstore.blob import to_blob
from trajstore.entries import Event, decode_known, entry_digest
from trajstore.errors import NotFound, SequenceGap
from trajstore.events import EventId, LateRouting, SegmentOpened, TrajectoryClosed, TrajectoryDeleted, TrajectoryOpened
from trajstore.fold import POLICIES, plan
from trajstore.history import read_history
from trajstore.log.feed import ARCHIVER
from trajstore.log.keys import Keys
from trajstore.ready import ReadyGroup, assembly_name
from trajstore.store import Store
from trajstore.summary import decode_summary

__all__ = ["ABANDON_SECONDS", "GROUP_SECONDS", "Invariants"]

ABANDON_SECONDS = 8.0
"""For how long nothing must have come of a segment, at least, that an archiver closes as abandoned."""

GROUP_SECONDS = 6.0
"""How long a group waits, by the server's clock, where somebody publishes it without those that are late."""

_CLOSING = ("TrajectoryOpened", "SegmentClosed", "Rewarded", "TrajectoryClosed", "TrajectoryDeleted")
"""Events with which an epoch is finished."""

_ALL = b"18446744073709551615-0"
"""Above every entry."""

_group = msgspec.msgpack.Decoder(ReadyGroup)


class Invariants:
    """Watches one run.

    Attributes:
        log: by trajectory, every entry that the server's file holds, trimmed ones too: bytes by id.
        archived: digest of each archived entry, by (trajectory, note, id).
        undeleted: trajectories of which the server has forgotten the deletion; notes that had gone with it are back.
        strays: hashes that a late request made of payloads of nobody, when the other keys were let go already.
        lost: by trajectory, how often the server has forgotten entries of it.
        published: ready entries in the server's file: version by name, newest.
        newest: the newest of them by name, whole.
        used: (name, version) that some trainer has trained on by acknowledgement.
        durable: by each consumer group that trains by checkpoint, the entries that its durable ones hold.
    """

    def __init__(self, server: Server, disk: Disk, ledger: Ledger, keys: Keys, location: str) -> None:
        self.server = server
        self.disk = disk
        self.ledger = ledger
        self.keys = keys
        self.location = location
        self.log: dict[str, dict[Id, bytes]] = {}
        self.notes: dict[str, dict[Id, bytes]] = {}
        self.archived: dict[tuple[str, bool, Id], str] = {}
        self.deleted: set[str] = set()
        self.undeleted: set[str] = set()
        self.strays: set[bytes] = set()
        self.lost: dict[str, int] = {}
        self.published: dict[str, int] = {}
        self.newest: dict[str, ReadyGroup] = {}
        self._let_go: set[str] = set()
        self._waits: dict[str, int] = {}
        self._written: dict[str, list[int]] = {}
        self.deliveries: dict[tuple[int, Id], ReadyGroup] = {}
        self.used: set[tuple[str, int]] = set()
        self.durable: dict[bytes, set[str]] = {}
        self.offered_ever: set[tuple[str, int]] = set()
        self.checked = 0
        self._records: list[str] = []
        self._reader: ArchiveReader | None = None
        self._prefixes = {keys.entries_prefix(p).encode(): p for p in range(keys.partitions)}
        self._feeds = {keys.feed(p).encode(): p for p in range(keys.partitions)}
        self._readies = {keys.ready(p).encode(): p for p in range(keys.partitions)}
        server.watchers.append(self._before)
        server.observers.append(self._after)
        disk.on_create = self._created

    # Of the server

    def _before(self, command: Sequence[bytes]) -> None:
        name, key = command[0].upper(), command[1]
        if (name == b"XTRIM" and key in self._feeds) or (name == b"XTRIM" and key in self._readies):
            self._require_unneeded(key, command[3])
        elif name == b"XTRIM":
            self._require_stored(key, command[3])
        elif name == b"PEXPIRE":  # by then nobody may be left to archive it
            self._require_stored(key, _ALL)
            if b":e:" in key:
                self._let_go.add(_name(key))
        elif name == b"HSET" and b":p:" in key and key not in self.server.keys and _name(key) in self._let_go:
            if not any(self._holder(key, field) for field in command[2::2]):
                self.strays.add(key)
        elif name == b"UNLINK":
            for one in command[1:]:
                self._require_stored(one, _ALL)
                for field in self.server.keys.get(one, ()) if b":p:" in one else ():
                    self._require_payload_unneeded(one, field)
        elif name == b"HDEL" and b":p:" in key:
            for field in command[2:]:
                self._require_payload_unneeded(key, field)
        elif name == b"XACK" and key in self._feeds and command[2] == ARCHIVER.encode():
            self._require_archived(key, command[3:])
        elif name == b"XACK" and key in self._readies:
            self._require_used(key, command[2], command[3:])

    def _after(self, command: Sequence[bytes], reply: Any) -> None:
        name, key = command[0].upper(), command[1]
        if name == b"XADD":
            at = _id(reply)
            if key in self._readies:
                self._ready(key, at, command[-1], checked=True)
            elif b":e:" in key:
                self._entry(_name(key), at, command[-1], checked=True)
            elif b":n:" in key:
                self._note(_name(key), at, command[-1], checked=True)
        elif name == b"HSETNX" and key.endswith(b":waiting") and reply:
            self._waits[command[2].decode()] = self.server.ms
        elif name == b"HDEL" and key.endswith(b":waiting"):
            self._waits.pop(command[2].decode(), None)

    def _entry(self, id: str, at: Id, data: bytes, *, checked: bool) -> None:
        mine = self.log.setdefault(id, {})
        entry = decode_known(data)
        if checked:
            issued = self.ledger.turns.get((id, entry.nonce), [])
            wanted = [issue.header for issue in issued[at[1] : at[1] + len(entry.events)]]
            assert list(entry.events) == wanted, f"{id}: entry {at} is not what its writer handed in"
            by_archiver = str(self.ledger.owner_of(issued[at[1]].lane)).startswith("archiver")
            decided = issued[at[1]].ms  # what comes between that and the closing itself was too late
            written = [ms for ms in self._written.get(id, ()) if ms <= decided]
            if by_archiver and written and not self.lost.get(id):  # else it may have been written again
                quiet = (decided - written[-1]) / 1000
                assert quiet > ABANDON_SECONDS - 1.0, f"{id} is closed as abandoned {quiet} s after its last event"
            self._written.setdefault(id, []).append(self.server.ms)
            before = self._newest(id)
            if before is None:
                assert at == (1, 0), f"{id} begins with {at}"
            else:
                newest, count, nonce = before
                if at[0] == newest[0]:
                    assert at == (newest[0], newest[1] + count), f"{id}: {at} was written above {newest}+{count}: a gap"
                    assert nonce == entry.nonce, f"{id}: two writers in epoch {at[0]}"
                else:
                    assert at >= (newest[0] + 1, 0), f"{id}: {at} after {newest}"
                    assert at[1] == 0, f"{id}: an epoch begins with {at}"
            assert id not in self.deleted, f"{id}: {at} was written after its tombstone"
        mine[at] = data
        if isinstance(entry.events[0], TrajectoryDeleted):
            self.deleted.add(id)

    def _newest(self, id: str) -> tuple[Id, int, int] | None:
        """Newest entry that the server or the archive has: id, events, nonce."""
        mine = self.log.get(id)
        if not mine:
            return None
        newest = max(mine)
        entry = decode_known(mine[newest])
        return newest, len(entry.events), entry.nonce

    def _note(self, id: str, at: Id, data: bytes, *, checked: bool) -> None:
        if id in self.deleted:  # nobody reads it. Its stream may begin anew while an archiver is at the old one
            return
        mine = self.notes.setdefault(id, {})
        if checked:
            assert id in self.log or self.lost.get(id), f"{id}: note {at} is of a trajectory that was never there"
            header = decode_known(data).events[0]
            issued = [issue for issue in self.ledger.notes.get(id, ()) if issue.header == header]
            assert issued, f"{id}: note {at} was handed in by nobody"
            held = [one for one, other in mine.items() if decode_known(other).events[0] == header]
            assert not held or id in self.undeleted, f"{id}: note {at} was written before as {held}"
        mine[at] = data

    def _ready(self, key: bytes, at: Id, data: bytes, *, checked: bool) -> None:
        group = _group.decode(data)
        name = name_of(group)
        if checked:
            before = self.published.get(name, 0)
            assert group.version > before, f"{name} was published as {group.version} after {before}"
            if group.late and name in self._waits:
                waited = (self.server.ms - self._waits[name]) / 1000
                assert waited >= GROUP_SECONDS, f"{name} was published without {group.late} after {waited} s"
            for member in group.members:
                assert self._closes(member.id, EventId.parse(member.at)) == member.version, (
                    f"{name}: {member} is published under a version that its log does not have"
                )
        self.published[name] = group.version
        self.newest[name] = group
        self.deliveries[self._readies[key], at] = group
        self.offered_ever.add((name, group.version))

    def _closes(self, id: str, until: EventId) -> int:
        headers = [h for at in sorted(self.log[id]) for h in decode_known(self.log[id][at]).events if at <= until]
        return sum(type(header).__name__ == "TrajectoryClosed" for header in headers)

    def _require_stored(self, key: bytes, least: bytes) -> None:
        stream = self.server.stream(key)
        if stream is None or not (b":e:" in key or b":n:" in key):
            return
        id, note = _name(key), b":n:" in key
        for at in stream.ids:
            if at >= _id(least):
                break
            if id in self.deleted and (note or at < max(self.log[id])):
                continue
            assert (id, note, at) in self.archived, f"{id}: {'note' if note else 'entry'} {at} goes, unarchived"

    def _require_payload_unneeded(self, key: bytes, field: bytes) -> None:
        id, note = _name(key), field.startswith(b"n")
        holder = None if id in self.deleted else self._holder(key, field)
        assert holder is None or (id, note, holder) in self.archived, (
            f"{id}: the payload {field.decode()} goes, unarchived"
        )

    def _holder(self, key: bytes, field: bytes) -> Id | None:
        """The entry in the hot log that a payload belongs to; None if it is nobody's."""
        id, (place, _, nonce) = _name(key), field.decode().partition(":")
        note, at = place.startswith("n"), _id(place.lstrip("n").encode())
        stream = self.server.stream(self.keys.notes(id).encode() if note else self.keys.entries(id).encode())
        holders = [] if stream is None else [one for one in stream.ids if one[0] == at[0] and one <= at]
        if stream is None or not holders:
            return None
        entry = decode_known(stream.data[holders[-1]][-1])
        inside = at[1] < holders[-1][1] + len(entry.events)
        return holders[-1] if inside and f"{entry.nonce:016x}" == nonce else None

    def _require_archived(self, key: bytes, ids: Sequence[bytes]) -> None:
        """What these hints tell of is archived, or not finished, or another hint leads there still."""
        stream = self.server.stream(key)
        assert stream is not None
        group = stream.groups[ARCHIVER.encode()]
        going = set(map(_id, ids))
        left = [_hint(stream.data[at]) for at in stream.ids if at not in going]
        left = [
            hint
            for at, hint in zip([at for at in stream.ids if at not in going], left, strict=True)
            if at > group.last or at in group.pending
        ]
        for at in going & set(stream.data):
            id, note, event = _hint(stream.data[at])
            held = self.server.stream((self.keys.notes(id) if note else self.keys.entries(id)).encode())
            if held is None or event not in held.data or id in self.deleted or (id, note, event) in self.archived:
                continue
            if not note and self._is_open(held):
                continue  # the end of its newest epoch brings a hint
            others = [other for other in left if other[0] == id and other[1] == note and other[2] >= event]
            assert others, f"{id}: the hint of {event} is acknowledged before its archival"

    def _is_open(self, stream: Stream) -> bool:
        entries = [decode_known(stream.data[at][-1]) for at in stream.ids if at[0] == stream.ids[-1][0]]
        return not any(type(header).__name__ in _CLOSING for entry in entries for header in entry.events)

    def _require_unneeded(self, key: bytes, least: bytes) -> None:
        stream = self.server.stream(key)
        assert stream is not None
        gone = [at for at in stream.ids if at < _id(least)]
        for name, group in stream.groups.items():
            needed = [at for at in gone if at > group.last or at in group.pending]
            assert not needed, f"{key.decode()} is trimmed of {needed}, which {name.decode()} needs"

    def _require_used(self, key: bytes, consumers: bytes, ids: Sequence[bytes]) -> None:
        durable = self.durable.get(consumers)
        for at in map(_id, ids):
            group = self.deliveries.get((self._readies[key], at))
            if durable is not None:
                place = f"{self._readies[key]}/{at[0]}-{at[1]}"
                gone = group is None or self.deleted.issuperset(one.id for one in group.members)
                assert gone or place in durable, f"{place} is acknowledged, and no durable checkpoint has it"
                continue
            assert group is None or (name_of(group), group.version) in self.used, f"{group} acknowledged, not used"

    def forgot(self, lost: Sequence[Unit]) -> None:
        """The server came back without these units."""
        forgotten: list[tuple[str, bool, Id]] = []
        for unit in lost:
            for command in unit.commands:
                key = command[1]
                if command[0].upper() == b"XADD" and (b":e:" in key or b":n:" in key):
                    at = _id(command[-3])
                    forgotten.append((_name(key), b":n:" in key, at))
        for id, note, at in forgotten:
            assert (id, note, at) not in self.archived, f"{id}: {at} was archived before it was safe, and is lost now"
            self.lost[id] = self.lost.get(id, 0) + 1
        deleted = self.deleted
        self.log, self.notes, self.published, self.deliveries, self.deleted = {}, {}, {}, {}, set()
        self.newest, self._waits, self._written = {}, {}, {}
        for unit in self.server.aof:
            for command in unit.commands:
                key = command[1]
                if command[0].upper() != b"XADD":
                    continue
                if b":e:" in key:
                    self._entry(_name(key), _id(command[-3]), command[-1], checked=False)
                elif b":n:" in key:
                    self._note(_name(key), _id(command[-3]), command[-1], checked=False)
        self.undeleted |= deleted - self.deleted
        for key, partition in self._readies.items():
            for unit in self.server.aof:
                for command in unit.commands:
                    if command[0].upper() == b"XADD" and command[1] == key:
                        group = _group.decode(command[-1])
                        self.published[name_of(group)] = group.version
                        self.newest[name_of(group)] = group
            stream = self.server.stream(key)
            for at in stream.ids if stream is not None else ():
                self.deliveries[partition, at] = _group.decode(stream.data[at][-1])

    def drained(self) -> bool:
        """Nothing waits in the hot log, in the feeds or in the ready streams.

        But for notes of which the server has lost the trajectory: an archiver refuses them, and says so.
        """
        for key, held in self.server.keys.items():
            if not isinstance(held, Stream) or key.endswith(b":lease"):
                continue
            if b":e:" in key or b":n:" in key:
                if held.ids and not self._is_stray(_name(key)):
                    return False
            elif any(self._lags(held, group) for group in held.groups.values()):
                return False
        return True

    def holds_nothing_finished(self) -> bool:
        """The hot log has no entry and no note that could be archived, but of trajectories that somebody writes to.

        Of one that was only created no hint tells, and who looks for those writes down when; a full server takes none.
        """
        for key, held in self.server.keys.items():
            if not isinstance(held, Stream) or not (b":e:" in key or b":n:" in key) or not held.ids:
                continue
            id = _name(key)
            entries = self.server.stream(self.keys.entries(id).encode())
            is_bare = entries is not None and entries.ids == [(1, 0)]
            is_open = entries is not None and bool(entries.ids) and self._is_open(entries)
            if not (is_bare or is_open or self._is_stray(id)):
                return False
        return True

    def listed_open(self) -> list[str]:
        """Trajectories of which a summary says that a segment is open: an archiver closes it, or mends the summary."""
        kept = [self.server.keys.get(self.keys.summaries(p).encode(), {}) for p in range(self.keys.partitions)]
        return [id.decode() for some in kept for id, data in some.items() if decode_summary(data).has_open_segment]

    def unpublished(self, *, late_too: bool) -> list[str]:
        """Closed trajectories that lie in no ready entry as they are, though nothing is left to wait for.

        Args:
            late_too: a group waits for its members for a while only.
        """
        if any(self.lost.values()):
            return []  # a group may wait for one that is lost
        found = []
        ended: dict[str, list[str]] = {}
        for id, entries in self.log.items():
            headers = [header for at in sorted(entries) for header in decode_known(entries[at]).events]
            opened, turns = headers[0], [one for one in headers if isinstance(one, SegmentOpened | TrajectoryClosed)]
            assert isinstance(opened, TrajectoryOpened)
            name = assembly_name(id, opened.group, opened.group_size)
            is_closed = bool(turns) and isinstance(turns[-1], TrajectoryClosed)
            if is_closed or id in self.deleted:
                ended.setdefault(name, []).append(id)
            closes = sum(isinstance(one, TrajectoryClosed) for one in turns)
            newest = self.newest.get(name)
            lies = newest is not None and any((one.id, one.version) == (id, closes) for one in newest.members)
            if is_closed and id not in self.deleted and not lies:
                found.append((id, name, opened.group_size or 1))
        return [id for id, name, size in found if late_too or len(ended[name]) >= size]

    def _lags(self, stream: Stream, group: Group) -> bool:
        pending = [stream.data[at] for at in group.pending if at in stream.data]
        return group.last < stream.last or any(b"t" not in one or not self._is_stray(_hint(one)[0]) for one in pending)

    def _is_stray(self, id: str) -> bool:
        return id not in self.log and bool(self.lost.get(id))

    # Of the archive

    def _created(self, path: str) -> None:
        if path.startswith("manifest/"):
            self._records.append(path)

    def after_step(self) -> None:
        """Look at what was archived in this step."""
        while self._records:
            path = self._records.pop(0)
            partition, number = int(path.split("/")[1]), int(path.split("/")[2].split(".")[0])
            record = decode_record(self.disk.files[path], partition=partition, number=number, where=path)
            reader = self._archive()
            manifest = reader.manifest(partition)
            manifest.refresh()
            if not record.pack or record.replaces:
                continue
            for line in manifest.lines(record):
                for entry in reader.read_parts(line.id, reader.find(line.id)):
                    if entry.events and entry.events[0].stored != record.pack:
                        continue
                    self._archive_entry(line.id, entry)

    def _archive_entry(self, id: str, entry: Any) -> None:
        place = (id, entry.note, tuple(entry.at))
        assert place not in self.archived, f"{place} is archived twice"
        held = (self.notes if entry.note else self.log).get(id, {}).get(tuple(entry.at))
        assert held is not None, f"{place} is archived, and the log never had it: the archive ran ahead"
        assert entry.note or self._is_finished(id, tuple(entry.at)), f"{place} is archived, and its epoch goes on"
        assert entry_digest(held) == entry.digest, f"{place} is archived as something else"
        self.archived[place] = entry.digest

    def _is_finished(self, id: str, at: Id) -> bool:
        """A newer epoch has begun, or this one has its closing event."""
        mine = [decode_known(data) for one, data in self.log[id].items() if one[0] == at[0]]
        closed = any(type(header).__name__ in _CLOSING for entry in mine for header in entry.events)
        return closed or max(self.log[id])[0] > at[0]

    def _archive(self) -> ArchiveReader:
        if self._reader is None:
            root = ArchiveRoot(Files(self.disk, self.location, fails=False))
            self._reader = ArchiveReader(root, root.require())
        return self._reader

    # Of what readers see

    def check_reading(self, store: Store, id: str) -> None:
        """Read a trajectory, event for event, payload for payload, and folded: it is what its writers handed in."""
        try:
            events, notes = store.events(id), store.notes(id)
        except NotFound:
            return
        self.checked += 1
        wanted = [self._issue_of(id, event, i) for i, event in self._numbered(id, events)]
        noted = [self._note_issue(id, event) for event in notes]
        try:
            found = store.payloads(id, [event.id for event in [*events, *notes]])
        except NotFound:
            return  # deleted since
        for event, issue, payload in zip([*events, *notes], [*wanted, *noted], found, strict=True):
            assert bytes(payload) == issue.payload, f"{id}: the payload of {event.id} is another"
        payloads = {e.id: issue.payload for e, issue in zip([*events, *notes], [*wanted, *noted], strict=True)}
        for policy in POLICIES:
            try:
                expected = plan(events, policy, notes=notes).apply(lambda some: (payloads[e.id] for e in some), id=id)
            except SequenceGap:
                assert self.lost.get(id), f"{id} has a gap, and the server forgot nothing of it"
                continue
            self._require_own_notes(id, events, notes)
            try:
                loaded = store.load(id, policy=policy, until=events[-1].id)
            except NotFound:
                return
            if not [note for note in store.notes(id) if note.id not in payloads]:
                assert to_blob(loaded) == to_blob(expected), f"{id} folds as something else under {policy}"

    def _require_own_notes(self, id: str, events: Sequence[Event], notes: Sequence[Event]) -> None:
        """What folds as a late recording is of the segment that its writer meant."""
        nonces = {event.at.epoch: event.nonce for event in events}
        meant = {note.id: note.header.turn for note in notes if isinstance(note.header, LateRouting)}
        for segment in read_history(events, notes=notes).segments:
            for recording in segment.recordings:
                if recording.event in meant:
                    mine = f"{nonces[segment.epoch]:016x}"
                    assert meant[recording.event] == mine, f"{id}: {recording.event} is of another's segment"

    def _numbered(self, id: str, events: Sequence[Event]) -> list[tuple[int, Event]]:
        """Events with their place in their epoch: without a gap there, and by one writer."""
        result, before = [], None
        for event in events:
            if before is not None:
                assert event.at > before.at, f"{id}: {event.id} after {before.id}"
                if event.at.epoch == before.at.epoch:
                    assert event.nonce == before.nonce, f"{id}: epoch {event.at.epoch} has two writers"
                    assert event.at.seq == before.at.seq + 1, f"{id}: a gap before {event.id}"
            result.append((event.at.seq, event))
            before = event
        return result

    def _issue_of(self, id: str, event: Event, number: int) -> Issue:
        issued = self.ledger.turns.get((id, event.nonce), [])
        assert number < len(issued), f"{id}: {event.id} was not handed in"
        assert bare(issued[number].header) == bare(event.header), f"{id}: {event.id} was not handed in so"
        return issued[number]

    def _note_issue(self, id: str, event: Event) -> Issue:
        found = [issue for issue in self.ledger.notes.get(id, ()) if bare(issue.header) == bare(event.header)]
        assert found, f"{id}: {event.id} was handed in by nobody"
        return found[0]

    def present(self, issue: Issue) -> bool:
        """An event is in the log, as of the server's file and the archive."""
        if issue.note:
            return any(decode_known(data).events[0] == issue.header for data in self.notes.get(issue.id, {}).values())
        for at, data in self.log.get(issue.id, {}).items():
            entry = decode_known(data)
            if entry.nonce == issue.nonce and at[1] <= issue.number < at[1] + len(entry.events):
                return True
        return False


def name_of(group: ReadyGroup) -> str:
    """Under which a ready entry is put together."""
    return assembly_name(group.members[0].id, group.group, group.size)


def bare(header: Any) -> Any:
    """A header without the payload bytes that ride in it: in a pack they lie with the others."""
    info = getattr(header, "payload", None)
    if info is None or info.inline is None:
        return header
    return msgspec.structs.replace(header, payload=msgspec.structs.replace(info, inline=None))


def _hint(fields: Sequence[bytes]) -> tuple[str, bool, Id]:
    """Trajectory, note or not, and event of a feed entry."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    return named[b"t"].decode(), named[b"k"] in (b"RoutingObserved", b"LateRouting"), _id(named[b"e"])


def _name(key: bytes) -> str:
    """The trajectory of a key: what follows the third part."""
    return key.decode().rpartition(":")[2]


def _id(text: bytes) -> Id:
    epoch, _, seq = text.partition(b"-")
    return int(epoch), int(seq or 0)
