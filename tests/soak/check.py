"""What must be true after a crash loop: every acknowledged event once, and nothing that nobody wrote.

The only losses are those that an error has reported to the writer, and those only where the server does not fsync.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

import trajstore
from tests.core.logs import Log
from tests.servers import RealServer
from tests.soak.crash_loop import LEASE, RUN
from tests.soak.ledger import Told, digest, event_digests, read_ledger
from tests.soak.script import life, open_log, play_to_log
from trajstore.archive.verify.verify import verify
from trajstore.archiver import Archiver
from trajstore.blob import to_blob
from trajstore.entries import Event
from trajstore.events import EventId, TrajectoryClosed
from trajstore.fold import POLICIES, plan
from trajstore.log.batch import payload_field
from trajstore.opening import read_archive

__all__ = ["Account", "check_events", "drain_and_check", "plain"]


class Account(msgspec.Struct):
    """What was found.

    Attributes:
        trajectories, events, notes: in the archive.
        unsure: events that were found although never acknowledged.
        reported: errors that writers were told.
        lost: acknowledged events that these took away.
        renumbered: payloads that notes left under numbers that they did not get.
    """

    trajectories: int = 0
    events: int = 0
    notes: int = 0
    unsure: int = 0
    reported: int = 0
    lost: int = 0
    renumbered: int = 0


def drain_and_check(
    ledgers: Iterable[Path], server: RealServer, *, seed: int, archive: str, options: Mapping[str, str]
) -> Account:
    """Close what is open, archive everything by a fresh archiver, and compare it with the ledgers.

    Raises:
        AssertionError: something is missing, doubled, foreign, or not what was written.
    """
    told: dict[str, Told] = {}
    for path in ledgers:
        told |= read_ledger(path)
    durable = server.options["appendfsync"] == "always"
    with trajstore.open(server.url(RUN), archive_options=options, create=False) as store:
        closed = _close_open(store, told)
        Archiver(store, lease_seconds=LEASE, grace_seconds=0.05).run(once=True)
        left = store.backlog()
        assert (left.trajectories, left.nbytes, left.seconds) == (0, 0, 0.0), left
        account = Account()
        offline = trajstore.open_archive(archive, options=options)
        for id, about in told.items():
            _check(store, offline, id, about, seed=seed, closed=id in closed, durable=durable, account=account)
        _check_hot(store, account)
        found = [finding for finding in verify(store, options=options) if finding.severity != "information"]
        assert found == [], found
    reader = read_archive(archive, options)
    lines = [
        line.id for p in range(reader.info.partitions) for r in _live(reader, p) for line in reader.manifest(p).lines(r)
    ]
    assert set(lines) <= set(told), "nobody wrote these"
    return account


def _live(reader: Any, partition: int) -> Any:
    reader.manifest(partition).refresh()
    return reader.manifest(partition).live()


def _close_open(store: trajstore.Store, told: Iterable[str]) -> set[str]:
    """Close as aborted what no archiver would take: its segment is open, for its writer was killed; or it has none."""
    closed = set()
    for id in told:
        try:
            history = store.plan(id).history
        except trajstore.NotFound:
            continue
        if history.has_open_segment or history.last == (1, 0):
            store.get(id).close("aborted", takeover=True)
            store.flush(id)
            closed.add(id)
    return closed


def _check(
    store: trajstore.Store,
    offline: Any,
    id: str,
    about: Told,
    *,
    seed: int,
    closed: bool,
    durable: bool,
    account: Account,
) -> None:
    turns = [[], *life(seed, id)]
    acknowledged, begun = _played(turns[: about.acknowledged]), _played(turns[: about.begun])
    assert about.events == event_digests(acknowledged), f"{id}: the ledger and the seed tell different stories"
    needed = len(acknowledged.events)
    account.reported += len(about.errors)
    for error in about.errors:
        if error.kind == "Unavailable":  # asked while the server was away; what was acknowledged must be there
            continue
        assert not durable, f"{id}: {error}"
        assert error.kind in ("SequenceGap", "Fenced"), f"{id}: {error}"
        kept = error.last_good and sum(event.at <= EventId.parse(error.last_good) for event in begun.events)
        needed = min(needed, int(kept or 0))

    entries = sorted(store.archive.read_parts(id, store.archive.find(id)), key=lambda entry: entry.at)
    twice = [at for at, count in Counter((entry.note, entry.at) for entry in entries).items() if count > 1]
    assert not twice, f"{id}: archived twice: {twice}"
    events = [event for entry in entries if not entry.note for event in entry.events]
    closed |= bool(about.errors) and _closed_beside(events, begun)  # by its writer, after it was told of a loss
    found = len(events) - closed
    assert needed <= found <= len(begun.events), (
        f"{id}: {found} events, of {needed} acknowledged and not lost, {len(begun.events)} begun; {about.errors}"
    )
    expected = _cut(begun, found, closed=closed)
    check_events(store, id, events, expected.events, expected.payloads)
    expected.notes, payloads = _check_notes(store, id, entries, acknowledged, begun, whole=not about.errors)
    expected.payloads |= payloads
    account.trajectories += bool(events)
    account.events += len(events)
    account.notes += len(expected.notes)
    account.unsure += max(0, found - len(acknowledged.events))
    account.lost += max(0, len(acknowledged.events) - found)
    if not events:
        return
    assert [event.id for event in offline.events(id)] == [event.id for event in expected.events]
    for policy in POLICIES:
        fold = plan(events, policy, notes=expected.notes).apply(expected.fetch, id=id)
        for place in (store, offline):
            assert to_blob(place.load(id, policy=policy)) == to_blob(fold), f"{id}: {policy} folds to something else"


def _closed_beside(events: list[Event], begun: Log) -> bool:
    """The newest event is a close, at a place where the script has none."""
    if not events or not isinstance(events[-1].header, TrajectoryClosed):
        return False
    return all((event.at, event.header) != (events[-1].at, events[-1].header) for event in begun.events)


def _played(turns: list[Any]) -> Log:
    log = open_log()
    for turn in turns:
        play_to_log(turn, log)
    if not turns:
        log.events = []
    return log


def _cut(log: Log, count: int, *, closed: bool) -> Log:
    """The log as it stands after so many events, and closed by the check."""
    log.events = log.events[:count]
    if closed:
        log.close("aborted")
    return log


def check_events(
    store: trajstore.Store, id: str, found: list[Event], expected: list[Event], payloads: Mapping[str, bytes]
) -> None:
    """Archived events are, byte for byte, those that are expected."""
    assert [event.id for event in found] == [event.id for event in expected], f"{id}: other ids"
    bytes_found = list(store.archive.payloads(id, found))
    for event, wanted, data in zip(found, expected, bytes_found, strict=True):
        assert plain(event.header) == plain(wanted.header), f"{id} {event.id}: another header"
        assert data == payloads[wanted.id], f"{id} {event.id}: another payload"


def _check_notes(
    store: trajstore.Store, id: str, entries: Iterable[Any], acknowledged: Log, begun: Log, *, whole: bool
) -> tuple[list[Event], dict[str, bytes]]:
    """Notes have no order, and a crash may renumber them; but each is there once. They and their payloads, as found."""
    notes = [event for entry in entries if entry.note for event in entry.events]
    payloads = list(store.archive.payloads(id, notes))
    found = Counter((plain(note.header), digest(note.type, data)) for note, data in zip(notes, payloads, strict=True))
    assert found <= _notes(begun), f"{id}: notes that nobody wrote, or twice"
    assert not whole or found >= _notes(acknowledged), f"{id}: acknowledged notes are missing"
    return notes, {note.id: data for note, data in zip(notes, payloads, strict=True)}


def _notes(log: Log) -> "Counter[Any]":
    return Counter((plain(note.header), digest(note.type, log.payloads[note.id])) for note in log.notes)


def plain(header: Any) -> Any:
    """A header as it is the same in the hot log, the archive and a ledger: without inline bytes, and the nonce of the
    turn that a late recording belongs to."""
    if getattr(header, "turn", None):
        header = msgspec.structs.replace(header, turn="")
    payload = getattr(header, "payload", None)
    return header if payload is None else msgspec.structs.replace(header, payload=None)


def _check_hot(store: trajstore.Store, account: Account) -> None:
    """Nothing that is archived is left, and no payload of an entry."""
    for partition in range(store.partitions):
        assert store.wire.call("XPENDING", store.keys.feed(partition), "archiver")[0] == 0
        prefix = store.keys.entries_prefix(partition).removesuffix("e:")
        for kind in ("e:", "n:"):
            left = {key: store.wire.call("XLEN", key) for key in _keys(store, prefix + kind)}
            assert not any(left.values()), f"left in the hot log: {left}"
        for key in _keys(store, prefix + "p:"):
            id = key.removeprefix(prefix + "p:")
            archived = {payload_field(note.at, note.nonce, note=True) for note in store.notes(id)}
            fields = {field.decode() for field in store.wire.call("HKEYS", key)}
            assert all(field.startswith("n") for field in fields - archived), f"{id}: payloads left: {fields}"
            assert not fields & archived, f"{id}: archived payloads left: {fields & archived}"
            account.renumbered += len(fields)


def _keys(store: trajstore.Store, prefix: str) -> list[str]:
    return [key.decode() for key in store.wire.call("KEYS", prefix.replace("{", "\\{") + "*")]
