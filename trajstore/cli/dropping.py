"""Which packs `gc` drops, by its options, and the dropping. What may be dropped is decided in `upkeep/retention.py`."""

import logging
from typing import NamedTuple

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.upkeep.ledger import Ledgers, Noted, numbers_of
from trajstore.archive.upkeep.retention import (
    drop,
    expired,
    free_dropped,
    given_up,
    held_by,
    named,
    nothing_hot,
    still_hot,
)
from trajstore.cli.damage import Damage
from trajstore.errors import Corrupt, Fenced
from trajstore.log.feed import worker_name
from trajstore.store import Store

__all__ = ["Choice", "Dropped"]

log = logging.getLogger(__name__)

_TRIES = 10
"""An archiver at work writes records, too; whoever comes second looks again."""


class Dropped(NamedTuple):
    """A pack that is dropped.

    Attributes:
        lost: it is damaged and given up.
        ids: of the trajectories in a lost one, as far as its list can be read.
    """

    record: Noted
    lost: bool
    ids: list[str] | None


class Choice:
    """Which packs are to be dropped, by the options of `gc`.

    Args:
        reader, run: of the archive, and its run if it has a server.
        before: drop what is older, Unix seconds; None for nothing by its age.
        packs: names of packs to be dropped.
        whole: also where trajectories in them have parts in other packs.
        lost: they are damaged and given up.
        damage: hears what cannot be read.

    Attributes:
        ledgers: what was read of the records.
    """

    def __init__(
        self,
        reader: ArchiveReader,
        run: Store | None,
        before: float | None,
        packs: tuple[str, ...],
        *,
        whole: bool,
        lost: bool,
        damage: Damage,
    ) -> None:
        self.ledgers = Ledgers(reader, without=packs if lost else ())
        self._reader = reader
        self._run = run
        self._before = before
        self._packs = packs
        self._whole = whole
        self._lost = lost
        self._damage = damage
        self._busy = nothing_hot if run is None else still_hot(run.wire, run.keys)

    def named(self, partition: int | None = None) -> list[Noted]:
        """Packs of one partition that were named, or of all."""
        wanted = [pack for pack in self._packs if partition is None or pack.startswith(f"{partition:02}/")]
        if self._lost:
            return given_up(self._reader, wanted)
        return named(self._reader, wanted, whole=self._whole, busy=self._busy)

    def look(self, partition: int) -> list[Dropped]:
        """Packs of one partition that may go, by name or by age."""
        by_name = {one.number: one for one in self.named(partition)}
        found = {
            number: Dropped(one, self._lost, held_by(self._reader, one) if self._lost else None)
            for number, one in by_name.items()
        }
        if self._before is not None:
            old = expired(
                self.ledgers.of(partition), before=self._before, busy=self._busy, on_corrupt=self._damage.hear
            )
            found |= {one.number: Dropped(one, False, None) for one in old if one.number not in found}
        return [found[number] for number in sorted(found)]

    def drop(self, partition: int) -> list[Dropped]:
        """Drop them, in one record, and what the hot log holds of trajectories that have been dropped."""
        dropped = self._drop(partition)
        run = self._run
        if run is not None:
            try:
                gone = free_dropped(run.wire, run.keys, run.hot, self._reader.manifest(partition), partition)
            except Corrupt as error:
                self._damage.hear(error)
                return dropped
            if gone:
                log.warning("%d dropped trajectories were removed from the hot log, %s among them", len(gone), gone[0])
        return dropped

    def _drop(self, partition: int) -> list[Dropped]:
        writer = worker_name()
        manifest = self._reader.manifest(partition)
        without = numbers_of(self._packs, partition) if self._lost else ()
        for left in reversed(range(_TRIES)):
            try:
                number = manifest.refresh(without=without) + 1
            except Corrupt as error:
                self._damage.hear(error)
                return []
            chosen = self.look(partition)
            if not chosen:
                return []
            records = [one.record for one in chosen]
            lost = [one.record.number for one in chosen if one.lost]
            try:
                drop(self._reader, partition, records, number=number, writer=writer, busy=self._busy, lost=lost)
                return chosen
            except Fenced as error:
                if not left:
                    raise
                log.info("%s", error)
        return []
