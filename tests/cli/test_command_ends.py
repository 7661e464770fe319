"""Commands in processes of their own: stopped, with a file in their way, or with a full disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = [
    *(f"a run stopped by {name}" for name in ("SIGINT", "SIGTERM", "SIGHUP")),
    "a second signal",
    "nohup",
    "a run stopped while it opens its model",
    "a run stopped in its validation",
    "a run stopped when it has finished",
    "a run whose disk is full",
    *(
        f"{name}: a file in the way, a full disk, links"
        for name in ("tree", "ranker", "ensemble", "neighbours", "export", "predict", "prepare")
    ),
    *(
        f"{name}: stopped while it tells of its work"
        for name in ("train", "linear", "ranker", "ensemble", "neighbours", "prepare")
    ),
    "prepare stopped",
    "tree stopped",
]


def run_script(name: str, *words: str | Path, seconds: int = 1000) -> list[dict[str, Any]]:
    """Run a script of tests/ with the paths of this process; return its lines of JSON."""
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    # Threads do not survive a fork.
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(here / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[object, object]:
    return {
        line["case"]: line["wrong"]
        for line in run_script("command_ends.py", tmp_path_factory.mktemp("ends"))
    }


@pytest.mark.parametrize("case", CASES)
def test_a_command_ends_in_order(case: str, wrong: dict[object, object]) -> None:
    assert wrong[case] == "", wrong[case]


def test_every_case_is_named(wrong: dict[object, object]) -> None:
    assert sorted(map(str, wrong)) == sorted(CASES)
