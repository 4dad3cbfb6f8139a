"""How long a trajectory has stood still: by the server's clock if somebody noted it, or by its writer's."""

import time
from collections.abc import Mapping
from typing import NamedTuple

from trajstore.store import Store
from trajstore.summary import Summary

__all__ = ["Ages", "told"]


class Ages(NamedTuple):
    """Of the trajectories of one partition.

    A sweep of an archiver notes when it first saw a segment stand where it stands (see `trajstore.abandon`); what it
    has not noted is as old as the writer's clock says.

    Attributes:
        now: Unix seconds, by the server's clock; of an archive alone, by this machine's.
        noted: by id, the last event and since when it is that, by the server's clock.
    """

    now: float
    noted: Mapping[str, tuple[str, float]]

    @classmethod
    def of_run(cls, run: Store, partition: int) -> "Ages":
        """Of a partition of a run, now."""
        time_now, flat = run.wire.call_all([("TIME",), ("HGETALL", run.keys.quiet(partition))])
        noted: dict[str, tuple[str, float]] = {}
        for id, text in zip(flat[::2], flat[1::2], strict=True):
            last, _, since = text.decode().partition(" ")
            noted[id.decode()] = (last, float(since))
        return cls(int(time_now[0]) + int(time_now[1]) / 1e6, noted)

    @classmethod
    def of_archive(cls) -> "Ages":
        """Of an archive without its server."""
        return cls(time.time(), {})

    def of(self, summary: Summary) -> float:
        """Seconds since the newest event."""
        last, since = self.noted.get(summary.id, ("", 0.0))
        by_server = self.now - since if last == summary.last else 0.0
        return max(0.0, by_server, self.now - summary.updated)


def told(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3 h, 2 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
