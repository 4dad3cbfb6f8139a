"""Makes a frozen sample of a store: an embedded store's folder, and what its version of trajstore reads from it.

A sample shows that what a version wrote stays readable. It is made once, with the code of that version, just before
the schema of the events or the format of the archive changes, and is never made again:

    python tests/data/stores/make.py tests/data/stores/v2

(with `PYTHONPATH` at a checkout of the version, where this one is newer already). The new folder holds

    store.json, redis/appendonlydir/   the hot log; plain commands, so Redis 7.0 and Valkey 9.1 both open it
    archive/                           several packs in two partitions
    expected.json, expected.npz        what `described` says of the store and of its archive alone

`tests/archive/test_frozen_stores.py` reads every `v<n>` beside this file. The script stands alone, for it runs with
code that has other tests; it uses the public API and the archiver only. What it writes covers what a log can hold: what
a new version adds to that belongs into `record`.
"""

import hashlib
import json
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import msgspec
import numpy as np

import trajstore
from trajstore.archiver import Archiver

FOLDER = Path(__file__).parent
POLICIES = ("last_segment_wins", "as_sampled")
ARRAYS = (
    "logprobs",
    "loss_mask",
    "routed_experts",
    "routing_mask",
    "routing_source",
    "segment_ids",
    "token_ids",
    "weight_version_ids",
)
"""Of a folded trajectory."""

STEPPED = ("seed", "rewound")
"""Trajectories whose state at every event is kept, as a digest."""

SMALL = trajstore.RoutingSpec(layer_ids=(0, 1, 2), top_k=2, num_experts=8, num_hidden_layers=3)
WIDE = trajstore.RoutingSpec(layer_ids=(1, 2, 5), top_k=4, num_experts=300, num_hidden_layers=6)


def make(folder):
    """Write the sample into `folder`, which must not exist."""
    socket.gethostname = lambda: "host"  # it stands in manifest records and consumer names; a sample names no machine
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "store"
        record(home)
        shutil.copytree(home / "redis" / "appendonlydir", folder / "redis" / "appendonlydir")
        shutil.copytree(home / "archive", folder / "archive", ignore=shutil.ignore_patterns("staging"))
        shutil.copy(home / "store.json", folder)
        with trajstore.open(home) as store:
            whole, arrays = described(store)
        alone, more = described(trajstore.open_archive(home / "archive"))
    (folder / "expected.json").write_text(json.dumps({"store": whole, "archive": alone}, indent=1) + "\n")
    named = {f"store/{name}": data for name, data in arrays.items()}
    named |= {f"archive/{name}": data for name, data in more.items()}
    np.savez_compressed(folder / "expected.npz", **named)


def record(home):
    """A run with every kind of event: archived, mixed, and in the hot log only."""
    with trajstore.open(home, partitions=2, ack="fsync") as store:
        first_turns(store)
        archive(store)
        second_turns(store)
        archive(store)
        hot_turns(store)


def first_turns(store):
    seed = store.create(id="seed", routing=SMALL)
    with seed.segment(context=[1, 2, 3, 4, 5], engine="test/1", weight_version="v1") as segment:
        segment.tokens([10, 11, 12], [-0.5, -0.25, -0.125])
        segment.routing(rows(7, 1), start=0)
        segment.close("abort")

    wide = store.create(id="wide", routing=WIDE)
    turn(wide, 7, 40, seed=2, context=np.arange(100), weight_version="v1", reason="abort")

    plain = store.create(id="plain")
    with plain.segment(context=[5, 4, 3]) as segment:
        segment.tokens([7, 8])
        segment.close("length")
    plain.close("truncated")

    rewound = store.create(id="rewound", routing=SMALL)
    turn(rewound, 1, 12, seed=3, context=[1, 2, 3], weight_version="v1", reason="stop")
    turn(rewound, 2, 6, seed=4, base=9, context=[50, 51], weight_version="v2", reason="stop")

    lost = store.create(id="lost", routing=SMALL)
    unfinished = lost.segment(context=[1, 2], weight_version="v1")
    unfinished.tokens([3, 4, 5], [-1.0, -2.0, -3.0])
    unfinished.routing(rows(4, 5), start=0)
    store.flush()
    turn(store.get("lost"), 5, 4, seed=6, weight_version="v2", reason="stop")  # takes over; the first never closes

    resumed = store.create(id="resumed", routing=SMALL, metadata={"task": "math", "level": 3, "tags": ["a", None, 0.5]})
    turn(resumed, 2, 5, seed=7, context=[9, 9, 9], weight_version="v1", reason="abort", sampling={"temperature": 0.7})
    resumed.close("aborted")

    for name, reward in (("pair-a", 1.0), ("pair-b", -0.25)):
        member = store.create(id=name, group="prompt-17", group_size=2, routing=SMALL)
        turn(member, 6, 8, seed=8, context=[1, 2, 3, 4], weight_version="v1", reason="stop")
        member.reward(reward, components={"format": 0.5, "answer": reward - 0.5})
        member.close("completed")

    noted = store.create(id="noted", routing=SMALL)
    with noted.segment(context=np.arange(20), engine="test/1", weight_version="v1") as segment:
        segment.tokens([20, 21], [-0.1, -0.2])
        segment.tokens([22, 23, 24])
        segment.routing(rows(8, 9), start=0, origin="cached")
        segment.routing(rows(6, 10), start=8)
        segment.routing(rows(4, 11), start=10, origin="recomputed")
        segment.no_routing("feature off")
        segment.close("stop", cached_tokens=8, retractions=1, weight_versions=[("v1", 0, 2), ("v2", 2, 5)])
    store.flush()
    noted.observe(rows(24, 12), start=0, source="trainer", weight_version="v2")
    noted.late_routing(rows(9, 13), segment=0, start=14, origin="unknown")

    nan = store.create(id="nan", routing=SMALL)
    with nan.segment(context=[1]) as segment:
        segment.tokens([2, 3, 4, 5], [-0.5, np.nan, -np.inf, 0.0])
        segment.close("error")
    nan.close("failed")

    mixed = store.create(id="mixed", routing=SMALL)
    turn(mixed, 3, 90, seed=14, context=np.arange(60), weight_version="v1", reason="abort")


