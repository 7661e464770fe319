"""500 damaged files of every kind: each is refused in a sentence, or what was taken holds together."""

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("forks, and limits what a process may take, as Linux does it", allow_module_level=True)

import torch
from harness import Kind, run
from kinds import all_kinds

from xmlkernels import InputError


def test_damaged_files(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = run(all_kinds(), 500, 14, tmp_path)
    finally:
        torch.set_num_threads(before)
    print(report)
    assert report.bad == []
    taken = sum(count for (_, end), count in report.ends.items() if end == "taken")
    assert sum(report.ends.values()) == 500 and 0 < taken < 400  # the damages are neither harmless nor all the same


def test_the_harness_sees_every_bad_end(tmp_path: Path) -> None:
    """Readers with a fault each: were the harness blind to one, the test above could not fail for it."""
    import ctypes

    def write(folder: Path) -> None:
        (folder / "a").write_text("good")

    def reader(fault):  # type: ignore[no-untyped-def]
        return lambda folder: None if not (folder / "a").is_file() or (folder / "a").read_bytes() == b"good" else fault()

    def several_lines() -> None:
        raise InputError("a", "b", "c\nd", "e")

    def endless() -> None:
        while True:
            pass

    faults = {
        "traceback": (lambda: [][1], "IndexError"),
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
