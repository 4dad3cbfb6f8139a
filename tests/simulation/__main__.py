"""`python -m tests.simulation --seed 4711` or `--seeds 0:1000`: run seeds, and say what they came to.

`--mutant NAME` breaks the library first, `--mutants` does so with each bug in turn, until a seed finds it; with
`--known` it begins with the seed that is written down in `mutants.py`, and leaves out those of which none is.
"""

import argparse
import os
import sys
import time

from tests.simulation.hunt import hunt
from tests.simulation.mutants import KNOWN, MUTANTS, install
from tests.simulation.tally import DONE, Tally, play, play_in_parts

_TOLD = 1000
"""Seeds from one line about them to the next."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="one seed, with its account and, if it fails, where")
    parser.add_argument("--seeds", default="0:200", help="FIRST:LAST, the last one left out")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="a bug made on purpose; stops at the first seed")
    parser.add_argument("--mutants", action="store_true", help="every such bug, each in a process of its own")
    parser.add_argument("--known", action="store_true", help="with --mutants: the seed that is known to find it first")
    parser.add_argument("--part", default="0:1", help="with --mutants: WHICH:OF, every so many-th of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="with --seeds: processes")
    options = parser.parse_args()
    first, last = (options.seed, options.seed + 1) if options.seed is not None else map(int, options.seeds.split(":"))
    if options.mutants:
        which, of = map(int, options.part.split(":"))
        names = [name for name in MUTANTS if name in KNOWN or not options.known]
        return run_mutants(names[which::of], range(first, last), known=options.known)
    if options.mutant:
        install(options.mutant)
    if options.mutant or options.seed is not None:
        return run_here(range(first, last), show=options.seed is not None, stop=bool(options.mutant))
    return run_seeds(range(first, last), workers=options.workers)


def run_seeds(seeds: range, *, workers: int) -> int:
    """Play seeds in several processes and say what they came to; 1 if one failed."""
    begun = time.perf_counter()
    tally = Tally()
    for part in play_in_parts(seeds, workers=workers):
        for seed, what in part.failed.items():
            say(f"seed {seed}: {what}")
        told = tally.played // _TOLD
        tally.add(part)
        if tally.played // _TOLD > told:
            say(f"{tally.played} of {len(seeds)} seeds, {len(tally.failed)} failed")
    return tell(tally, time.perf_counter() - begun)


def run_here(seeds: range, *, show: bool, stop: bool) -> int:
    """Play seeds in this process, with the library as it was made; 1 if one failed."""
    begun = time.perf_counter()
    tally = play(seeds, show=say if show else None, stop=stop)
    for seed, what in tally.failed.items():
        say(f"seed {seed}: {what}")
    return tell(tally, time.perf_counter() - begun)


def tell(tally: Tally, seconds: float) -> int:
    """Say what seeds came to; 1 if one failed."""
    say(f"{tally.played} seeds in {seconds:.0f} s; failed: {sorted(tally.failed) or 'none'}")
    say(", ".join(f"{tally.done[name]} {name}" for name in DONE))
    say(", ".join(f"{name}: {count}" for name, count in sorted(tally.happened.items())))
    return bool(tally.failed)


def run_mutants(names: list[str], seeds: range, *, known: bool) -> int:
    """What finds each, one line for each: its name, the seed and the failure; 1 if one was not found."""
    missed = 0
    for name in names:
        before = [KNOWN[name]] if known else []
        try:
            found = hunt(name, [*before, *seeds], seconds=600.0)
        except (TimeoutError, RuntimeError) as error:
            say(f"NOT FOUND: {error}")
            missed += 1
            continue
        if found is None:
            say(f"NOT FOUND: {name}: by seeds {seeds.start}:{seeds.stop}{f' and {KNOWN[name]}' if known else ''}")
            missed += 1
        else:
            moved = f" (not {KNOWN[name]})" if known and found.seed != KNOWN[name] else ""
            say(f"{name}: seed {found.seed}{moved}: {found.what[:160]}")
    say(f"{len(names) - missed} of {len(names)} found")
    return bool(missed)


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
