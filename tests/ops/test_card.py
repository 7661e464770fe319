"""The tests that a card is asked first are there, and few."""

import os
import subprocess
import sys
from pathlib import Path

import card

HERE = Path(__file__).parent


def test_the_table_names_tests_that_are_there() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "card"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    files = [str(HERE / name) for name in card.FILES]
    # Options of this very run would change the lines that are read.
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, *files], capture_output=True, text=True, timeout=300, env=environment
    )
    names = [line.rsplit("/", 1)[-1] for line in done.stdout.splitlines() if "::" in line]
    found = [card.chosen(*name.split("::")) for name in names]
    assert set(found) == set(card.TESTS), "tests/ops/card.py: expected a test for each entry"
    assert 100 <= len(names) <= 140, done.stdout[-300:]
    assert all(
        "cuda" in name or "card" in name or "graph" in name or "eager" in name for name in names
    )
