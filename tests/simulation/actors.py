"""Those who take part in a simulated run: each is a process with a store of its own, which may die at any step."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.builders import SPEC, rows
from tests.simulation.invariants import ABANDON_SECONDS, GROUP_SECONDS, name_of
from tests.simulation.job import Rank, launch
from tests.simulation.scheduler import Process
from trajstore.archiver import Archiver
from trajstore.errors import Conflict, Corrupt, Fenced, NotFound, SequenceGap, StoreFull, Unavailable
from trajstore.log.run import TRAINER_GROUP
from trajstore.materializer import Materializer
from trajstore.ready_follower import ReadyFollower

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["MISFORTUNES", "ROLES", "TURNS"]

TURNS = {"segment": 50, "reward": 8, "close": 14, "observe": 12, "late": 12, "delete": 2, "nothing": 5}
"""What a writer does with a turn, and how often in a hundred or so."""

_EXPECTED = (Unavailable, StoreFull, Fenced, Conflict, NotFound, SequenceGap)
"""What a writer may be told while things go wrong; anything else is a bug."""


def setup(world: "World", process: Process) -> None:
    """Begins the run, and waits until that is on the server's disk: a run whose record is lost cannot be opened."""
    world.network.calm = world.disk.calm = True
    store = world.open()
    if world.plan.ranks and world.job.group != TRAINER_GROUP:  # so that it gets everything
        ReadyFollower(store.wire, store.keys, world.job.group, "")
    store.close()
    world.scheduler.sleep(3.0)
    world.network.calm = world.disk.calm = False


