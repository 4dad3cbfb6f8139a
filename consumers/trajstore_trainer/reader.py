"""Reading what is ready: entries of the ready streams become folded trajectories, and are acknowledged after use."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap, Unavailable
from trajstore.fold import Policy
from trajstore.log.feed import worker_name
from trajstore.log.run import TRAINER_GROUP
from trajstore.ready import Delivery, EntryPlace, ReadyMember
from trajstore.ready_follower import ReadyFollower
from trajstore.store import Store
from trajstore.trajectory import Trajectory

__all__ = ["ReadyTrajectories", "TrajectoryReader"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadyTrajectories:
    """One ready entry: a complete group, or a single trajectory.

    Attributes:
        group: name, None for a trajectory without one.
        version: rises when the group is published again because a member was closed again, another one came, or an
            aborted one was deleted.
        trajectories: its members, folded, by id.
        missing: members that cannot be read, by id, with the reason: deleted ones, and damaged ones. Normally empty.
        delivery: what `TrajectoryReader.acknowledge` acknowledges.
    """

    group: str | None
    version: int
    trajectories: list[Trajectory]
    missing: dict[str, str] = field(default_factory=dict)
    delivery: Delivery


class TrajectoryReader:
    """A consumer of finished trajectories, for one thread. A context manager, which signs off at its end.

    Delivery is at least once: what was not acknowledged comes again, before anything new, to the next reader of the
    same name, or to any other of the group after `claim_seconds`. To the reader that has it, it does not.

    Args:
        store: of the run.
        group: consumer group; each group gets everything, its consumers share it. One that is new begins with what the
            ready streams still hold.
        consumer: name within the group, such as a rank; no two readers may run under one name at a time. Default: a
            name that nobody had.
        claim_seconds: how long a consumer may have something before others take it over; more than from one `take` to
            the next, or to `acknowledge`. None: this reader takes nothing over.

    Attributes:
        deleted: members that were published, and deleted before this reader came to them. A group lacks them; an entry
            without any other member is skipped and acknowledged.
    """

    def __init__(
        self,
        store: Store,
        *,
        group: str = TRAINER_GROUP,
        consumer: str | None = None,
        claim_seconds: float | None = 300.0,
    ) -> None:
        self._store = store
        self._group = group
        self._claim_seconds = claim_seconds
        self._queue = ReadyFollower(store.wire, store.keys, group, consumer or worker_name())
        self._former = dict.fromkeys(range(store.partitions if consumer else 0), "0-0")
        self._held: list[Delivery] = []
        self._outstanding: set[EntryPlace] = set()
        self._next_claim = 0.0
        self.deleted = 0

    def take(self, groups: int = 1, timeout: float = 60.0) -> list[ReadyTrajectories]:
        """Wait for entries that are ready.

        Args:
            groups: how many.
            timeout: seconds; then what is there is returned, even if it is fewer.

        Returns:
            1 to `groups` entries. Their payloads came together; a payload that has expired is folded again, at
            the event that was published (late recordings that came since then count).

        Raises:
            Unavailable: nothing was ready before the deadline, or the server does not answer (also a `TimeoutError`).
                What was found until then is returned by the next call.
        """
        ready = self.poll(groups, timeout, at_least=groups)
        if not ready:
            raise Unavailable(
                f"nothing was ready for group {self._group!r} of {self._store.location} within {timeout:g} s; is a "
                "materializer running (`trajstore materialize STORE`), and are trajectories being closed?"
            )
        return ready

    def poll(
        self, groups: int, timeout: float, *, at_least: int = 1, nbytes: int | None = None
    ) -> list[ReadyTrajectories]:
        """As `take`, but nothing at the deadline is no error.

        Args:
            groups: at most so many.
            timeout: seconds.
            at_least: it waits for so many, and then takes what more is there.
            nbytes: it reads no further once the payloads are so large; one entry is read, whatever its size.

        Raises:
            Unavailable: the server does not answer.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._fill(groups, at_least, deadline)
            if not self._held:
                return []
            if ready := self._read_held(self._first_held(groups, nbytes)):
                return ready

    def hold(self, claimed: Sequence[Delivery]) -> None:
        """Entries that were claimed for this consumer elsewhere: they come next."""
        self._hold(claimed)

    @property
    def in_hand(self) -> set[EntryPlace]:
        """Every entry that this reader has and did not acknowledge. Any thread may ask."""
        return self._outstanding.copy()

    def settled(self, places: Iterable[EntryPlace]) -> None:
        """These entries, which this reader gave, were acknowledged by others for it. Any thread may say so."""
        self._outstanding.difference_update(places)

    def forget(self, places: Iterable[EntryPlace]) -> None:
        """These entries are others' now, or acknowledged by others."""
        lost = set(places)
        self._held = [one for one in self._held if one.place not in lost]
        self._outstanding.difference_update(lost)

    def acknowledge(self, ready: Iterable[ReadyTrajectories]) -> None:
        """These entries were used: they do not come again, and their payloads go.

        Raises:
            Unavailable: the server does not answer; acknowledge again.
        """
        deliveries = [one.delivery for one in ready]
        self._queue.acknowledge(deliveries)
        self._outstanding.difference_update(one.place for one in deliveries)

    def close(self) -> None:
        """Sign off: the consumer's name goes from where it has nothing unacknowledged. It may read on all the same."""
        try:
            self._queue.leave()
        except Unavailable as error:  # what it has comes to others all the same
            log.warning("a reader of group %s left without signing off: %s", self._group, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, groups: int, at_least: int, deadline: float) -> None:
        """Hold at least so many entries, or what there is at the deadline; look for `groups`."""
        while len(self._held) < at_least:
            left = deadline - time.monotonic()
            self._look(groups - len(self._held), block=max(0.0, min(left, self._store.timeout / 2)))
            if left <= 0:
                break

    def _first_held(self, groups: int, nbytes: int | None) -> int:
        """How many of the held entries to read: up to `groups`, and until their payloads are `nbytes` large."""
        read = 0
        for count, delivery in enumerate(self._held[:groups], 1):
            read += sum(member.nbytes for member in delivery.group.members)
            if nbytes is not None and read >= nbytes:
                return count
        return min(groups, len(self._held))

    def _read_held(self, groups: int) -> list[ReadyTrajectories]:
        """Read up to so many entries of those held, but for those all of whose members were deleted."""
        taken = self._held[:groups]
        deleted, ready = self._read(taken)
        gone = [one for one in ready if deleted.issuperset(member.id for member in one.delivery.group.members)]
        self.acknowledge(gone)
        del self._held[: len(taken)]
        self.deleted += sum(member.id in deleted for one in taken for member in one.group.members)
        return [one for one in ready if one not in gone]

    def _look(self, count: int, *, block: float) -> None:
        """Find up to `count` entries: what this consumer once had, what silent ones have, what is new."""
        wanted = len(self._held) + count
        while self._former and len(self._held) < wanted:
            partition, after = next(iter(self._former.items()))
            had = self.in_hand  # another thread may settle some of it while the reply that still has them is on its way
            found, cursor = self._queue.unacknowledged(partition, after=after, count=wanted - len(self._held))
            if cursor is None:
                del self._former[partition]
            else:
                self._former[partition] = cursor
            self._hold([one for one in found if one.place not in had])
        if self._claim_seconds is not None and len(self._held) < wanted and time.monotonic() >= self._next_claim:
            found = self._queue.take_over(
                idle=self._claim_seconds,
                count=wanted - len(self._held),
                skip=lambda one: one.place in self._outstanding,
            )
            self._hold(found)
            if len(self._held) < wanted:  # else there may be more
                self._next_claim = time.monotonic() + self._claim_seconds / 4
        if len(self._held) < wanted:
            if self._claim_seconds is not None:
                block = max(0.0, min(block, self._next_claim - time.monotonic()))
            self._hold(self._queue.poll(count=wanted - len(self._held), block=block))

    def _hold(self, found: Sequence[Delivery]) -> None:
        for one in found:  # an entry may be there twice: its former consumer took it back in between
            if one.place not in self._outstanding:
                self._held.append(one)
                self._outstanding.add(one.place)

    def _read(self, deliveries: Sequence[Delivery]) -> tuple[set[str], list[ReadyTrajectories]]:
        """Ids of deleted members, and the entries."""
        members = {_version(member): member for delivery in deliveries for member in delivery.group.members}
        folds = dict(zip(members, self._queue.folds(list(members.values())), strict=True))
        deleted = self._queue.deleted(members.values())  # after the folds: what is not deleted by now was not before
        ready = []
        for delivery in deliveries:
            entry = delivery.group
            trajectories: list[Trajectory] = []
            missing: dict[str, str] = {}
            for member in entry.members:
                laid = None if member.id in deleted else folds[_version(member)]
                try:
                    trajectories.append(self._fold(member, laid, cast(Policy, entry.policy)))
                except (NotFound, Corrupt, SequenceGap, RoutingError, SchemaError) as error:
                    if isinstance(error, NotFound) and self._store.tombstone(member.id) is not None:
                        deleted.add(member.id)
                    else:
                        log.error("%s of group %s is ready and cannot be read: %s", member.id, entry.group, error)
                    missing[member.id] = str(error)
            ready.append(
                ReadyTrajectories(
                    group=entry.group,
                    version=entry.version,
                    trajectories=trajectories,
                    missing=missing,
                    delivery=delivery,
                )
            )
        return deleted, ready

    def _fold(self, member: ReadyMember, laid: Trajectory | Corrupt | None, policy: Policy) -> Trajectory:
        """As it lay ready, else folded again.

        A materializer with another policy, or that came later to an aborted trajectory, lays another fold in its place.
        """
        wanted = (member.id, member.at, policy)
        if isinstance(laid, Corrupt):
            log.warning("the ready payload of %s is damaged and is folded again: %s", member.id, laid)
        elif laid is not None:
            found = (laid.id, laid.at, laid.policy)
            if found == wanted:
                return laid
            log.warning("the ready payload of %s at %s by %s is that of %s at %s by %s; folded again", *wanted, *found)
        return self._store.load(member.id, policy=policy, until=member.at)


def _version(member: ReadyMember) -> tuple[str, int]:
    return member.id, member.version
