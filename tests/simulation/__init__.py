"""A whole run in one thread: writers, archivers, materializers and trainers over a modelled server and a modelled disk.

A seed decides everything: who goes on next, what gets lost on the way, who dies, when the server goes down and what it
has forgotten then. What must hold is checked while it runs, so a seed that fails does so at its first wrong step, and
does so again: `python -m tests.simulation --seed 4711`.
"""
