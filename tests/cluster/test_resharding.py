"""Slots move to other servers, key by key, while writers, an archiver, a materializer and a trainer are at work."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from redis.crc import key_slot

import trajstore
from tests.cluster.nodes import Cluster
from tests.waiting import until
from trajstore.archive.verify.verify import verify
from trajstore.archiver import Archiver
from trajstore.materializer import Materializer
from trajstore.summary import encode_summary
from trajstore_trainer.reader import TrajectoryReader

OpenAt = Callable[..., trajstore.Store]

WRITERS = 3


def tokens_of(id: str, segment: int) -> np.ndarray[Any, Any]:
    """Enough for a payload of its own, and no other trajectory's."""
    return np.random.default_rng([*id.encode(), segment]).integers(0, 50_000, 300)


def write(store: trajstore.Store, stop: threading.Event) -> list[str]:
    """Whole trajectories of two segments, each by a handle of its own; those whose last event is acknowledged."""
    ids = []
    while not stop.is_set():
        id = store.create().id
        for segment in range(2):
            handle = store.get(id)
            with handle.segment(base=None, context=[segment]) as seg:
                seg.tokens(tokens_of(id, segment), None)
                seg.no_routing("none here")
                seg.close("stop")
            store.flush(id)
        handle.close("completed")
        store.flush(id)
        ids.append(id)
    return ids


def train(store: trajstore.Store, stop: threading.Event) -> list[tuple[str, str]]:
    """Take and acknowledge what is ready; which trajectories came, and by which entries."""
    reader = TrajectoryReader(store, consumer="rank-0", claim_seconds=2.0)
    taken = []
    while not stop.is_set():
        try:
            ready = reader.poll(8, 0.2)
            reader.acknowledge(ready)
        except trajstore.Unavailable:
            continue
        taken += [(one.id, str(entry.delivery.place)) for entry in ready for one in entry.trajectories]
    return taken


