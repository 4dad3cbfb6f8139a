"""The embedded server is its owner's: nobody else connects to it, or reads what it keeps."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

import trajstore
from tests.consumers.rollouts import finish
from tests.store.children import servers_of
from trajstore.server import stop_server

NOBODY = 65534

as_root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")


@pytest.fixture
def open_mask():
    """A process that keeps nothing to itself by default."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def public():
    """A folder open to everybody; tmp_path is not, and too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="ts-") as made:
        Path(made).chmod(0o777)
        yield Path(made)


@pytest.fixture
def runtime(public, monkeypatch):
    """Where sockets lie."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(public))
    return public


@pytest.fixture
def folder(public):
    path = public / "store"
    yield path
    if servers_of(path):
        stop_server(path)


def others_may(path: Path) -> bool:
    """Group or others have any right to it."""
    return bool(stat.S_IMODE(path.lstat().st_mode) & 0o077)


def socket_of(folder: Path) -> Path:
    return Path(msgspec.json.decode((folder / "redis" / "server.json").read_bytes())["socket"])


def test_socket_and_files_are_the_owners_whatever_the_umask(folder, runtime, open_mask):
    with trajstore.open(folder, partitions=1) as store:
        finish(store)
        socket = socket_of(folder)
        assert socket.is_relative_to(runtime)
        assert stat.S_ISSOCK(socket.stat().st_mode)
        assert [path for path in (socket.parent, socket, folder / "redis") if others_may(path)] == []
        assert list((folder / "redis" / "appendonlydir").glob("*.aof"))


def test_folder_of_the_server_that_others_may_enter_is_shut_again(folder, runtime, open_mask):
    """It may have been copied or unpacked without its mode."""
    trajstore.open(folder, partitions=1).close()
    (folder / "redis").chmod(0o777)
    with trajstore.open(folder):
        assert not others_may(folder / "redis")


@as_root
def test_another_user_neither_connects_nor_reads(folder, runtime, open_mask):
    """Everything above lies open to it."""
    with trajstore.open(folder, partitions=1) as store:
        finish(store, id="x")
        socket = socket_of(folder)
        aof = next((folder / "redis" / "appendonlydir").glob("*.incr.aof"))
        for path in (folder, folder / "store.json"):
            path.chmod(0o777)
        code = f"""
import os, socket
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
os.stat({str(folder / "store.json")!r})
for attempt in (
    lambda: socket.socket(socket.AF_UNIX).connect({str(socket)!r}),
    lambda: open({str(aof)!r}, "rb").read(),
    lambda: os.listdir({str(folder / "redis")!r}),
    lambda: os.listdir({str(socket.parent)!r}),
    lambda: os.unlink({str(socket)!r}),
):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemExit("it was let in")
"""
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert (tried.returncode, tried.stderr) == (0, "")
        assert store.load("x").status == "completed"


@as_root
def test_socket_folder_that_another_user_has_made_is_refused(folder, runtime):
    """Who owns the folder could put a socket of his own there."""
    theirs = runtime / f"trajstore-{os.getuid()}"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(trajstore.Unavailable, match="a folder of yours with mode 0700"):
        trajstore.open(folder, partitions=1)


def test_socket_folder_that_is_a_link_is_refused(folder, runtime, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (runtime / f"trajstore-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(trajstore.Unavailable, match="a folder of yours with mode 0700"):
        trajstore.open(folder, partitions=1)


def test_server_of_a_folder_listens_at_no_port(folder, runtime):
    with trajstore.open(folder, partitions=1) as store:
        settings = store.wire.call("CONFIG", "GET", "port")
        assert settings == [b"port", b"0"]
