"""2,000 damaged files of every kind: each is refused in a sentence, or accepted and consistent."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip(
        "forks, and limits what a process may take, as Linux does it", allow_module_level=True
    )

from harness import Kind, run

from xmlkernels import InputError

FILES = 2000


def test_damaged_files() -> None:
    """Run in a separate process.

    A fork of a process in which torch's or the tokenizers' threads run may wait for them for ever.
    """
    command = [
        sys.executable,
        Path(__file__).with_name("fuzz.py"),
        "--files",
        str(FILES),
        "--seed",
        "14",
    ]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, timeout=900)
    assert done.returncode == 0 and "bad: 0" in done.stdout, done.stdout + done.stderr[-4000:]
    ends = re.findall(r" (refused|taken|bad) +(\d+)$", done.stdout, re.M)
    taken = sum(int(count) for end, count in ends if end == "taken")
    # Neither harmless nor all the same.
    assert sum(int(count) for _, count in ends) == FILES
    assert 0 < taken < 0.8 * FILES


def test_the_harness_sees_every_bad_end(tmp_path: Path) -> None:
    """Readers with one fault each: the test above could miss what the harness cannot see."""
    import ctypes

    def write(folder: Path) -> None:
        (folder / "a").write_text("good")

    def reader(fault):  # type: ignore[no-untyped-def]
        return lambda folder: (
            None
            if not (folder / "a").is_file() or (folder / "a").read_bytes() == b"good"
            else fault()
        )

    def several_lines() -> None:
        raise InputError("a", "b", "c\nd", "e")

    def endless() -> None:
        while True:
            pass

    faults = {
        "traceback": (lambda: list[int]()[1], "IndexError"),
        "segfault": (lambda: ctypes.string_at(0), "signal -11"),
        "memory": (lambda: bytearray(4 << 30), "memory"),
        "assertion": (lambda: (_ for _ in ()).throw(AssertionError("nonsense")), "AssertionError"),
        "lines": (several_lines, "several lines"),
        "exit": (lambda: sys.exit(3), "SystemExit"),
    }
    for name, (fault, end) in faults.items():
        report = run([Kind(name, write, reader(fault))], 6, 0, tmp_path / name)
        assert report.bad and all(end in line for line in report.bad), (name, report.bad)
    report = run([Kind("endless", write, reader(endless))], 2, 0, tmp_path / "endless", seconds=0.3)
    assert report.bad and all("time" in line for line in report.bad)
