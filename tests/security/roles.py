"""What each role does with a run, as one short act: the whole of what its access rules must allow.

An act is by one process of its role, over a run that its administrator has begun (`begin`) and others have filled
(`fill`). It looks at what came of it, so that a role that is refused anything fails.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import trajstore
from tests.builders import SPEC, rows
from tests.cli.running import invoke
from trajstore.archive.upkeep.retention import free_dropped, still_hot
from trajstore.archive.verify.verify import verify
from trajstore.archiver import Archiver
from trajstore.log.feed import FeedTail
from trajstore.materializer import Materializer
from trajstore.ready_follower import ReadyFollower
from trajstore.recovery import recover
from trajstore.status import RunLook
from trajstore.summary import encode_summary
from trajstore_replay import diagnose
from trajstore_trainer.claims import Claims
from trajstore_trainer.dataset import TrajectoryDataset
from trajstore_trainer.rank_routing import RoutingPlace, read_routing
from trajstore_trainer.reader import TrajectoryReader
from trajstore_trainer.selection import Selection
from trajstore_trainer.slices import Span

__all__ = ["ACTS", "begin", "fill"]

_LONG = 400
"""Tokens whose payloads are too long to ride in an entry."""


def begin(url: str, archive: Path, timeout: float) -> None:
    """A run of one partition."""
    trajstore.open(url, archive=archive, partitions=1, timeout=timeout).close()


def fill(url: str) -> None:
    """Something for every role: archived, published and taken by a trainer that died; closed; left open; deleted."""
    with trajstore.open(url, create=False) as store:
        _finish(store, id="old", group="g0", group_size=2)
        _finish(store, id="old-aborted", group="g0", group_size=2, status="aborted")
        Materializer(store).run(once=True)
        Archiver(store).run(once=True)
        assert TrajectoryReader(store, consumer="dead").take(1, timeout=10.0)
        _finish(store, id="single")
        Materializer(store).run(once=True)
        store.wire.call("UNLINK", store.keys.ready_payload("single", 1))  # as after its time: readers fold it again
        _finish(store, id="unseen")
        Archiver(store, grace_seconds=0.0).run(once=True)  # out of the hot log before it was published
        _finish(store, id="a", group="g1", group_size=2)
        _finish(store, id="b", group="g1", group_size=2, status="aborted")
        _finish(store, id="alone", group="g3", group_size=2)
        _finish(store, id="gone")
        store.delete("gone")
        store.create(id="left").segment(context=[1])
        store.get("a").observe(rows(2), start=0, source="trainer")


def _finish(store: trajstore.Store, *, status: Any = "completed", **options: Any) -> trajstore.TrajectoryWriter:
    """A trajectory with payloads beside its entries, scored and closed."""
    trajectory = store.create(routing=SPEC, **options)
    with trajectory.segment(context=range(1, _LONG), engine="test/1", weight_version="v1") as segment:
        segment.tokens(range(_LONG), [-0.5] * _LONG)
        segment.routing(rows(_LONG), start=0)
        segment.close("stop")
    trajectory.reward(1.0)
    trajectory.close(status)
    store.flush()
    return trajectory


def _produce(url: str, timeout: float) -> None:
    """A rollout worker: writes, resumes what another has aborted, loses a race, annotates, reads what it wrote."""
    with trajstore.open(url, create=False, ack="fsync", timeout=timeout) as store:
        trajectory = _finish(store, id="fresh", group="g2", group_size=2)
        trajectory.late_routing(rows(2), segment=0, start=0)
        winner, loser = store.get("b"), store.get("b")
        with winner.segment(weight_version="v2") as segment:
            segment.tokens([7, 8])
            segment.no_routing("not asked for")
        store.flush()
        with contextlib.suppress(trajstore.Fenced):  # perhaps it has not heard of it when it leaves the block
            loser.segment(context=range(_LONG)).close("stop")
        with pytest.raises(trajstore.Fenced):
            store.flush("b")
        store.get("b").close()
        store.flush()
        assert store.load("fresh").status == "completed"
        assert store.wait("b").status == "completed"
        with pytest.raises(trajstore.Unavailable, match="at the deadline"):
            store.wait("left", status="failed", timeout=0.3)


def _archive(url: str, timeout: float) -> None:
    """An archiver: everything ripe goes into a pack and out of the hot log, what was left alone is closed; a summary
    that a lost race has left is written anew."""
    with trajstore.open(url, create=False, ack="fsync", timeout=timeout) as store:
        assert store.archive is not None
        old = store.archive.find("old-aborted").summary
        assert old is not None
        wrong = encode_summary(msgspec.structs.replace(old, weight_version="loser"))
        store.wire.call("HSET", store.keys.summaries(0), "old-aborted", wrong)
        stop = threading.Event()
        Archiver(store).run(stop=stop, on_progress=lambda _: stop.set())  # a turn of one that stays: who else is there?
        done = Archiver(store, lease_seconds=timeout, grace_seconds=60.0, abandon_seconds=0.0).run(once=True)
        assert (done.refused, done.waiting, done.abandoned) == (0, 0, 1)
        assert store.archive.find("a").parts
        assert "loser" not in {one.weight_version for one in store.list(status="aborted")}
        store.repair_summary("a")


def _materialize(url: str, timeout: float) -> None:
    """A materializer: publishes what is whole, a group that waits in vain, clears away what was deleted."""
    with trajstore.open(url, create=False, timeout=timeout) as store:
        done = Materializer(store, group_seconds=0.0).run(once=True)
        assert (done.refused, done.groups) == (0, 3)


def _train(url: str, timeout: float) -> None:
    """Trainers: one that drops groups for good, one that takes over from the dead, reads a rank's rows, observes."""
    dropping = Selection(aborted="drop")
    with TrajectoryDataset(url, group="other", selection=dropping, lease=max(0.2, timeout), timeout=timeout) as data:
        assert next(iter(data)).trajectories[0].id == "single"
        data.acknowledge()
        assert data.filtered()
    with trajstore.open(url, create=False, timeout=timeout) as store:
        assert Claims(store.wire, store.keys, group="trainer", consumer="heir", lease=0.0).take_over(9, may=bool)
        reader = TrajectoryReader(store, consumer="heir", claim_seconds=1e-3)
        groups = [*reader.take(1, timeout=timeout), *reader.take(1, timeout=timeout)]
        place = RoutingPlace.of(groups[0].trajectories[0])
        assert read_routing(store, [place], spans=[Span(0, 0, 2)]).routing_mask.all()
        store.get("a").observe(rows(2), start=0, source="trainer", weight_version="v3")
        store.flush()
        reader.acknowledge(groups)


