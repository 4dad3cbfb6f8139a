"""`python -m tests.simulation --seed 4711` or `--seeds 0:1000`: run seeds, and say what they came to.

`--mutant NAME` breaks the library first, `--mutants` does so with each bug in turn, until a seed finds it.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections import Counter

from tests.simulation.mutants import MUTANTS, install


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="one seed, with its account and, if it fails, where")
    parser.add_argument("--seeds", default="0:200", help="FIRST:LAST, the last one left out")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="a bug made on purpose; stops at the first seed")
    parser.add_argument("--mutants", action="store_true", help="every such bug, each in a process of its own")
    options = parser.parse_args()
    if options.mutants:
        return run_mutants(options.seeds)
    if options.mutant:
        install(options.mutant)
    first, last = (options.seed, options.seed + 1) if options.seed is not None else map(int, options.seeds.split(":"))
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


def run_mutants(seeds: str) -> int:
    missed = []
    for name in MUTANTS:
        command = [sys.executable, "-m", "tests.simulation", "--mutant", name, "--seeds", seeds]
        result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        found = result.stdout.splitlines()[0] if result.returncode == 1 and result.stdout else ""
        say(f"{name}: {found[:160] or 'NOT FOUND ' + result.stderr[-300:]}")
        missed += [] if found else [name]
    say(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} found")
    return bool(missed)


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
