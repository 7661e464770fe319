"""The planned peak is that of the real loop: evaluation, checkpoints and the last report included.

Within a tenth of what the run holds beyond its imports, so that these do not hide an error.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

SCRIPT = Path(__file__).with_name("peak_runs.py")
CASES = (
    "fp32, momentum",
    "bf16, Adam, from centroids",
    "fp8, momentum in fp32",
    "cascade, Adam, bf16",
    "transformer, gradient caching",
)
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not say what a process holds"
)


def lines(folder: Path, *words: str) -> list[dict[str, float]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("peaks")
    lines(made, "data")
    return made


@pytest.fixture(scope="module")
def planned(folder: Path) -> dict[str, dict[str, float]]:
    found = {str(line["case"]): line for line in lines(folder, "plan")}
    assert list(found) == list(CASES)
    return found


@pytest.mark.parametrize(
    "number",
    [
        0,
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        3,
        pytest.param(4, marks=pytest.mark.slow),
    ],
    ids=CASES.__getitem__,
)
def test_a_run_peaks_where_it_was_planned_to(
    number: int, folder: Path, planned: dict[str, dict[str, float]]
) -> None:
    (run,) = lines(folder, "run", str(number))
    own = run["measured"] - run["imported"]
    assert own > 250, "a case too small to tell"
    for by in ("by sizes", "by data"):
        error = planned[CASES[number]][by] - run["measured"]
        assert abs(error) <= 0.1 * own, (by, planned[CASES[number]], run)