class Writer:
    """Writes to trajectories in turns, keeps old handles, is taken over and takes over."""

    def __init__(self, world: "World", process: Process) -> None:
        self.world = world
        self.rng = world.rng
        self.process = process
        self.store: Any = None
        self.handles: dict[str, Any] = {}
        self.segments: dict[str, Any] = {}

    def run(self) -> None:
        world = self.world
        while not world.winding_down:
            if world.actions_left <= 0:  # idle, while things go wrong
                world.scheduler.sleep(0.5)
                continue
            try:
                if self.store is None:
                    self.store = world.open()
                    world.stores.append(self.store)
                for id in self.rng.sample(world.ids, min(len(world.ids), self.rng.choice([1, 1, 1, 3]))):
                    world.actions_left -= 1
                    self._act(id)
            except (ExceptionGroup, *_EXPECTED) as error:
                self._told(error)
            world.scheduler.sleep(self.rng.random() * self.rng.choice([0.05, 0.5, 1.5]) * world.plan.pace)
        self._leave()

    def _leave(self) -> None:
        if self.store is None:
            return
        for id in list(self.handles):
            try:
                self._flush(id)
            except (ExceptionGroup, *_EXPECTED) as error:
                self._told(error)
        scheduler = self.world.scheduler
        begun = scheduler.now
        while scheduler.now < max(begun, self.process.stalled_until) + 8.0:
            scheduler.sleep(1.0)  # nothing goes wrong any more: then it has seen what the server came back with
        self.world.require_told(self.process)
        try:
            self.store.close()
        except (ExceptionGroup, *_EXPECTED) as error:
            self._told(error)
        self.world.stores.remove(self.store)
        self.world.gone_lanes |= self.world.ledger.lanes_of(self.process)

    def _act(self, id: str) -> None:
        handle = self.handles.get(id)
        if handle is None or self.rng.random() < 0.15:
            handle = self._obtain(id)
        segment = self.segments.get(id)
        if segment is not None and not segment.closed:
            if self.rng.random() < 0.5:
                self._output(segment)
            else:
                self._finish(id, segment)
        else:
            self._turn(id, handle)
        if self.rng.random() < 0.5:
            self._flush(id)
        if self.rng.random() < 0.1:
            self.world.invariants.check_reading(self.store, self.rng.choice(self.world.ids))

    def _obtain(self, id: str) -> Any:
        self.segments.pop(id, None)
        number = int(id[1:])
        try:
            if self.rng.random() < 0.1:
                raise NotFound("it did not look")
            handle = self.store.get(id)
        except NotFound:
            group = None if number % 3 == 0 else f"g{number // 2}"
            size = None if group is None else 2 if number // 2 * 2 + 1 < self.world.plan.trajectories else 1
            routing = None if number == 4 else SPEC
            handle = self.store.create(id=id, group=group, group_size=size, routing=routing)
        self.handles[id] = handle
        return handle

    def _turn(self, id: str, handle: Any) -> None:
        turns = self.world.plan.turns
        kind = self.rng.choices(list(turns), list(turns.values()))[0]
        takeover = self.rng.random() < 0.5
        if kind == "segment":
            length = len(handle)
            base = self.rng.randint(0, length) if self.rng.random() < 0.2 else None
            context = self._ids(self.rng.randint(0 if length else 1, 30))
            self.segments[id] = handle.segment(context=context, base=base, weight_version=f"v{self.rng.randint(1, 3)}")
            for _ in range(self.rng.randint(0, 2)):
                self._output(self.segments[id])
            if self.rng.random() < 0.7:
                self._finish(id, self.segments[id])
        elif kind == "reward":
            handle.reward(self.rng.random(), takeover=takeover)
        elif kind == "close":
            handle.close(self.rng.choice(["completed", "aborted", "aborted", "truncated"]), takeover=takeover)
        elif kind == "observe" and len(handle) and handle.routing is not None:
            handle.observe(self._rows(min(len(handle), 4)), start=0, source=f"o{self.rng.getrandbits(60)}")
        elif kind == "late" and handle._ends and handle.routing is not None:
            number = self.rng.randrange(len(handle._ends))
            handle.late_routing(self._rows(min(handle._ends[number], 6)), segment=number, start=0)
        elif kind == "delete":
            self.handles.pop(id)
            self.store.delete(id)

    def _output(self, segment: Any) -> None:
        count = self.rng.choice([1, 3, 20, 120, 200])
        segment.tokens(self._ids(count), [-self.rng.random()] * count if self.rng.random() < 0.8 else None)
        if segment.spec is not None and self.rng.random() < 0.6:
            start = self.rng.choice([0, segment.start])
            segment.routing(self._rows(segment.end - start), start=start)

    def _finish(self, id: str, segment: Any) -> None:
        if segment.spec is not None and self.rng.random() < 0.2:
            segment.no_routing("feature off")
        segment.close(self.rng.choice(["stop", "length", "abort", "error"]))
        self.segments.pop(id, None)

    def _flush(self, id: str) -> None:
        handle = self.handles.get(id)
        if handle is None:
            return
        lanes = [lane for lane in (handle._lane, handle._notes) if lane is not None]
        counts = [lane.queued for lane in lanes]
        self.store.flush(id)
        for lane, count in zip(lanes, counts, strict=True):
            assert lane.error is None, f"{id}: flushed, and nothing is said of {lane.error!r}"
            self.world.ledger.acknowledge(lane, count)
        flusher = self.store._flusher
        if not any(lane.busy for lane in flusher._lanes):
            assert flusher._buffered == 0, f"{flusher._buffered} bytes are counted, and nothing waits"

    def _told(self, error: Any) -> None:
        for one in error.exceptions if isinstance(error, ExceptionGroup) else [error]:
            assert isinstance(one, _EXPECTED), f"{self.process} was told {one!r}"
            self.world.count(type(one).__name__)
        for id, handle in list(self.handles.items()):
            if handle._lane.error is not None and self.rng.random() < 0.8:
                del self.handles[id]
                self.segments.pop(id, None)

    def _ids(self, count: int) -> Any:
        return np.array([self.rng.randrange(50_000) for _ in range(count)], np.int32)

    def _rows(self, count: int) -> Any:
        return rows(count, seed=self.rng.getrandbits(30))


def writer(world: "World", process: Process) -> None:
    Writer(world, process).run()


def archiver(world: "World", process: Process) -> None:
    """Archives for as long as it lives; begins anew when the archive does not answer its beginning."""
    store = _opened(world)
    while True:
        try:
            made = Archiver(
                store,
                pack_bytes=world.rng.choice([2000, 64 << 20]),
                pack_seconds=world.rng.choice([0.0, 0.5, 2.0]),
                lease_seconds=3.0,
                abandon_seconds=world.rng.choice([ABANDON_SECONDS, 30.0]),
                grace_seconds=7.0,  # longer than any request stays on its way
                compact=world.rng.random() < 0.5,
                on_step=lambda step: _step(world, process),
            )
        except Unavailable:
            world.scheduler.sleep(0.5)
        else:
            made.run()


def materializer(world: "World", process: Process) -> None:
    """Materializes for as long as it lives."""
    store = _opened(world)
    if world.rng.random() < 0.5:
        world.hasten.add(process)
    Materializer(
        store,
        claim_seconds=4.0,
        blob_seconds=world.rng.choice([20.0, 3600.0]),
        assembly_seconds=3600.0,
        group_seconds=GROUP_SECONDS if process in world.hasten else None,
        on_step=lambda step: _step(world, process),
    ).run()


