"""Those who train by checkpoint: ranks of a job that die, stand still and are begun again, and what must come of them.

A rank's checkpoint is what its weights have seen and the state of its dataset, durable together or not at all. What
must hold is looked at when one becomes durable, when the server is told that an entry was used, and at the end.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.simulation.invariants import Invariants, name_of
from tests.simulation.scheduler import Process
from tests.simulation.server import Unit
from trajstore.errors import Fenced, Unavailable
from trajstore.ready import ReadyGroup, parse_deliveries
from trajstore.store import Store
from trajstore_trainer import Selection, TrajectoryDataset

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["GROUP", "Job", "Rank", "launch"]

GROUP = "ranks"
"""Consumer group of a job beside which others train by acknowledgement."""

_COMES_AGAIN = ("waits for an aborted member", "waits for a late member")
_DECIDED = "an earlier version of the group was decided on"


class Job:
    """What outlives the ranks, and what they must not do.

    Args:
        size: ranks to begin with.
        group: consumer group.

    Attributes:
        size: ranks of the job as it is now.
        places: which process has the place of each rank; an earlier one may live on.
        datasets: of those in their place, once they have gone on from a checkpoint.
        saved: state of the newest durable checkpoint of each rank.
        weights: trajectories that durable checkpoints were trained on, and the entry each came in.
        settled: entries in the states of durable checkpoints.
        stumbles: share of the steps between two checkpoints at which a rank dies or stands still.
        tardy: share of the server's replies that reach the threads of a rank only when its trainer has gone on.
        patience: share of a rank's turns after which it writes no checkpoint yet.
        often: seconds between two launches, about.
        unsure: groups about which the server has forgotten what the trainers did: they may come again.
    """

    def __init__(self, invariants: Invariants, rng: random.Random, *, size: int, group: str) -> None:
        self.invariants = invariants
        self.size = size
        self.group = group
        self.places: dict[int, Process] = {}
        self.datasets: dict[int, TrajectoryDataset] = {}
        self.saved: dict[int, Any] = {}
        self.weights: dict[str, str] = {}
        self.settled: set[str] = set()
        self.unsure: set[str] = set()
        self._former: list[Any] = []
        self._trained: set[str] = set()
        self._decided: set[str] = set()
        self._seen: set[tuple[str, int]] = set()
        self._touched: list[tuple[int, str]] = []
        self._streams = {invariants.keys.ready(p).encode(): p for p in range(invariants.keys.partitions)}
        self._options: dict[str, Any] = {
            "checkpoints": True,
            "selection": Selection(
                aborted=rng.choice(["wait", "wait", "drop", "rest"]),
                late=rng.choice(["wait", "wait", "drop", "rest"]),
                unfit=rng.choice(["drop", "rest"]),
                min_members=rng.choice([1, 2]),
            ),
            "lease": rng.choice([3.0, 12.0, 12.0]),
            "timeout": 1.0,
            "prefetch_groups": rng.choice([1, 2, 8]),
        }
        self.stumbles = rng.choice([0.0, 0.05, 0.3])
        self.tardy = rng.choice([0.0, 0.1, 0.15, 0.2])
        self.patience = rng.choice([0.0, 0.5, 0.7])
        self.often = rng.choice([2.0, 4.0, 8.0])
        invariants.durable[group.encode()] = self.settled
        invariants.server.observers.append(self._after)

    def dataset(self, store: Store, number: int) -> TrajectoryDataset:
        """As each rank makes it."""
        return TrajectoryDataset(store, group=self.group, rank=number, world_size=self.size, **self._options)

    def sources(self, number: int) -> list[Any]:
        """With which a rank goes on: its own state, or those of all ranks of the job before."""
        return [self.saved[number]] if number in self.saved else self._former

    def save(self, number: int, process: Process, state: Any, fresh: Sequence[Any]) -> bool:
        """A checkpoint becomes durable; whether it does.

        Where another process has the place now, the job does not go on from this one, and whoever launched that other
        keeps it from being written: unless the heir has taken all that it holds, so that the library must refuse it.

        Args:
            fresh: what was trained on since the rank's last one that is durable.
        """
        if self.places.get(number) is not process:
            return self.settled.union(self._had_by_heir(number)).issuperset(state["entries"])
        entries, passed = set(state["entries"]), {one["entry"] for one in state["filtered"] if one["why"]}
        known = {str(ready.delivery.place) for ready in fresh}
        strange = entries - known - passed - self.settled
        assert not strange, f"{process}'s state has {sorted(strange)}, which were not handed out"
        before = self.saved.get(number)
        listed = set(before["entries"]) if before is not None and before["consumer"] == state["consumer"] else set()
        again = [one for one in (entries & self.settled) - listed if self._name_of(one) not in (None, *self.unsure)]
        assert not again, f"{process} was given {sorted(again)} again, which a durable checkpoint holds"
        for ready in fresh:
            group, place = ready.delivery.group, str(ready.delivery.place)
            name = name_of(group)
            assert place in entries or name in self.unsure, f"{process} has trained on {place}, and its state lacks it"
            for one in ready.trajectories:
                other = self.weights.get(one.id)
                assert other is None or name in self.unsure, f"{one.id} of {place} is durable already, by {other}"
                self.weights[one.id] = place
            self._trained.add(name)
            self._seen.add((name, group.version))
        for record in state["filtered"]:
            if record["why"] and record["entry"] in entries:
                self._passed_over(record)
        self.settled |= entries
        self.saved[number] = state
        return True

    def resize(self, size: int) -> None:
        """Another job goes on where this one ended, with the states of all its ranks."""
        self._former, self.saved = list(self.saved.values()), {}
        self.places.clear()
        self.datasets.clear()
        self.size = size

    def forgot(self, lost: Sequence[Unit]) -> None:
        """The server came back without these units."""
        if lost:
            self.unsure |= {name for ms, name in self._touched if ms >= lost[0].ms}

    def check_end(self) -> None:
        """What was published is in a durable checkpoint, or was passed over for good and by a decision."""
        for name, group in self.invariants.newest.items():
            if self.invariants.deleted.issuperset(one.id for one in group.members):
                continue
            assert (name, group.version) in self._seen, f"{name} version {group.version} is in no durable checkpoint"
            returns = group.late or any(one.status == "aborted" for one in group.members)
            decided = name in self._trained or name in self._decided
            assert returns or decided or name in self.unsure, f"{name} was passed over, and nobody has decided on it"

    def _had_by_heir(self, number: int) -> set[str]:
        """What the server has given to the rank that has this place."""
        session: Any = self.datasets[number]._session if number in self.datasets else None
        if session is None:
            return set()
        groups = {p: self.invariants.server.keys[key].groups[self.group.encode()] for key, p in self._streams.items()}
        return {
            f"{p}/{at[0]}-{at[1]}"
            for p, group in groups.items()
            for at, (consumer, _, _) in group.pending.items()
            if consumer == session.consumer.encode()
        }

    def _passed_over(self, record: Any) -> None:
        name = self._name_of(record["entry"])
        if name is not None:
            self._seen.add((name, record["version"]))
            if record["why"] not in (*_COMES_AGAIN, _DECIDED):
                self._decided.add(name)

    def _name_of(self, place: str) -> str | None:
        """Of what lies there; None if the server has forgotten it."""
        partition, _, at = place.partition("/")
        group = self.invariants.deliveries.get((int(partition), _id(at.encode())))
        return None if group is None else name_of(group)

    def _after(self, command: Sequence[bytes], reply: Any) -> None:
        """Note which groups a command of the trainers was about."""
        name, key, groups = command[0].upper(), command[1], self.invariants.deliveries
        found: list[ReadyGroup | None] = []
        if name in (b"XADD", b"XACK") and key in self._streams:
            ids = [reply] if name == b"XADD" else command[3:]
            found = [groups.get((self._streams[key], _id(at))) for at in ids]
        elif name == b"XREADGROUP" and command[-1] == b">":
            mine = [some for stream, some in reply if stream in self._streams]
            found = [one.group for some in mine for one in parse_deliveries(0, some)]
        elif name in (b"XCLAIM", b"XAUTOCLAIM") and key in self._streams:
            found = [one.group for one in parse_deliveries(0, reply if name == b"XCLAIM" else reply[1])]
        names = [name_of(group) for group in found if group is not None]
        if name == b"SET" and b":chosen:" in key:
            names = [key.rpartition(b":")[2].decode()]
        self._touched += [(self.invariants.server.ms, one) for one in names]


class Rank:
    """One process in the place of a rank: trains, makes checkpoints durable and commits them."""

    def __init__(self, world: "World", process: Process, store: Store) -> None:
        self.world = world
        self.rng = world.rng
        self.process = process
        self.store = store
        self.job = world.job
        self.number = int(process.name.partition("-")[2].partition(".")[0])
        self.dataset: Any = None
        self.fresh: list[Any] = []

    def run(self) -> None:
        """Train until another process has this place, and for a while beyond."""
        while self._is_in_place():
            try:
                self._go_on()
                while self._is_in_place() or self.rng.random() < 0.8:
                    self._train()
            except Fenced:
                self.world.count("rank fenced")
        if self.dataset is not None and self.rng.random() < 0.5:
            self.dataset.close()
        self.world.kill(self.process)

    def _is_in_place(self) -> bool:
        return self.job.places.get(self.number) is self.process

    def _go_on(self) -> None:
        """From the last durable checkpoint, or from those of the job before."""
        if self.dataset is None or self.rng.random() < 0.5:
            if self.dataset is not None:
                self.dataset.close()
            if not self._is_in_place():
                return
            self.dataset = self.job.dataset(self.store, self.number)
        self.fresh.clear()
        while True:
            try:
                if self.job.sources(self.number):
                    self.dataset.load_state_dict(self.job.sources(self.number))
                if self.number not in self.job.saved:
                    self.job.save(self.number, self.process, self.dataset.state_dict(), [])
            except Unavailable:
                self.world.scheduler.sleep(self.rng.random())
            else:
                break
        if self._is_in_place():
            self.job.datasets[self.number] = self.dataset

    def _train(self) -> None:
        try:
            for ready in self.dataset:
                self.fresh.append(ready)
                if self.rng.random() < 0.8:
                    break
        except Unavailable:  # nothing came, or the server is away
            self.world.scheduler.sleep(self.rng.random() * 0.5)
        if not self.world.calm and self.rng.random() < self.job.patience:  # it is a long way to the next checkpoint
            return
        try:
            state = self.dataset.state_dict()
            if state["entries"]:
                self._stumble()
                if self.job.save(self.number, self.process, state, self.fresh):
                    self.fresh.clear()
                    self._stumble()
                    self.dataset.commit(state)
        except Unavailable:
            self.world.scheduler.sleep(self.rng.random() * 0.5)

    def _stumble(self) -> None:
        """Between two steps a rank may die, or stand still."""
        world = self.world
        if not world.calm and self.rng.random() < self.job.stumbles:
            if self.rng.random() < 0.5 and self._is_in_place():
                world.end(f"rank-{self.number}")
            else:
                self.process.stalled_until = world.scheduler.now + self.rng.choice([1.0, 5.0, 12.0])
        world.scheduler.pause()


def launch(world: "World", process: Process) -> None:
    """Begin ranks again elsewhere, beside those that live, and the whole job with another number of ranks."""
    rng, job = world.rng, world.job
    while not world.calm:
        world.scheduler.sleep(rng.random() * 2 * job.often)
        if world.calm:
            break
        if rng.random() < 0.6:
            number = rng.randrange(job.size)
            world.count("rank begun beside another")
            world.processes[f"rank-{number}"].stalled_until = world.scheduler.now + rng.choice([0.0, 1.0, 4.0, 8.0])
            world.begin("rank", number)
        elif len(job.saved) == job.size:
            world.count("job of another size")
            for number in range(job.size):
                world.kill(world.processes.pop(f"rank-{number}"))
            size = rng.randint(1, 3)
            if size != job.size:  # whoever was replaced and lives on would follow ranks of the new job
                for task in world.scheduler.tasks:
                    if task.name == "rank":
                        world.kill(task.process)
            job.resize(size)
            for number in range(job.size):
                world.begin("rank", number)


def _id(text: bytes) -> tuple[int, int]:
    epoch, _, seq = text.partition(b"-")
    return int(epoch), int(seq)
