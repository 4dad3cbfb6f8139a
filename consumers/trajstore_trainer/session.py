"""One consumer at work: a thread that reads ahead and keeps the claims, and what was handed out and not acknowledged.

The thread alone uses the reader. It holds at most the prefetch in memory, and makes the claims fresh four times per
lease, whether or not anybody asks for a group.
"""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from trajstore.errors import TrajstoreError, Unavailable
from trajstore.events import EventId
from trajstore.store import Store
from trajstore_trainer.claims import Claims, Place, Slot, consumer_name
from trajstore_trainer.filtered import Filtered
from trajstore_trainer.reader import ReadyTrajectories, TrajectoryReader

__all__ = ["Session", "place_of"]

log = logging.getLogger(__name__)

_BLOCK = 0.25
_PAUSE = 0.5


class Session:
    """A consumer from its first read to its end.

    Args:
        store: of the run.
        group: consumer group.
        slot: its place in the job.
        is_predecessor: places whose earlier consumers it follows; what they have is taken at once.
        may_take_over: asked about a silent consumer with its name, and whether it was alive after this one began.
        lease: seconds after which a silent consumer counts as dead.
        prefetch_groups, prefetch_bytes: how far it reads ahead; it stops at either.

    Attributes:
        consumer: its name.
        handed: entries handed out and not acknowledged, and what is to go on record of each.
        taken_over: entries that silent consumers had.
        again: entries that its predecessors had.
    """

    def __init__(
        self,
        store: Store,
        *,
        group: str,
        slot: Slot,
        is_predecessor: Callable[[Slot], bool],
        may_take_over: Callable[[str, bool], bool],
        lease: float,
        prefetch_groups: int,
        prefetch_bytes: int,
    ) -> None:
        self.consumer = consumer_name(slot)
        self.handed: dict[Place, Filtered | None] = {}
        self.taken_over = 0
        self.again = 0
        self._reader = TrajectoryReader(store, group=group, consumer=self.consumer, claim_seconds=None)
        self._claims = Claims(store.wire, store.keys, group=group, consumer=self.consumer, lease=lease)
        self._is_predecessor = is_predecessor
        self._may_take_over = may_take_over
        self._lease = lease
        self._prefetch_groups = prefetch_groups
        self._prefetch_bytes = prefetch_bytes
        self._changed = threading.Condition()
        self._ready: deque[ReadyTrajectories] = deque()
        self._taken: set[Place] = set()
        self._settled: set[Place] = set()
        self._adopted = False
        self._kept_at = time.monotonic()
        self._next_keep = 0.0
        self._take_over_from = 0.0
        self._trouble: OSError | None = None
        self._failure: TrajstoreError | None = None
        self._largest = 0
        self._process = os.getpid()
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"trajstore-{self.consumer}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # The trainer's side

    def peek(self, seconds: float) -> ReadyTrajectories | None:
        """The next group, which stays where it is; None if there is none within so many seconds, or something is lost.

        Raises:
            TrajstoreError: what ended the thread.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self._taken, timeout=seconds)
            if self._ready:
                return self._ready[0]
            if self._ended:
                raise self._failure or Unavailable(f"the reading thread of {self.consumer} has ended; see the log")
            return None

    def hand_out(self, ready: ReadyTrajectories, filtered: Filtered | None) -> bool:
        """Take the next group; False if it is not the next any more, for others took it over."""
        with self._changed:
            if not self._ready or self._ready[0] is not ready:
                return False
            self._ready.popleft()
            self.handed[place_of(ready)] = filtered
            self._changed.notify_all()
            return True

    def settled(self, places: Collection[Place]) -> None:
        """These were acknowledged."""
        for place in places:
            self.handed.pop(place, None)
        self._reader.settled(places)

    def lost(self, timeout: float) -> set[Place]:
        """What was handed out and is others' now, until it is settled. If the last look is too old, waits for another.

        Raises:
            Unavailable: the server did not answer before the deadline, so that nobody knows.
        """
        with self._changed:
            if time.monotonic() - self._kept_at > self._lease:
                asked, self._next_keep = time.monotonic(), 0.0
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._kept_at >= asked, timeout=timeout):
                    raise Unavailable(f"{self.consumer} could not renew its claims: {self._trouble}") from self._trouble
            self._taken &= self.handed.keys()
            lost, settled = self._taken.copy(), self._settled & self.handed.keys()
            self._settled = set()
        for place in settled:
            del self.handed[place]
        return lost

    @property
    def prefetched(self) -> int:
        """Groups in memory."""
        return len(self._ready)

    @property
    def trouble(self) -> OSError | None:
        """Why the thread cannot read just now."""
        return self._trouble

    def close(self) -> None:
        """End the thread. What was handed out, and what was read ahead, comes again to whoever follows."""
        if self._process != os.getpid():  # a forked child at its end: the consumer is its parent's
            return
        atexit.unregister(self.close)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()
        if self._failure is None and self._trouble is None:
            try:
                self._claims.leave()
            except Unavailable as error:
                log.warning("%s left without signing off: %s", self.consumer, error)

    # The thread's side

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._work()
                    self._trouble = None
                except OSError as error:  # Unavailable and StoreFull are such
                    if self._trouble is None:
                        log.warning("%s cannot read just now, and keeps trying: %s", self.consumer, error)
                    self._trouble = error
                    self._pause(_PAUSE)
        except TrajstoreError as error:
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _work(self) -> None:
        now = time.monotonic()
        room = self._room()
        if now >= self._next_keep:
            self._keep(room)
            self._next_keep = now + self._lease / 4
        wait = min(_BLOCK, max(0.0, self._next_keep - now))
        if room:
            groups, nbytes = room
            self._put(self._reader.poll(groups, wait, nbytes=nbytes))
        else:
            self._pause(wait)

    def _keep(self, room: tuple[int, int] | None) -> None:
        """Make the claims fresh, see which are gone, and look for those of the dead."""
        held, began = self._reader.in_hand, time.monotonic()
        gone = sorted(held - self._claims.keep())
        if gone:
            self._forget([Place(*one) for one in gone])
        with self._changed:
            # After a while without the server the others may be as late as this one: they get a lease to come back.
            if began - self._kept_at > self._lease / 2:
                self._take_over_from = began + self._lease
            self._kept_at = began
            self._changed.notify_all()
        if not self._adopted:
            found = self._claims.adopt(self._is_predecessor)
            self.again += len(found)
            self._reader.hold(sorted(found, key=lambda one: EventId.parse(one.at)))
            self._adopted = True
            if found:
                log.info("%s has %d entries that its predecessors had", self.consumer, len(found))
        elif room and began >= self._take_over_from:
            found = self._claims.take_over(room[0], may=self._may_take_over)
            self.taken_over += len(found)
            self._reader.hold(found)
            if found:
                log.info("%s takes over %d entries of silent consumers", self.consumer, len(found))

    def _forget(self, gone: list[Place]) -> None:
        """These are not among the claims any more: others took them over, or acknowledged them."""
        owners = self._claims.owners(gone)
        self._reader.forget(gone)
        lost = set(gone)
        with self._changed:
            for place, owner in zip(gone, owners, strict=True):
                (self._settled if owner is None else self._taken).add(place)
            self._changed.notify_all()
            self._ready = deque(one for one in self._ready if place_of(one) not in lost)

    def _room(self) -> tuple[int, int] | None:
        """How many groups and bytes more to read; None while the prefetch is full.

        What is claimed is kept from other ranks, so no more groups than fit if they are as large as the largest so far.
        """
        with self._changed:
            groups = self._prefetch_groups - len(self._ready)
            nbytes = self._prefetch_bytes - sum(map(_nbytes, self._ready))
        if groups <= 0 or nbytes <= 0:
            return None
        return (min(groups, 1 + nbytes // self._largest) if self._largest else 1), nbytes

    def _put(self, found: Iterable[ReadyTrajectories]) -> None:
        with self._changed:
            self._ready.extend(found)
            self._largest = max([self._largest, *map(_nbytes, self._ready)])
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if not self._stopping:
                self._changed.wait(seconds)


def place_of(ready: ReadyTrajectories) -> Place:
    """Where an entry lies."""
    return Place(ready.delivery.partition, ready.delivery.at)


def _nbytes(ready: ReadyTrajectories) -> int:
    return sum(member.nbytes for member in ready.delivery.group.members)
