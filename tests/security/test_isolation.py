"""Runs beside each other on one server, and hostile data in one of them: whoever else is there goes on."""

import msgspec
import pytest

import trajstore
from tests.builders import record_seed_case
from tests.consumers.rollouts import finish, look, materialize
from trajstore.archiver import Archiver
from trajstore.log.run import TRAINER_GROUP
from trajstore.ready_follower import ReadyFollower
from trajstore.recovery import recover

JUNK = (b"", b"\xff\xfe", b"\xdd\xff\xff\xff\xff", b"\x91" * 50_000, b'{"a":' * 50_000, b"../../etc/passwd\n\x1b[2J")


@pytest.fixture
def client(own_server):
    with own_server.client() as client:
        yield client


@pytest.fixture
def opened(own_server, run_name, tmp_path):
    """A run with an archive on a server of the test's own, which fsyncs always so that nothing has to ripen."""
    with own_server.client() as client:
        client.config_set("appendfsync", "always")
    with trajstore.open(own_server.url(run_name), archive=tmp_path / "archive", partitions=1, timeout=10.0) as store:
        yield store


def test_run_that_is_begun_again_is_not_held_up_by_one_that_is_called_alike(own_server, run_name, tmp_path, client):
    """`exp1` and `exp1:00` share the beginning of their keys."""
    with trajstore.open(own_server.url(run_name), archive=tmp_path / "archive", partitions=1) as store:
        finish(store, id="x")
        Archiver(store).run(once=True)
    with trajstore.open(own_server.url(f"{run_name}:00"), partitions=1) as beside:
        finish(beside, id="theirs")
    for key in client.keys(f"trajstore:{{{run_name}}}:*") + client.keys(f"trajstore:{{{run_name}:00}}:[efslqrpn]*"):
        if key != f"trajstore:{{{run_name}:00}}:run".encode():
            client.delete(key)
    assert recover(own_server.url(run_name), archive=tmp_path / "archive").begun
    with trajstore.open(own_server.url(run_name)) as again:
        assert [one.id for one in again.list(status="completed")] == ["x"]


@pytest.mark.parametrize("junk", JUNK)
def test_hostile_hints_stop_neither_archiver_nor_materializer(opened, client, junk):
    for fields in ({b"t": junk, b"k": junk, b"e": junk}, {junk or b"x": junk}):
        client.xadd(opened.keys.feed(0), fields)
    finish(opened, id="good")
    materialize(opened)
    Archiver(opened).run(once=True)
    assert [one.members[0].id for one in look(opened)] == ["good"]
    assert opened.archive.find("good").parts


@pytest.mark.parametrize("junk", JUNK)
def test_hostile_entry_harms_its_own_trajectory_only(opened, client, junk):
    finish(opened, id="bad")
    finish(opened, id="good")
    client.xadd(opened.keys.entries("bad"), {b"e": junk}, id="99-0")
    client.xadd(opened.keys.feed(0), {b"t": b"bad", b"k": b"TrajectoryClosed", b"e": b"99-0"})
    for use in (opened.load, opened.events, opened.get):
        with pytest.raises(trajstore.TrajstoreError):
            use("bad")
    materialize(opened)
    Archiver(opened).run(once=True)
    assert opened.archive.find("good").parts
    assert opened.load("good").status == "completed"
    assert opened.delete("bad") == 1


@pytest.mark.parametrize("junk", JUNK)
def test_hostile_summary_is_an_error_of_ours_and_can_be_mended(opened, client, junk):
    finish(opened, id="good")
    client.hset(opened.keys.summaries(0), "good", junk)
    with pytest.raises(trajstore.SchemaError, match="trajstore rebuild"):
        list(opened.list())
    opened.rebuild_summaries()
    assert [one.id for one in opened.list(status="completed")] == ["good"]


@pytest.mark.parametrize("junk", JUNK)
def test_hostile_ready_entry_is_named(opened, client, junk):
    at = client.xadd(opened.keys.ready(0), {b"g": junk}).decode()
    with pytest.raises(trajstore.Corrupt, match=f"ready entry 0/{at} cannot be read"):
        ReadyFollower(opened.wire, opened.keys, TRAINER_GROUP, "rank-0").poll(count=1)


@pytest.mark.parametrize("junk", JUNK)
def test_hostile_payload_is_corrupt(opened, client, junk):
    trajectory = record_seed_case(opened, metadata={})
    with trajectory.segment(context=range(500)) as segment:
        segment.close("stop")
    opened.flush()
    (field,) = client.hkeys(opened.keys.payloads(trajectory.id))
    client.hset(opened.keys.payloads(trajectory.id), field, junk)
    with pytest.raises(trajstore.Corrupt):
        opened.load(trajectory.id)


def test_header_that_promises_a_payload_beyond_all_limits_is_refused_before_it_is_fetched(opened, client):
    opened.create(id="x")
    opened.flush()
    segment = {"type": "SegmentOpened", "base": 0, "context": 1 << 40, "payload": {"nbytes": 1 << 42, "crc": 0}}
    entry = {"v": 2, "nonce": 1, "time": 0.0, "events": [segment]}
    client.xadd(opened.keys.entries("x"), {b"e": msgspec.msgpack.encode(entry)}, id="2-0")
    with pytest.raises(trajstore.SchemaError, match="2-0 has a bad field"):
        opened.load("x")
