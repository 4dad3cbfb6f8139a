"""Several processes share one folder's server: the last one out stops it, and nobody's death hurts the others."""

import os
import signal

import pytest

import trajstore
from tests.store.children import has_ended, record_of, servers_of, until
from trajstore.server import stop_server

CREATE = "store.create(id={!r}); store.flush()"


def test_the_last_process_out_stops_the_server_and_waits_until_it_is_gone(user, folder):
    first, second = user(), user()
    (server,) = servers_of(folder)
    first.do(CREATE.format("a"))
    second.do(CREATE.format("b"))
    assert first.ask("[s.id for s in store.list()]") == ["a", "b"]
    first.do("store.close()")  # the one that started it
    assert servers_of(folder) == [server]
    assert second.ask("[s.id for s in store.list()]") == ["a", "b"]
    assert record_of(folder)["pid"] == server
    second.do("store.close()")
    assert servers_of(folder) == []
    assert record_of(folder)["stopped"]
    assert not os.path.exists(record_of(folder)["socket"])
    for process in (first, second):
        assert process.last() == 0
        assert process.words() == ""  # no ResourceWarning either, of the one whose server outlived its membership


@pytest.mark.parametrize(
    ("ending", "status"),
    [("", 0), ("sys.exit(3)", 3), ("raise ValueError('on purpose')", 1), ("del store", 0)],
    ids=["end of the script", "sys.exit", "exception", "dropped store"],
)
def test_a_process_that_ends_without_close_flushes_and_stops_the_server(user, folder, ending, status):
    process = user()
    assert process.last(f"store.create(id='a'); {ending}") == status
    assert servers_of(folder) == []
    with trajstore.open(folder, create=False) as store:
        assert [found.id for found in store.list()] == ["a"]


def test_killing_a_user_leaves_the_others_at_work_and_the_last_of_them_stops_the_server(user, folder):
    doomed, other = user(), user()
    doomed.do(CREATE.format("a"))
    doomed.kill()
    other.do(CREATE.format("b"))
    assert other.ask("[s.id for s in store.list()]") == ["a", "b"]
    other.do("store.close()")
    assert servers_of(folder) == []


def test_the_server_of_a_killed_only_user_is_taken_over_and_then_stopped(user, folder):
    doomed = user()
    doomed.do(CREATE.format("a"))
    doomed.kill()
    (server,) = servers_of(folder)
    with trajstore.open(folder) as store:
        assert servers_of(folder) == [server]
        assert [found.id for found in store.list()] == ["a"]
    assert servers_of(folder) == []


def test_stop_server_ends_what_a_killed_only_user_left(user, folder):
    user().kill()
    assert len(servers_of(folder)) == 1
    assert stop_server(folder)
    assert servers_of(folder) == []
    assert not stop_server(folder)


