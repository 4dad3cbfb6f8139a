"""A process that writes as fast as it can, and reports what was acknowledged: `ID TOKENS` for each flush.

Token *p* of a trajectory is `p % 1000`, so that whoever reads it back sees what is missing or doubled.
"""

import itertools
import sys

import numpy as np

import trajstore
from tests.builders import SPEC, rows

CHUNK = 500


def main(url: str, name: str, rounds: str) -> None:
    """Write to four trajectories in turn, a segment for each flush, `rounds` times (0: for ever)."""
    with trajstore.open(url, partitions=2) as store:
        trajectories = [store.create(id=f"{name}-{i}", routing=SPEC) for i in range(4)]
        for turn in range(int(rounds)) if int(rounds) else itertools.count():
            trajectory = trajectories[turn % len(trajectories)]
            start = len(trajectory)
            with trajectory.segment(weight_version=f"v{turn}") as segment:
                segment.tokens(np.arange(start, start + CHUNK) % 1000, np.full(CHUNK, -0.5))
                segment.routing(rows(CHUNK, seed=turn % 50), start=start)
                segment.close("abort")
            store.flush(trajectory.id)
            sys.stdout.write(f"{trajectory.id} {len(trajectory)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
