"""One simulated run: who takes part, what happens to them, and what must be true at the end."""

import contextlib
import gc
import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from tests.simulation.actors import MISFORTUNES, ROLES, TURNS
from tests.simulation.disk import Disk, Files
from tests.simulation.invariants import Invariants
from tests.simulation.job import GROUP, Job
from tests.simulation.ledger import Issue, Ledger
from tests.simulation.network import Network, Pool
from tests.simulation.outside import Outside
from tests.simulation.scheduler import Process, Scheduler
from tests.simulation.server import Server, Unit
from trajstore.archive.of_run import open_archived_run
from trajstore.entries import decode_known
from trajstore.errors import Fenced, SequenceGap, Unavailable
from trajstore.log.flusher import Flusher
from trajstore.log.keys import Keys
from trajstore.log.run import TRAINER_GROUP
from trajstore.log.wire import Wire
from trajstore.store import Store

__all__ = ["Account", "Plan", "World", "simulate"]

RUN = "sim"
LOCATION = "/simulated/archive"
TIMEOUT = 2.0
LINES = 2
"""Connections of a writer to a server that fsyncs. There are few trajectories here; so they share even these."""

RANKS = (3, 6)
"""Seeds that leave these, divided by 7, train by checkpoint."""

BLOCK = 1.0
"""Seconds for which a rank's reading thread waits at the server, where it waits for little else."""

SMALL = 10_000
"""A buffer of fewer bytes does not keep all that was acknowledged in the last seconds."""


class Plan(msgspec.Struct):
    """What a seed decides in advance.

    Seeds have different habits: what some of them never do, others do all the time. Much goes wrong only where one
    thing happens again and again, and is not seen where everything happens a little (Groce et al., "Swarm Testing",
    2012).

    Attributes:
        always: the server fsyncs before it acknowledges, and writers ask for that.
        trajectories, writers, archivers, materializers: how many.
        trainers: how many train by acknowledgement.
        ranks: of the job that trains by checkpoint, to begin with; 0 for none.
        actions: of the writers, together.
        loss: share of requests that something happens to.
        disk_loss: likewise of the archive's calls.
        chaos: seconds between two misfortunes, about; 0 for none.
        misfortunes: how often each kind comes, see `actors.py`.
        turns: likewise what writers do with a turn.
        stumbles: share of the steps of archivers and materializers at which they die or stand still.
        pace: how long writers wait between two actions, as a factor.
        full: bytes of `maxmemory` while the server is short of it, 0 for never.
        buffer: bytes of each writer's buffer, and of what it keeps against a loss.
    """

    always: bool
    trajectories: int
    writers: int
    archivers: int
    materializers: int
    trainers: int
    ranks: int
    actions: int
    loss: float
    disk_loss: float
    chaos: float
    misfortunes: dict[str, int]
    turns: dict[str, int]
    stumbles: float
    pace: float
    full: int
    buffer: int

    @classmethod
    def of(cls, rng: random.Random) -> "Plan":
        """One without ranks."""
        return cls(
            always=rng.random() < 0.35,
            trajectories=rng.choice([1, 2, 3, 4, 5, 6]),
            writers=rng.randint(1, 4),
            archivers=rng.randint(1, 2),
            materializers=rng.randint(1, 2),
            trainers=rng.randint(1, 2),
            ranks=0,
            actions=rng.randint(25, 90),
            loss=rng.choice([0.0, 0.003, 0.01, 0.03, 0.08]),
            disk_loss=rng.choice([0.0, 0.0, 0.02, 0.1]),
            chaos=rng.choice([0.0, 0.7, 1.5, 3.0, 6.0]),
            misfortunes={name: often * rng.choice([0, 1, 1, 4]) for name, often in MISFORTUNES.items()},
            turns={name: often * rng.choice([0, 1, 1, 4]) for name, often in TURNS.items()} | {"segment": 50},
            stumbles=rng.choice([0.0, 0.0, 0.02, 0.1]),
            pace=rng.choice([0.3, 1.0, 1.0, 3.0]),
            full=rng.choice([0, 0, 0, 12_000, 30_000]),
            buffer=rng.choice([1 << 20, 1 << 20, 1 << 20, 4000, 500]),
        )

    def with_ranks(self, rng: random.Random) -> "Plan":
        """In most cases they train alone; and more is finished, while things go wrong, than the others need."""
        return msgspec.structs.replace(
            self,
            ranks=rng.randint(1, 3),
            trainers=rng.choice([0, 0, 0, self.trainers]),
            trajectories=rng.choice([4, 8, 12]),
            turns=self.turns | {"close": rng.choice([14, 50, 100])},
        )


