"""`python -m tests.simulation --seed 4711` or `--seeds 0:1000`: run seeds, and say what they came to.

`--mutant NAME` breaks the library first, `--mutants` does so with each bug in turn, until a seed finds it; with
`--known` it begins with the seed that is written down in `mutants.py`, and leaves out those of which none is.
"""

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.simulation.hunt import hunt
from tests.simulation.mutants import KNOWN, MUTANTS, install


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
    options = parser.parse_args()
    first, last = (options.seed, options.seed + 1) if options.seed is not None else map(int, options.seeds.split(":"))
    if options.mutants:
        which, of = map(int, options.part.split(":"))
        names = [name for name in MUTANTS if name in KNOWN or not options.known]
        return run_mutants(names[which::of], range(first, last), known=options.known)
    if options.mutant:
        install(options.mutant)
    return run_seeds(range(first, last), verbose=options.seed is not None, stop=bool(options.mutant))


def run_seeds(seeds: range, *, verbose: bool, stop: bool) -> int:
    from tests.simulation.world import simulate  # after the library was broken, if it was to be

    failed: list[int] = []
    totals: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    begun = time.perf_counter()
    for seed in seeds:
        try:
            account = simulate(seed)
        except Exception as error:  # noqa: BLE001 (whatever it is, the seed has found it)
            failed.append(seed)
            say(f"seed {seed}: {type(error).__name__}: {error}")
            if verbose:
                traceback.print_exc()
            if stop:
                break
            continue
        for name in ("steps", "events", "acknowledged", "forgotten", "archived", "published", "checked"):
            totals[name] += getattr(account, name)
        happened.update(account.happened)
        if verbose:
            say(account)
    say(f"{len(seeds)} seeds in {time.perf_counter() - begun:.0f} s; failed: {failed or 'none'}")
    say(", ".join(f"{count} {name}" for name, count in totals.items()))
    say(", ".join(f"{name}: {count}" for name, count in sorted(happened.items())))
    return bool(failed)


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
