"""A dataset's part of a checkpoint: which entries it had handed out and not acknowledged. Plain data, pure functions.

The state is a dict of JSON types, one per rank (and per DataLoader worker), so that any checkpoint format takes it, by
itself or inside what a stateful data loader makes of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from trajstore.errors import Conflict, SchemaError
from trajstore.ready import EntryPlace
from trajstore_trainer.claims import Slot
from trajstore_trainer.filtered import Filtered

__all__ = ["DatasetState", "find_states", "require_enough", "require_own"]

_VERSION = 1
_MARK = "trajstore_dataset"


class DatasetState(msgspec.Struct, frozen=True, kw_only=True):
    """What one consumer had handed out since the last commit.

    Attributes:
        run: incarnation of the run.
        group: consumer group.
        rank, world_size: its place among the ranks.
        worker, workers: its place among the rank's DataLoader workers; 0 of 1 without.
        consumer: its name; "" if it had not begun to read.
        entries: partition and id of each entry.
        filtered: what of them was not trained on.
        trajstore_dataset: version of this format.
    """

    run: str
    group: str
    rank: int
    world_size: int
    worker: int
    workers: int
    consumer: str
    entries: list[str]
    filtered: list[Filtered]
    trajstore_dataset: int = _VERSION

    @property
    def slot(self) -> Slot:
        """Its place in the job."""
        return Slot(self.rank, self.worker)

    @property
    def places(self) -> list[EntryPlace]:
        """Its entries."""
        return [EntryPlace.parse(entry) for entry in self.entries]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dict(msgspec.to_builtins(self))


def find_states(tree: Any) -> Iterator[DatasetState]:
    """Every dataset state in a tree of mappings and sequences, such as a gathered list or a data loader's own state.

    Raises:
        SchemaError: a state that this version does not understand.
    """
    if isinstance(tree, Mapping):
        if _MARK in tree:
            yield _read(tree)
        else:
            for value in tree.values():
                yield from find_states(value)
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for value in tree:
            yield from find_states(value)


def require_own(tree: Any, *, run: str, group: str) -> list[DatasetState]:
    """The states in a tree, all of this run and consumer group.

    Raises:
        SchemaError: there is none, or one that this version does not understand.
        Conflict: one belongs to another run or consumer group.
    """
    states = list(find_states(tree))
    if not states:
        raise SchemaError("there is no state of a TrajectoryDataset in what was given; give what state_dict() returned")
    for one in states:
        if (one.run, one.group) != (run, group):
            raise Conflict(
                f"the state is of run {one.run}, consumer group {one.group!r}; the dataset reads run {run}, group "
                f"{group!r}. A new run or group begins without a state"
            )
    return states


def require_enough(states: Iterable[DatasetState], *, rank: int, world_size: int) -> None:
    """The states are those of all ranks and workers of the job that made them, or this rank's own and the job as large.

    Raises:
        SchemaError: they are not.
    """
    states = list(states)
    there = {one.slot for one in states}
    world = max(one.world_size for one in states)
    workers = {one.rank: one.workers for one in states}
    missing = sorted({slot for r in range(world) for slot in _slots(r, workers.get(r, 1))} - there)
    if missing and (world != world_size or rank not in workers):
        ranks = ", ".join(str(one) for one in sorted({slot.rank for slot in missing}))
        raise SchemaError(
            f"the state was made by {world} ranks and is loaded by rank {rank} of {world_size}; that needs the states "
            f"of all ranks, and those of rank {ranks} are missing. Load a list of all of them in every rank"
        )


def _slots(rank: int, workers: int) -> list[Slot]:
    return [Slot(rank, worker) for worker in range(workers)]


def _read(state: Mapping[str, Any]) -> DatasetState:
    try:
        found = msgspec.convert(dict(state), DatasetState)
    except msgspec.ValidationError as error:
        raise SchemaError(f"this is no state of a TrajectoryDataset: {error}") from error
    if found.trajstore_dataset != _VERSION:
        raise SchemaError(
            f"the dataset's state has version {found.trajstore_dataset}, this trajstore reads {_VERSION}; upgrade it"
        )
    return found
