"""One handle's queue of events on their way to the log. Plain state; the flusher owns it and its lock guards it."""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from trajstore.errors import TrajstoreError
from trajstore.events import EventId
from trajstore.log.batch import BATCH_BYTES, BESIDE_BYTES, Batch, Item, Turn, freeze
from trajstore.summary import Summary

__all__ = ["Kept", "Lane", "Waiter"]


class Kept(NamedTuple):
    """An acknowledged batch that a server crash might still lose."""

    since: float
    batch: Batch


class Waiter:
    """Somebody who waits for several lanes to settle what they had queued."""

    def __init__(self, lanes: int) -> None:
        self.left = lanes
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # who gives up waiting must not cancel it under the flusher's hands
        if not lanes:
            self.future.set_result(None)

    def one_less(self) -> None:
        """A lane is through, or has failed."""
        self.left -= 1
        if self.left == 0:
            self.future.set_result(None)


class Lane:
    """Events of one trajectory by one handle, in order; notes have a lane of their own.

    Attributes:
        id: of the trajectory.
        note: feeds the notes stream.
        after: of notes whose trajectory is new: the lane that creates it, and without which they would be nobody's.
        queue: events not yet frozen.
        frozen: batches to send, the first of them perhaps in flight.
        kept: acknowledged batches younger than the fsync horizon, oldest first.
        acked, acked_nonce: newest entry known to be in the log, and its nonce.
        summary: of the trajectory as of the newest frozen event.
        holds_open: a segment of this handle is open.
        error: why nothing more can be written; sticky.
        queued, settled: events taken in, and events acknowledged or given up.
        since: when it last got on, by a monotonic clock; None while nothing waits.
        scheduled: waits for its turn, or has a batch in flight.
    """

    def __init__(
        self,
        id: str,
        *,
        note: bool = False,
        after: "Lane | None" = None,
        acked: EventId | None = None,
        acked_nonce: int | None = None,
        summary: Summary | None = None,
    ) -> None:
        self.id = id
        self.note = note
        self.after = after
        self.queue: deque[Item] = deque()
        self.frozen: deque[Batch] = deque()
        self.kept: deque[Kept] = deque()
        self.acked = acked
        self.acked_nonce = acked_nonce
        self.summary = summary
        self.holds_open = False
        self.error: TrajstoreError | None = None
        self.queued = 0
        self.settled = 0
        self.since: float | None = None
        self.scheduled = False
        self.waiters: list[tuple[int, Waiter]] = []
        self._noted: list[weakref.ref[Lane]] = []  # weak, for a lane ends with its handle
        if after is not None:
            after._noted.append(weakref.ref(self))

    def notes(self) -> Iterator["Lane"]:
        """The lanes that come after this one."""
        return (lane for lane in (ref() for ref in self._noted) if lane is not None)

    @property
    def busy(self) -> bool:
        """True while something waits to be acknowledged, or, after a loss of the server's, to be written again."""
        return self.settled < self.queued or bool(self.frozen)

    @property
    def waits(self) -> bool:
        """The trajectory is not in the log yet: it comes before its notes."""
        return self.after is not None and self.after.acked is None and self.after.error is None

    @property
    def stopped(self) -> TrajstoreError | None:
        """Why nothing more can be written, of it or of the trajectory that it notes something of."""
        if self.error is None and self.after is not None and self.after.acked is None:
            return self.after.error
        return self.error

    @property
    def in_question(self) -> Batch | None:
        """The first frozen batch, if it may be in the log: it went out, or is a note, whose number may be taken."""
        head = self.frozen[0] if self.frozen else None
        return head if head is not None and (head.sent or self.note) else None

    def take(self) -> list[Item]:
        """Events for the next batch, off the queue: of one turn, up to `BATCH_BYTES`, or a large one and what is small.

        None while a batch is frozen: that one is next.
        """
        items: list[Item] = []
        nbytes = largest = 0
        while not self.frozen and self.queue and (not items or self.queue[0].turn is items[0].turn):
            size = self.queue[0].nbytes
            nbytes, largest = nbytes + size, max(largest, size)
            if items and nbytes > BATCH_BYTES and nbytes - largest > BESIDE_BYTES:
                break
            items.append(self.queue.popleft())
            if self.note:  # one number each
                break
        return items

    def next_batch(self, items: Sequence[Item], now: float) -> Batch | None:
        """The batch to send now, made of what was taken; None if the lane failed meanwhile."""
        if items:
            if self.note:
                items[0].turn.epoch = self.acked.epoch + 1 if self.acked is not None else 1
            batch = freeze(self.id, items, note=self.note, summary=self.summary, now=now)
            self.summary = batch.summary or self.summary
            self.frozen.append(batch)
        return self.frozen[0] if self.frozen else None

    def mark_sent(self) -> Batch:
        """The first frozen batch, which goes out now: from here on its bytes do not change."""
        batch = self.frozen[0]
        if not batch.sent:
            batch.before, batch.before_nonce, batch.sent = self.acked, self.acked_nonce, True
        return batch

    def landed(self) -> None:
        """The first frozen batch is in the log."""
        batch = self.frozen.popleft()
        self.acked, self.acked_nonce = batch.at, batch.turn.nonce

    def write_again(self, batches: Sequence[Batch], acked: EventId | None, *, head: Batch | None, now: float) -> None:
        """The server lost what came after `acked`: these batches go out again, before what was not sent yet.

        Args:
            batches: the lost ones, and `head` after them.
            head: the frozen batch whose fate was in question, None for none.
            now: by a monotonic clock.
        """
        rest = list(self.frozen)[1:] if head is not None else list(self.frozen)
        self.frozen = deque([*batches, *rest])
        self.kept = deque(kept for kept in self.kept if kept.batch not in batches)
        self.acked, self.acked_nonce = acked, batches[0].before_nonce if batches else None
        self.since = self.since or now

    def renumber(self, number: int, *, creates: bool, now: float) -> None:
        """Freeze the first frozen note anew, under another number."""
        head = self.frozen[0]
        turn = Turn(number, creates=creates)
        items = [Item(turn, item.header, item.payload, item.since) for item in head.items]
        self.frozen[0] = freeze(self.id, items, note=True, summary=None, now=now)
        self.frozen[0].acked = head.acked

    def settle(self, events: int, now: float) -> None:
        """Count events as acknowledged or given up, and tell those who wait, once what was lost is written again."""
        self.settled += events
        self.since = now if self.busy else None
        if self.waiters and not (self.frozen and self.frozen[0].acked):
            through = [waiter for count, waiter in self.waiters if self.settled >= count]
            self.waiters = [(count, waiter) for count, waiter in self.waiters if self.settled < count]
            for waiter in through:
                waiter.one_less()

    def fail(self, error: TrajstoreError, now: float) -> int:
        """Give up everything queued; returns the bytes that this frees in the buffer."""
        self.error = error
        freed = sum(item.nbytes for item in self.queue)
        freed += sum(item.nbytes for batch in self.frozen if not batch.acked for item in batch.items)
        self.queue.clear()
        self.frozen.clear()
        self.kept.clear()
        self.settle(self.queued - self.settled, now)
        return freed
