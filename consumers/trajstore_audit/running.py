"""Who audits the units: this process, several of this machine, or the workers of a Dask cluster.

All take units as they come, keep a bounded number in flight, and give the parts in the order in which they are done.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from trajstore.errors import SchemaError, Unavailable
from trajstore.reading import Archive
from trajstore_audit.tally import Part, decode_part, encode_part
from trajstore_audit.unit import Unit, audit_unit, close_places, encode_unit, run_unit
from trajstore_audit.work import Work

__all__ = ["Progress", "run_here", "run_in_processes", "run_on_dask"]

_AHEAD = 2
"""Units in flight for each worker."""

_CONNECT = 10.0
"""Seconds that a Dask scheduler may take to answer."""

_LOOK = 5.0
"""Seconds between two looks whether a Dask cluster has workers, while nothing comes back from it."""

_WITHOUT_WORKERS = 60.0
"""Seconds that it may have none: a worker that died is started again in fewer."""

_SENT_AGAIN = 3
"""How often a unit whose part was lost with its worker is sent again."""

_CLOSING = 10.0
"""Seconds that a worker may take to close what it reads, once nobody waits for it."""


class Progress(NamedTuple):
    """How far an audit is.

    Attributes:
        trajectories: that were audited, or skipped.
        total: that are to be.
        reused: of `trajectories`, those whose part an earlier, killed audit had kept.
        bytes_read: of routing, uncompressed.
    """

    trajectories: int
    total: int
    reused: int
    bytes_read: int


def run_here(units: Iterator[Unit], work: Work | None, archive: Archive) -> Iterator[tuple[Part, bool]]:
    """Audit units one after the other; each part, and whether it was kept before."""
    for unit in units:
        kept = work.get(unit.key) if work is not None else None
        if kept is not None:
            yield kept, True
            continue
        part = audit_unit(archive, unit)
        if work is not None:
            work.put(unit.key, encode_part(part))
        yield part, False


def run_in_processes(units: Iterator[Unit], work: Work | None, *, workers: int) -> Iterator[tuple[Part, bool]]:
    """Audit units in so many processes, which are started anew, and end with this one; otherwise as `run_here`.

    Raises:
        Unavailable: one of them died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share locks and connections
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        try:
            yield from _in_flight(units, work, lambda data: pool.submit(run_unit, data), limit=_AHEAD * workers)
        except BrokenProcessPool as error:
            raise Unavailable(
                "a worker of the audit died (killed, or out of memory); with work= the audit goes on where it was"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """In a worker: end when the process that started it has, even one that was killed and could not say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    nowhere = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)

    def follow(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        # An embedded store's server ends with the last process that closes the store, not with one that just ends.
        # Counts without Python's lock, which a library that is closed may keep for ever; its stacks go nowhere.
        faulthandler.dump_traceback_later(1.5 * _CLOSING, exit=True, file=nowhere)
        closing = threading.Thread(target=close_places, daemon=True)
        closing.start()
        closing.join(_CLOSING)
        os._exit(1)

    threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()


class _Sent(NamedTuple):
    """A unit in flight, and how often it was sent before."""

    unit: Unit
    before: int = 0


def _in_flight(
    units: Iterator[Unit],
    work: Work | None,
    submit: Callable[[bytes], "Future[bytes]"],
    *,
    limit: int,
    has_workers: Callable[[], bool] | None = None,
    lost: tuple[type[Exception], ...] = (),
) -> Iterator[tuple[Part, bool]]:
    """Parts as they are done.

    Args:
        limit: how many are in flight.
        has_workers: asked now and then, where those who audit may vanish without a word.
        lost: errors that say no more than that the part was lost on its way: the unit is sent again, a few times.
    """
    running: dict[Future[bytes], _Sent] = {}
    for unit in units:
        kept = work.get(unit.key) if work is not None else None
        if kept is not None:
            yield kept, True
            continue
        while len(running) >= limit:
            yield from _done(running, work, submit, has_workers, lost)
        running[submit(encode_unit(unit))] = _Sent(unit)
    while running:
        yield from _done(running, work, submit, has_workers, lost)


def _done(
    running: dict["Future[bytes]", _Sent],
    work: Work | None,
    submit: Callable[[bytes], "Future[bytes]"],
    has_workers: Callable[[], bool] | None,
    lost: tuple[type[Exception], ...],
) -> Iterator[tuple[Part, bool]]:
    """Parts that are done; waits for one.

    Raises:
        Unavailable: nobody is there to audit them.
    """
    seen = time.monotonic()
    while not (done := wait(running, None if has_workers is None else _LOOK, FIRST_COMPLETED).done):
        if has_workers is None or has_workers():
            seen = time.monotonic()
        elif time.monotonic() - seen > _WITHOUT_WORKERS:
            raise Unavailable(
                f"the Dask cluster has had no workers for {_WITHOUT_WORKERS:g} s; start some, and the audit again: "
                "with work= it goes on where it was"
            )
    for future in done:
        sent = running.pop(future)
        try:
            data = future.result()
        except lost:
            if sent.before == _SENT_AGAIN:
                raise
            running[submit(encode_unit(sent.unit))] = _Sent(sent.unit, sent.before + 1)
            continue
        if work is not None:
            work.put(sent.unit.key, data)
        yield decode_part(data), False


def run_on_dask(units: Iterator[Unit], work: Work | None, *, scheduler: str) -> Iterator[tuple[Part, bool]]:
    """Audit units on the workers of a Dask cluster, which must have trajstore and reach the place.

    Args:
        scheduler: its address, e.g. "tcp://host:8786".

    Raises:
        SchemaError: `distributed` is not installed, or that is no address.
        Unavailable: the scheduler does not answer, has no workers for a minute, or loses those that audit a unit.
    """
    try:
        from distributed import Client, KilledWorker
        from distributed.comm.addressing import get_address_host_port
        from distributed.comm.core import CommClosedError
    except ImportError as error:
        raise SchemaError("a Dask scheduler needs the extra: pip install 'trajstore[dask]'") from error
    try:
        get_address_host_port(scheduler, strict=True)
    except ValueError as error:
        raise SchemaError(f"{scheduler!r} is no address of a Dask scheduler: give one like tcp://host:8786") from error
    try:
        client: Any = Client(scheduler, timeout=_CONNECT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"the Dask scheduler at {scheduler} does not answer: {error}") from error
    again = "with work= the audit goes on where it was"
    with client:
        threads = _threads(client, scheduler)
        if not threads:
            raise Unavailable(f"the Dask scheduler at {scheduler} has no workers")
        executor = client.get_executor(pure=False)
        try:
            yield from _in_flight(
                units,
                work,
                lambda data: executor.submit(run_unit, data),
                limit=_AHEAD * threads,
                has_workers=lambda: _threads(client, scheduler) > 0,
                # What the executor of distributed makes of a part whose worker died while it was fetched: it takes the
                # part for an error, and unpacks it (cfexecutor.py, `_cascade_future`).
                lost=(ValueError,),
            )
        except KilledWorker as error:
            raise Unavailable(
                f"workers of the Dask cluster at {scheduler} died again and again (killed, or out of memory): {error}; "
                f"{again}"
            ) from error
        except (CommClosedError, CancelledError) as error:
            raise Unavailable(f"the Dask scheduler at {scheduler} was lost; {again}") from error


def _threads(client: Any, scheduler: str) -> int:
    """How many threads all workers have.

    Raises:
        Unavailable: the scheduler does not answer.
    """
    try:
        return sum(client.nthreads(callback_timeout=_CONNECT).values())
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"the Dask scheduler at {scheduler} does not answer: {error}") from error