class Account(msgspec.Struct):
    """What a seed came to.

    Attributes:
        seed: its number.
        steps, seconds: of the simulation.
        digest: of everything that the server was told: two runs of one seed agree on it.
        events, acknowledged: handed in, and acknowledged.
        forgotten: acknowledged, and lost with a server's tail.
        archived: entries and notes in the archive.
        published: ready entries.
        checked: trajectories read and compared.
        happened: misfortunes, by kind.
    """

    seed: int
    steps: int = 0
    seconds: float = 0.0
    digest: str = ""
    events: int = 0
    acknowledged: int = 0
    forgotten: int = 0
    archived: int = 0
    published: int = 0
    checked: int = 0
    happened: dict[str, int] = {}


class World:
    """Everything that takes part.

    Attributes:
        winding_down: writers finish what they have and leave.
        calm: nothing goes wrong any more.
        hasten: materializers that publish a group without those that are late.
        stale: trajectories whose summary the loser of a race could not mend, or did not know that it had to.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.plan = Plan.of(self.rng)
        apart = random.Random(f"ranks of {seed}")  # so that who has none plays the story that it would play anyway
        if seed % 7 in RANKS:
            self.plan = self.plan.with_ranks(apart)
        self.scheduler = Scheduler(self.rng)
        self.outside = Outside(self.scheduler, self.rng)
        fsync = "always" if self.plan.always else "everysec"
        self.server = Server(lambda: int(self.scheduler.now * 1000), fsync=fsync)
        self.network = Network(self.server, self.scheduler, self.rng, loss=self.plan.loss)
        self.disk = Disk(self.scheduler, self.rng, loss=self.plan.disk_loss)
        self.ledger = Ledger(lambda: int(self.scheduler.now * 1000))
        self.keys = Keys(RUN, 2)
        self.invariants = Invariants(self.server, self.disk, self.ledger, self.keys, LOCATION)
        group = GROUP if self.plan.trainers else TRAINER_GROUP
        self.job = Job(self.invariants, apart, size=self.plan.ranks, group=group) if self.plan.ranks else None
        self.ids = [f"t{number}" for number in range(self.plan.trajectories)]
        self.winding_down = False
        self.calm = False
        self.hasten: set[Process] = set()
        self.stale: set[str] = set()
        self.stores: list[Store] = []
        self.stores_of: dict[Process, list[Store]] = {}
        self.actions_left = self.plan.actions
        self.counts: dict[str, int] = {}
        self.digest = hashlib.blake2b(digest_size=8)
        self.server.observers.append(self._note)
        self._born = 0
        self._undone: Any = None
        self.gone_lanes: set[int] = set()
        self.processes: dict[str, Process] = {}

    def _note(self, command: Any, reply: Any) -> None:
        self.digest.update(b" ".join(command))

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def open(self) -> Store:
        """What `trajstore.open` does, over the simulated server and archive."""
        wire = Wire(Pool(self.network, TIMEOUT), timeout=TIMEOUT)  # type: ignore[arg-type]
        wire.wait_while_loading()
        info, archive = open_archived_run(
            wire, RUN, LOCATION, options=None, home=None, partitions=2, routing_order=None, create=True
        )
        store = Store(
            location="sim",
            wire=wire,
            run=RUN,
            info=info,
            archive=archive,
            server=None,
            ack="fsync" if self.plan.always else "memory",
            timeout=TIMEOUT,
            buffer_bytes=self.plan.buffer,
        )
        task = self.scheduler.current
        if task is not None:
            self.stores_of.setdefault(task.process, []).append(store)
        return store

    def begin(self, role: str, number: int) -> Process:
        """A new process in a role."""
        self._born += 1
        process = Process(f"{role}-{number}.{self._born}")
        self.processes[f"{role}-{number}"] = process
        if role == "rank" and self.job is not None:
            process.tardy = self.job.tardy
            self.job.places[number] = process
            self.job.datasets.pop(number, None)
        self.scheduler.spawn(role, process, lambda: ROLES[role](self, process))
        return process

    def kill(self, process: Process) -> None:
        """End a process; nobody is left there to be told anything."""
        self.scheduler.kill(process)
        self.gone_lanes |= self.ledger.lanes_of(process)
        self.stores = [store for store in self.stores if store not in self.stores_of.pop(process, [])]

    def end(self, name: str) -> None:
        """Kill a process; another takes its place after a while."""
        process = self.processes[name]
        role, _, number = name.rpartition("-")
        self.count(f"killed {role}")
        self.kill(process)

        def revive() -> None:
            self.scheduler.sleep(self.rng.random() * 4.0)
            if self.processes.get(name) is process:
                self.begin(role, int(number))

        self.scheduler.spawn("nurse", Process("nurse"), revive)

    def forgot(self, lost: Sequence[Unit]) -> None:
        """The server came back without these units."""
        self.invariants.forgot(lost)
        if self.job is not None:
            self.job.forgot(lost)

    def roles(self) -> Iterator[tuple[str, int]]:
        for role in ("writer", "archiver", "materializer", "trainer"):
            for number in range(getattr(self.plan, role + "s")):
                yield role, number
        for number in range(self.job.size if self.job is not None else 0):
            yield "rank", number

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The library lives in this world for the length of the block."""
        import trajstore.archive.root as root
        import trajstore.log.flusher as flusher
        import trajstore_trainer.session as session

        ledger, append = self.ledger, Flusher.append
        fail, repair = Flusher._fail, Store.repair_summary

        def recorded(flusher: Any, lane: Any, turn: Any, header: Any, payload: Any = None) -> None:
            if self.scheduler.current is not None:
                ledger.own(lane, self.scheduler.current.process)
            issue = ledger.issue(lane, turn, header, _payload(header, payload))
            queued = lane.queued
            try:
                append(flusher, lane, turn, header, payload)
            except BaseException:
                if lane.queued == queued:
                    ledger.withdraw(issue)
                raise

        def failed(flusher: Any, lane: Any, error: Any) -> None:
            self.ledger.errors[self.ledger.key_of(lane)] = error
            self._require_reason(lane, error)
            if isinstance(error, Unavailable) and not lane.note and lane.in_question is not None:
                self.stale.add(lane.id)  # it may have been refused, and its writer gave up before it knew
            fail(flusher, lane, error)

        def repaired(store: Any, id: str) -> None:
            self.stale.add(id)
            repair(store, id)
            self.stale.discard(id)

        opened, lines, block = root.open_storage, flusher._LINES, session._BLOCK
        with self.outside.installed():
            flusher._LINES, session._BLOCK = LINES, BLOCK
            root.open_storage = lambda location, options=None: Files(self.disk, str(location))  # type: ignore
            Flusher.append = recorded  # type: ignore[method-assign]
            Flusher._fail = failed  # type: ignore[method-assign]
            Store.repair_summary = repaired  # type: ignore[method-assign]
            try:
                yield
            finally:
                Flusher.append, Flusher._fail = append, fail  # type: ignore[method-assign]
                Store.repair_summary = repair  # type: ignore[method-assign]
                root.open_storage = opened
                flusher._LINES, session._BLOCK = lines, block

    def _require_reason(self, lane: Any, error: Any) -> None:
        """A writer is told that its turn is over only if it is, and of a loss only if there was one."""
        issues = self.ledger.by_lane.get(self.ledger.key_of(lane), [])
        nonces = {issue.nonce for issue in issues}
        if isinstance(error, SequenceGap):
            assert self.invariants.lost.get(lane.id), f"{lane.id}: told of a loss that was none: {error}"
        elif isinstance(error, Fenced) and not lane.note and not self.invariants.lost.get(lane.id):
            held = self.invariants.log.get(lane.id, {})
            newest = max(held, default=(0, 0))
            foreign = [at for at, data in held.items() if decode_known(data).nonce not in nonces]
            assert foreign, f"{lane.id}: fenced, but nobody else has written: {error}"
            assert max(foreign) >= (newest[0], 0) or lane.acked is None or max(foreign) > lane.acked, (
                f"{lane.id}: fenced, but nobody has written since: {error}"
            )

    def run(self) -> None:
        """The whole life of the run.

        Raises:
            AssertionError: an invariant does not hold.
        """
        setup = Process("setup")
        task = self.scheduler.spawn("setup", setup, lambda: ROLES["setup"](self, setup))
        self._until(lambda: task.ended, 60.0)
        chaos = Process("chaos")
        self.scheduler.spawn("chaos", chaos, lambda: ROLES["chaos"](self, chaos))
        for role, number in self.roles():
            self.begin(role, number)
        if self.job is not None:
            launcher = Process("launcher")
            self.scheduler.spawn("launcher", launcher, lambda: ROLES["launcher"](self, launcher))
        self._until(lambda: self.actions_left <= (15 if self.plan.full else 0), 600.0)
        if self.plan.full:  # what comes now is there when the server is full
            self._end_archivers()
        self._until(lambda: self.actions_left <= 0, 600.0)
        over = self.scheduler.now + self.rng.random() * 5.0
        self._until(lambda: self.scheduler.now >= over, 60.0)
        self.calm = self.network.calm = self.disk.calm = True
        self.server.limit = 0
        self.winding_down = True
        self._until(lambda: self._gone("writer") and self.network.up and not self.network.late, 120.0)
        if self.plan.full:
            self._drain_full()
        closer = Process("closer")
        task = self.scheduler.spawn("closer", closer, lambda: ROLES["closer"](self, closer))
        self._until(lambda: task.ended, 120.0)
        for role, number in self.roles():
            if role != "writer" and self.processes[f"{role}-{number}"].dead:
                self.begin(role, number)
        self._until(self._is_done, 120.0)
        checker = Process("checker")
        task = self.scheduler.spawn("checker", checker, lambda: ROLES["checker"](self, checker))
        self._until(lambda: task.ended, 120.0)
        self._until(self._is_done, 120.0)  # a group may have been published because it waited too long
        self._check_end()

    def _drain_full(self) -> None:
        """An archiver that is begun on a full server archives all that is finished, and trims it."""
        self.server.limit = 1
        self._end_archivers()
        for role, number in self.roles():
            if role == "archiver":
                self.begin(role, number)
        self._until(self.invariants.holds_nothing_finished, 120.0)
        self.server.limit = 0

    def _end_archivers(self) -> None:
        for role, number in self.roles():
            if role == "archiver":
                self.kill(self.processes[f"{role}-{number}"])

    def _is_done(self) -> bool:
        """Nothing waits, what was closed was published, and no summary is wrong that a writer could not mend.

        Of that an archiver takes care, if a segment seems to stand open.
        """
        hastens = any(task.process in self.hasten for task in self.scheduler.tasks)
        told, stands = self.invariants, (self.server.changes, hastens, frozenset(self.stale))
        if stands == self._undone:
            return False
        if told.drained() and not told.unpublished(late_too=hastens):
            wrong = [id for id in told.listed_open() if id in self.stale or "killed writer" in self.counts]
            if not wrong:
                return True
        self._undone = stands
        return False

    def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = self.scheduler.now + seconds
        self.scheduler.run(condition, deadline=deadline, after_step=self._after_step)

    def _after_step(self) -> None:
        self.network.deliver_late()
        self.invariants.after_step()
        for store in self.stores:
            flusher: Any = store._flusher
            bound = max(flusher._buffer_bytes, self.ledger.largest)
            assert flusher._buffered <= bound, "the buffer grows beyond its bound"
            assert flusher._buffered >= 0

    def _gone(self, role: str) -> bool:
        return not any(task.process.name.startswith(role) for task in self.scheduler.tasks)

    def require_told(self, process: Process | None = None) -> None:
        """What was acknowledged is there; or the server lost it, and the writer was told, if it still lived.

        Args:
            process: only of this one.
        """
        lanes = self.ledger.by_lane if process is None else self.ledger.lanes_of(process)
        for issue in [issue for lane in lanes for issue in self.ledger.by_lane.get(lane, ())]:
            if not issue.acknowledged or issue.id in self.invariants.deleted or self.invariants.present(issue):
                continue
            assert self.invariants.lost.get(issue.id), f"{issue} was acknowledged, and is not there"
            assert not self.plan.always, f"{issue} was acknowledged as durable, and is not there"
            if self.plan.buffer < SMALL and not self._must_know(issue):
                continue
            assert issue.lane in self.ledger.errors or issue.lane in self.gone_lanes, (
                f"{issue} was acknowledged, is not there, and its writer was not told"
            )

    def _must_know(self, issue: Issue) -> bool:
        """Of a loss a writer knows, though it keeps next to nothing, by what the server shows: its log is shorter."""
        lane, held = self.ledger.lane_of(issue.lane), self.invariants.log.get(issue.id, {})
        return not issue.note and lane is not None and max(held, default=(0, 0)) < tuple(lane.acked or (0, 0))

    def _check_end(self) -> None:
        self.require_told()
        for id, entries in self.invariants.log.items():
            for at in entries:
                there = (id, False, at) in self.invariants.archived
                assert there or id in self.invariants.deleted, f"{id}: {at} is nowhere"
        for id, notes in self.invariants.notes.items():
            for at in notes:
                there = (id, True, at) in self.invariants.archived
                gone = id in self.invariants.deleted or self.invariants.lost.get(id)
                assert there or gone, f"{id}: note {at} is nowhere"
        for key in self.server.keys:
            goes = key in self.server.expires or key in self.invariants.strays
            assert b":p:" not in key or goes, f"{key!r} holds payloads of nobody"
            id = key.decode().rpartition(":")[2]
            gone = id in self.invariants.deleted and not self.invariants.lost.get(id)
            assert not (b":r:" in key and gone), f"{key!r} holds a fold of a deleted trajectory"
        self._check_published()

    def _check_published(self) -> None:
        if self.job is not None:
            self.job.check_end()
        if not self.plan.trainers:
            return
        for name, version in self.invariants.published.items():
            assert (name, version) in self.invariants.used, f"{name} version {version} was never trained on"


