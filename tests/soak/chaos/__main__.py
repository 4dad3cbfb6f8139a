"""The chaos run: `python -m tests.soak.chaos --seed N --minutes M`; `--help` has what else may be chosen.

Rounds on fresh servers, over both acknowledgement levels, kinds of server and places of the archive, until the time is
over; then a table. A round that fails says how to run it again and what its processes were at, and leaves its files.
"""

import argparse
import itertools
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.servers import binary_of
from tests.simulation.mutants import MUTANTS
from tests.soak.chaos.round import Round, one_round
from tests.soak.chaos.servers import CLUSTERS, SINGLE

ACKS = ("fsync", "memory")
ARCHIVES = {"local": 1.0, "s3": 1 / 3}
"""Where the archive is, and how much of `--round` the faults last: the account reads everything, which the S3 server of
the tests is slow at."""
PACE = 1.2
SERVERS = (*SINGLE, *CLUSTERS)


def main() -> None:
    """Rounds until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next ones count on")
    parser.add_argument("--minutes", type=float, default=10.0, help="no further round is begun after")
    parser.add_argument("--round", type=float, default=90.0, help="seconds of faults in one round; a third with s3")
    parser.add_argument("--ack", choices=ACKS, help="only this level; default both in turn")
    parser.add_argument("--server", choices=SERVERS, help="only this one; default all in turn")
    parser.add_argument("--archive", choices=ARCHIVES, help="only this one; default both in turn, local on a cluster")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="a bug made on purpose, which a round should find")
    chosen = parser.parse_args()
    kinds = itertools.cycle(kinds_of(server=chosen.server, ack=chosen.ack, archive=chosen.archive))
    deadline = time.monotonic() + 60 * chosen.minutes
    done: dict[str, list[Round]] = {}
    for seed, (server, ack, archive) in zip(itertools.count(chosen.seed), kinds, strict=False):
        if time.monotonic() > deadline and done:
            break
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        try:
            one = one_round(
                folder,
                seed=seed,
                ack=ack,
                server=server,
                archive=archive,
                seconds=chosen.round * ARCHIVES[archive],
                pace=PACE,
                mutant=chosen.mutant,
            )
        except BaseException as error:
            again = f"python -m tests.soak.chaos --seed {seed} --minutes 0 --round {chosen.round:g}"
            again += f" --ack {ack} --server {server} --archive {archive}"
            again += "" if chosen.mutant is None else f" --mutant {shlex.quote(chosen.mutant)}"
            error.add_note(f"again: {again}   (its files: {folder})")
            raise
        done.setdefault(ack, []).append(one)
        _say(
            f"seed {seed} ({server}, {ack}, {archive}): {sum(one.happened.values())} faults, "
            f"{one.account.trajectories} trajectories, {one.account.lost} events lost; "
            f"faults, drain and account took {', '.join(f'{seconds:.0f}' for seconds in one.seconds)} s"
        )
        shutil.rmtree(folder)
    _say(table(done))


def kinds_of(*, server: str | None, ack: str | None, archive: str | None) -> list[tuple[str, str, str]]:
    """Server, level and archive of the rounds, in order: all that there are of what is left open; unless one kind
    is asked for, one round in three is on a cluster, with a local archive.
    """
    acks = [one for one in ACKS if ack in (None, one)]
    archives = [one for one in ARCHIVES if archive in (None, one)]
    if server in CLUSTERS:
        return list(itertools.product([server], acks, archives if archive else ["local"]))
    kinds = []
    clusters = itertools.cycle((*CLUSTERS, *reversed(CLUSTERS)))
    for (name, level), cluster in zip(itertools.product(SINGLE, acks), clusters, strict=False):
        if server in (None, name) and binary_of(name) is not None:
            kinds += [(name, level, one) for one in archives]
            kinds += [(cluster, level, archive or "local")] if server is None else []
    return kinds


def table(done: dict[str, Sequence[Round]] | dict[str, list[Round]]) -> str:
    """All rounds added up, a column for each level, in Markdown."""
    columns = {ack: _sums(rounds) for ack, rounds in done.items()}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[name, *(f"{column.get(name, 0):,}" for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _sums(rounds: Sequence[Round]) -> dict[str, int]:
    happened = Counter[str]()
    counts = Counter[str]()
    errors = Counter[str]()
    for one in rounds:
        happened.update(one.happened)
        account = msgspec.structs.asdict(one.account)
        errors.update(account.pop("errors"))
        counts.update(account)
    peaks = {kind: max(one.peaks[kind] for one in rounds) for kind in rounds[0].peaks}
    return (
        {"rounds": len(rounds), "seconds of faults": round(sum(one.seconds[0] for one in rounds))}
        | {name: happened[name] for name in sorted(happened)}
        | {"ranks fenced": sum(one.fenced for one in rounds)}
        | {name.replace("_", " "): count for name, count in counts.items()}
        | {f"errors told: {kind}": count for kind, count in sorted(errors.items())}
        | {f"peak memory, MiB: {kind}": peak for kind, peak in peaks.items()}
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
