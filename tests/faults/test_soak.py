"""One process that trains, evaluates, saves and predicts again and again does not grow."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("looks at /proc", allow_module_level=True)

from patience import until
from soak import Sample, faults, figures, threads


def test_a_few_seconds() -> None:
    """Few turns: what grows by little would not show, what is left open does."""
    script = Path(__file__).with_name("soak.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, script, "--minutes", "0.1", "--growth", "3"],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == [] and found["turns"] >= 10
    assert found["mb_at_the_end"] > found["own_mb_at_the_end"] > 100


@pytest.mark.parametrize(
    ("mb", "own", "files", "threads", "told"),
    [
        (0.0, 0.0, 0, 0, []),
        (0.05, 0.0, 0, 0, ["memory grew by 2.38 %"]),
        (0.0, 0.05, 0, 0, ["memory without files grew by 2.4 %"]),
        (0.0, 0.0, 1, 0, ["files were not constant"]),
        (0.0, 0.0, 0, 1, ["threads were not constant"]),
    ],
)
def test_what_grows_is_seen(
    mb: float, own: float, files: int, threads: int, told: list[str]
) -> None:
    samples = [
        Sample(
            seconds=float(n),
            mb=100 + mb * n + 50 * (n > 3),
            own_mb=60 + own * n + 40 * (n > 3),
            files=9 + files * (n == 90),
            threads=2 + threads * (n > 50),
        )
        for n in range(100)
    ]
    found = figures(samples)
    assert found["mb_after_warm_up"] < 155 and found["own_mb_after_warm_up"] < 105
    assert faults(found, 1) == told


def test_a_thread_that_has_ended_is_not_counted() -> None:
    before, end = threads(), threading.Event()
    stays = threading.Thread(target=end.wait, args=(60,))
    stays.start()
    assert threads() == before + 1
    end.set()
    stays.join(60)
    until(lambda: threads() == before)
