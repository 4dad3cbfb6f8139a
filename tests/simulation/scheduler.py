"""Who goes on next, and when: tasks that take turns in one thread, processes that can be killed, and time that is made.

A task is a greenlet. It gives way wherever a real thread could be interrupted for longer: at every command to the
server, every file of the archive, every lock and every wait. The seeded scheduler says who is next.
"""

import random
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

__all__ = ["Killed", "Process", "Scheduler", "Stuck", "Task"]


class Killed(BaseException):
    """The process of the task that meets this was killed; nothing that it still does has an effect."""


class Stuck(AssertionError):
    """Something never came to its end."""


class Process:
    """What dies together: the tasks of one operating system process.

    Attributes:
        skew: how far its wall clock is off, in seconds.
        tardy: share of the server's replies that reach its threads, but the first, only when that one has gone on.
        stalled_until: it stands still until then, like one that is swapped out or stopped.
        steps: turns that its tasks have had.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.skew = 0.0
        self.tardy = 0.0
        self.stalled_until = 0.0
        self.steps = 0

    def __repr__(self) -> str:
        return self.name


class Task:
    """One thread of a process.

    Attributes:
        tardy: share of the server's replies that reach it only after a while.
    """

    def __init__(self, name: str, process: Process, run: Callable[[], Any], hub: greenlet) -> None:
        self.name = name
        self.process = process
        self.tardy = 0.0
        self.error: BaseException | None = None
        self.ready: Callable[[], bool] | None = None
        self.deadline: float | None = None
        self._run = run
        self.greenlet = greenlet(self._begin, parent=hub)

    @property
    def ended(self) -> bool:
        return self.greenlet.dead

    def _begin(self) -> None:
        try:
            self._run()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 (the scheduler raises it)
            self.error = error


class Scheduler:
    """Runs tasks in turn until all that matters is done.

    Attributes:
        now: seconds since the simulation began.
        steps: turns given so far.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 1000.0
        self.steps = 0
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.hub = getcurrent()
        self.preempt = 0.1
        self._killed = False

    def spawn(self, name: str, process: Process, run: Callable[[], Any]) -> Task:
        """A new task, which begins when its turn comes."""
        task = Task(name, process, run, self.hub)
        self.tasks.append(task)
        return task

    def kill(self, process: Process) -> None:
        """End a process as `kill -9` would: its tasks go no further, and nothing is put in order."""
        process.dead = self._killed = True

    def _bury(self) -> None:
        self._killed = False
        for task in [one for one in self.tasks if one.process.dead]:
            self.tasks.remove(task)
            if task.greenlet:  # begun and not ended: unwind it, which has no effect any more
                task.greenlet.throw(Killed)

    def run(self, until: Callable[[], bool], *, deadline: float, after_step: Callable[[], None]) -> None:
        """Give turns until a condition holds.

        Raises:
            Stuck: it did not hold by the deadline, or nobody can go on.
            BaseException: what a task raised.
        """
        while not until():
            if self.now > deadline:
                raise Stuck(f"not done at {self.now:.1f} s: {self._waiting()}")
            able = self._able()
            if not able:
                times = [task.deadline for task in self.tasks if task.deadline is not None]
                times = [time for time in times if time > self.now]
                times += [task.process.stalled_until for task in self.tasks if task.process.stalled_until > self.now]
                if not times:
                    raise Stuck(f"nobody can go on: {self._waiting()}")
                self.now = max(self.now, min(times))
                continue
            task = self.rng.choice(able)
            self.steps += 1
            task.process.steps += 1
            self.now += self.rng.random() * 0.002
            task.ready = task.deadline = None
            self.current = task
            task.greenlet.switch()
            self.current = None
            if self._killed:
                self._bury()
            if task.ended and task in self.tasks:
                self.tasks.remove(task)
            if task.error is not None:
                raise task.error
            after_step()

    def pause(self) -> None:
        """Let others have a turn."""
        self._away(None, None)

    def maybe_pause(self) -> None:
        """Let others have a turn now and then: where a thread is interrupted, but seldom."""
        if self.current is not None and self.rng.random() < self.preempt:
            self._away(None, None)
        self.check()

    def wait(self, ready: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until something is so, at most for some time; whether it is."""
        self._away(ready, None if seconds is None else self.now + max(0.0, seconds))
        return ready()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._away(lambda: False, self.now + max(0.0, seconds))

    def check(self) -> None:
        """Nothing that a killed process does has an effect."""
        if self.current is not None and self.current.process.dead:
            raise Killed
        if self.current is None and getcurrent() is not self.hub:  # it is being unwound
            raise Killed

    def _away(self, ready: Callable[[], bool] | None, deadline: float | None) -> None:
        task = self.current
        if task is None:
            if getcurrent() is not self.hub:
                raise Killed
            return  # before the first turn and after the last, nobody else is there
        if ready is None and deadline is None:
            ready = _always
        task.ready, task.deadline = ready, deadline
        self.hub.switch()
        self.check()

    def _able(self) -> list[Task]:
        now, able = self.now, []
        for task in self.tasks:
            if task.process.stalled_until > now:
                continue
            ready, deadline = task.ready, task.deadline
            is_new = ready is None and deadline is None
            if is_new or (deadline is not None and deadline <= now) or (ready is not None and ready()):
                able.append(task)
        return able

    def _waiting(self) -> str:
        return ", ".join(f"{task.process}/{task.name}" for task in self.tasks)


def _always() -> bool:
    return True
