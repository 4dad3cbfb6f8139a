"""An archiver or a materializer of a chaos run: `python -m tests.soak.chaos.worker WHAT URL LEASE DIE_AT`.

With DIE_AT above 0 it kills itself at that step of its publishes.
"""

import logging
import os
import signal
import sys
import threading

import trajstore
from tests.soak.chaos.clock import follow
from tests.soak.patience import once_there
from trajstore.archiver import Archiver
from trajstore.materializer import Materializer

TIMEOUT = 10.0


def main(what: str, url: str, lease: str, die_at: str) -> None:
    """Work until SIGTERM."""
    follow()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    seconds, left, is_idle = float(lease), int(die_at), True

    def step(name: str) -> None:
        nonlocal left, is_idle
        if name == "acknowledged" and is_idle:  # a hint of which nothing came: most are
            return
        is_idle = name == "acknowledged"
        left -= 1
        if left == 0:
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
