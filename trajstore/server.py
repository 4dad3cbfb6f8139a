"""The embedded server: a private Redis or Valkey over one directory, shared by the processes that use it.

No daemon and no pid file. Three kernel locks tell everything, and the kernel drops them with the process:

- `members` is held shared by every process that uses the store; who can take it exclusively is the last one out.
- `door` is held exclusively while somebody joins, starts, leaves or stops.
- `alive` is inherited by the server itself, so it is held exactly as long as a server runs on the directory.

`server.json` says how to reach that server. It is written before the server starts, so that a starter killed at any
moment leaves a server that the next one finds.
"""

import contextlib
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import redis

from trajstore.binaries import find_bundled_server, find_server
from trajstore.errors import UNREADABLE, Conflict, Corrupt, NotFound, TrajstoreError, Unavailable
from trajstore.locks import LockFile
from trajstore.log.wire import Wire, info_fields, pool_options

__all__ = ["Ack", "EmbeddedServer", "find_bundled_server", "find_server", "stop_server"]

Ack = Literal["memory", "fsync"]

_START_DEADLINE = 60.0
_POLL = 0.02
_SOCKET_PATH_LIMIT = 107 if sys.platform == "linux" else 103


class ServerRecord(msgspec.Struct, frozen=True):
    """`redis/server.json`: what was started last.

    Attributes:
        host, boot: whether the locks can be believed: they are the kernel's.
        pid: 0 while it starts; means something only while the `alive` lock is held.
        ack: what its users asked for at most. A restart keeps to it, whoever makes it.
        stopped: it has ended, and was seen to.
    """

    binary: str
    version: str
    host: str
    boot: str
    pid: int
    socket: str
    ack: Ack = "memory"
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
        self._members: LockFile | None = None
        with self._home.door():
            self._members = self._home.lock("members")
            self._members.share()
            try:
                self.socket = self._home.ensure(ack)
            except BaseException:
                with contextlib.suppress(TrajstoreError):  # the first error tells more
                    self._let_go()
                raise

    def wire(self) -> Wire:
        """Connections to the server, which start it again if it has died."""
        options = pool_options(self._timeout)
        pool = redis.ConnectionPool(connection_class=_EmbeddedConnection, path=self.socket, server=self, **options)
        return Wire(pool, timeout=self._timeout)

    def ensure(self) -> str:
        """Start the server again if it has died; returns its socket path."""
        with self._home.door():
            if self._members is None or self._members.closed:
                raise Unavailable(f"the store in {self._home.directory} is closed in this process")
            if self._members.removed:
                raise NotFound(f"{self._home.directory} has been removed")
            self.socket = self._home.ensure(self._ack)
            return self.socket

    def leave(self) -> None:
        """End this process's membership; the last one stops the server and waits until it is gone."""
        if self._members is None:
            return
        if self._members.removed:
            self._let_go()
            return
        with self._home.door():
            self._let_go()

    def _let_go(self) -> None:
        members, self._members = self._members, None
        if members is None:
            return
        try:
            if members.closed or not members.try_exclusive():
                return
            if members.removed:
                self._home.abandon()
            else:
                self._home.stop(unused=True)
        finally:
            members.release()


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
        return home.stop(unused=home.is_free("members"))


