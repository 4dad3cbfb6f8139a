"""Which seed finds a mutant: each is looked for in a fork of a process that has imported everything but the library.

So a bug costs the import of the library and the seeds, and not the start of an interpreter with all that zarr brings.
"""

import importlib
import multiprocessing
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import NamedTuple

from tests.simulation.mutants import install

__all__ = ["Find", "hunt"]

_BESIDE = ("greenlet", "msgspec", "numpy", "redis", "torch.utils.data", "ulid", "zarr", "zarr.codecs")


class Find(NamedTuple):
    """A seed that failed, and how."""

    seed: int
    what: str


def hunt(name: str, seeds: Iterable[int], *, seconds: float) -> Find | None:
    """The first of these seeds that finds a mutant; None if none does.

    Raises:
        TimeoutError: not within so many seconds.
        RuntimeError: the library cannot be broken so, or not imported then.
    """
    for module in _BESIDE:
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_look, args=(name, list(seeds), theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise TimeoutError(f"{name}: nothing came of it within {seconds:.0f} s")
        found: Find | None = ours.recv()
    except EOFError:
        raise RuntimeError(f"{name}: the process that was to look for it ended before it had, see above") from None
    finally:
        process.kill()
        process.join()
    return found


def _look(name: str, seeds: Iterable[int], tell: Connection) -> None:
    install(name)
    from tests.simulation.world import simulate

    for seed in seeds:
        try:
            simulate(seed)
        except Exception as error:  # noqa: BLE001 (whatever it is, the seed has found it)
            tell.send(Find(seed, " ".join(f"{type(error).__name__}: {error}".split())))
            return
    tell.send(None)
