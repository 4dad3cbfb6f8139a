"""The background writer of a store: one thread that sends the batches of many trajectories together (group commit).

Callers enqueue into a bounded buffer and do not wait. One batch per trajectory is in flight; the next one goes out only
after its reply. What a refusal or a lost reply meant is decided in `resolve.py`, from what the server shows.
"""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import redis

from trajstore.chance import Chance
from trajstore.entries import Buffer
from trajstore.errors import Conflict, StoreFull, TrajstoreError, Unavailable
from trajstore.events import EventId, Header
from trajstore.log.batch import Batch, Item, Turn
from trajstore.log.counts import WriterCounts
from trajstore.log.keys import Keys
from trajstore.log.lane import Kept, Lane, Waiter
from trajstore.log.resolve import (
    ArchiveIndex,
    Landed,
    Nothing,
    Refused,
    Renumber,
    Resend,
    Seen,
    Verdict,
    judge,
    judge_note,
)
from trajstore.log.stream import (
    ends_in_tombstone,
    nonce_of,
    parse_entries,
    stream_last_event,
    stream_last_id,
    stream_last_nonce,
)
from trajstore.log.wide import WideSession
from trajstore.log.wire import FULL_AT, Command, Wire, first_refusal, fullest
from trajstore.slabs import Slabs

__all__ = ["FSYNC_HORIZON", "KEPT_BYTES", "Flusher"]

log = logging.getLogger(__name__)

FSYNC_HORIZON = 3.0
"""Seconds after which an `everysec` server has certainly written an acknowledged entry to disk (it promises 2)."""

KEPT_BYTES = 64 << 20
"""Acknowledged batches that are kept until they are certainly on disk, at most. More would cover a faster producer, but
costs it: memory that is not used again has to be faulted in anew (benchmarks/append.py)."""

_LINES = 8  # connections over which a flush goes out, to a server that fsyncs before it replies
_ROUND_BYTES = 32 << 20
_ROUND_BATCHES = 512
_BACKOFF = (0.02, 0.5)
_ENDED = "the store's writer thread has ended, by a bug (its traceback went to stderr); open the store again"
_ASKED_EVERY = 0.5
_PATIENCE = 1 / 3  # share of the deadline that one reply may take: a lost one must leave time to read back