def _look(url: str, timeout: float) -> None:
    """Whoever only looks: lists, loads, waits, follows, watches how the run stands, and asks what is wrong with it."""
    with trajstore.open(url, create=False, timeout=timeout) as store:
        assert {one.id for one in store.list(status="completed")} >= {"a", "old"}
        assert len(store.load("a")) > _LONG
        assert store.events("a")
        assert store.wait("a").status == "completed"
        with pytest.raises(trajstore.Unavailable, match="at the deadline"):
            store.wait("left", timeout=0.3)
        assert RunLook(store).look().backlog.trajectories
        assert {one.kind for one in diagnose(store, stale_seconds=0.0)} >= {"aborted", "stuck-group", "untaken"}
        FeedTail(store.wire, store.keys).poll(count=1, block=0.001)


def _administer(url: str, timeout: float) -> None:
    """Whoever begins runs, deletes, frees what retention has dropped, verifies, ends a consumer group, and mends what
    was lost."""
    with trajstore.open(url, create=False, ack="fsync", timeout=timeout) as store:
        store.delete("a")
        assert store.delete(group="g0") == 2
        assert store.archive is not None
        assert store.load("alone").status == "completed"
        store.repair_summary("nobody")  # one whose trajectory is gone
        assert still_hot(store.wire, store.keys)(["left"]) == {"left"}
        assert free_dropped(store.wire, store.keys, store.hot, store.archive.manifest(0), 0) == []
        assert [one.severity for one in verify(store) if one.severity != "information"] == []
        ReadyFollower(store.wire, store.keys, "kept", "")
    refused, removed = (invoke("consumers", url, "--remove", "trainer", *force) for force in ((), ("--force",)))
    assert (refused.exit_code, "dead" in refused.stderr) == (1, True)
    assert (removed.exit_code, "kept" in removed.stdout) == (0, True)
    assert recover(url, timeout=timeout).summaries


ACTS: dict[str, Callable[[str, float], None]] = {
    "producer": _produce,
    "archiver": _archive,
    "materializer": _materialize,
    "trainer": _train,
    "reader": _look,
    "admin": _administer,
}
