"""What an archive promises is held against what may be before memory is given to it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.bombs import BOMBS, MIB

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_array_that_promises_gigabytes_is_corrupt_and_takes_no_memory(tmp_path):
    command = [sys.executable, "-m", "tests.security.bombs", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    outcomes = json.loads(found.stdout)
    assert {name: what for name, (what, _) in outcomes.items()} == dict.fromkeys(BOMBS, "Corrupt")
    assert {name: grown for name, (_, grown) in outcomes.items() if grown > 64 * MIB} == {}
