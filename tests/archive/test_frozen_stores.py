"""Stores that older versions wrote stay readable, for ever, and can be written on.

`tests/data/stores/make.py` says how a sample is made, and describes what is read here the same way.
"""

import json
import shutil

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, rows
from tests.data.stores import make
from tests.servers import binary_of
from trajstore.archiver import Archiver
from trajstore.events import SCHEMA_VERSION

STORES = make.FOLDER
SAMPLES = sorted(path.name for path in STORES.glob("v[0-9]*"))

SERVERS = [
    pytest.param(
        binary_of(name), id=name, marks=pytest.mark.skipif(binary_of(name) is None, reason=f"no {name} server here")
    )
    for name in ("redis", "valkey")
]
"""A sample's append-only file opens with either."""


@pytest.fixture(params=SAMPLES)
def sample(request):
    """Folder of each frozen sample in turn, not to be written to."""
    return STORES / request.param


@pytest.fixture
def folder(sample, tmp_path):
    """A store of its own with what the sample holds."""
    return shutil.copytree(sample, tmp_path / "store", ignore=shutil.ignore_patterns("expected.*"))


def expected(sample, part):
    """(document, arrays) of the whole "store" or of its "archive" alone, as the version that wrote it read them."""
    document = json.loads((sample / "expected.json").read_bytes())[part]
    with np.load(sample / "expected.npz") as arrays:
        return document, {name.removeprefix(f"{part}/"): arrays[name] for name in arrays if name.startswith(f"{part}/")}


def differences(then, now, where=""):
    """Where `now` is not what `then` was; fields that a version has added are no difference."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            found
            for name, value in then.items()
            for found in (
                differences(value, now[name], f"{where}/{name}") if name in now else [f"{where}/{name} is gone"]
            )
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [
            found for i, pair in enumerate(zip(then, now, strict=True)) for found in differences(*pair, f"{where}/{i}")
        ]
    return [] if then == now and type(then) is type(now) else [f"{where}: {then!r} became {now!r}"]


def assert_reads_as(reading, then, arrays_then):
    now, arrays = make.described(reading)
    assert differences(then, json.loads(json.dumps(now))) == []
    for name, data in arrays_then.items():
        assert arrays[name].dtype == data.dtype, name
        np.testing.assert_array_equal(arrays[name], data, err_msg=name)


def test_there_is_a_sample_of_every_older_version():
    assert {f"v{version}" for version in range(1, SCHEMA_VERSION)} <= set(SAMPLES)


@pytest.mark.parametrize("server", SERVERS)
def test_frozen_store_reads_as_the_version_that_wrote_it_read_it(sample, folder, server, monkeypatch):
    monkeypatch.setenv("TRAJSTORE_SERVER", server)
    with trajstore.open(folder, create=False) as store:
        assert_reads_as(store, *expected(sample, "store"))


def test_frozen_archive_reads_without_a_server(sample, folder):
    shutil.rmtree(folder / "redis")
    assert_reads_as(trajstore.open_archive(folder / "archive"), *expected(sample, "archive"))


def test_frozen_store_is_archived_to_the_end_and_reads_the_same(sample, folder):
    """What was hot is written with today's headers; the copies of an entry still agree."""
    document, arrays = expected(sample, "store")
    with trajstore.open(folder, create=False, ack="fsync") as store:
        store.get("open").close("aborted", takeover=True)
        assert Archiver(store).run(once=True).refused == 0
    now, arrays_now = make.described(trajstore.open_archive(folder))
    then_list, now_list = ([one for one in about["list"] if one["id"] != "open"] for about in (document, now))
    assert differences(then_list, json.loads(json.dumps(now_list))) == []
    for about in (document["trajectories"], now["trajectories"]):
        about.pop("open")
        for id in ("hot", "mixed", "noted"):
            for event in about[id]["events"] + about[id]["notes"]:
                del event["stored"]
    assert differences(document["trajectories"], json.loads(json.dumps(now["trajectories"]))) == []
    for name, data in arrays.items():
        if not name.startswith("open/"):
            np.testing.assert_array_equal(arrays_now[name], data, err_msg=name)


@pytest.mark.parametrize("id", ["wide", "mixed", "lost", "hot"])
def test_frozen_trajectory_is_resumed_archived_and_loaded(sample, folder, id):
    """Aborted and archived; part hot and part archived; once taken over; hot only."""
    document, arrays = expected(sample, "store")
    then = document["trajectories"][id]["last_segment_wins"]
    with trajstore.open(folder, create=False, ack="fsync") as store:
        trajectory = store.get(id)
        assert trajectory.token_ids.tolist() == arrays[f"{id}/last_segment_wins/token_ids"].tolist()
        length = len(trajectory)
        with trajectory.segment(context=[1], weight_version="v9") as segment:
            segment.tokens([2, 3], [-0.5, -0.25])
            new = rows(length + 2, seed=99, spec=trajectory.routing)
            segment.routing(new, start=0)
            segment.close("stop")
        trajectory.close("completed")
        live = store.load(id)
        assert Archiver(store, grace_seconds=0.0).run(once=True).refused == 0
        again = store.load(id)
        assert all(event.stored != "hot" for event in store.events(id))
        with pytest.raises(trajstore.Conflict, match="already"):
            store.create(id=id)
    for loaded in (live, again, trajstore.open_archive(folder).load(id)):
        np.testing.assert_array_equal(loaded.token_ids[-3:], [1, 2, 3])
        np.testing.assert_array_equal(loaded.routed_experts[:-1], new)
        assert loaded.status == "completed"
    before = trajstore.open_archive(folder).load(id, until=then["at"])
    for name, data in make.arrays_of(before).items():
        np.testing.assert_array_equal(data, arrays[f"{id}/last_segment_wins/{name}"], err_msg=name)


def test_frozen_store_takes_new_trajectories_and_no_used_id(sample, folder):
    with trajstore.open(folder, create=False, ack="fsync") as store:
        assert store.routing_order == "engine"
        with pytest.raises(trajstore.Conflict, match="already"):
            store.create(id="seed")
        with store.create(id="new", routing=SPEC).segment(context=[1, 2]) as segment:
            segment.routing(rows(2), start=0)
            segment.close("stop")
        store.flush()
        assert Archiver(store).run(once=True).refused == 0
    np.testing.assert_array_equal(trajstore.open_archive(folder).load("new").routed_experts, rows(2))