def trainer(world: "World", process: Process) -> None:
    """Takes what is ready, uses it, acknowledges it."""
    store = _opened(world)
    follower = _following(world, store, process.name)
    in_hand: dict[tuple[int, str], Any] = {}
    while True:
        try:
            for one in follower.poll(count=2, block=0.3):
                in_hand[one.partition, one.at] = one
            if world.rng.random() < 0.2:
                for one in follower.take_over(idle=5.0, count=3, skip=lambda d: (d.partition, d.at) in in_hand):
                    in_hand[one.partition, one.at] = one
            for place, one in list(in_hand.items()):
                if world.rng.random() < 0.7:
                    _train(world, store, follower, one)
                    follower.acknowledge([one])
                    del in_hand[place]
        except (Unavailable, StoreFull):
            world.scheduler.sleep(0.5)


def _following(world: "World", store: Any, name: str) -> ReadyFollower:
    while True:
        try:
            return ReadyFollower(store.wire, store.keys, TRAINER_GROUP, name)
        except (Unavailable, StoreFull):
            world.scheduler.sleep(0.3)


def _train(world: "World", store: Any, follower: Any, delivery: Any) -> None:
    """Fold the members again and compare them with the blobs that lie ready."""
    from trajstore.blob import to_blob

    members = [one for one in delivery.group.members if one.status != "unreadable"]
    for member, found in zip(members, follower.folds(members), strict=True):
        assert not isinstance(found, Corrupt), found
        try:
            folded = store.load(member.id, until=member.at)
            noted = store.notes(member.id)  # a late recording may have come between the two folds
        except NotFound:
            continue
        except SequenceGap:
            assert world.invariants.lost.get(member.id)
            continue
        # Of two materializers at work on one version, the other may have laid its fold last; readers look at that, too.
        if found is not None and found.at == member.at and not noted:
            assert to_blob(found) == to_blob(folded) or world.invariants.lost.get(member.id), f"{member} lies otherwise"
    world.invariants.used.add((name_of(delivery.group), delivery.group.version))


def rank(world: "World", process: Process) -> None:
    """Trains by checkpoint."""
    Rank(world, process, _opened(world)).run()


def chaos(world: "World", process: Process) -> None:
    """What goes wrong."""
    rng, scheduler = world.rng, world.scheduler
    if not world.plan.chaos:
        return
    often = world.plan.misfortunes
    while not world.calm and any(often.values()):
        scheduler.sleep(rng.random() * 2 * world.plan.chaos)
        if not world.calm:
            _KINDS[rng.choices(list(often), list(often.values()))[0]](world)


def _at_work(world: "World", process: Process) -> None:
    """Wait, in half of all cases, until a process is in the middle of something: else it mostly waits itself."""
    if world.rng.random() < 0.5:
        steps = process.steps + world.rng.randrange(100)
        world.scheduler.wait(lambda: process.dead or process.steps >= steps, 2.0)


def _kill(world: "World") -> None:
    name = world.rng.choice(sorted(world.processes))
    process = world.processes[name]
    _at_work(world, process)
    if not process.dead and not world.calm:
        world.end(name)


def _step(world: "World", process: Process) -> None:
    """Between two steps of an archiver's or a materializer's work somebody else may be next, or it may be its last."""
    if not world.calm and world.rng.random() < world.plan.stumbles:
        if world.rng.random() < 0.5:
            world.end(next(name for name, one in world.processes.items() if one is process))
        else:
            process.stalled_until = world.scheduler.now + world.rng.choice([1.0, 4.0, 8.0])
    world.scheduler.pause()


def _crash_server(world: "World") -> None:
    """The server dies; what it comes back with has reached the disk."""
    network, server, rng = world.network, world.server, world.rng
    network.down()
    units = len(server.aof)
    if server.fsync == "everysec" and rng.random() < 0.7:
        horizon = server._now() - int(rng.random() * 2000)
        while units and server.aof[units - 1].ms > horizon:
            units -= 1
    world.scheduler.sleep(rng.random() * 3.0)
    lost = server.restart(units)
    world.count("server crashed" if not lost else "server crashed with loss")
    world.forgot(lost)
    network.loading = rng.random() < 0.3
    network.up = True
    if network.loading:
        world.scheduler.sleep(rng.random())
        network.loading = False


def _crash_unseen(world: "World") -> None:
    """The server dies and comes back while a process stands still, which finds another server when it goes on."""
    _stall(world)
    if world.rng.random() < 0.5:  # while others write
        writers = [process for name, process in sorted(world.processes.items()) if name.startswith("writer")]
        world.rng.choice(writers).stalled_until = world.scheduler.now + world.rng.choice([4.0, 8.0])
    _crash_server(world)


