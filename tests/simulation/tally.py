"""Seeds played one after the other, in this process or in several, and what they came to."""

import multiprocessing
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import msgspec

__all__ = ["DONE", "Tally", "play", "play_in_parts"]

DONE = ("steps", "events", "acknowledged", "forgotten", "archived", "published", "checked")
"""What is added up of the accounts."""

_TOGETHER = 20
"""Seeds that a process plays before it says what they came to."""


class Tally(msgspec.Struct):
    """What seeds came to.

    Attributes:
        played: how many.
        failed: those that failed, and why.
        done, happened: added up over the others.
    """

    played: int = 0
    failed: dict[int, str] = msgspec.field(default_factory=dict)
    done: Counter[str] = msgspec.field(default_factory=Counter)
    happened: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Take in what others came to."""
        self.played += other.played
        self.failed |= other.failed
        self.done.update(other.done)
        self.happened.update(other.happened)


def play(seeds: range, *, show: Callable[[object], object] | None = None, stop: bool = False) -> Tally:
    """Play seeds one after the other.

    Args:
        show: hears each one's account, or where it failed.
        stop: at the first that fails.
    """
    from tests.simulation.world import simulate  # after the library was broken, if it was to be

    tally = Tally()
    for seed in seeds:
        tally.played += 1
        try:
            account = simulate(seed)
        except Exception as error:  # noqa: BLE001 (whatever it is, the seed has found it)
            tally.failed[seed] = f"{type(error).__name__}: {error}"
            if show is not None:
                show(traceback.format_exc())
            if stop:
                break
            continue
        tally.done.update({name: getattr(account, name) for name in DONE})
        tally.happened.update(account.happened)
        if show is not None:
            show(account)
    return tally


def play_in_parts(seeds: range, *, workers: int) -> Iterator[Tally]:
    """Play seeds in several processes; what each few came to, as soon as it is known."""
    parts = [seeds[first : first + _TOGETHER] for first in range(0, len(seeds), _TOGETHER)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for part in as_completed([pool.submit(play, part) for part in parts]):
            yield part.result()
