"""Who audits the units: this process, several of this machine, or the workers of a Dask cluster.

All take units as they come, keep a bounded number in flight, and give the parts in the order in which they are done.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from trajstore.errors import SchemaError, Unavailable
from trajstore.reading import Archive
from trajstore_audit.tally import Part, decode_part, encode_part
from trajstore_audit.unit import Unit, audit_unit, encode_unit, run_unit
from trajstore_audit.work import Work

__all__ = ["Progress", "run_here", "run_in_processes", "run_on_dask"]

_AHEAD = 2
"""Units in flight for each worker."""

_CONNECT = 10.0
"""Seconds that a Dask scheduler may take to answer."""


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
    """Audit units in so many processes, which are started anew; otherwise as `run_here`.

    Raises:
        Unavailable: one of them died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share locks and connections
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from _in_flight(units, work, lambda data: pool.submit(run_unit, data), limit=_AHEAD * workers)
        except BrokenProcessPool as error:
            raise Unavailable(
                "a worker of the audit died (killed, or out of memory); with work= the audit goes on where it was"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_flight(
    units: Iterator[Unit], work: Work | None, submit: Callable[[bytes], "Future[bytes]"], *, limit: int
) -> Iterator[tuple[Part, bool]]:
    running: dict[Future[bytes], str] = {}
    for unit in units:
        kept = work.get(unit.key) if work is not None else None
        if kept is not None:
            yield kept, True
            continue
        while len(running) >= limit:
            yield from _done(running, work)
        running[submit(encode_unit(unit))] = unit.key
    while running:
        yield from _done(running, work)


def _done(running: dict["Future[bytes]", str], work: Work | None) -> Iterator[tuple[Part, bool]]:
    """Parts that are done; waits for one."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        data, key = future.result(), running.pop(future)
        if work is not None:
            work.put(key, data)
        yield decode_part(data), False


def run_on_dask(units: Iterator[Unit], work: Work | None, *, scheduler: str) -> Iterator[tuple[Part, bool]]:
    """Audit units on the workers of a Dask cluster, which must have trajstore and reach the place.

    Args:
        scheduler: its address, e.g. "tcp://host:8786".

    Raises:
        SchemaError: `distributed` is not installed, or that is no address.
        Unavailable: the scheduler does not answer, or has no workers.
    """
    try:
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
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
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise Unavailable(f"the Dask scheduler at {scheduler} has no workers")
        executor = client.get_executor(pure=False)
        yield from _in_flight(units, work, lambda data: executor.submit(run_unit, data), limit=_AHEAD * threads)
