"""The background writer of a store: one thread that sends the batches of many trajectories together (group commit).

Callers enqueue into a bounded buffer and do not wait. One batch per trajectory is in flight; the next one goes out only
after its reply. What a refusal or a lost reply meant is decided in `resolve.py`, from what the server shows.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis

from trajstore.entries import Buffer
from trajstore.errors import StoreFull, TrajstoreError, Unavailable
from trajstore.events import EventId, Header
from trajstore.log.batch import Batch, Item, Turn
from trajstore.log.keys import Keys
from trajstore.log.lane import Kept, Lane, Waiter
from trajstore.log.resolve import ArchiveIndex, Landed, Nothing, Refused, Renumber, Resend, Seen, judge, judge_note
from trajstore.log.stream import nonce_of, parse_entries, stream_last_id
from trajstore.log.wire import Command, Wire, info_fields, translate

__all__ = ["FSYNC_HORIZON", "Flusher"]

FSYNC_HORIZON = 3.0
"""Seconds after which an `everysec` server has certainly written an acknowledged entry to disk (it promises 2)."""

_ROUND_BYTES = 32 << 20
_ROUND_BATCHES = 512
_FULL_AT = 0.9
_BACKOFF = (0.02, 0.5)


class Flusher:
    """Writes lanes to the log in the background.

    Args:
        wire, keys: where to.
        timeout: seconds without progress after which a lane that cannot be written fails.
        buffer_bytes: what may wait in memory; beyond it `append` blocks.
        kept_bytes: acknowledged batches kept against the loss of the server's tail, at most this much.
        horizon: seconds for which they are kept; 0 on a server that fsyncs before it acknowledges.
        archive: knows what was archived and trimmed.
        on_connect: checks a fresh connection (fsync level); may raise.
        on_refused: called with a trajectory id after its writer lost, to put its summary right again.
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
        on_refused: Callable[[str], None],
    ) -> None:
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
        self._kept: deque[tuple[float, int, Lane]] = deque()
        self._kept_now = 0
        self._buffered = 0
        self._progress = 0
        self._failed: dict[str, TrajstoreError] = {}
        self._unreported: list[TrajstoreError] = []
        self._trouble: TrajstoreError | None = None
        self._pause = _BACKOFF[0]
        self._stopping = False
        self._stopped = threading.Event()

        self._session = wire.session()
        self._next_memory_check = 0.0
        self._was_connected = False
        self._thread = threading.Thread(target=self._run, name="trajstore-flusher", daemon=True)
        self._thread.start()

    # What callers do

    def lane(
        self,
        id: str,
        *,
        note: bool = False,
        acked: EventId | None = None,
        acked_nonce: int | None = None,
        **state: Any,
    ) -> Lane:
        """A new lane; it takes the place of a failed one of the same trajectory."""
        lane = Lane(id, note=note, acked=acked, acked_nonce=acked_nonce, **state)
        with self._lock:
            self._lanes.add(lane)
            self._failed.pop(id, None)
        return lane

    def append(self, lane: Lane, turn: Turn, header: Header, payload: Buffer | None = None) -> None:
        """Enqueue one event; blocks only while the buffer is full.

        Raises:
            TrajstoreError: what stopped this lane before (sticky).
            StoreFull, Unavailable: the buffer stayed full until the deadline, because of this.
        """
        item = Item(turn, header, payload)
        with self._lock:
            self._require_open(lane)
            if self._buffered + item.nbytes > self._buffer_bytes and self._buffered:
                self._wait_for_room(lane, item.nbytes)
            lane.queue.append(item)
            lane.queued += 1
            self._buffered += item.nbytes
            if lane.since is None:
                lane.since = time.monotonic()
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
        with self._lock:
            nothing = self._buffered == 0
            lanes = [] if nothing else [lane for lane in self._lanes if lane.busy and (id is None or lane.id == id)]
            waiter = Waiter(len(lanes))
            for lane in lanes:
                lane.waiters.append((lane.queued, waiter))
            if not lanes:
                waiter.future.set_result(None)
            return waiter

    def report(self, id: str | None = None) -> None:
        """Raise what failed: always for one trajectory, else what was not reported yet."""
        with self._lock:
            if id is not None:
                errors = [self._failed[id]] if id in self._failed else []
                self._unreported = [error for error in self._unreported if error not in errors]
            else:
                errors, self._unreported = self._unreported, []
        if len(errors) == 1:
            raise errors[0].with_traceback(None)
        if errors:
            raise ExceptionGroup(f"{len(errors)} trajectories could not be written", errors)

    def drain(self, id: str | None = None) -> None:
        """As `flush`, but leave what failed to those who ask for it."""
        waiter = self.watch(id)
        progress = -1
        while True:
            try:
                return waiter.future.result(self._timeout)
            except TimeoutError:  # lanes fail by themselves; this is for a thread that died
                if progress == self._progress:
                    raise self._trouble or Unavailable(f"nothing was written for {self._timeout:g} s") from None
                progress = self._progress

    def knows(self, id: str) -> bool:
        """True while a handle of this trajectory lives in this process, written or not."""
        with self._lock:
            return any(lane.id == id for lane in self._lanes)

    def stop(self) -> None:
        """Send what can be sent and end the thread; waits for it no longer than the deadline."""
        with self._lock:
            self._stopping = True
            self._stopped.set()
            self._wake.notify_all()
            self._room.notify_all()
        self._thread.join(self._timeout + 5)
        self._session.disconnect()

    def _require_open(self, lane: Lane) -> None:
        if lane.error is not None:
            raise lane.error.with_traceback(None)
        if self._stopping or not self._thread.is_alive():
            raise Unavailable("the store is closed; open it again to write")

    def _schedule(self, lane: Lane) -> None:
        if not lane.scheduled:
            lane.scheduled = True
            self._ready.append(lane)
            self._wake.notify()

    def _wait_for_room(self, lane: Lane, nbytes: int) -> None:
        deadline = time.monotonic() + self._timeout
        while self._buffered and self._buffered + nbytes > self._buffer_bytes:
            left = deadline - time.monotonic()
            if left <= 0:
                reason = self._trouble or Unavailable("the server takes events more slowly than they come")
                raise type(reason)(f"the write buffer ({self._buffer_bytes} bytes) stayed full: {reason}")
            self._room.wait(left)
            self._require_open(lane)

    # The thread

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._ready and not self._stopping:
                        self._wake.wait(1.0 if self._kept else None)
                    self._drop_kept(time.monotonic())
                    if self._stopping and not self._ready:
                        return
                    idle = not self._ready
                if not idle or self._kept:
                    self._round()
        finally:  # closed, or a bug ended the thread: nobody may wait for it any more
            for lane in list(self._lanes):
                if lane.busy:
                    self._fail(lane, Unavailable(f"{lane.id}: the store's writer ended before this was written"))

    def _round(self) -> None:
        taken: list[tuple[Lane, Batch]] = []
        try:
            self._connect()
            self._require_memory()
            taken = self._take()
            if not taken:  # a crash of the server must not go unseen while batches are kept against it
                self._session.exchange([("PING",)])
                return
            commands = [batch.commands(self._keys) for _, batch in taken]
            replies = iter(self._session.exchange([command for batch in commands for command in batch]))
            doubtful = []
            for (lane, batch), sent in zip(taken, commands, strict=True):
                outcome = _outcome([next(replies) for _ in sent])
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
            else:
                self._trouble, self._pause = None, _BACKOFF[0]
        except (Unavailable, StoreFull) as error:
            if isinstance(error, Unavailable):
                self._session.disconnect()
            self._trouble = error
            self._set_back()
        finally:
            with self._lock:
                for lane, _ in taken:
                    lane.scheduled = False
                    if lane.queue or lane.frozen:
                        self._schedule(lane)

    def _connect(self) -> None:
        if self._session.connected:
            return
        self._session.connect()
        self._on_connect()
        if self._was_connected:
            self._recover()
        self._was_connected = True

    def _recover(self) -> None:
        """After a reconnect, before anything is sent: is what was acknowledged still there?"""
        with self._lock:
            lanes = [lane for lane in self._lanes if lane.error is None]
            for lane in lanes:
                if lane.note and lane.kept:
                    lane.frozen.extendleft(kept.batch for kept in reversed(lane.kept))
                    lane.kept.clear()
        self._settle_doubts([lane for lane in lanes if lane.acked is not None or (lane.frozen and lane.frozen[0].sent)])
        with self._lock:
            for lane in lanes:
                if lane.frozen:
                    self._schedule(lane)

    def _take(self) -> list[tuple[Lane, Batch]]:
        taken: list[tuple[Lane, Batch]] = []
        nbytes = 0
        with self._lock:
            while self._ready and len(taken) < _ROUND_BATCHES and nbytes < _ROUND_BYTES:
                lane = self._ready.popleft()
                batch = lane.next_batch(time.time())
                if batch is None:  # it failed while it waited
                    lane.scheduled = False
                    continue
                if not batch.sent:
                    batch.before, batch.sent = lane.acked, True
                nbytes += batch.nbytes
                taken.append((lane, batch))
        return taken

    def _landed(self, lane: Lane, batch: Batch) -> None:
        now = time.monotonic()
        with self._lock:
            lane.landed()
            if not batch.acked:
                batch.acked = True
                self._buffered -= sum(item.nbytes for item in batch.items)
                lane.settle(len(batch.items), now)
            self._progress += 1
            if self._horizon:
                lane.kept.append(Kept(now, batch))
                self._kept.append((now, batch.nbytes, lane))
                self._kept_now += batch.nbytes
            self._drop_kept(now)
            self._room.notify_all()

    def _drop_kept(self, now: float) -> None:
        while self._kept and (self._kept[0][0] < now - self._horizon or self._kept_now > self._kept_bytes):
            since, nbytes, lane = self._kept.popleft()
            self._kept_now -= nbytes
            if lane.kept and lane.kept[0].since <= since:
                lane.kept.popleft()

    def _settle_doubts(self, lanes: Sequence[Lane]) -> None:
        """Read back what became of the lanes' writes, and act on it.

        Raises:
            Unavailable: the server did not answer; the doubts remain.
        """
        for lane, seen in zip(lanes, self._look(lanes), strict=True):
            head = lane.frozen[0] if lane.frozen and lane.frozen[0].sent else None
            if lane.note:
                verdict = judge_note(head, seen, self._archive) if head is not None else Nothing()
            else:
                verdict = judge(
                    lane.id,
                    seen,
                    head=head,
                    acked=lane.acked,
                    acked_nonce=lane.acked_nonce,
                    kept=[kept.batch for kept in lane.kept],
                    holds_open=lane.holds_open,
                    archive=self._archive,
                )
            match verdict:
                case Landed() if head is not None:
                    self._landed(lane, head)
                case Resend(batches, acked) if not lane.note and acked != lane.acked:
                    with self._lock:
                        rest = list(lane.frozen)[1:] if head is not None else list(lane.frozen)
                        lane.frozen = deque([*batches, *rest])
                        lane.kept = deque(kept for kept in lane.kept if kept.batch not in batches)
                        lane.acked, lane.acked_nonce = acked, None
                case Renumber(number, creates):
                    with self._lock:
                        lane.renumber(number, creates=creates, now=time.time())
                case Refused(error):
                    self._fail(lane, error)
                    self._on_refused(lane.id)

    def _look(self, lanes: Sequence[Lane]) -> list[Seen]:
        commands: list[Command] = []
        for lane in lanes:
            stream = self._keys.notes(lane.id) if lane.note else self._keys.entries(lane.id)
            first = str(EventId(lane.acked.epoch, 0)) if lane.acked is not None else "0-1"
            head = str(lane.frozen[0].at) if lane.frozen else "0-1"
            commands.append(("XINFO", "STREAM", stream))
            commands.append(("XRANGE", stream, first, first))
            commands.append(("XRANGE", stream, head, head))
        replies = iter(self._session.exchange(commands))
        result = []
        for _ in lanes:
            last = stream_last_id(next(replies))
            first_entries, head_entries = parse_entries(next(replies)), parse_entries(next(replies))
            result.append(
                Seen(
                    last=last,
                    first_nonce=nonce_of(first_entries[0][1]) if first_entries else None,
                    at_head=head_entries[0][1] if head_entries else None,
                )
            )
        return result

    def _fail(self, lane: Lane, error: TrajstoreError) -> None:
        with self._lock:
            self._failed[lane.id] = error
            self._unreported.append(error)
            self._buffered -= lane.fail(error, time.monotonic())
            self._progress += 1
            self._room.notify_all()

    def _require_memory(self) -> None:
        """Stop short of a full server, so that what drains it keeps room to work.

        Raises:
            StoreFull: at 90 % of `maxmemory`.
        """
        now = time.monotonic()
        if now < self._next_memory_check:
            return
        reply = self._session.exchange([("INFO", "memory")])[0]
        if isinstance(reply, redis.RedisError):  # not permitted, or not implemented: the server's own refusal remains
            self._next_memory_check = float("inf")
            return
        used, limit = _memory_use(reply)
        if limit and used >= _FULL_AT * limit:
            raise StoreFull(
                f"the server uses {used >> 20} of {limit >> 20} MiB (maxmemory); writing stops at 90 %. Start an "
                "archiver (`trajstore archive STORE`) to drain it, or raise maxmemory"
            )
        self._next_memory_check = now + (0.25 if limit else 5.0)

    def _set_back(self) -> None:
        """Nothing could be written: give up lanes past their deadline, and wait a little."""
        now = time.monotonic()
        error = self._trouble or Unavailable("the server took none of the events")
        with self._lock:
            late = [lane for lane in self._lanes if lane.since is not None and now - lane.since > self._timeout]
        for lane in late:
            unsure = any(batch.sent for batch in lane.frozen) and isinstance(error, Unavailable)
            doubt = "; whether the last batch arrived is not known" if unsure else ""
            self._fail(lane, type(error)(f"{lane.id}: not written within {self._timeout:g} s{doubt}. {error}"))
        self._stopped.wait(self._pause)
        self._pause = min(self._pause * 2, _BACKOFF[1])


def _outcome(replies: Sequence[Any]) -> TrajstoreError | bool | None:
    """What a transaction's replies say: None it is in; an error: refused whole, try later; True: look it up."""
    results = replies[-1]
    if isinstance(results, redis.RedisError):
        return translate(next(r for r in replies if isinstance(r, redis.RedisError)), "a batch")
    if not isinstance(results, list) or results[0] is None or isinstance(results[0], redis.RedisError):
        return True
    refused = next((r for r in results if isinstance(r, redis.RedisError)), None)
    return None if refused is None else translate(refused, "a batch")


def _memory_use(info: bytes) -> tuple[int, int]:
    """`used_memory` and `maxmemory` of an INFO reply, in bytes; 0 for no limit."""
    fields = info_fields(info)
    return int(fields.get("used_memory", "0")), int(fields.get("maxmemory", "0"))
