"""A process of a chaos run with a bug made on purpose: `python -m tests.soak.chaos.broken MUTANT MODULE ARGUMENTS...`.

It is `python -m MODULE ARGUMENTS...` with one of the simulation's mutants in the library, to show what the run finds.
"""

import runpy
import sys

from tests.simulation.mutants import install

if __name__ == "__main__":
    mutant, module = sys.argv[1:3]
    install(mutant)
    del sys.argv[1:3]  # `runpy` puts the module's own path in place of the first
    runpy.run_module(module, run_name="__main__", alter_sys=True)
