"""What an archiver does while there is nothing to archive: compactions, one after the other, its leases kept."""

import logging
import math
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from trajstore.archive.reader import ArchiveReader
from trajstore.archive.upkeep.candidates import Candidates
from trajstore.archive.upkeep.compaction import compact
from trajstore.archive.writer import PublishStep
from trajstore.errors import Corrupt, Fenced, SchemaError

__all__ = ["IdleCompaction", "Step"]

log = logging.getLogger(__name__)

_LOOKED_BACK = 1024
"""Records in which whoever takes a partition looks for packs to compact; `trajstore compact` looks at all."""


class Step(NamedTuple):
    """What one step came to.

    Attributes:
        compactions: done, 0 or 1.
        more: there may be more to do at once.
        lost: partition that another archiver has taken, or None.
    """

    compactions: int = 0
    more: bool = True
    lost: int | None = None


class IdleCompaction:
    """Compactions of the partitions that an archiver holds.

    Args:
        archive: of the run.
        writer: name of the archiver.
        pack_bytes: payload bytes up to which packs are merged.
        renew: prolongs the lease of a partition; False if it is another's.
        every: seconds after which leases are renewed.
        on_step: hears the steps of a publish.
    """

    def __init__(
        self,
        archive: ArchiveReader,
        *,
        writer: str,
        pack_bytes: int,
        renew: Callable[[int], bool],
        every: float,
        on_step: Callable[[PublishStep], None],
    ) -> None:
        self._archive = archive
        self._writer = writer
        self._pack_bytes = pack_bytes
        self._renew = renew
        self._every = every
        self._on_step = on_step
        self._candidates: dict[int, Candidates] = {}

    def step(self, held: Collection[int]) -> Step:
        """Compact in one of the partitions held, if it is due; or look for what is due.

        Raises:
            Unavailable: archive or server do not answer.
        """
        self._candidates = {partition: one for partition, one in self._candidates.items() if partition in held}
        for partition in held:
            try:
                candidates = self._of(partition)
                if not candidates.look():
                    return Step()
            except (SchemaError, Corrupt) as error:  # of its manifest; the other partitions go on
                log.error(
                    "nothing of partition %d is compacted: %s",
                    partition,
                    error,
                    extra={"event": "compaction-failed", "partition": partition},
                )
                continue
            records = candidates.due()
            if not records:
                continue
            renewed = -math.inf

            def stay(partition: int = partition) -> None:
                nonlocal renewed
                if time.monotonic() >= renewed + self._every:
                    renewed = time.monotonic()
                    if not {other: self._renew(other) for other in held}[partition]:
                        raise Fenced(f"the lease of partition {partition} went to another archiver")

            try:
                compact(
                    self._archive, partition, records, writer=self._writer, on_step=self._on_step, on_trajectory=stay
                )
            except Fenced as error:
                log.warning("%s", error, extra={"event": "fenced", "partition": partition})
                return Step(lost=partition)
            except (SchemaError, Corrupt) as error:
                candidates.pass_over(records)
                log.error(
                    "packs of partition %d stay as they are: %s",
                    partition,
                    error,
                    extra={"event": "compaction-failed", "partition": partition},
                )
                return Step()
            return Step(compactions=1)
        return Step(more=False)

    def _of(self, partition: int) -> Candidates:
        known = self._candidates.get(partition)
        if known is not None:
            return known
        newest = self._archive.manifest(partition).refresh()
        since = max(0, newest - _LOOKED_BACK)
        self._candidates[partition] = Candidates(self._archive, partition, pack_bytes=self._pack_bytes, since=since)
        return self._candidates[partition]