def test_stop_server_of_a_folder_without_a_store_is_not_found(tmp_path):
    with pytest.raises(trajstore.NotFound, match="no embedded store"):
        stop_server(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_killed_server_is_restarted_by_the_next_call_with_everything_acknowledged(user, folder):
    one, other = user(), user()
    one.do(CREATE.format("a"))
    other.do(CREATE.format("b"))
    (server,) = servers_of(folder)
    os.kill(server, signal.SIGKILL)
    until(lambda: not servers_of(folder), what="the server's end")
    for process in (one, other):
        assert process.ask("[s.id for s in store.list()]") == ["a", "b"]
    (again,) = servers_of(folder)
    assert again != server
    one.do(CREATE.format("c"))
    one.do("store.close()")
    assert other.ask("[s.id for s in store.list()]") == ["a", "b", "c"]
    other.do("store.close()")
    assert servers_of(folder) == []


def test_a_writer_in_the_middle_of_a_segment_goes_on_when_the_server_is_killed(folder):
    with trajstore.open(folder, partitions=1) as store:
        trajectory = store.create(id="a")
        with trajectory.segment(context=[1, 2, 3]) as segment:
            for round in range(20):
                segment.tokens([round] * 50)
                if round % 5 == 4:
                    (server,) = until(lambda: servers_of(folder), what="a server")
                    os.kill(server, signal.SIGKILL)
            segment.close("stop")
        trajectory.close()
        store.flush()
        loaded = store.load("a")
        assert loaded.status == "completed"
        assert loaded.token_ids.tolist() == [1, 2, 3] + [r for r in range(20) for _ in range(50)]
    assert servers_of(folder) == []


def test_a_server_that_was_told_to_stop_while_in_use_is_started_again(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
        store.flush()
        assert stop_server(folder)
        assert [found.id for found in store.list()] == ["a"]
    assert servers_of(folder) == []


def test_eight_processes_opening_and_closing_again_and_again_all_see_everything(child, folder):
    rounds = 6
    processes = [child() for _ in range(8)]
    code = (
        f"for round in range({rounds}):\n"
        f"    with trajstore.open({str(folder)!r}, partitions=1) as store:\n"
        "        mine = f'p{number}-{round}'\n"
        "        store.create(id=mine)\n"
        "        store.flush()\n"
        "        ids = [s.id for s in store.list()]\n"
        "        assert {f'p{number}-{r}' for r in range(round + 1)} <= set(ids), ids\n"
    )
    for number, process in enumerate(processes):
        process.begin("do", f"number = {number}\n{code}")
    for process in processes:
        process.finish()
    assert servers_of(folder) == []
    with trajstore.open(folder) as store:
        assert len(store.list()) == 8 * rounds


def test_a_folder_is_opened_while_the_last_user_leaves(user, folder):
    leaving, opening = user(), user()
    opening.do("store.close()")
    for round in range(6):
        leaving.begin("do", "store.close()")
        opening.begin("do", f"store = trajstore.open({str(folder)!r})")
        leaving.finish()
        opening.finish()
        opening.do(CREATE.format(f"round-{round}"))
        assert len(opening.ask("[s.id for s in store.list()]")) == round + 1
        assert len(servers_of(folder)) == 1
        leaving, opening = opening, leaving
    leaving.do("store.close()")
    assert servers_of(folder) == []


def test_two_stores_of_one_folder_in_one_process_are_two_members(folder):
    first, second = trajstore.open(folder, partitions=1), trajstore.open(folder)
    first.create(id="a")
    first.close()
    first.close()  # a second time does nothing
    (server,) = servers_of(folder)
    second.create(id="b")
    second.flush()
    assert [found.id for found in second.list()] == ["a", "b"]
    assert servers_of(folder) == [server]
    second.close()
    assert servers_of(folder) == []


def test_a_store_that_starts_the_server_and_leaves_first_leaves_no_zombie_behind(user, folder):
    with trajstore.open(folder, partitions=1):
        (server,) = servers_of(folder)
        other = user()
    other.do("store.close()")
    with trajstore.open(folder), pytest.raises(ChildProcessError):  # opening collects what has ended
        os.waitpid(server, os.WNOHANG)


def test_fsync_upgrades_the_running_server_and_nobody_downgrades_it(user, folder):
    weak = user()
    with trajstore.open(folder) as store:
        assert store.wire.call("CONFIG", "GET", "appendfsync")[1] == b"everysec"
    with trajstore.open(folder, ack="fsync") as strict:
        assert strict.wire.call("CONFIG", "GET", "appendfsync")[1] == b"always"
        with trajstore.open(folder) as store:
            assert store.wire.call("CONFIG", "GET", "appendfsync")[1] == b"always"
        (server,) = servers_of(folder)
        os.kill(server, signal.SIGKILL)
        until(lambda: not servers_of(folder), what="the server's end")
        weak.do(CREATE.format("a"))  # a user who asked for less is the one to restart it
        assert strict.wire.call("CONFIG", "GET", "appendfsync")[1] == b"always"
        strict.create(id="b")
        strict.flush()
        assert [found.id for found in strict.list()] == ["a", "b"]
    weak.do("store.close()")
    with trajstore.open(folder) as store:  # all who counted on it have left
        assert store.wire.call("CONFIG", "GET", "appendfsync")[1] == b"everysec"


def test_a_folder_removed_under_its_user_is_an_error_and_its_server_ends_with_the_user(user, folder):
    process = user("partitions=1, timeout=3")
    process.do(CREATE.format("a"))
    (server,) = servers_of(folder)
    os.rename(folder, folder.with_name("elsewhere"))
    process.do("store.close()")
    assert has_ended(server)
    with trajstore.open(folder.with_name("elsewhere")) as store:
        assert [found.id for found in store.list()] == ["a"]


def test_a_folder_removed_and_made_anew_is_not_mistaken_for_the_old_one(child, folder):
    """prime-rl #2304: a fresh run consumed stale files; here, a stale process must not write to the fresh run."""
    stale, fresh = child(), child()
    stale.do(f"import shutil; store = trajstore.open({str(folder)!r}, partitions=1, timeout=3)")
    stale.do(CREATE.format("old"))
    (server,) = servers_of(folder)
    stale.do(f"shutil.rmtree({str(folder)!r})")
    fresh.do(f"store = trajstore.open({str(folder)!r}, partitions=1)")
    fresh.do(CREATE.format("new"))
    stale.do("store.wire.close()")  # so that it has to connect anew
    assert stale.ask("[s.id for s in store.list()]") == ["old"]
    os.kill(server, signal.SIGKILL)
    until(lambda: has_ended(server), what="the server's end")
    with pytest.raises(AssertionError, match=r"Unavailable: .*has been removed"):
        stale.do("store.list()")
    stale.do("store.close()")
    assert len(servers_of(folder)) == 1
    assert fresh.ask("[s.id for s in store.list()]") == ["new"]
    fresh.do("store.close()")
    assert servers_of(folder) == []


def test_a_server_stopped_under_its_users_comes_back_as_strict_as_they_asked(user, folder):
    weak = user()
    with trajstore.open(folder, ack="fsync") as strict:
        stop_server(folder)
        weak.do(CREATE.format("a"))
        assert strict.wire.call("CONFIG", "GET", "appendfsync")[1] == b"always"