class _Home:
    """The server's files. `ensure` and `stop` want the door held."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self.directory = directory
        self._folder = directory.resolve() / "redis"  # a later chdir, or another link to it, must not matter
        self._timeout = timeout
        self._reached: ServerRecord | None = None
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if self._folder.stat().st_mode & 0o077:  # copied or unpacked without its mode: the server's files lie open
                self._folder.chmod(0o700)
        except OSError as error:
            raise Unavailable(f"the store in {directory} cannot be used: {error}") from error

    def lock(self, name: str) -> LockFile:
        try:
            return LockFile(self._folder / name)
        except FileNotFoundError as error:
            raise NotFound(f"{self._folder} has been removed") from error
        except OSError as error:
            raise Unavailable(f"the store in {self.directory} cannot be used: {error}") from error

    @contextlib.contextmanager
    def door(self) -> Iterator[None]:
        patience = self._timeout + _START_DEADLINE
        door = self.lock("door")
        try:
            deadline = time.monotonic() + patience
            while not door.try_exclusive():
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"another process has been starting or stopping the server of {self.directory} for "
                        f"{patience:g} s"
                    )
                time.sleep(_POLL)
            yield
        finally:
            door.release()

    def is_free(self, name: str) -> bool:
        """Whether nobody holds the lock of that name, in any way."""
        lock = self.lock(name)
        try:
            return lock.try_exclusive()
        finally:
            lock.release()

    def ensure(self, ack: Ack) -> str:
        """Have a server that answers; returns its socket path."""
        record = self._record()
        if record is not None and record.ack == "fsync":
            ack = "fsync"  # another user counts on it
        if record is None or not self._running(record) or not self._answers(record):
            record = self._start(ack)
        elif ack == "fsync":
            self._write(msgspec.structs.replace(record, ack=ack))
            self._call(record, "CONFIG", "SET", "appendfsync", "always")
        self._reached = record
        return record.socket

    def stop(self, *, unused: bool) -> bool:
        """End the server, by asking, then by signals; True if one was running. `unused`: nobody counts on it."""
        record = self._record()
        if record is None:
            return False
        ended = msgspec.structs.replace(record, stopped=True, ack="memory" if unused else record.ack)
        if not self._running(record):
            self._write(ended)
            return False
        for signal_number, patience in ((None, 30.0), (signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
            if signal_number is not None:
                self._signal(record, signal_number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if signal_number is None:
                    self._ask_to_end(record)
                if not self._running(record):
                    self._write(ended)
                    Path(record.socket).unlink(missing_ok=True)
                    _reap(record.pid)
                    return True
                time.sleep(_POLL)
        raise Unavailable(f"the server of {self.directory} (pid {record.pid}) does not end, even when killed")

    def abandon(self) -> None:
        """End the server of a folder that was removed or moved under its users: no file leads to it any more."""
        if self._reached is not None:
            self._ask_to_end(self._reached)
            _reap(self._reached.pid)

    def _running(self, record: ServerRecord) -> bool:
        if record.stopped:
            return False
        boot = _boot_id()
        if record.boot != boot or not boot:
            if record.host != socket.gethostname():
                raise Conflict(
                    f"the server of {self.directory} was started on host {record.host} and not stopped; it cannot be "
                    f"reached from here. Run `trajstore stop {self.directory}` there, or, if that host is gone for "
                    f"good, remove {self._folder / 'server.json'}"
                )
            if boot:
                return False  # this host has been restarted since
        return not self.is_free("alive")

    def _start(self, ack: Ack) -> ServerRecord:
        _collect()
        binary, version = find_server()
        path = _socket_path(self._folder)
        record = ServerRecord(
            binary=binary,
            version=version,
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=0,
            socket=str(path),
            ack=ack,
        )
        arguments = [part for name, value in _options(self._folder, path, ack).items() for part in (f"--{name}", value)]
        alive = self.lock("alive")
        try:
            if not alive.try_exclusive():
                raise Unavailable(f"a server that nobody knows holds {self.directory}; end it by hand")
            self._write(record)
            path.unlink(missing_ok=True)
            with (self._folder / "server.log").open("ab") as log:
                process = subprocess.Popen(  # noqa: S603 - a binary that find_server chose
                    [binary, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    pass_fds=[alive.fileno()],
                    start_new_session=True,  # a Ctrl-C at the terminal must not reach it
                )
        except OSError as error:
            raise Unavailable(f"{binary} could not be started for {self.directory}: {error}") from error
        finally:
            alive.close()
        _started.add(process.pid)
        process.returncode = 0  # `_collect` waits for it: it may outlive this process, which is no cause for a warning
        record = msgspec.structs.replace(record, pid=process.pid)
        self._write(record)
        if not self._answers(record):
            raise Unavailable(
                f"{binary} ended instead of answering: {self._last_words()}. Its log is {self._folder / 'server.log'}"
            )
        return record

    def _answers(self, record: ServerRecord) -> bool:
        """Wait until the server answers, as long as it gets on with loading its log; False if it ends instead."""
        deadline, loaded = time.monotonic() + _START_DEADLINE, ""
        while True:
            try:
                state = info_fields(self._call(record, "INFO", "persistence"))
                if state.get("loading") == "0":
                    return True
                stands = state.get("loading_loaded_bytes", "")
                trouble = f"it is loading its log, and stands at {stands} bytes"
                if stands != loaded:
                    deadline, loaded = time.monotonic() + _START_DEADLINE, stands
            except Unavailable as error:  # not listening yet
                trouble = str(error)
            if not self._running(record):
                return False
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the server of {self.directory} (pid {record.pid}) holds the directory but does not answer: "
                    f"{trouble}. `trajstore stop {self.directory}` ends it"
                )
            time.sleep(_POLL)

    def _call(self, record: ServerRecord, *command: str) -> Any:
        pool = redis.ConnectionPool(
            connection_class=redis.UnixDomainSocketConnection, path=record.socket, **pool_options(self._timeout)
        )
        wire = Wire(pool, timeout=self._timeout)
        try:
            return wire.call(*command)
        finally:
            wire.close()

    def _ask_to_end(self, record: ServerRecord) -> None:
        """In order, which includes writing its log to disk."""
        with contextlib.suppress(Unavailable):  # it closes the connection instead of answering, or does not listen yet
            self._call(record, "SHUTDOWN", "NOSAVE")
        if not Path(record.socket).exists():
            self._signal(record, signal.SIGTERM)

    def _signal(self, record: ServerRecord, number: int) -> None:
        """Send a signal to the process, if it is the server: a pid is used again, and is another's in a container."""
        if not record.pid or not _has_open(record.pid, self._folder / "alive"):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)

    def _record(self) -> ServerRecord | None:
        path = self._folder / "server.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=ServerRecord)
        except FileNotFoundError:
            return None
        except UNREADABLE as error:
            raise Corrupt(f"{path} cannot be read ({error}); if no server runs on that folder, remove it") from error

    def _write(self, record: ServerRecord) -> None:
        temporary = self._folder / "server.json.new"
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record)))
            file.flush()
            os.fsync(file.fileno())  # else a power loss may leave it empty
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
            try:
                self.path = self._server.ensure()
            except TrajstoreError as error:  # redis-py would put its own words in place of an OSError's
                raise redis.ConnectionError(str(error)) from error
            return super()._connect()  # type: ignore[no-any-return, no-untyped-call]


