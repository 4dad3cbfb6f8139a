"""`ack="fsync"`: acknowledged means on the server's disk, and a server that does not do that is refused."""

import pytest

import trajstore
from tests.builders import record_seed_case
from tests.log.looking import until


def test_fsync_is_refused_where_the_server_does_not_fsync(own_server, run_name):
    with pytest.raises(trajstore.Conflict, match="appendfsync everysec"):
        trajstore.open(own_server.url(run_name), ack="fsync")


def test_fsync_is_refused_without_an_append_only_file(start_server, run_name):
    with pytest.raises(trajstore.Conflict, match="appendonly no"):
        trajstore.open(start_server(appendonly="no", appendfsync="always").url(run_name), ack="fsync")


def test_fsync_is_refused_where_the_configuration_cannot_be_read(start_server, run_name):
    server = start_server(appendfsync="always")
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">secret", "~*", "+@all", "-config")
    url = server.url(run_name).replace("redis://", "redis://limited:secret@")
    with pytest.raises(trajstore.Conflict, match="cannot be read"):
        trajstore.open(url, ack="fsync")
    with trajstore.open(url, partitions=1) as store:  # and "memory" asks for no more than it is given
        store.create()
        store.flush()


def test_fsync_is_accepted_where_the_server_does_it_and_nothing_is_lost_by_a_crash(start_server, open_at):
    server = start_server(appendfsync="always")
    store = open_at(server, ack="fsync")
    trajectory = record_seed_case(store)
    store.flush()
    server.kill()
    server.start()
    assert not trajectory._lane.kept  # there is nothing to keep against a crash
    assert len(store.load(trajectory.id).token_ids) == 10


def test_fsync_is_checked_again_at_each_connection(start_server, open_at):
    server = start_server(appendfsync="always")
    store = open_at(server, ack="fsync", timeout=1.0)
    trajectory = record_seed_case(store)
    store.flush()
    server.stop()
    server.options["appendfsync"] = "everysec"
    server.start()
    trajectory.reward(1.0)
    with pytest.raises(trajstore.Conflict, match="appendfsync everysec"):
        store.flush(trajectory.id)
    assert store.events(trajectory.id)[-1].type == "SegmentClosed"
    with server.client() as client:
        client.config_set("appendfsync", "always")
    again = store.get(trajectory.id)
    again.reward(2.0)
    store.flush(trajectory.id)
    assert store.load(trajectory.id).reward == 2.0


def test_writing_goes_on_when_the_server_fsyncs_again_before_the_deadline(start_server, open_at):
    server = start_server(appendfsync="always")
    store = open_at(server, ack="fsync", timeout=20.0)
    trajectory = record_seed_case(store)
    store.flush()
    server.stop()
    server.options["appendfsync"] = "everysec"
    server.start()
    trajectory.reward(1.0)
    with server.client() as client:
        until(lambda: isinstance(store._flusher._trouble, trajstore.Conflict), what="it has noticed")
        client.config_set("appendfsync", "always")
    store.flush(trajectory.id)


def test_client_of_a_limited_user_can_do_without_info_and_config(start_server, run_name):
    """What a managed server withholds must not keep anybody from writing."""
    server = start_server()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">secret", "~*", "+@all", "-config", "-info")
    with trajstore.open(server.url(run_name).replace("//", "//limited:secret@"), partitions=1) as store:
        trajectory = record_seed_case(store)
        store.flush()
        assert len(store.load(trajectory.id).token_ids) == 10


def test_wrong_password_is_named_as_such(start_server, run_name):
    server = start_server()
    with server.client() as client:
        client.config_set("requirepass", "right")
        with pytest.raises(trajstore.Unavailable, match="password"):
            trajstore.open(server.url(run_name).replace("//", "//:wrong@"), timeout=2.0)
        assert client.dbsize() == 0
