"""Finished trajectories to publish, and what the ready streams hold of them."""

import threading
import time

import msgspec

from tests.builders import SPEC, rows
from trajstore.log.feed import parse_stream
from trajstore.materializer import Materializer
from trajstore.ready import ReadyGroup

__all__ = ["abort", "finish", "laid", "look", "materialize", "members", "resume", "wait_until"]


def finish(store, *, status="completed", tokens=3, seed=0, reward=None, routing=SPEC, version="v1", **options):
    """A trajectory of 2 prompt tokens and some sampled ones, closed and flushed."""
    trajectory = store.create(routing=routing, **options)
    with trajectory.segment(context=[1, 2], weight_version=version) as segment:
        segment.tokens(range(10, 10 + tokens), [-0.5] * tokens)
        if routing is not None:
            segment.routing(rows(tokens + 1, seed, routing), start=0)
        segment.close("stop")
    if reward is not None:
        trajectory.reward(reward)
    trajectory.close(status)
    store.flush()
    return trajectory


def abort(store, **options):
    """As `finish`, but closed as aborted."""
    return finish(store, status="aborted", **options)


def resume(store, trajectory, status=None, version="v2"):
    """Two more tokens under other weights; closed if `status` is given."""
    again = store.get(trajectory.id)
    with again.segment(weight_version=version) as segment:
        segment.tokens([20, 21], [-1.0, -1.0])
        segment.close("stop" if status else "abort")
    if status:
        again.close(status)
    store.flush()
    return again


def materialize(store, **options):
    """Drain what is there."""
    return Materializer(store, **options).run(once=True)


def look(store):
    """Every entry still in the ready streams, oldest first within a partition."""
    pages = [store.wire.call("XRANGE", store.keys.ready(p), "-", "+") for p in range(store.partitions)]
    decode = msgspec.msgpack.Decoder(ReadyGroup).decode
    return [decode(fields[b"g"]) for page in pages for _, fields in parse_stream(page)]


def laid(store, members):
    """The blob that lies beside its entry for each member, None for none."""
    return [store.wire.call("GET", store.keys.ready_payload(one.id, one.version)) for one in members]


def members(entries):
    """(id, version) of every member of every entry, sorted; repeats stay visible."""
    return sorted((one.id, one.version) for entry in entries for one in entry.members)


def wait_until(condition, seconds=20.0):
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        threading.Event().wait(0.005)
    return found
