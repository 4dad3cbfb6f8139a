"""The account at the end of a chaos run: what every process has entered, against what is there.

Whoever got the turn: what is there of an epoch must be the beginning of a turn that was begun, in its place, byte for
byte, and every turn that was acknowledged must be there whole. Only where the server died without a sync of every
command may some of its last seconds be gone, and that is counted apart.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import msgspec

import trajstore
from tests.core.logs import Log
from tests.soak.chaos.ledger import Entered, Line, TrainedOn, lines_of, read_ledgers
from tests.soak.chaos.trainer import Checkpoint
from tests.soak.chaos.turns import NOTES, Turn, calls_of, copy_of, play_note_to_memory, play_to_memory
from tests.soak.check import check_events, plain
from tests.soak.ledger import digest
from trajstore.archive.verify.verify import verify
from trajstore.blob import to_blob
from trajstore.entries import Event
from trajstore.fold import POLICIES, plan

__all__ = ["Account", "settle"]

MAY_BE_GONE = 2.5
"""Seconds before the death of a server under `everysec` that its log may lack."""

EXPECTED = {"Fenced", "Unavailable", "StoreFull", "Conflict"}
"""What a writer may be told while everything goes wrong; where the server may lose something, also `TOLD`."""

TOLD = {"SequenceGap", "NotFound"}


class Account(msgspec.Struct):
    """What was found.

    Attributes:
        trajectories, events, notes: that are there.
        acknowledged: events and notes that writers were told are written.
        unsure: events and notes that are there although nobody was told so.
        lost: acknowledged ones that are gone, as a server that died under `everysec` may have it; of these
        lost_told: those of trajectories of which a writer was told.
        doubled: events that are there twice: never.
        taken_over: turns that came after another writer's.
        errors: what writers were told, by kind.
        published: versions of groups and of trajectories by themselves that trainers were given.
        trained_once: trajectories in the checkpoints exactly once.
        trained_again: further times, by acknowledgement; by checkpoint only where the server lost something.
    """

    trajectories: int = 0
    events: int = 0
    notes: int = 0
    acknowledged: int = 0
    unsure: int = 0
    lost: int = 0
    lost_told: int = 0
    doubled: int = 0
    taken_over: int = 0
    errors: dict[str, int] = {}
    published: int = 0
    trained_once: int = 0
    trained_again: int = 0


def settle(
    store: trajstore.Store,
    *,
    archive: str,
    options: Mapping[str, str],
    ledgers: Iterable[Path],
    checkpoints: Iterable[Path],
    journals: Iterable[Path],
    losses: Sequence[float],
    killed: Set[str],
    durable: bool,
) -> Account:
    """Compare everything with everything.

    Args:
        store: of the run; all of it is archived.
        archive, options: where, to be opened by itself.
        ledgers, checkpoints, journals: of writers, of ranks by checkpoint, of ranks by acknowledgement.
        losses: when the server died, monotonic seconds.
        killed: lives of writers that were killed. A writer that lives writes again what its server lost.
        durable: it syncs each command.

    Raises:
        AssertionError: something is missing, doubled, foreign, not what was written, or unsound.
    """
    account = Account()
    told, errors = read_ledgers(ledgers)
    account.errors = dict(Counter(line.kind for line in errors))
    unexpected = [line for line in errors if line.kind not in (EXPECTED if durable else EXPECTED | TOLD)]
    assert not unexpected, f"writers were told what nobody expects: {unexpected[:3]}"
    offline = trajstore.open_archive(archive, options=options)
    final: dict[str, str] = {}
    for id, entered in told.items():
        about = [line for line in errors if line.id == id]
        newest = _check(store, offline, id, entered, about, losses=losses, killed=killed, account=account)
        if newest:
            final[id] = newest
    assert {one.id for one in store.list(status=None)} <= set(told), "nobody wrote these"
    found = [finding for finding in verify(store, options=options) if finding.severity != "information"]
    assert found == [], found
    _check_hot(store)
    _check_training(final, checkpoints, journals, durable=durable, account=account)
    return account


def _check(
    store: trajstore.Store,
    offline: Any,
    id: str,
    entered: Sequence[Entered],
    errors: Sequence[Line],
    *,
    losses: Sequence[float],
    killed: Set[str],
    account: Account,
) -> str:
    """One trajectory; the id of its newest event, "" if there is none."""
    entries = sorted(store.archive.read_parts(id, store.archive.find(id)), key=lambda entry: entry.at)
    twice = [at for at, count in Counter((entry.note, entry.at) for entry in entries).items() if count > 1]
    assert not twice, f"{id}: archived twice: {twice}"
    events = [event for entry in entries if not entry.note for event in entry.events]
    payloads = dict(zip([event.id for event in events], store.archive.payloads(id, events), strict=True))

    log: Log | None = None
    kept: set[str] = set()
    writers: list[str] = []
    for epoch, group in groupby(events, key=lambda event: event.at.epoch):
        of_epoch = list(group)
        begun = [one for one in entered if one.turn.kind not in NOTES and one.turn.epoch == epoch]
        log, winner = _whose(id, of_epoch, payloads, begun, log)
        kept.add(winner.turn.key)
        writers.append(winner.turn.key.split("/")[0])
        if winner.acknowledged is None:
            account.unsure += len(of_epoch)
        else:
            missing = _events_of(winner.turn) - len(of_epoch)
            _lose(missing, winner, errors, losses, killed, account)
            account.acknowledged += len(of_epoch)
    if log is not None:
        assert [event.at.epoch for event in log.events if event.at.seq == 0] == list(
            range(1, log.events[-1].at.epoch + 1)
        ), f"{id}: epochs are missing"
        check_events(store, id, events, log.events, log.payloads)
    notes = [event for entry in entries if entry.note for event in entry.events]
    kept |= _check_notes(store, id, notes, entered, log, account)

    for one in entered:
        if one.acknowledged is not None and one.turn.key not in kept:
            _lose(_events_of(one.turn), one, errors, losses, killed, account)
    account.trajectories += bool(events)
    account.events += len(events)
    account.notes += len(notes)
    account.taken_over += sum(before != after for before, after in pairwise(writers))
    if log is None:
        return ""
    log.notes = notes
    log.payloads |= dict(zip([note.id for note in notes], store.archive.payloads(id, notes), strict=True))
    for policy in POLICIES:
        fold = to_blob(plan(events, policy, notes=notes).apply(log.fetch, id=id))
        for place in (store, offline):
            assert to_blob(place.load(id, policy=policy)) == fold, f"{id}: {policy} folds to something else"
    return log.events[-1].id


def _lose(
    count: int,
    one: Entered,
    errors: Sequence[Line],
    losses: Sequence[float],
    killed: Set[str],
    account: Account,
) -> None:
    """So many events of an acknowledged turn are not there.

    That may be only where the server died soon after, without a sync, and then a writer was told, or is dead itself.
    """
    if not count:
        return
    what = f"{one.turn.id}: acknowledged and gone: {count} events of {one.turn}; {errors}"
    acknowledged = one.acknowledged or 0.0  # entered by a process that may have stood still since it was told
    assert any(one.begun <= death <= acknowledged + MAY_BE_GONE for death in losses), what
    was_told = any(line.kind in TOLD | {"Fenced"} for line in errors)
    assert was_told or one.turn.key.partition("/")[0] in killed, f"{what}; its writer lives, and nobody was told"
    account.acknowledged += count
    account.lost += count
    account.lost_told += count * was_told


def _events_of(turn: Turn) -> int:
    return 1 if turn.kind == "create" else len(calls_of(turn))


def _whose(
    id: str, found: Sequence[Event], payloads: Mapping[str, bytes], begun: Sequence[Entered], log: Log | None
) -> tuple[Log, Entered]:
    """Which of the turns that were begun the events of an epoch are the beginning of, and the log with them.

    Two closes may look the same; then it is the one that was acknowledged, or, after a loss, acknowledged last.
    """
    for one in sorted(begun, key=lambda one: one.acknowledged or 0.0, reverse=True):
        if log is None and one.turn.kind != "create":
            continue
        played = play_to_memory(one.turn, log, events=len(found))
        made = played.events[-len(found) :]
        if [(event.id, plain(event.header), payloads[event.id]) for event in found] == [
            (event.id, plain(event.header), played.payloads[event.id]) for event in made
        ]:
            return played, one
    raise AssertionError(f"{id}: nobody wrote {[event.id for event in found]}; begun were {begun}")


def _check_notes(
    store: trajstore.Store,
    id: str,
    notes: Sequence[Event],
    entered: Sequence[Entered],
    log: Log | None,
    account: Account,
) -> set[str]:
    """Notes have no order, and a crash may renumber them; each is there at most once. Keys of those that are there."""
    found = Counter(
        (plain(note.header), digest(note.type, data))
        for note, data in zip(notes, store.archive.payloads(id, notes), strict=True)
    )
    kept = set()
    for one in entered:
        if one.turn.kind not in NOTES or log is None:
            continue
        made = copy_of(log)
        made.notes = []
        play_note_to_memory(one.turn, made)
        note = made.notes[0]
        known = (plain(note.header), digest(note.type, made.payloads[note.id]))
        if found[known]:
            assert found[known] == 1, f"{id}: a note is there {found[known]} times: {one.turn}"
            del found[known]
            kept.add(one.turn.key)
            account.acknowledged += one.acknowledged is not None
            account.unsure += one.acknowledged is None
    assert not found, f"{id}: notes that nobody wrote: {found}"
    return kept


def _check_hot(store: trajstore.Store) -> None:
    """Nothing is left: all is final, archived, and its keys have gone."""
    for partition in range(store.partitions):
        assert store.wire.call("XPENDING", store.keys.feed(partition), "archiver")[0] == 0
        prefix = store.keys.entries_prefix(partition).removesuffix("e:")
        for kind in ("e:", "n:", "p:"):
            left = store.wire.call("KEYS", (prefix + kind).replace("{", "\\{") + "*")
            assert left == [], f"left in the hot log: {left}"


def _check_training(
    final: Mapping[str, str], checkpoints: Iterable[Path], journals: Iterable[Path], *, durable: bool, account: Account
) -> None:
    """Each trajectory is in the checkpoints once and in the journals at least once, as it stood in the end.

    Each version of a group was published once.
    """
    held = [
        one
        for path in checkpoints
        if path.exists()
        for one in msgspec.json.decode(path.read_bytes(), type=Checkpoint).trained
    ]
    entered = [one for path in journals for one in lines_of(path, TrainedOn)]
    places: dict[tuple[str, int], set[str]] = {}
    for one in [*held, *entered]:
        places.setdefault((one.group, one.version), set()).add(one.place)
    account.published = len(places)
    by_checkpoint = Counter(member for one in held for member in one.members)
    by_acknowledgement = Counter(member for one in entered for member in one.members)
    for how, counts in (("checkpoint", by_checkpoint), ("acknowledgement", by_acknowledgement)):
        missing = [id for id, at in final.items() if (id, at) not in counts]
        assert not missing, f"by {how}, {len(missing)} trajectories were not trained on as they are: {missing[:5]}"
    account.trained_once = sum(count == 1 for count in Counter(id for id, _ in by_checkpoint.elements()).values())
    account.trained_again = sum(count - 1 for count in by_acknowledgement.values())
    if durable:
        doubled = {one: where for one, where in places.items() if len(where) > 1}
        assert not doubled, f"published more than once: {doubled}"
        again = [one for one, count in by_checkpoint.items() if count > 1]
        assert not again, f"trained on more than once by checkpoint: {again[:5]}"
        assert len(by_checkpoint) == len(final), "trained on as it did not stay"
