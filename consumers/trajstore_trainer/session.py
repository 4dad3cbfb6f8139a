"""One consumer at work: threads that read ahead and keep its claims, and what was handed out and not acknowledged.

The reading thread alone uses the reader, and holds at most the prefetch in memory. The keeping thread makes the claims
fresh four times per lease, whether or not anybody asks for a group and however long a group takes to be read.
"""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from trajstore.errors import Unavailable
from trajstore.events import EventId
from trajstore.ready import Delivery, EntryPlace
from trajstore.store import Store
from trajstore_trainer.claims import Claims, Slot, consumer_name
from trajstore_trainer.filtered import Filtered
from trajstore_trainer.reader import ReadyTrajectories, TrajectoryReader
from trajstore_trainer.repeating import RepeatingThread

__all__ = ["Session"]

log = logging.getLogger(__name__)

_BLOCK = 0.25


class Session:
    """A consumer from its first read to its end.

    Args:
        store: of the run.
        group: consumer group.
        slot: its place in the job.
        is_predecessor: places whose earlier consumers it follows; what they have is taken at once.
        may_take_over: asked about a silent consumer with its name.
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
        may_take_over: Callable[[str], bool],
        lease: float,
        prefetch_groups: int,
        prefetch_bytes: int,
    ) -> None:
        self.consumer = consumer_name(slot)
        self.handed: dict[EntryPlace, Filtered | None] = {}
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
        self._claiming = threading.Lock()  # held while what the reader has is compared with what the server says
        self._ready: deque[ReadyTrajectories] = deque()
        self._taken: set[EntryPlace] = set()
        self._settled: set[EntryPlace] = set()
        self._gone: set[EntryPlace] = set()
        self._adopted = False
        self._kept_at = time.monotonic()
        self._wanted_at = 0.0
        self._next_look = 0.0
        self._take_over_from = 0.0
        self._largest = 0
        self._process = os.getpid()
        self._reading = self._thread("read", self._read_ahead)
        self._keeping = self._thread("keep its claims", self._keep_fresh)
        self._threads = (self._reading, self._keeping)
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    # The trainer's side

    def peek(self, seconds: float) -> ReadyTrajectories | None:
        """The next group, which stays where it is; None if there is none within so many seconds, or something is lost.

        Raises:
            TrajstoreError: what ended a thread.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._taken or self._has_ended(), timeout=seconds)
            if self._ready:
                return self._ready[0]
            self._refuse_ended()
            return None

    def pause(self, seconds: float) -> None:
        """Wait for so many seconds, or until something was lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken or self._has_ended(), timeout=seconds)

    def hand_out(self, ready: ReadyTrajectories, filtered: Filtered | None) -> bool:
        """Take the next group; False if it is not the next any more, for others took it over."""
        with self._changed:
            if not self._ready or self._ready[0] is not ready:
                return False
            self._ready.popleft()
            self.handed[ready.delivery.place] = filtered
            self._changed.notify_all()
            return True

    def hand_back(self, ready: ReadyTrajectories) -> None:
        """What was handed out last was not used: it is the next again, if it is this consumer's still."""
        with self._changed:
            place = ready.delivery.place
            del self.handed[place]
            if place not in self._gone | self._taken | self._settled:
                self._ready.appendleft(ready)

    def settled(self, places: Collection[EntryPlace]) -> None:
        """These were acknowledged."""
        for place in places:
            self.handed.pop(place, None)
        self._reader.settled(places)

    def lost(self, timeout: float) -> set[EntryPlace]:
        """What was handed out and is others' now, until it is settled. If the last look is too old, waits for another.

        Raises:
            Unavailable: the server did not answer before the deadline, so that nobody knows.
            TrajstoreError: what ended a thread.
        """
        with self._changed:
            asked = time.monotonic()
            if asked - self._kept_at > self._lease:
                self._wanted_at = asked
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._kept_at >= asked or self._keeping.ended, timeout=timeout)
                if self._kept_at < asked:
                    self._refuse_ended()
                    raise Unavailable(f"{self.consumer} could not renew its claims: {self.trouble}") from self.trouble
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
        """Why a thread cannot do its work just now."""
        return next((thread.trouble for thread in self._threads if thread.trouble is not None), None)

    def close(self) -> None:
        """End the threads. What was handed out, and what was read ahead, comes again to whoever follows."""
        if self._process != os.getpid():  # a forked child at its end: the consumer is its parent's
            return
        atexit.unregister(self.close)
        with self._changed:
            for thread in self._threads:
                thread.stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._ready.clear()
        if not any(thread.failure or thread.trouble for thread in self._threads):
            try:
                self._claims.leave()
            except Unavailable as error:
                log.warning("%s left without signing off: %s", self.consumer, error)

    def _has_ended(self) -> bool:
        return any(thread.ended for thread in self._threads)

    def _refuse_ended(self) -> None:
        for thread in self._threads:
            if thread.ended:
                raise thread.failure or Unavailable(f"{thread.name} has ended; see the log")

    # The keeping thread's side

    def _keep_fresh(self) -> None:
        with self._changed:
            left = self._kept_at + self._lease / 4 - time.monotonic()
            self._changed.wait_for(lambda: self._keeping.stopping or self._keep_is_due(), timeout=max(0.0, left))
        with self._claiming:
            if self._keep_is_due():
                self._keep()

    def _keep_is_due(self) -> bool:
        return self._kept_at <= max(self._wanted_at, time.monotonic() - self._lease / 4)

    def _keep(self) -> set[EntryPlace]:
        """Make the claims fresh, and see which are gone.

        Returns:
            Those that the reader does not have. Unless it reads just now, it never heard of them: a reply was lost.
        """
        held, began = self._reader.in_hand, time.monotonic()
        mine = self._claims.keep()
        gone = sorted(held - mine - self._gone)
        owners = self._claims.owners(gone)
        with self._changed:
            for place, owner in zip(gone, owners, strict=True):
                (self._settled if owner is None else self._taken).add(place)
            self._gone.update(gone)
            self._ready = deque(one for one in self._ready if one.delivery.place not in self._gone)
            # After a while without the server the others may be as late as this one: they get a lease to come back.
            if began - self._kept_at > self._lease / 2:
                self._take_over_from = began + self._lease
            self._kept_at = began
            self._changed.notify_all()
        return mine - held

    # The reading thread's side

    def _read_ahead(self) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._look()
            self._next_look = now + self._lease / 4
        wait = min(_BLOCK, max(0.0, self._next_look - now))
        room = self._room()
        if room is None:
            self._reading.pause(wait)
            return
        groups, nbytes = room
        try:
            self._put(self._reader.poll(groups, wait, nbytes=nbytes))
        except OSError:
            self._next_look = 0.0  # the reply that was lost may have brought something
            raise

    def _look(self) -> None:
        """Let go of what is gone, hold what a lost reply brought, and look for what the dead had."""
        with self._claiming:
            unheard = self._keep()
            self._reader.forget(self._gone)
            self._gone.clear()
        self._hold(self._claims.read(sorted(unheard)), "%s has %d entries that it had not heard of")
        if not self._adopted:
            found = self._claims.adopt(self._is_predecessor)
            self.again += len(found)
            self._hold(found, "%s has %d entries that its predecessors had")
            self._adopted = True
        elif (room := self._room()) and time.monotonic() >= self._take_over_from:
            found = self._claims.take_over(room[0], may=self._may_take_over)
            self.taken_over += len(found)
            self._hold(found, "%s takes over %d entries of silent consumers")

    def _hold(self, found: list[Delivery], message: str) -> None:
        self._reader.hold(sorted(found, key=lambda one: EventId.parse(one.at)))
        if found:
            log.info(message, self.consumer, len(found))

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
            self._ready.extend(one for one in found if one.delivery.place not in self._gone)
            self._largest = max([self._largest, *map(_nbytes, self._ready)])
            self._changed.notify_all()

    # Threads

    def _thread(self, work: str, step: Callable[[], None]) -> RepeatingThread:
        return RepeatingThread(
            step,
            name=f"trajstore-{self.consumer} ({step.__name__.strip('_')})",
            complaint=f"{self.consumer} cannot {work} just now",
            changed=self._changed,
        )


def _nbytes(ready: ReadyTrajectories) -> int:
    return sum(member.nbytes for member in ready.delivery.group.members)
