"""Rollouts that lie ready for a trainer, in groups of 4, and a reader that finds them as often as wanted."""

from collections.abc import Sequence

from ulid import ULID

import trajstore
from benchmarks.corpora import Corpus, Rollout
from trajstore.materializer import Materializer
from trajstore.trajectory import Trajectory
from trajstore_trainer import TrajectoryReader

__all__ = ["GROUP_SIZE", "Reader", "publish", "record"]

GROUP_SIZE = 4


def publish(store: trajstore.Store, corpus: Corpus, rollouts: Sequence[Rollout]) -> None:
    """Groups of finished trajectories, ready."""
    for number, rollout in enumerate(rollouts):
        group = f"g{number // GROUP_SIZE:03}"
        record(store, corpus, rollout, group=group, group_size=GROUP_SIZE).close("completed")
    store.flush()
    Materializer(store).run(once=True)


def record(
    store: trajstore.Store, corpus: Corpus, rollout: Rollout, *, group: str | None = None, group_size: int | None = None
) -> trajstore.TrajectoryWriter:
    trajectory = store.create(group=group, group_size=group_size, routing=corpus.spec)
    with trajectory.segment(context=rollout.tokens[: rollout.prompt], weight_version="v1") as segment:
        segment.tokens(rollout.tokens[rollout.prompt :], rollout.logprobs[rollout.prompt :])
        segment.routing(rollout.routed[:-1], start=0)
        segment.close("stop")
    trajectory.reward(1.0)
    return trajectory


class Reader:
    """Reads all that is ready, as often as wanted: each time as a consumer group that is new."""

    def __init__(self, store: trajstore.Store, groups: int) -> None:
        self._store = store
        self._groups = groups
        self._reader: TrajectoryReader | None = None

    def fresh(self) -> None:
        """The next `read` finds everything again."""
        self._reader = TrajectoryReader(self._store, group=f"round-{ULID()}")

    def read(self) -> list[Trajectory]:
        """All trajectories."""
        assert self._reader is not None
        taken = self._reader.take(self._groups, timeout=60.0)
        return [one for entry in taken for one in entry.trajectories]
