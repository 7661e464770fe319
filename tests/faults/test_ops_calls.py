"""Spoiled calls of the ops from fixed seeds, in processes of their own: none crashes, none writes
where it must not, and each refusal is a sentence. More seeds: `python tests/faults/ops_calls.py
public --count 6600`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xmlkernels import ops

SCRIPT = Path(__file__).with_name("ops_calls.py")
native = pytest.mark.skipif(
    ops.missing is not None, reason=f"CPU kernels are not loaded: {ops.missing}"
)


def calls(kind: str, first: int, count: int, folder: Path, **variables: str) -> dict[str, Any]:
    seed = folder / "seed"
    env = {k: v for k, v in os.environ.items() if k != "XMLKERNELS_REQUIRE_NATIVE"} | variables
    env["PYTHONPATH"] = str(SCRIPT.parents[2])
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            SCRIPT,
            kind,
            "--first",
            str(first),
            "--count",
            str(count),
            "--progress",
            seed,
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    where = seed.read_text().strip() if seed.exists() else "none"
    assert done.returncode == 0, (
        f"{kind}: the process ended with {done.returncode} at seed {where}\n{done.stderr[-3000:]}"
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "kind, count, variables",
    [
        pytest.param("public", 300, {}, id="public"),
        pytest.param("direct", 300, {}, id="direct", marks=native),
        pytest.param("direct", 160, {"XMLKERNELS_NATIVE": "0"}, id="reference"),
    ],
)
def test_spoiled_calls_end_well(
    kind: str, count: int, variables: dict[str, str], tmp_path: Path
) -> None:
    found = calls(kind, 0, count, tmp_path, **variables)
    assert found["faults"] == []
    assert found["native"] == (ops.missing is None and not variables)
    assert found["refused"] + found["succeeded"] == count
    # Both ends are met, by every op.
    assert found["refused"] > count / 3 and found["succeeded"] > count / 10
    assert all(ends["refused"] > 0 and ends["succeeded"] > 0 for ends in found["ops"].values()), (
        found["ops"]
    )
