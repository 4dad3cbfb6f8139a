"""`TrajectoryDataset`: the finished groups of a run as a torch dataset that survives the death of a trainer.

Entries of the ready streams are claimed, read ahead by a thread, judged by the selection when they are used, and
acknowledged after the step, or when a checkpoint is durable.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

import trajstore
from trajstore.errors import Conflict, SchemaError
from trajstore.log.run import TRAINER_GROUP
from trajstore.ready import EntryPlace
from trajstore.store import Store
from trajstore.trajectory import Trajectory
from trajstore_trainer.checkpoint import DatasetState, require_enough, require_own
from trajstore_trainer.claims import Slot, slot_of
from trajstore_trainer.counts import Counts
from trajstore_trainer.filtered import Filtered, FilteredLog
from trajstore_trainer.handing import Handing
from trajstore_trainer.pinning import pinned
from trajstore_trainer.reader import ReadyTrajectories
from trajstore_trainer.selection import Selection
from trajstore_trainer.session import Session
from trajstore_trainer.settling import Settling

__all__ = ["TrajectoryDataset"]

T = TypeVar("T")


class TrajectoryDataset(IterableDataset[ReadyTrajectories]):
    """Groups to train on, one after the other, without end; what is not ready yet is waited for.

    Several consumers (ranks, DataLoader workers) share the groups of a consumer group; an entry is one consumer's at a
    time. Two ways to be sure:

    - `checkpoints=False`: call `acknowledge` after each step. Whatever was handed out and not acknowledged comes again
      to the next process of this rank at once, or to another rank after the lease: trained on at least once.
    - `checkpoints=True`: save `state_dict()` with each checkpoint, call `commit(state)` once that is durable, and
      `load_state_dict(state)` when training goes on from it: whatever was handed out after the checkpoint comes again,
      and nothing else does, so that the weights have seen each trajectory exactly once. All ranks go on from the same
      checkpoint, as they do when a rank died; an older one than that committed last misses what was in between. What a
      rank has stays with it, however long it is silent, until its place in the job is taken again: only then is it
      known what of it a checkpoint holds.

    One thread uses it. It is a context manager; closing it hands back what was read ahead.

    Args:
        source: where the run is, as `trajstore.open` takes it; or an open store, which cannot go to a worker process.
        group: consumer group.
        rank, world_size: place among the data-parallel ranks. Ranks that share their data (tensor or pipeline parallel)
            have one reader.
        checkpoints: see above.
        selection: what to train on.
        lease: seconds after which a consumer that gives no sign of life counts as dead; a thread gives it, so a long
            step does no harm. At least 0.2. With checkpoints only those whose place this rank has are followed.
        timeout: seconds to wait for the next group.
        progress_seconds: a line about a wait is logged this often.
        prefetch_groups, prefetch_bytes: how far to read ahead; one group may exceed the bytes.

    Attributes:
        counts: what came, and what was passed over.
    """

    def __init__(
        self,
        source: Store | str | os.PathLike[str],
        *,
        group: str = TRAINER_GROUP,
        rank: int = 0,
        world_size: int = 1,
        checkpoints: bool = False,
        selection: Selection | None = None,
        lease: float = 60.0,
        timeout: float = 600.0,
        progress_seconds: float = 30.0,
        prefetch_groups: int = 8,
        prefetch_bytes: int = 1 << 30,
    ) -> None:
        if not 0 <= rank < world_size:
            raise SchemaError(f"rank {rank} is none of {world_size} ranks; ranks count from 0 to world_size - 1")
        if lease < 0.2 or prefetch_groups < 1 or prefetch_bytes < 1:
            raise SchemaError("lease= is at least 0.2 s, prefetch_groups= and prefetch_bytes= at least 1")
        self.counts = Counts()
        self._source = source if isinstance(source, Store) else os.fspath(source)
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._checkpoints = checkpoints
        self._selection = selection or Selection()
        self._lease = lease
        self._timeout = timeout
        self._progress_seconds = progress_seconds
        self._prefetch_groups = prefetch_groups
        self._prefetch_bytes = prefetch_bytes
        self._version: int | None = None
        self._worker = Slot(rank, 0)
        self._workers = 1
        self._process = os.getpid()
        self._opened: Store | None = None
        self._settles: Settling | None = None
        self._session: Session | None = None
        self._handing: Handing | None = None
        self._gathered: list[ReadyTrajectories] = []

    @property
    def weight_version(self) -> int | None:
        """Number of the weights that the trainer has now, against which `max_staleness` is counted; set it each step.

        A label is read by the selection's `version_key`. In DataLoader workers it stays as it was when they began.
        """
        return self._version

    @weight_version.setter
    def weight_version(self, version: int | str | None) -> None:
        self._version = self._selection.version_key(version) if isinstance(version, str) else version

    @property
    def in_hand(self) -> tuple[str, str, int, int]:
        """Run and consumer group, groups read ahead, and entries handed out and not acknowledged, in this process.

        For metrics: asks nobody. Without a run before the first group is asked for.
        """
        store = self._source if isinstance(self._source, Store) else self._opened
        session, run = self._session, store.run if store is not None else ""
        if session is None:
            return run, self._group, 0, 0
        return run, self._group, session.prefetched, len(session.handed)

    # Reading

    def __iter__(self) -> Iterator[ReadyTrajectories]:
        """Groups as they are handed out; a second iterator goes on where the first ended.

        Raises:
            Unavailable: nothing came before the deadline, the server had no room until then for a decision on a group
                that may be published again, or does not answer (also a `TimeoutError`).
            Fenced: with checkpoints, others have what was handed out here, for this rank was started again elsewhere.
                Begin again from the last checkpoint.
            SchemaError: the age of a weight version cannot be told; the group stays, and comes again.
            Conflict: this object came through a fork.
        """
        self._begin()
        while True:
            yield self._gathered.pop(0) if self._gathered else self._next()

    def batches(
        self, groups: int, collate: Callable[[Sequence[Trajectory]], T], *, pin_memory: bool | None = None
    ) -> Iterator[T]:
        """Collated batches of so many groups each, without end.

        Groups count as handed out with their batch. Those that were there when the others did not come, or when
        `collate` failed, are in the next one.

        Args:
            collate: e.g. `padded_batch`.
            pin_memory: of a batch that is a dataclass of tensors; default: if CUDA is there.

        Raises:
            TrajstoreError: as iterating does.
        """
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._begin()
        while True:
            while len(self._gathered) < groups:
                self._gathered.append(self._next())
            batch = collate([one for ready in self._gathered[:groups] for one in ready.trajectories])
            ready_batch = pinned(batch) if pin else batch
            del self._gathered[:groups]
            yield ready_batch

    def acknowledge(self, ready: Iterable[ReadyTrajectories] | None = None) -> None:
        """The step is done: what was handed out does not come again.

        Args:
            ready: groups that came through DataLoader workers; default: all that was handed out in this process.

        Raises:
            Conflict: the dataset was made for checkpoints.
            Unavailable: the server does not answer; acknowledge again.
        """
        if self._checkpoints:
            raise Conflict("this dataset was made with checkpoints=True: save state_dict(), then call commit(state)")
        self._refuse_fork()
        if ready is not None:
            self._settle([one.delivery.place for one in ready])
        elif self._session is not None:
            self._settle(list(self._used(self._session)))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was handed out here and is not committed; goes into the checkpoint of a step that trained on all of it.

        Plain JSON data, a few dozen bytes per group.

        Raises:
            Conflict: the dataset was made without checkpoints.
            Fenced: as iterating does.
        """
        self._require_checkpoints("state_dict()")
        session = self._session
        if self._handing is not None:
            self._handing.require_held(self._timeout)
        handed = {} if session is None else self._used(session)
        return DatasetState(
            run=self._store.incarnation,
            group=self._group,
            rank=self._rank,
            world_size=self._world_size,
            worker=self._worker.worker,
            workers=self._workers,
            consumer="" if session is None else session.consumer,
            entries=[str(place) for place in handed],
            filtered=[one for one in handed.values() if one is not None],
        ).to_dict()

    def commit(self, state: Any) -> None:
        """The checkpoint with this state is durable: what it holds never comes again. To commit again is no error.

        Args:
            state: what `state_dict()` returned; or anything of mappings and sequences that holds such states, like
                those of all ranks or of a stateful data loader.

        Raises:
            Conflict: made without checkpoints, or the state is of another run or consumer group.
            Fenced: others have what it holds; nothing was committed. Begin again from the last checkpoint.
            Unavailable: the server does not answer; commit again.
        """
        self._require_checkpoints("commit(state)")
        states = require_own(state, run=self._store.incarnation, group=self._group)
        self._settling.require_owned(states)
        self._settle_states(states)

    def load_state_dict(self, state: Any) -> None:
        """Go on from a checkpoint: what its state holds is acknowledged, all else that was handed out comes again.

        Call it before iterating. What was read ahead is given back.

        Args:
            state: this rank's state. If the number of ranks has changed, and wherever it is at hand, the states of all
                ranks, as a list or whatever holds them: rank r of W then goes on with what the ranks r, r + W, r + 2W
                ... had. No process of a job with another number of ranks may live on.

        Raises:
            Conflict: made without checkpoints, or the state is of another run or consumer group.
            SchemaError: no such state, or the other ranks' states are needed too.
            Unavailable: the server does not answer.
        """
        self._require_checkpoints("load_state_dict(state)")
        states = require_own(state, run=self._store.incarnation, group=self._group)
        require_enough(states, rank=self._rank, world_size=self._world_size)
        self._end()
        self._settle_states(states)

    # What was passed over

    def filtered(self, *, reason: str | None = None) -> list[Filtered]:
        """What this consumer group did not train on, the newest 10,000 entries of each partition, and why.

        On record since it was passed over; with checkpoints, since that was committed. The trajectories stay in the
        store: `store.load(id)` gives them.

        Args:
            reason: only entries with a member that was left out for this reason.
        """
        found = FilteredLog(self._store.wire, self._store.keys, consumers=self._group).read()
        return [one for one in found if reason is None or reason == one.why or reason in one.reasons.values()]

    def close(self) -> None:
        """Hand back what was read ahead, and close the store if it was opened here."""
        if self._process == os.getpid():
            self._end()
            if self._opened is not None:
                self._opened.close()
                self._opened = self._settles = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process that is spawned: everything but what belongs to this process."""
        if isinstance(self._source, Store):
            raise Conflict(
                "a TrajectoryDataset over an open store cannot go to another process; make it with what trajstore.open "
                "was given"
            )
        return self.__dict__ | {
            "_opened": None,
            "_settles": None,
            "_session": None,
            "_handing": None,
            "_gathered": [],
            "_process": None,
            "counts": Counts(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_process": os.getpid()})

    # Inside

    @property
    def _store(self) -> Store:
        self._refuse_fork()
        if isinstance(self._source, Store):
            return self._source
        if self._opened is None:
            self._opened = trajstore.open(self._source, create=False)
        return self._opened

    @property
    def _settling(self) -> Settling:
        store = self._store
        if self._settles is None:
            self._settles = Settling(store, self._group)
        return self._settles

    def _refuse_fork(self) -> None:
        if self._process != os.getpid():
            raise Conflict(
                "this TrajectoryDataset was made before a fork and is of no use in the child; give the DataLoader "
                "multiprocessing_context='spawn', or num_workers=0 (it reads ahead in a thread of its own)"
            )

    def _require_checkpoints(self, call: str) -> None:
        if not self._checkpoints:
            raise Conflict(f"{call} needs a dataset that was made with checkpoints=True; without, call acknowledge()")

    def _begin(self) -> Handing:
        """What hands out in this process; reading begins if it had not."""
        store = self._store
        if self._handing is None:
            info = get_worker_info()
            if info is not None:
                self._worker, self._workers = Slot(self._rank, info.id), info.num_workers
            settling = self._settling  # asks the server; who has threads already would go on reading if that failed
            self._session = Session(
                store,
                group=self._group,
                slot=self._worker,
                is_predecessor=self._is_predecessor,
                may_take_over=self._may_take_over,
                lease=self._lease,
                prefetch_groups=self._prefetch_groups,
                prefetch_bytes=self._prefetch_bytes,
            )
            self._handing = Handing(
                store,
                self._session,
                settling,
                group=self._group,
                checkpoints=self._checkpoints,
                selection=self._selection,
                counts=self.counts,
                progress_seconds=self._progress_seconds,
            )
        return self._handing

    def _end(self) -> None:
        """End reading, if it had begun."""
        if self._session is not None:
            self._session.close()
            self._session = self._handing = None
            self._gathered.clear()

    def _is_predecessor(self, slot: Slot) -> bool:
        """Whether this consumer follows those of a place in the job, or in one of another size."""
        return (slot.rank % self._world_size, slot.worker % self._workers) == self._worker

    def _may_take_over(self, consumer: str) -> bool:
        """Whether what a silent consumer has may be trained on here.

        With checkpoints, another rank's never: it may be silent between a durable checkpoint and its commit, and what
        it had would be in two checkpoints.
        """
        slot = slot_of(consumer)
        return not self._checkpoints or slot is None or self._is_predecessor(slot)

    def _next(self) -> ReadyTrajectories:
        return self._begin().next(version=self._version, timeout=self._timeout)

    def _used(self, session: Session) -> dict[EntryPlace, Filtered | None]:
        """What was handed out, but for the groups of a batch that has not been."""
        gathered = {one.delivery.place for one in self._gathered}
        return {place: record for place, record in session.handed.items() if place not in gathered}

    def _settle(self, places: Sequence[EntryPlace]) -> None:
        self.counts.acknowledged += self._settling.settle(places)
        if self._session is not None:
            self._session.settled(places)

    def _settle_states(self, states: Sequence[DatasetState]) -> None:
        self.counts.acknowledged += self._settling.settle_states(states)
        if self._session is not None:
            self._session.settled([place for one in states for place in one.places])
