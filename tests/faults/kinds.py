"""What is damaged: every kind of file or folder that the product reads.

To add a kind, write a module of this folder with a list `KINDS` of `harness.Kind(name, make,
consume, reseal)` and name it in `MODULES`. `make(folder)` writes a good one by the project's own
writers. `consume(folder)` reads it, passes it to its cheapest user, and asserts what must be true
of what was accepted (ids in range, values finite). It runs once on the good files before the first
fork, then on damaged ones in forked processes; one thread (torch.set_num_threads(1)), no pool.
`reseal(folder)` renews sizes and checksums after a damage, so that half of the damages are met
behind them.
"""

from __future__ import annotations

from importlib import import_module

from harness import Kind

MODULES = ("kinds_data", "kinds_tables", "kinds_models", "kinds_served", "kinds_runs")


def all_kinds() -> list[Kind]:
    """Return the kinds of every module."""
    return [kind for module in MODULES for kind in import_module(module).KINDS]
