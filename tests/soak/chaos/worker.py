"""An archiver or a materializer of a chaos run: `python -m tests.soak.chaos.worker WHAT URL LEASE DIE_AT`.

With DIE_AT, such as `moved:3`, it kills itself at that step of its third publish.
"""

import logging
import os
import signal
import sys
import threading

import trajstore
from tests.soak.chaos.clock import follow
from tests.soak.chaos.stacks import tell_when_asked
from tests.soak.patience import once_there
from trajstore.archiver import Archiver
from trajstore.materializer import Materializer

__all__ = ["STEPS"]

STEPS = {
    "archiver": ("staged", "synced", "moved", "recorded", "trimmed"),
    "materializer": ("folded", "laid", "offered", "acknowledged"),
}
"""Of a publish, in order."""

TIMEOUT = 10.0


def main(what: str, url: str, lease: str, die_at: str) -> None:
    """Work until SIGTERM."""
    follow()
    tell_when_asked()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    seconds, begun = float(lease), 0
    last_step, _, publishes = die_at.partition(":")

    def step(name: str) -> None:
        nonlocal begun
        begun += name == STEPS[what][0]
        if name == last_step and begun >= int(publishes):
            os.kill(os.getpid(), signal.SIGKILL)

    with once_there(lambda: trajstore.open(url, create=False, timeout=TIMEOUT)) as store:
        if what == "archiver":
            Archiver(
                store, pack_bytes=1 << 20, pack_seconds=0.5, lease_seconds=seconds, grace_seconds=2.0, on_step=step
            ).run(stop=stop)
        else:
            Materializer(store, claim_seconds=seconds, on_step=step).run(stop=stop)


if __name__ == "__main__":
    main(*sys.argv[1:])
