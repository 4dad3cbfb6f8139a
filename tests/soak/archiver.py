"""An archiver of the crash loop, as a process: `python -m tests.soak.archiver URL LEASE DIE_AT OPTIONS`.

OPTIONS is JSON, of an object store. With DIE_AT above 0 it kills itself at that step of its publishes.
"""

import logging
import os
import signal
import sys

import msgspec

import trajstore
from tests.soak.patience import once_there
from trajstore.archiver import Archiver


def main(url: str, lease: str, die_at: str, options: str) -> None:
    """Archive until killed."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    left = int(die_at)

    def step(name: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    store = once_there(lambda: trajstore.open(url, archive_options=msgspec.json.decode(options), create=False))
    Archiver(
        store, pack_bytes=1 << 20, pack_seconds=0.1, lease_seconds=float(lease), grace_seconds=2.0, on_step=step
    ).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
