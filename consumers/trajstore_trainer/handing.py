"""Handing groups out: waiting for the next, judging it, and keeping what is left out on record.

Between the thread that reads ahead (`session.py`) and the trainer's calls (`dataset.py`).
"""

import logging
import time
from dataclasses import replace

from trajstore.errors import Fenced, StoreFull, Unavailable
from trajstore.store import Store
from trajstore_trainer.counts import Counts
from trajstore_trainer.decisions import Decisions
from trajstore_trainer.filtered import Filtered, FilteredLog
from trajstore_trainer.reader import ReadyTrajectories
from trajstore_trainer.selection import Selection, judge
from trajstore_trainer.session import Session
from trajstore_trainer.settling import Settling, fenced_message

__all__ = ["Handing"]

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5


class Handing:
    """What a session reads, handed to the trainer.

    Args:
        store: of the run.
        session: at work.
        settling: acknowledges what is passed over.
        group: consumer group.
        checkpoints: what is passed over goes on record, and is acknowledged, when the trainer commits; else at once.
        selection: what to train on.
        counts: to be counted in.
        progress_seconds: a line about a wait is logged this often.
    """

    def __init__(
        self,
        store: Store,
        session: Session,
        settling: Settling,
        *,
        group: str,
        checkpoints: bool,
        selection: Selection,
        counts: Counts,
        progress_seconds: float,
    ) -> None:
        self._session = session
        self._settling = settling
        self._decisions = Decisions(store.wire, store.keys, consumers=group)
        self._records = FilteredLog(store.wire, store.keys, consumers=group)
        self._checkpoints = checkpoints
        self._selection = selection
        self._counts = counts
        self._progress_seconds = progress_seconds

    def next(self, *, version: int | None, timeout: float) -> ReadyTrajectories:
        """The next group to train on, with the members that are fit.

        Args:
            version: number of the weights that the trainer has now.
            timeout: seconds to wait for it.

        Raises:
            Unavailable: none came before the deadline, the server has no room for a decision, or does not answer.
            Fenced, SchemaError: as `TrajectoryDataset.__iter__`.
        """
        begun = now = time.monotonic()
        next_line = begun + self._progress_seconds
        full: StoreFull | None = None
        while True:
            self.require_held(max(0.0, begun + timeout - now))
            left = max(0.0, min(next_line, begun + timeout) - now)
            if full is not None:
                self._session.pause(min(left, _RETRY_SECONDS))
            ready = self._session.peek(left if full is None else 0.0)
            self._counts.again, self._counts.taken_over = self._session.again, self._session.taken_over
            if ready is None:
                full = None
            else:
                try:
                    chosen = self._choose(ready, version, timeout)
                except StoreFull as error:  # others may free memory; without a decision it could be trained on twice
                    if full is None:
                        log.warning("a group cannot be decided on just now, and waits: %s", error)
                    full = error
                else:
                    full = None
                    if chosen is not None:
                        return chosen
            now = time.monotonic()
            trouble = full or self._session.trouble
            if now >= begun + timeout:
                raise Unavailable(
                    f"no group came within {timeout:g} s; {self._progress(trouble)}. Is a materializer running "
                    "(`trajstore materialize STORE`), and are trajectories being closed?"
                ) from trouble
            if now >= next_line:
                log.info("waiting for %.0f s; %s", now - begun, self._progress(trouble))
                next_line = now + self._progress_seconds

    def require_held(self, timeout: float) -> None:
        """What was handed out is this consumer's still.

        Raises:
            Fenced: with checkpoints, it is not.
            Unavailable: the server did not answer before the deadline.
        """
        lost = self._session.lost(timeout)
        if not lost:
            return
        first = str(min(lost))
        if self._checkpoints:
            raise Fenced(fenced_message(self._session.consumer, len(lost), first))
        log.warning(
            "%s was silent for longer than the lease: %d entries that it had handed out, the first %s, go to others",
            self._session.consumer, len(lost), first,
        )  # fmt: skip
        self._session.settled(lost)

    def _choose(self, ready: ReadyTrajectories, version: int | None, timeout: float) -> ReadyTrajectories | None:
        """Hand out what of the next group is to be trained on; None if it is nothing, or the group is gone."""
        place = ready.delivery.place
        verdict = self._decisions.apply(ready, judge(ready, self._selection, version=version))
        record = None
        if verdict.reasons:
            record = Filtered(
                entry=str(place), group=ready.group, version=ready.version, why=verdict.why, reasons=verdict.reasons
            )
        self.require_held(timeout)
        if not self._session.hand_out(ready, record if self._checkpoints else None):
            return None
        if record is not None and not self._checkpoints:
            try:
                self._records.write([record])  # not before: whoever has taken the group over decides on it, too
            except BaseException:
                self._session.hand_back(ready)
                raise
        if record is not None:
            log.info(
                "%s: not trained on %s%s",
                "a trajectory without a group" if ready.group is None else f"group {ready.group}",
                ", ".join(f"{id} ({reason})" for id, reason in sorted(verdict.reasons.items())),
                f": {verdict.why}" if verdict.why else "",
            )
        self._counts.add(verdict)
        if not verdict.keep:
            if not self._checkpoints:
                self._counts.acknowledged += self._settling.settle([place])
                self._session.settled([place])
            return None
        return replace(ready, trajectories=verdict.keep)

    def _progress(self, trouble: OSError | None) -> str:
        session = self._session
        return (
            f"{session.consumer.partition(':')[0]} has had {self._counts}; {len(session.handed)} entries are not "
            f"acknowledged, {session.prefetched} groups are read ahead"
            f"{'' if trouble is None else f'; the server: {trouble}'}"
        )