def _socket_path(home: Path) -> Path:
    """In a private folder, named by a hash of the real path: socket paths end at 107 bytes.

    And of the inode: a folder removed and made anew under a server that still runs must not be mistaken for the old.
    """
    status = home.stat()
    name = hashlib.sha256(f"{status.st_dev} {status.st_ino} ".encode() + os.fsencode(home)).hexdigest()[:24] + ".sock"
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if not base or not os.access(base, os.W_OK | os.X_OK):  # the variable outlives the login that made the folder
            continue
        folder = Path(base).resolve() / f"trajstore-{os.getuid()}"
        if len(os.fsencode(folder / name)) > _SOCKET_PATH_LIMIT:
            continue
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise Unavailable(f"{folder} must be a folder of yours with mode 0700, for the server's socket lies in it")
        return folder / name
    raise Unavailable(
        "there is no folder for the server's socket: set XDG_RUNTIME_DIR or TMPDIR to one that you may write to and "
        f"whose path is shorter than {_SOCKET_PATH_LIMIT - len(name) - 20} bytes"
    )


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; True where there is no telling."""
    if not os.path.isdir("/proc/self/fd"):
        return True
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(f"/proc/{pid}/fd/{descriptor}", path):
                    return True
    return False


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


_started: set[int] = set()  # servers that this process started, to be collected when they end


def _collect() -> None:
    for pid in list(_started):
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # a fork's child has not started it
            ended = pid
        if ended:
            _started.discard(pid)


def _reap(pid: int) -> None:
    """Wait for the rest of an ending server's life, if it is this process's child."""
    deadline = time.monotonic() + 10
    while pid in _started and time.monotonic() < deadline:
        _collect()
        time.sleep(_POLL / 10)