@contextmanager
def running(work: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """A thread for the length of a block; whatever it raises comes out."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, *arguments)
        yield future
        future.result(60)


def test_everything_is_there_once_after_every_partition_has_moved_about(
    cluster: Cluster, open_at: OpenAt, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    store = open_at(cluster, archive=archive)
    stops = [threading.Event() for _ in range(3)]
    writing, working, training = stops
    archiver = Archiver(open_at(cluster), pack_seconds=0.2, lease_seconds=2.0)
    materializer = Materializer(open_at(cluster), claim_seconds=1.0)
    with (
        ThreadPoolExecutor(WRITERS) as pool,
        running(train, open_at(cluster), training) as trained,
        running(lambda: archiver.run(stop=working)),
        running(lambda: materializer.run(stop=working)),
    ):
        try:
            writers = [pool.submit(write, open_at(cluster), writing) for _ in range(WRITERS)]
            for round_ in (1, 2):
                for partition in range(store.partitions):
                    slot = key_slot(store.keys.feed(partition).encode())
                    at = cluster.nodes.index(cluster.owner(store.keys.feed(partition)))
                    cluster.move(slot, cluster.nodes[(at + round_) % len(cluster.nodes)])
            slot = key_slot(store.keys.run_record(store.run).encode())
            at = cluster.nodes.index(cluster.owner(store.keys.run_record(store.run)))
            cluster.move(slot, cluster.nodes[(at + 1) % len(cluster.nodes)])
            writing.set()
            ids = [id for writer in writers for id in writer.result(60)]
            until(lambda: materializer.done.trajectories >= len(ids), seconds=30)
        finally:
            for stop in (writing, working):
                stop.set()
            Materializer(store).run(once=True)
            until(lambda: _all_taken(store), seconds=30)
            training.set()
    Archiver(store, lease_seconds=2.0).run(once=True)

    assert len(ids) > 3 * WRITERS
    assert Counter(id for id, _ in set(trained.result())) == Counter(ids), "published once each, and trained on"
    for place in (store, trajstore.open_archive(archive)):
        for id in ids:
            expected = [part for n in range(2) for part in ([n], tokens_of(id, n))]
            assert np.array_equal(place.load(id).token_ids, np.concatenate(expected))
            events = [event.id for event in place.events(id)]
            assert len(set(events)) == len(events)
    assert {summary.id for summary in store.list()} == set(ids)
    assert store.backlog().trajectories == 0
    assert [finding for finding in verify(store) if finding.severity != "information"] == []


def _all_taken(store: trajstore.Store) -> bool:
    """Nothing waits for the trainer, and it has nothing in hand."""
    ready = [store.keys.ready(partition) for partition in range(store.partitions)]
    return not any(store.wire.call_all([("XLEN", stream) for stream in ready]))


def test_writer_in_a_slot_that_is_half_moved_goes_on_when_it_has_arrived(cluster: Cluster, open_at: OpenAt) -> None:
    store = open_at(cluster, partitions=1)
    handles = [store.create() for _ in range(4)]
    store.flush()
    source = cluster.owner(store.keys.feed(0))
    left = iter(handles)
    began = []

    def begin() -> None:
        handle = next(left, None)
        if handle is not None:
            began.append(handle.id)
            with handle.segment(context=[1, 2]) as segment:
                segment.tokens(tokens_of(handle.id, 0), None)

    target = next(node for node in cluster.nodes if node is not source)
    cluster.move(key_slot(store.keys.feed(0).encode()), target, between=begin)
    store.flush()
    assert len(began) == 4
    for handle in handles:
        assert np.array_equal(store.load(handle.id).token_ids[2:], tokens_of(handle.id, 0))
    feed = [fields[1].decode() for _, fields in store.wire.call("XRANGE", store.keys.feed(0), "-", "+")]
    assert sorted(feed) == sorted(began), "one hint for each close: no transaction ran twice"


def test_zombie_is_fenced_although_the_slot_has_moved(cluster: Cluster, open_at: OpenAt) -> None:
    first, second = open_at(cluster, partitions=1), open_at(cluster, partitions=1)
    zombie = first.create()
    segment = zombie.segment(context=[1])
    segment.tokens([2], None)
    first.flush()
    source = cluster.owner(first.keys.feed(0))
    cluster.move(key_slot(first.keys.feed(0).encode()), next(node for node in cluster.nodes if node is not source))
    second.get(zombie.id).close("aborted", takeover=True)
    second.flush()
    segment.tokens([3], None)
    try:
        first.flush(zombie.id)
    except trajstore.Fenced:
        pass
    else:
        raise AssertionError("the zombie wrote on")
    assert list(second.load(zombie.id).token_ids) == [1, 2]


def test_half_moved_slot_holds_up_no_other_partition(cluster: Cluster, open_at: OpenAt) -> None:
    store = open_at(cluster, partitions=2, timeout=10.0)
    handles = [next(one for one in iter(store.create, None) if store.keys.partition(one.id) == p) for p in range(2)]
    moving, staying = (handle.segment(context=[0]) for handle in handles)
    store.flush()
    owners = {cluster.owner(store.keys.feed(partition)) for partition in range(2)}
    target = next(node for node in cluster.nodes if node not in owners)

    def write_both() -> None:
        moving.tokens([1], None)
        staying.tokens([1], None)
        store.flush(handles[1].id)

    cluster.move(key_slot(store.keys.feed(0).encode()), target, between=write_both)
    store.flush()
    lengths = {len(store.load(handle.id).token_ids) for handle in handles}
    assert len(lengths) == 1
    assert min(lengths) > 3


def test_summary_that_cannot_be_mended_while_its_slot_moves_stops_no_archiver(
    cluster: Cluster, open_at: OpenAt, tmp_path: Path
) -> None:
    """Of what has left the hot log, which can neither be watched here nor there while keys are on their way."""
    store = open_at(cluster, archive=tmp_path / "archive", partitions=2)
    names: dict[int, list[str]] = {partition: [] for partition in range(2)}
    for number in range(20):
        names[store.keys.partition(f"t{number}")].append(f"t{number}")
    moving, staying = names[0][0], names[1][:2]

    def finish(id: str) -> None:
        with store.create(id=id).segment(context=[1]) as segment:
            segment.tokens([2])
        store.get(id).close("completed")
        store.flush()

    finish(moving)
    summary = store.list(status="completed")[0]
    Archiver(store, grace_seconds=0.001).run(once=True)
    until(lambda: not store.wire.call("EXISTS", store.keys.entries(moving)), seconds=10.0)
    store.wire.call("HSET", store.keys.summaries(0), moving, encode_summary(summary))
    slot = key_slot(store.keys.summaries(0).encode())
    target = next(node for node in cluster.nodes if node is not cluster._owner_of(slot))
    waiting = list(staying)
    packs: list[int] = []

    def archive_the_others() -> None:
        if waiting:
            finish(waiting.pop())
            packs.append(Archiver(store).run(once=True).packs)

    cluster.move(slot, target, between=archive_the_others)
    assert packs == [1, 1]
    Archiver(store).run(once=True)
    assert store.hot.summary(moving) is None