def second_turns(store):
    seed = store.get("seed")
    with seed.segment(engine="test/1", weight_version="v2") as segment:
        segment.tokens([13, 14], [-1.0, -2.0])
        segment.routing(rows(9, 15), start=0)
        segment.close("stop")
    seed.reward(0.5)
    seed.close("completed")
    wide = store.get("wide")
    turn(wide, 8, 25, seed=16, weight_version="v2", reason="abort")
    wide.close("aborted")
    resumed = store.get("resumed")
    turn(resumed, 3, 4, seed=17, context=[70, 71], weight_version="v2", reason="stop")
    resumed.close("completed")
    store.get("lost").reward(2.0)
    noted = store.get("noted")
    noted.reward(0.75)
    noted.observe(rows(3, 21), start=4, source="trainer", weight_version="v2")
    store.get("nan").observe(rows(5, 22), start=0, source="auditor")  # the second pack has notes of it and no entries


def hot_turns(store):
    """What no archiver has seen yet."""
    turn(store.get("mixed"), 4, 30, seed=18, weight_version="v2", reason="stop")
    store.get("noted").observe(rows(24, 23), start=0, source="trainer/2", weight_version="v3")
    hot = store.create(id="hot", group="prompt-18", group_size=4, routing=WIDE)
    turn(hot, 5, 30, seed=20, context=np.arange(10), weight_version="v3", reason="length")
    hot.reward(0.125)
    going = store.create(id="open", routing=SMALL)
    segment = going.segment(context=[4, 5, 6], weight_version="v3")
    segment.tokens([7, 8], [-0.5, -0.5])
    store.flush()  # and the process goes away with the segment open


def turn(trajectory, first, count, *, seed, reason, **options):
    """A segment of `count` tokens that records every row of its input and output but the last."""
    with trajectory.segment(**options) as segment:
        random = np.random.default_rng(seed)
        segment.tokens(first + random.integers(0, 1000, count), -random.random(count))
        segment.routing(rows(segment.end - 1, seed, trajectory.routing), start=0)
        segment.close(reason)


def rows(count, seed, spec=SMALL):
    """Random rows `[count, L, K]` of distinct experts."""
    order = np.random.default_rng(seed).random((count, spec.num_layers, spec.num_experts)).argsort(axis=-1)
    return order[..., : spec.top_k].astype(spec.dtype)


def archive(store):
    store.flush()
    # No grace: keys that expire later would make the sample's hot log another one by the day.
    Archiver(store, grace_seconds=0.0).run(once=True)
    deadline = time.monotonic() + 10
    while any(store.hot.exists(summary.id) for summary in store.list(status=("completed", "truncated", "failed"))):
        if time.monotonic() > deadline:
            raise TimeoutError("the keys of a final trajectory stayed in the hot log")


def described(archive):
    """What can be read of a store or an archive: plain data for JSON, and arrays by name."""
    document = {"list": [plain(summary) for summary in archive.list()], "trajectories": {}}
    arrays = {}
    for summary in archive.list():
        id = summary.id
        about = document["trajectories"][id] = {
            "events": [event_of(event) for event in archive.events(id)],
            "notes": [event_of(event) for event in archive.notes(id)],
            "overlaps": [plain(overlap) for overlap in archive.overlaps(id)],
        }
        for policy in POLICIES:
            loaded = archive.load(id, policy=policy)
            about[policy] = plain(loaded)
            arrays |= {f"{id}/{policy}/{name}": data for name, data in arrays_of(loaded).items()}
        for recording in (one for segment in loaded.segments for one in segment.recordings):
            arrays[f"{id}/recorded/{recording.event}"] = archive.recorded_rows(id, recording)
        for overlap in archive.overlaps(id):
            arrays[f"{id}/recorded/{overlap.second.event}"] = archive.recorded_rows(id, overlap.second)
        if id in STEPPED:
            about["until"] = {
                f"{event.id}/{policy}": digest(archive.load(id, policy=policy, until=event.at))
                for event in archive.events(id)
                for policy in POLICIES
            }
    return document, arrays


def event_of(event):
    """An event as it was read; where its bytes lie inside a pack is the format's business."""
    about = {name: plain(getattr(event, name)) for name in ("id", "type", "nonce", "time", "note", "stored")}
    header = plain(event.header)
    if header.get("payload"):
        header["payload"].pop("inline")  # present in the hot log only
    return about | {"header": header}


def arrays_of(loaded):
    named = {name: getattr(loaded, name) for name in ARRAYS}
    return {name: data for name, data in named.items() if data is not None}


def digest(loaded):
    """BLAKE2b-128 (hex) of a trajectory's arrays, by name."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, data in arrays_of(loaded).items():
        hashed.update(f"{name} {data.dtype.str} {data.shape} ".encode() + data.tobytes())
    return hashed.hexdigest()


def plain(value):
    """Structs and dataclasses as maps of all their fields, arrays left out; the rest as JSON has it."""
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if not isinstance(one, np.ndarray)}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value.hex() if isinstance(value, bytes) else value


if __name__ == "__main__":
    make(Path(sys.argv[1]))