def simulate(seed: int) -> Account:
    """Run one seed.

    Raises:
        AssertionError: an invariant does not hold; the same seed fails again.
    """
    world = World(seed)
    collecting = gc.isenabled()
    gc.disable()  # when weak references die must not depend on what ran before
    logging.disable(logging.CRITICAL)
    try:
        with world.installed():
            try:
                world.run()
            finally:
                for process in {task.process for task in world.scheduler.tasks}:
                    process.dead = True
                world.scheduler._bury()
    finally:
        logging.disable(logging.NOTSET)
        if collecting:
            gc.enable()
    issues = [issue for some in world.ledger.by_lane.values() for issue in some]
    acknowledged = [issue for issue in issues if issue.acknowledged]
    return Account(
        seed=seed,
        steps=world.scheduler.steps,
        seconds=world.scheduler.now - 1000.0,
        digest=world.digest.hexdigest(),
        events=len(issues),
        acknowledged=len(acknowledged),
        forgotten=sum(not world.invariants.present(issue) for issue in acknowledged),
        archived=len(world.invariants.archived),
        published=len(world.invariants.offered_ever),
        checked=world.invariants.checked,
        happened=world.counts | world.network.counts | world.disk.counts,
    )


def _payload(header: Any, payload: Any) -> bytes:
    from trajstore.events import payload_of

    if payload is not None:
        return bytes(payload)
    info = payload_of(header)
    return b"" if info is None or info.inline is None else info.inline
