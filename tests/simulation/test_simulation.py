"""Seeds of the simulation, the same ones at each run of the suite, and bugs made on purpose that they find.

A seed that fails fails again by itself, step for step: `python -m tests.simulation --seed N`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutants import KNOWN, MUTANTS
from tests.simulation.tally import Tally, play, play_in_parts
from tests.simulation.world import Account, simulate

SEEDS = 200
TOGETHER = 20
PARTS = 4
LOOKED_AT = 30
"""Seeds that are tried for a mutant which the seed that is written down does not find."""

pytestmark = [pytest.mark.torch, pytest.mark.timeout(450)]

PAGE = (Path(__file__).parents[2] / "docs" / "guarantees.md").read_text()


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_every_invariant_holds_after_every_step(first):
    for seed in range(first, first + TOGETHER):
        run(seed)


def run(seed: int) -> Account:
    """One seed; a failure names the command that shows it again."""
    try:
        return simulate(seed)
    except Exception as error:
        error.add_note(f"\nagain: python -m tests.simulation --seed {seed}")
        raise


def test_seeds_come_to_the_same_in_several_processes(monkeypatch):
    monkeypatch.setattr("tests.simulation.tally._TOGETHER", 2)
    whole = Tally()
    for part in play_in_parts(range(5), workers=2):
        whole.add(part)
    assert whole == play(range(5))
    assert whole.done["steps"] > 5


def test_seed_that_fails_is_named_and_the_others_go_on(monkeypatch):
    def failing(seed):
        if seed == 1:
            raise ValueError("an invariant")
        return simulate(seed)

    monkeypatch.setattr("tests.simulation.world.simulate", failing)
    tally = play(range(3))
    assert (tally.played, tally.failed) == (3, {1: "ValueError: an invariant"})
    assert tally.done["steps"] == simulate(0).steps + simulate(2).steps


def test_seed_plays_the_same_story_in_every_process():
    """Whatever the hashes of strings, addresses in memory and the clock of the machine are."""
    seeds = [3, 11, 13, 47]
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


@pytest.mark.parametrize("part", range(PARTS))
def test_bugs_made_on_purpose_are_found(part):
    """Each by the seed that is written down in `mutants.py`, or by one of a few others.

    A change of the library gives every seed another story, and a rare one may then be found elsewhere only.
    """
    arguments = ["--mutants", "--known", "--part", f"{part}:{PARTS}", "--seeds", f"0:{LOOKED_AT}"]
    told = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments], capture_output=True, text=True, timeout=400
    )
    missed = [line for line in told.stdout.splitlines() if line.startswith("NOT FOUND")]
    assert told.returncode == 0, (
        f"{told.stderr}\n{chr(10).join(missed)}\n\n"
        "Where a change of the library moved it: `python -m tests.simulation --mutants --seeds 0:400` tells which seed "
        "finds it now; write that to KNOWN in tests/simulation/mutants.py, and to the table in docs/guarantees.md. "
        "Where no seed does, the simulation sees less than it did."
    )


def test_page_lists_every_bug_made_on_purpose_with_the_seed_that_is_known_to_find_it():
    rows = re.findall(r"^\| ([^|`]+) \| (\d+|none known) \|$", PAGE, re.MULTILINE)
    assert dict(rows) == {name: str(KNOWN.get(name, "none known")) for name in MUTANTS}
