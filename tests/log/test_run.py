"""A run's identity: its name in the URL, its incarnation, its partitions, its format; and ids that are never reused."""

import json

import pytest

import trajstore
from tests.builders import record_seed_case
from trajstore.archiver import Archiver


def test_url_must_name_a_run(backend):
    with pytest.raises(trajstore.SchemaError, match="names no run"):
        trajstore.open(backend.url("x").partition("?")[0])


@pytest.mark.parametrize("run", ["", "a b", "a/b", "{a}", "a" * 201])
def test_run_that_cannot_be_a_key_is_refused(backend, run):
    with pytest.raises(trajstore.SchemaError):
        trajstore.open(backend.url(run))


def test_opening_twice_finds_the_same_run(store, open_store):
    other = open_store(partitions=None)
    assert (other.incarnation, other.partitions) == (store.incarnation, store.partitions)


def test_partition_count_is_fixed(store, open_store):
    with pytest.raises(trajstore.Conflict, match="2 partitions"):
        open_store(partitions=3)


@pytest.mark.parametrize("partitions", [-1, 5000])
def test_partition_count_has_limits(backend, run_name, partitions):
    with pytest.raises(trajstore.SchemaError):
        trajstore.open(backend.url(run_name), partitions=partitions)


def test_run_that_does_not_exist_is_not_made_by_a_reader(backend, run_name, client):
    with pytest.raises(trajstore.NotFound):
        trajstore.open(backend.url(run_name), create=False)
    assert client.keys(f"*{run_name}*") == []


@pytest.mark.parametrize(
    "record",
    [
        {"format": 99, "incarnation": "x", "partitions": 2, "created": 0.0},
        {"format": 99, "somewhere": "else entirely"},
    ],
)
def test_newer_run_format_is_refused(backend, run_name, client, record):
    """Also where its fields are others than ours."""
    client.set(f"trajstore:{{{run_name}}}:run", json.dumps(record))
    with pytest.raises(trajstore.SchemaError, match="format 99"):
        trajstore.open(backend.url(run_name))


def test_run_record_of_somebody_else_is_refused(backend, run_name, client):
    client.set(f"trajstore:{{{run_name}}}:run", b"\x00\x01")
    with pytest.raises(trajstore.SchemaError, match="is it trajstore's"):
        trajstore.open(backend.url(run_name))


def test_archive_of_another_incarnation_is_a_conflict(store, backend, run_name):
    """The same folder for another run: nothing of one may be read as the other's."""
    with pytest.raises(trajstore.Conflict):
        trajstore.open(backend.url(run_name + "-2"), archive=store.archive.root.location)


def test_archive_of_a_run_that_the_server_lost_is_a_conflict(store, open_store, client):
    """prime-rl #2304: a fresh run would go on with stale files."""
    folder = store.archive.root.location
    store.close()
    for key in client.keys(f"*{store.run}*"):
        client.delete(key)
    with pytest.raises(trajstore.Conflict, match="incarnation"):
        open_store(archive=folder)


def test_existing_id_is_a_conflict(store, open_store):
    store.create(id="mine")
    with pytest.raises(trajstore.Conflict, match="never reused"):
        store.create(id="mine")
    store.flush()
    with pytest.raises(trajstore.Conflict):
        open_store().create(id="mine")


def test_id_that_was_archived_and_removed_is_not_reused(start_server, tmp_path, open_at):
    """verl RFC #7579: recycled ids silently train on mislabeled data."""
    server = start_server(appendfsync="always")
    store = open_at(server, archive=tmp_path / "archive")
    trajectory = record_seed_case(store, id="once")
    trajectory.close()
    store.flush()
    Archiver(store).run(once=True)
    with server.client() as client:
        for key in (store.keys.entries("once"), store.keys.payloads("once"), store.keys.notes("once")):
            client.delete(key)  # as after the grace period
    fresh = open_at(server, archive=tmp_path / "archive")
    with pytest.raises(trajstore.Conflict):
        fresh.create(id="once")
    assert len(fresh.load("once").token_ids) == 10


def test_url_in_messages_has_no_password(backend, run_name):
    url = backend.url(run_name).replace("//", "//user:secret@").partition("?")[0]
    with pytest.raises(trajstore.SchemaError) as caught:
        trajstore.open(url)
    assert "secret" not in str(caught.value)
