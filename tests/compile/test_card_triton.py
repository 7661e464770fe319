"""The kernels compile with the Triton of the cards' machines, which is not the one that CI pins.

`make test` installs it into a folder of its own; the tests of the main kernels for sm_90a run with
it in a process of their own: spills, shared memory, tensor cores, instructions per weight.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compile
ROOT = Path(__file__).resolve().parents[2]
VERSION = "3.6.0"  # goes with torch 2.11, the oldest that is served
FILES = ("test_bce.py", "test_matmul_topk.py", "test_cluster_step.py", "test_budgets.py")
# One format of each kernel, what comes nearest to spilling, and the instructions per weight.
CHOICE = "sm_90a and (bf16 or bfloat16 or e4m3) and not kahan and not level0 or sm_80 and fp32-adam"
CHOICE += " or per_weight and not momentum or sm_89 and (update_rows or add_dx)"
CHOICE += " or sm_89 and e4m3-row-adam-level0"


def card_triton() -> Path:
    """Its folder; without it skipped, or failed with XMLKERNELS_REQUIRE_CARD_TRITON=1."""
    told = os.environ.get("XMLKERNELS_CARD_TRITON", f".venv/triton-{VERSION}")
    folder = ROOT / told
    if (folder / "triton").is_dir():
        return folder
    missing = f"no Triton {VERSION} in {folder}: `make test` installs it there"
    if os.environ.get("XMLKERNELS_REQUIRE_CARD_TRITON") == "1":
        pytest.fail(f"XMLKERNELS_REQUIRE_CARD_TRITON=1, but {missing}")
    pytest.skip(missing)


def test_the_cards_triton_compiles_the_kernels() -> None:
    path = os.pathsep.join([str(card_triton()), str(ROOT), os.environ.get("PYTHONPATH", "")])
    python = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    environment = os.environ | {"PYTHONPATH": path}
    given: dict[str, Any] = {"capture_output": True, "text": True, "env": environment}
    found = subprocess.run(python, check=True, timeout=300, **given)
    assert found.stdout.strip() == VERSION
    files = [str(ROOT / "tests" / "compile" / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", CHOICE, *files]
    done = subprocess.run(command, cwd=ROOT, timeout=600, **given)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout[-5000:]


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_it_the_test_skips_and_says_so(
    required: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMLKERNELS_CARD_TRITON", "no such folder")
    monkeypatch.setenv("XMLKERNELS_REQUIRE_CARD_TRITON", required)
    outcome = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    with pytest.raises(outcome, match=rf"no Triton {VERSION}"):
        card_triton()