class Flusher:
    """Writes lanes to the log in the background.

    Args:
        wire, keys: where to.
        timeout: seconds without progress after which a lane that cannot be written fails.
        buffer_bytes: what may wait in memory; beyond it `append` blocks.
        kept_bytes: acknowledged batches kept against the loss of the server's tail, at most this much.
        horizon: seconds for which they are kept; 0 on a server that fsyncs before it acknowledges.
        archive: knows what was archived and trimmed.
        on_connect: checks the server at each connection (fsync level); may raise, then nothing is written.
        on_refused: called with a trajectory id after its writer lost, to put its summary right again.

    Attributes:
        chance, slabs: where its writers' nonces come from, and memory for their payloads.
    """

    def __init__(
        self,
        wire: Wire,
        keys: Keys,
        *,
        timeout: float,
        buffer_bytes: int,
        kept_bytes: int,
        horizon: float,
        archive: ArchiveIndex,
        on_connect: Callable[[], None],
        on_refused: Callable[[str], object],
    ) -> None:
        self.chance, self.slabs = Chance(), Slabs()
        self._wire = wire
        self._keys = keys
        self._timeout = timeout
        self._buffer_bytes = buffer_bytes
        self._kept_bytes = kept_bytes
        self._horizon = horizon
        self._archive = archive
        self._on_connect = on_connect
        self._on_refused = on_refused

        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)  # the thread waits for work
        self._room = threading.Condition(self._lock)  # callers wait for buffer space
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._ready: deque[Lane] = deque()  # lanes with work, none of it in flight
        self._taken: list[Lane] = []  # in flight
        self._undecided: weakref.WeakSet[Lane] = weakref.WeakSet()  # the archive could not be asked about them
        self._kept: deque[tuple[float, int, Lane]] = deque()
        self._kept_now = 0
        self._heard = float("-inf")  # when the server was last asked and has answered since, over one connection
        self._unsafe: float | None = None  # when the newest entry landed that a server crash might lose, kept or not
        self._buffered = 0
        self._progress = 0
        self._failed: dict[tuple[str, bool], TrajstoreError] = {}  # by lane: trajectory id, notes or not
        self._unreported: list[TrajstoreError] = []
        self._trouble: TrajstoreError | None = None
        self._pause = _BACKOFF[0]
        self._stopping = False
        self._stopped = threading.Event()
        self._ended = False
        self._pid = os.getpid()
        self._counts = WriterCounts(buffer_bytes=buffer_bytes)

        feeds = [keys.feed(partition) for partition in range(keys.partitions)]
        lines = 1 if horizon or not wire.one_server else _LINES
        sessions = [wire.session(timeout=timeout * _PATIENCE, keys=feeds) for _ in range(lines)]
        self._session = WideSession(sessions) if lines > 1 else sessions[0]
        self._next_memory_check = self._next_decision = 0.0
        self._thread = threading.Thread(target=self._run, name="trajstore-flusher", daemon=True)
        self._thread.start()

    # What callers do

    def lane(
        self,
        id: str,
        *,
        note: bool = False,
        after: Lane | None = None,
        acked: EventId | None = None,
        acked_nonce: int | None = None,
        **state: Any,
    ) -> Lane:
        """A new lane; it takes the place of failed ones: of the trajectory's notes, or of the whole trajectory."""
        lane = Lane(id, note=note, after=after, acked=acked, acked_nonce=acked_nonce, **state)
        self._require_parent()
        with self._lock:
            self._lanes.add(lane)
            self._failed.pop((id, True), None)
            if not note:
                self._failed.pop((id, False), None)
        return lane

    def append(self, lane: Lane, turn: Turn, header: Header, payload: Buffer | None = None) -> None:
        """Enqueue one event; blocks only while the buffer is full.

        Raises:
            TrajstoreError: what stopped this lane before (sticky).
            StoreFull, Unavailable: the buffer stayed full until the deadline, because of this.
        """
        item = Item(turn, header, payload, time.monotonic())
        self._require_parent()
        with self._lock:
            self._require_open(lane)
            nbytes = item.nbytes
            if self._buffered + nbytes > self._buffer_bytes and self._buffered:
                self._wait_for_room(lane, nbytes)
            # Counted first: Ctrl-C comes after a call, as of `append`, and what is not counted is not waited for.
            lane.queued += 1
            self._buffered += nbytes
            if lane.since is None:
                lane.since = item.since
            lane.queue.append(item)
            self._schedule(lane)

    def flush(self, id: str | None = None) -> None:
        """Wait until everything queued so far, of one trajectory or of all, is acknowledged.

        Raises:
            TrajstoreError: what stopped it; several go into an `ExceptionGroup`.
        """
        self.drain(id)
        self.report(id)

    def watch(self, id: str | None = None) -> Waiter:
        """A waiter for everything queued so far."""
        self._require_parent()
        with self._lock:
            lanes = [*self._ready, *self._taken]
            lanes = [lane for lane in lanes if lane.busy and (id is None or lane.id == id)]
            waiter = Waiter(len(lanes))
            for lane in lanes:
                lane.waiters.append((lane.queued, waiter))
            return waiter

    def told(self, error: TrajstoreError) -> None:
        """An error has been raised to whoever holds the handle: `report` of all need not raise it again."""
        if os.getpid() != self._pid:  # a lock that was held at the fork is held here for ever
            return
        with self._lock:
            self._unreported = [other for other in self._unreported if other is not error]

    def report(self, id: str | None = None) -> None:
        """Raise what failed: always for one trajectory, else what was neither reported nor `told` yet."""
        with self._lock:
            if id is not None:
                errors = [self._failed[key] for key in ((id, False), (id, True)) if key in self._failed]
                errors = list(dict.fromkeys(errors))  # notes of a trajectory that could not be created fail with it
                self._unreported = [error for error in self._unreported if error not in errors]
            else:
                errors, self._unreported = self._unreported, []
        if len(errors) == 1:
            raise errors[0].with_traceback(None)
        if errors:
            raise ExceptionGroup(f"{len(errors)} failures to write", errors)

    def drain(self, id: str | None = None) -> None:
        """As `flush`, but leave what failed to those who ask for it."""
        waiter = self.watch(id)
        while True:
            progress = self._progress
            try:
                return waiter.future.result(self._timeout * (1 + 2 * _PATIENCE))
            except TimeoutError:  # lanes fail by themselves before that, if all is well with the thread
                if progress == self._progress:
                    raise self._trouble or Unavailable(f"nothing was written for {self._timeout:g} s") from None

    def counts(self) -> WriterCounts:
        """What it has done, and what waits now. A copy; takes no lock, so that looking holds nobody up."""
        now = self._counts
        return msgspec.structs.replace(
            now,
            latencies=list(now.latencies),
            resolved=now.resolved.copy(),
            failed=now.failed.copy(),
            buffered=self._buffered,
            kept=self._kept_now,
            waiting=len(self._ready) + len(self._taken),
        )

    def knows(self, id: str) -> bool:
        """True while a handle of this trajectory lives in this process, written or not."""
        with self._lock:
            return any(lane.id == id for lane in self._lanes)

    def stop(self) -> None:
        """Send what can be sent at once and end the thread; waits for it no longer than the deadline."""
        self._require_parent()
        with self._lock:
            self._stopping = True
            self._stopped.set()
            self._wake.notify_all()
            self._room.notify_all()
        self._thread.join(self._timeout + 5)
        self._session.disconnect()

    def _require_open(self, lane: Lane) -> None:
        if lane.stopped is not None:
            raise lane.stopped.with_traceback(None)
        if self._stopping:
            raise Unavailable("the store is closed; open it again to write")
        if self._ended:
            raise Unavailable(f"{lane.id}: {_ENDED}")

    def _require_parent(self) -> None:
        if os.getpid() != self._pid:  # and a lock that was held at the fork is held here for ever
            raise Conflict("this store was opened before a fork; open it again in the child process")

    def _schedule(self, lane: Lane) -> None:
        if not lane.scheduled:
            lane.scheduled = True
            self._ready.append(lane)
            self._wake.notify()

    def _wait_for_room(self, lane: Lane, nbytes: int) -> None:
        deadline = time.monotonic() + self._timeout
        self._counts.blocked += 1
        while self._buffered and self._buffered + nbytes > self._buffer_bytes:
            left = deadline - time.monotonic()
            if left <= 0:
                reason = self._trouble or Unavailable("the server takes events more slowly than they come")
                raise type(reason)(f"the write buffer ({self._buffer_bytes} bytes) stayed full: {reason}")
            waited = time.monotonic()
            self._room.wait(left)
            self._counts.blocked_seconds += time.monotonic() - waited
            self._require_open(lane)

    # The thread

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._ready and not self._stopping:
                        self._wake.wait(1.0 if self._unsafe is not None or self._undecided else None)
                    self._drop_kept()
                    while self._ready and not self._ready[0].busy:  # failed while it waited
                        self._ready.popleft().scheduled = False
                    if self._stopping and not self._ready:
                        return
                    idle = not self._ready
                if not idle or self._unsafe is not None or self._undecided:
                    self._round()
        finally:  # closed, or a bug ended the thread: nobody may wait for it any more
            with self._lock:
                self._ended = True
                left = [lane for lane in self._lanes if lane.busy]
                self._room.notify_all()
            for lane in left:
                self._fail(lane, Unavailable(f"{lane.id}: {_ENDED}"))

    def _round(self) -> None:
        try:
            self._connect()
            self._hear()
            self._require_memory()
            self._decide()
            taken = self._take()
            if not taken and self._undecided:
                self._set_back()
                return
            if not taken:
                self._trouble, self._pause = None, _BACKOFF[0]
                return
            taken = self._number_first_notes(taken)
            commands = [batch.commands(self._keys) for _, batch in taken]
            replies = iter(self._session.exchange([command for batch in commands for command in batch]))
            self._counts.rounds += 1
            doubtful = []
            for (lane, batch), sent in zip(taken, commands, strict=True):
                outcome = _outcome([next(replies) for _ in sent], sent)
                if outcome is None:
                    self._landed(lane, batch)
                elif isinstance(outcome, TrajstoreError):
                    self._trouble = outcome
                else:
                    doubtful.append(lane)
            if doubtful:
                self._settle_doubts(doubtful)
            if any(lane.frozen and lane.frozen[0] is batch for lane, batch in taken):
                self._set_back()
            elif self._undecided:  # the others are not held up
                self._give_up_late()
            else:
                self._trouble, self._pause = None, _BACKOFF[0]
        except TrajstoreError as error:  # of the server as a whole; what is wrong with one lane is dealt with there
            if not isinstance(error, StoreFull):
                self._session.disconnect()
            self._trouble = error
            self._set_back()
        finally:
            with self._lock:
                for lane in self._taken:
                    lane.scheduled = False
                    if lane.busy:
                        self._schedule(lane)
                self._taken = []

    def _connect(self) -> None:
        if self._session.connected:
            return
        self._session.connect()
        self._counts.connections += 1
        self._on_connect()
        self._recover()

    def _hear(self) -> None:
        """A crash of the server must not go unseen while it may lose what was acknowledged: ask now and then."""
        now = time.monotonic()
        if self._unsafe is not None and now - self._heard >= _ASKED_EVERY:
            self._session.ask_each("PING")
            if not self._undecided:  # what these have lost, perhaps, is still needed
                self._heard = now

    def _recover(self) -> None:
        """At each connection, before anything is sent: is what was acknowledged, or read by a handle, still there?"""
        with self._lock:
            lanes = [lane for lane in self._lanes if lane.error is None]
            for lane in lanes:
                if lane.note and lane.kept:  # each is read back, or written again, by itself: their order says nothing
                    kept = [kept.batch for kept in lane.kept]
                    lane.write_again(kept, lane.acked, head=None, now=time.monotonic())
                    self._schedule(lane)
        self._settle_doubts([lane for lane in lanes if lane.acked is not None or (lane.frozen and lane.frozen[0].sent)])

    def _decide(self) -> None:
        """The archive may answer by now about those of which only it can tell."""
        now = time.monotonic()
        if self._undecided and now >= self._next_decision:
            self._next_decision = now + _ASKED_EVERY
            self._settle_doubts(list(self._undecided))

    def _take(self) -> list[tuple[Lane, Batch]]:
        taken: list[tuple[Lane, Batch]] = []
        nbytes = 0
        while len(taken) < _ROUND_BATCHES and nbytes < _ROUND_BYTES:
            with self._lock:  # not while batches are frozen: hundreds of them would hold callers up
                if not self._ready:
                    break
                lane = self._ready.popleft()
                self._taken.append(lane)
                if lane in self._undecided:  # it may have lost something, and nothing is written above that
                    continue
                if lane.waits:
                    continue
                items = lane.take()
            batch = lane.next_batch(items, time.time())
            if batch is not None:  # else it failed while it waited
                nbytes += batch.nbytes
                taken.append((lane, batch))
        return taken

    def _number_first_notes(self, taken: list[tuple[Lane, Batch]]) -> list[tuple[Lane, Batch]]:
        """Look before a handle's first note: only where there are none, archived ones neither, may it make the stream.

        Sending it on trial would leave its payload behind under a number that it did not get.
        """
        first = [lane for lane, batch in taken if lane.note and lane.acked is None and not batch.creates]
        if first:
            self._settle_doubts(first)
        return [(lane, lane.mark_sent()) for lane, _ in taken if lane.frozen and lane not in self._undecided]

    def _landed(self, lane: Lane, batch: Batch) -> None:
        now = time.monotonic()
        with self._lock:
            lane.landed()
            events = 0 if batch.acked else len(batch.items)
            if batch.acked:
                self._counts.again += 1
            else:
                batch.acked = True
                self._buffered -= sum(item.nbytes for item in batch.items)
                self._counts.landed(events, batch.nbytes, now - batch.items[0].since)
            if not lane.note:
                batch.items = ()
            lane.settle(events, now)
            self._progress += 1
            if self._horizon:
                lane.kept.append(Kept(now, batch))
                self._kept.append((now, batch.nbytes, lane))
                self._kept_now += batch.nbytes
                self._unsafe = now
            self._drop_kept()
            self._room.notify_all()

    def _drop_kept(self) -> None:
        # On disk is what a server that was heard of since has had time for. One that is away gets no further with its
        # fsync; and while this process stood still, it may have crashed and come back.
        horizon = self._heard - self._horizon
        if self._unsafe is not None and self._unsafe < horizon:
            self._unsafe = None
        while self._kept and (self._kept[0][0] < horizon or self._kept_now > self._kept_bytes):
            since, nbytes, lane = self._kept.popleft()
            self._kept_now -= nbytes
            if lane.kept and lane.kept[0].since <= since:
                lane.kept.popleft()

    def _settle_doubts(self, lanes: Sequence[Lane]) -> None:
        """Read back what became of the lanes' writes, and act on it.

        Raises:
            Unavailable: the server did not answer; the doubts remain.
        """
        looks = self._look(lanes)
        if looks and all(isinstance(seen, Unavailable) for seen in looks):  # it is the server, not a lane
            raise next(seen for seen in looks if isinstance(seen, Unavailable))
        for lane, seen in zip(lanes, looks, strict=True):
            self._undecided.discard(lane)
            head = lane.in_question
            verdict = self._verdict(lane, head, seen)
            if head is not None and head.sent:
                self._counts.resolved[type(verdict).__name__.lower()] += 1
            match verdict:
                case Landed() if head is not None:
                    self._landed(lane, head)
                case Resend(batches, acked) if not lane.note and acked != lane.acked:
                    with self._lock:
                        lane.write_again(batches, acked, head=head, now=time.monotonic())
                        self._schedule(lane)
                case Resend(creates=True) if head is not None:
                    head.creates = True
                case Renumber(number, creates):
                    with self._lock:
                        lane.renumber(number, creates=creates, now=time.time())
                case Refused(error):
                    if (
                        head is not None and head.fields
                    ):  # they carry this writer's nonce, so no winner's are among them
                        names = [name for name, _ in head.fields]
                        self._session.exchange([("HDEL", self._keys.payloads(lane.id), *names)])
                    self._repair(lane.id)  # before those who wait are told, so that they find it right
                    self._fail(lane, error)

    def _verdict(self, lane: Lane, head: Batch | None, seen: Seen | TrajstoreError) -> Verdict:
        """What follows for a lane from what the server shows, and the archive."""
        if not isinstance(seen, Seen):
            return Refused(seen)
        try:
            if lane.note:
                return judge_note(head, seen, self._archive) if head is not None else Nothing()
            return judge(
                lane.id,
                seen,
                head=head,
                acked=lane.acked,
                acked_nonce=lane.acked_nonce,
                kept=[kept.batch for kept in lane.kept],
                holds_open=lane.holds_open,
                archive=self._archive,
            )
        except OSError as error:  # the archive's disk: the doubt remains
            self._trouble = Unavailable(f"the archive cannot be asked about {lane.id}: {error}")
            self._undecided.add(lane)
            return Nothing()
        except TrajstoreError as error:  # what the archive holds of it is damaged
            return Refused(error)

    def _repair(self, id: str) -> None:
        """The loser's summary may lie over the winner's. A summary is a hint: failing to mend it fails nothing else."""
        try:
            self._on_refused(id)
        except (TrajstoreError, OSError) as error:
            log.warning(
                "the summary of %s may be out of date: %s",
                id,
                error,
                extra={"event": "summary-stale", "trajectory": id},
            )

    def _look(self, lanes: Sequence[Lane]) -> list[Seen | TrajstoreError]:
        """What the server shows of each lane's stream, or why that cannot be read."""
        commands: list[Command] = []
        for lane in lanes:
            stream = self._keys.notes(lane.id) if lane.note else self._keys.entries(lane.id)
            first = str(EventId(lane.acked.epoch, 0)) if lane.acked is not None else "0-1"
            looked = lane.in_question or (lane.kept[-1].batch if lane.kept else None)
            head = str(looked.at) if looked is not None else "0-1"
            commands.append(("XINFO", "STREAM", stream))
            commands.append(("XRANGE", stream, first, first))
            commands.append(("XRANGE", stream, head, head))
        replies = iter(self._session.exchange(commands))
        result: list[Seen | TrajstoreError] = []
        for _ in lanes:
            info, first_reply, head_reply = next(replies), next(replies), next(replies)
            try:
                first_entries, head_entries = parse_entries(first_reply), parse_entries(head_reply)
                seen = Seen(
                    last=stream_last_id(info),
                    last_event=stream_last_event(info),
                    first_nonce=nonce_of(first_entries[0][1]) if first_entries else None,
                    at_head=head_entries[0][1] if head_entries else None,
                    last_nonce=stream_last_nonce(info),
                    is_deleted=ends_in_tombstone(info),
                )
            except TrajstoreError as error:  # not a stream, or not ours
                result.append(error)
            else:
                result.append(seen)
        return result

    def _fail(self, lane: Lane, error: TrajstoreError) -> None:
        with self._lock:
            self._undecided.discard(lane)
            self._failed[lane.id, lane.note] = error
            self._counts.failed[type(error).__name__] += 1
            if lane.after is None or lane.after.error is not error:  # else it is its trajectory's, and one failure
                self._unreported.append(error)
            self._buffered -= lane.fail(error, time.monotonic())
            self._progress += 1
            self._room.notify_all()
            alone = [one for one in lane.notes() if one.busy] if lane.acked is None else []
        for one in alone:
            self._fail(one, error)

    def _require_memory(self) -> None:
        """Stop short of a full server, so that what drains it keeps room to work.

        Raises:
            StoreFull: at 90 % of `maxmemory`.
        """
        now = time.monotonic()
        if now < self._next_memory_check:
            return
        told = self._session.ask_each("INFO", "memory")
        if any(isinstance(one, redis.RedisError) for one in told):
            self._next_memory_check = float("inf")  # not permitted, or not implemented: its own refusal remains
            return
        used, limit = fullest(told)
        if limit and used >= FULL_AT * limit:
            raise StoreFull(
                f"the server uses {used >> 20} of {limit >> 20} MiB (maxmemory); writing stops at 90 %. Start an "
                "archiver (`trajstore archive STORE`) to drain it, or raise maxmemory"
            )
        self._next_memory_check = now + (0.25 if limit else 5.0)

    def _set_back(self) -> None:
        """Nothing could be written: wait a little."""
        self._give_up_late()
        self._stopped.wait(min(self._pause, self._timeout / 8))
        self._pause = min(self._pause * 2, _BACKOFF[1])

    def _give_up_late(self) -> None:
        """Give up lanes past their deadline, all of them when closing."""
        now = time.monotonic()
        error = self._trouble or Unavailable("the server took none of the events")
        with self._lock:
            oldest = now if self._stopping else now - self._timeout
            late = [one for one in self._lanes if one.since is not None and one.since <= oldest and not one.waits]
        for lane in late:
            unsure = any(batch.sent for batch in lane.frozen) and isinstance(error, Unavailable)
            doubt = "; whether the last batch arrived is not known" if unsure else ""
            within = "before the store was closed" if self._stopping else f"within {self._timeout:g} s"
            self._fail(lane, type(error)(f"{lane.id}: not written {within}{doubt}. {error}"))


def _outcome(replies: Sequence[Any], commands: Sequence[Command]) -> TrajstoreError | bool | None:
    """What a transaction's replies say: None it is in; an error: not all of it, try later; True: look it up."""
    results = replies[-1]
    if not isinstance(results, list):
        return True if results is None else first_refusal(replies, commands[1:-1])
    # Of an EXEC all runs but what fails. An entry without its payload must not be found there and taken for written.
    beside = first_refusal([*replies[:-1], [None, *results[1:]]], commands[1:-1])
    if beside is None and (results[0] is None or isinstance(results[0], redis.RedisError)):
        return True
    return beside
