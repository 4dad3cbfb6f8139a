"""Seeds of the simulation: a few hundred at each run of the suite, the same ones each time.

A seed that fails fails again by itself, step for step: `python -m tests.simulation --seed N`.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.world import Account, simulate

SEEDS = 200
TOGETHER = 20

FOUND = {
    55: "a tombstone expired with the keys of the trajectory that it deleted",
    213: "a writer to a trajectory that was deleted and removed was told of a loss that was none",
    389: "a lost turn was sent again above what another had written anew in the place of the turn before it",
    101: "a loss above which another had gone on was told to nobody, if the handle wrote no more",
    241: "a trainer looked behind what the server knew, after a loss, that it had given out",
    253: "a writer that stood still while the server crashed had dropped by the clock what it kept against that",
    47: "hints that a request took after the archiver had given it up were archived only by the next archiver",
    119: "hints of a refused trajectory stayed unacknowledged when it could be archived again",
}
"""Seeds that found a bug when they were first run, and which; each bug has a test of its own beside the code it was in.
(Seeds play other stories once the library or the simulation has changed, so they are not that test.)"""


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_every_invariant_holds_after_every_step(first):
    for seed in [*range(first, first + TOGETHER), *(list(FOUND) if first == 0 else ())]:
        run(seed)


def run(seed: int) -> Account:
    """One seed; a failure names the command that shows it again."""
    try:
        return simulate(seed)
    except Exception as error:
        error.add_note(f"\nagain: python -m tests.simulation --seed {seed}")
        raise


def test_seed_plays_the_same_story_in_every_process():
    """Whatever the hashes of strings, addresses in memory and the clock of the machine are."""
    seeds = [3, 11, 47]
    here = [simulate(seed).digest for seed in seeds]
    for hashing in ("1", "2"):
        code = f"from tests.simulation.world import simulate; print([simulate(seed).digest for seed in {seeds}])"
        told = subprocess.run(
            [sys.executable, "-c", code.replace("print(", "import json; print(json.dumps(") + ")"],
            env=os.environ | {"PYTHONHASHSEED": hashing},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert json.loads(told.stdout) == here


@pytest.mark.parametrize("name", ["writes above a gap", "acknowledged before it is recorded", "published twice"])
def test_bug_made_on_purpose_is_found(name):
    """What the simulation watches can fail; `--mutants` tries all of them."""
    assert name in MUTANTS
    told = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--mutant", name, "--seeds", "0:200"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert told.returncode == 1, told.stdout
    assert told.stdout.startswith("seed "), told.stderr
