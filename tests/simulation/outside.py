"""What the library takes from Python and the machine, in the scheduler's hands: clocks, chance, ids, threads, locks.

The library's modules name these things themselves (`time`, `threading`, `secrets`, `ULID`, ...). For the length of a
simulation those names lead here, in every module of the library, so that a new use of a clock is caught as well.
"""

import contextlib
import random
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from ulid import ULID

from tests.simulation.scheduler import Killed, Process, Scheduler

__all__ = ["Outside"]

EPOCH = 1_800_000_000.0
"""Unix seconds at the simulation's time 0."""


class Outside:
    """Stand-ins for one simulation."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._ids = 0
        self.time = SimpleNamespace(
            monotonic=lambda: scheduler.now,
            perf_counter=lambda: scheduler.now,
            time=self.wall,
            sleep=scheduler.sleep,
        )
        self.threading = SimpleNamespace(
            Lock=lambda: Lock(scheduler),
            RLock=lambda: Lock(scheduler, again=True),
            Condition=lambda lock=None: Condition(scheduler, lock or Lock(scheduler, again=True)),
            Event=lambda: Event(scheduler),
            Thread=lambda **about: Thread(scheduler, **about),
            get_ident=lambda: 1,
        )
        self.secrets = SimpleNamespace(randbits=rng.getrandbits)

    def wall(self) -> float:
        """The wall clock of the process whose turn it is."""
        task = self._scheduler.current
        return EPOCH + self._scheduler.now + (task.process.skew if task is not None else 0.0)

    def ulid(self) -> ULID:
        """The next id: by time, and no two alike."""
        self._ids += 1
        stamp = int(self.wall() * 1000).to_bytes(6, "big")
        return ULID(stamp + self._ids.to_bytes(10, "big"))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Every module of the library meets these stand-ins, for the length of the block."""
        replaced: list[tuple[Any, str, Any]] = []
        names: dict[str, Any] = {
            "time": self.time,
            "threading": self.threading,
            "secrets": self.secrets,
            "ULID": _Ulids(self.ulid),
            "ThreadPoolExecutor": AtOnce,
            "Future": lambda: Future(self._scheduler),
            "atexit": SimpleNamespace(register=_nothing, unregister=_nothing),
            "weakref": SimpleNamespace(
                ref=weakref.ref, WeakSet=InOrder, WeakValueDictionary=weakref.WeakValueDictionary
            ),
            "socket": SimpleNamespace(gethostname=lambda: "host", socket=socket.socket),
        }
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] not in ("trajstore", "trajstore_trainer") or module is None:
                continue
            if name == "trajstore.server":  # real processes and sockets are its business
                continue
            for attribute, stand_in in names.items():
                if attribute in module.__dict__ and not (attribute == "Future" and not name.endswith("log.lane")):
                    replaced.append((module, attribute, module.__dict__[attribute]))
                    setattr(module, attribute, stand_in)
        threads: Any = sys.modules["trajstore.archive.arrays.threads"]
        replaced.append((threads, "_threads", threads._threads))
        threads._threads = lambda _: AtOnce()
        feed: Any = sys.modules["trajstore.log.feed"]
        replaced.append((feed, "os", feed.os))
        feed.os = SimpleNamespace(getpid=lambda: 1)
        try:
            yield
        finally:
            for module, attribute, real in reversed(replaced):
                setattr(module, attribute, real)


class Lock:
    """`threading.Lock`, or with `again` `RLock`."""

    def __init__(self, scheduler: Scheduler, *, again: bool = False) -> None:
        self._scheduler = scheduler
        self._again = again
        self._holder: Any = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._scheduler.maybe_pause()
        me = self._scheduler.current or "outside"
        if self._holder is me and self._again:
            self._depth += 1
            return True
        if self._holder is not None:
            if not blocking:
                return False
            self._scheduler.wait(lambda: self._holder is None, None)
        self._holder, self._depth = me, 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._holder = None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """`threading.Condition` over a `Lock`."""

    def __init__(self, scheduler: Scheduler, lock: Lock) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._waiters: list[list[bool]] = []

    def wait(self, timeout: float | None = None) -> bool:
        told = [False]
        self._waiters.append(told)
        self._lock.release()
        self._scheduler.wait(lambda: told[0], timeout)
        if told in self._waiters:
            self._waiters.remove(told)
        self._lock.acquire()
        return told[0]

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        end = None if timeout is None else self._scheduler.now + timeout
        while not (result := predicate()):
            left = None if end is None else end - self._scheduler.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def notify(self) -> None:
        if self._waiters:
            self._waiters.pop(0)[0] = True

    def notify_all(self) -> None:
        while self._waiters:
            self.notify()


class Event:
    """`threading.Event`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._scheduler.wait(self.is_set, timeout)


class Thread:
    """`threading.Thread`: another task of the same process."""

    def __init__(self, scheduler: Scheduler, *, target: Callable[[], Any], name: str, daemon: bool) -> None:
        self._scheduler = scheduler
        self._target = target
        self.name = name
        self._task: Any = None

    def start(self) -> None:
        current = self._scheduler.current
        process = current.process if current is not None else Process("outside")
        self._task = self._scheduler.spawn(self.name, process, self._target)
        self._task.tardy = process.tardy

    def join(self, timeout: float | None = None) -> None:
        self._scheduler.wait(lambda: self._task.ended, timeout)

    def is_alive(self) -> bool:
        return not self._task.ended


class Future:
    """`concurrent.futures.Future`, as far as a waiter of the flusher uses it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._done = False

    def set_running_or_notify_cancel(self) -> bool:
        return True

    def set_result(self, result: None) -> None:
        self._done = True

    def result(self, timeout: float | None = None) -> None:
        if not self._done and not self._scheduler.wait(lambda: self._done, timeout):
            raise TimeoutError


class AtOnce:
    """An executor that has done its work when `submit` returns: what runs there computes, and waits for nobody."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        from concurrent.futures import Future as Real

        done: Any = Real()
        try:
            done.set_result(call(*arguments, **named))
        except Killed:
            raise
        except BaseException as error:  # noqa: BLE001 (whoever asks for the result is told)
            done.set_exception(error)
        return done

    def map(self, call: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        return map(call, *arguments)

    def shutdown(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class InOrder:
    """`weakref.WeakSet`, which goes through its members in the order in which they came."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[Any]] = []

    def add(self, member: Any) -> None:
        if member not in self:
            self._members.append(weakref.ref(member))

    def discard(self, member: Any) -> None:
        self._members = [one for one in self._members if one() is not member]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, member: Any) -> bool:
        return any(one() is member for one in self._members)

    def __iter__(self) -> Iterator[Any]:
        self._members = [one for one in self._members if one() is not None]
        return iter([member for one in self._members if (member := one()) is not None])


class _Ulids:
    """`ULID`, whose call gives the next id; the rest is ULID's own."""

    def __init__(self, fresh: Callable[[], ULID]) -> None:
        self._fresh = fresh

    def __call__(self) -> ULID:
        return self._fresh()

    def __getattr__(self, name: str) -> Any:
        return getattr(ULID, name)


def _nothing(*_: Any) -> None:
    pass