def _crash_twice(world: "World") -> None:
    """The server dies again before it has synced what it was told again; the first time goes unseen by an archiver."""
    archiver = world.rng.choice([process for name, process in sorted(world.processes.items()) if name[0] == "a"])
    archiver.stalled_until = world.scheduler.now + 4.0
    _crash_server(world)
    world.scheduler.sleep(max(0.0, archiver.stalled_until - world.scheduler.now) + world.rng.random() * 1.5)
    if not world.calm:
        _crash_server(world)


def _away(world: "World") -> None:
    """Every connection is cut; the server itself is well."""
    world.count("connections cut")
    world.network.generation += 1


def _skew(world: "World") -> None:
    """A wall clock jumps."""
    world.count("clock jumped")
    process = world.processes[world.rng.choice(sorted(world.processes))]
    process.skew += world.rng.choice([-86400.0, -3.0, 3.0, 86400.0])


def _stall(world: "World") -> None:
    """A process stands still for longer than a lease, and goes on as if nothing had happened."""
    world.count("stalled")
    process = world.processes[world.rng.choice(sorted(world.processes))]
    _at_work(world, process)
    process.stalled_until = world.scheduler.now + world.rng.choice([1.0, 4.0, 8.0])


def _fill(world: "World") -> None:
    """The server is short of memory for a while."""
    if not world.plan.full:
        return
    world.count("memory short")
    world.server.limit = world.server.used + world.rng.choice([0, 2000, world.plan.full])
    world.scheduler.sleep(world.rng.random() * 6.0)
    world.server.limit = 0


def _archive_away(world: "World") -> None:
    """The archive answers nobody for a while, whatever becomes of the server meanwhile."""
    world.count("archive away")
    world.disk.away = True

    def back() -> None:
        world.scheduler.sleep(world.rng.random() * 8.0)
        world.disk.away = False

    world.scheduler.spawn("operator", Process("operator"), back)


_KINDS: dict[str, Callable[..., None]] = {
    "kill": _kill,
    "crash": _crash_server,
    "crash_unseen": _crash_unseen,
    "crash_twice": _crash_twice,
    "stall": _stall,
    "away": _away,
    "skew": _skew,
    "fill": _fill,
    "archive_away": _archive_away,
}
MISFORTUNES = {
    "kill": 3,
    "crash": 3,
    "crash_unseen": 3,
    "crash_twice": 1,
    "stall": 2,
    "away": 1,
    "skew": 1,
    "fill": 2,
    "archive_away": 1,
}
"""What goes wrong, and how often beside the others."""


def closer(world: "World", process: Process) -> None:
    """Ends what is not final, when all writers are gone."""
    store = _opened(world)
    for id in world.ids:
        while True:
            try:
                handle = store.get(id)
                if handle.status in ("open", "aborted"):
                    handle.close("completed", takeover=True)
                store.flush(id)
            except NotFound:
                break
            except Fenced:  # an archiver has closed it as abandoned
                continue
            world.ledger.acknowledge(handle._lane, handle._lane.queued)
            break
    store.close()


def checker(world: "World", process: Process) -> None:
    """Reads everything, when all is archived."""
    store = _opened(world)
    for id in world.ids:
        world.invariants.check_reading(store, id)
    listed = {summary.id: summary for summary in store.list(status=ALL)}
    for id in world.ids:
        if id in world.invariants.log:
            assert id in listed, f"{id} is not listed"
            wanted = "deleted" if id in world.invariants.deleted else store.plan(id).history.status
            assert listed[id].status == wanted, f"{id} is listed as {listed[id]}"
    backlog = store.backlog()
    strays = any(world.invariants.lost.get(id) and id not in world.invariants.log for id in world.ids)
    assert strays or (backlog.trajectories, backlog.nbytes, backlog.seconds) == (0, 0, 0.0), backlog
    store.close()


def _opened(world: "World") -> Any:
    while True:
        try:
            store = world.open()
        except (Unavailable, StoreFull):
            world.scheduler.sleep(0.3)
        else:
            world.stores.append(store)
            return store


from trajstore.reading import ALL_STATUSES as ALL  # noqa: E402

ROLES: dict[str, Callable[..., None]] = {
    "setup": setup,
    "writer": writer,
    "archiver": archiver,
    "materializer": materializer,
    "trainer": trainer,
    "rank": rank,
    "launcher": launch,
    "chaos": chaos,
    "closer": closer,
    "checker": checker,
}
