"""The soak of the archive: `python -m tests.soak.archive --kills N --seed S --minutes M [--s3]`.

Rounds of the crash loop, each on a fresh server and archive, over the kinds of server, of its fsync and of archive. A
round that fails says how to run it again, and leaves its files.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.s3 import S3Server
from tests.servers import binary_of, running
from tests.soak.check import Account, drain_and_check
from tests.soak.crash_loop import Kills, crash_loop

__all__ = ["one_round"]

ROUND = 20
SERVERS = ("redis", "valkey")
FSYNCS = ("always", "everysec")


def one_round(
    folder: Path,
    *,
    seed: int,
    kills: int,
    server: str,
    appendfsync: str,
    s3: S3Server | None,
    deadline: float = float("inf"),
) -> tuple[Kills, Account]:
    """One crash loop and its check.

    Raises:
        AssertionError: a claim does not hold; the message ends with the command that runs the round again.
    """
    archive = s3.url(f"soak-{seed}-{time.time_ns()}") if s3 is not None else str(folder / "archive")
    options = s3.options if s3 is not None else {}
    again = f"python -m tests.soak.archive --seed {seed} --kills {kills} --server {server} --appendfsync {appendfsync}"
    again += " --s3" if s3 is not None else ""
    with running(server, folder / "server", appendfsync=appendfsync, **{"auto-aof-rewrite-percentage": "0"}) as real:
        try:
            done = crash_loop(folder, real, seed=seed, kills=kills, archive=archive, options=options, deadline=deadline)
            return done, drain_and_check(done.ledgers, real, seed=seed, archive=archive, options=options)
        except BaseException as error:
            error.add_note(f"again: {again}   (its files: {folder})")
            raise


def main() -> None:
    """Rounds until there were enough kills, or the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.archive", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="in all")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next ones count on")
    parser.add_argument("--minutes", type=float, default=30.0, help="no further round is begun after")
    parser.add_argument("--s3", action="store_true", help="archive to a server of the S3 protocol")
    parser.add_argument("--server", choices=SERVERS, help="only this one; default both in turn")
    parser.add_argument("--appendfsync", choices=FSYNCS, help="only this; default both in turn")
    chosen = parser.parse_args()
    names = [name for name in SERVERS if chosen.server in (None, name) and binary_of(name) is not None]
    fsyncs = [fsync for fsync in FSYNCS if chosen.appendfsync in (None, fsync)]
    kinds = itertools.cycle(itertools.product(names, fsyncs))
    deadline = time.monotonic() + 60 * chosen.minutes
    left = chosen.kills
    with _object_store(wanted=chosen.s3) as s3:
        for seed in itertools.count(chosen.seed):
            if left <= 0 or time.monotonic() > deadline:
                return
            server, appendfsync = next(kinds)
            folder = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
            done, account = one_round(
                folder,
                seed=seed,
                kills=min(left, ROUND),
                server=server,
                appendfsync=appendfsync,
                s3=s3,
                deadline=deadline,
            )
            left -= done.total
            _tell(seed, f"{server} {appendfsync} {'s3' if s3 else 'local'}", done, account)
            shutil.rmtree(folder)


@contextmanager
def _object_store(*, wanted: bool) -> Iterator[S3Server | None]:
    if not wanted:
        yield None
        return
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()


def _tell(seed: int, kind: str, done: Kills, account: Account) -> None:
    counts = {name: value for name, value in msgspec.structs.asdict(done).items() if name != "ledgers"}
    told = ", ".join(f"{value} {name}" for name, value in (counts | msgspec.structs.asdict(account)).items() if value)
    sys.stdout.write(f"seed {seed} ({kind}): {done.total} kills: {told}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
