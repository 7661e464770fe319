"""Whatever a sanitizer returns, the report goes on, and only an error that it found turns an op
red.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import children, gpu_tests

GREEN = children.Outcome(0, ("tests/ops/test_x.py::test_a PASSED [ 50%]",), "")
# status: (the line it is told by, whether the op stays green)
ENDS = {
    None: ("not finished within 9 s, so it says nothing", True),
    0: ("no error", True),
    1: ("no error", True),  # tests failed: pytest's own run of them says so
    5: ("it did not run: Device not supported", True),
    127: ("it did not run: Device not supported", True),
    -11: ("it did not run: Device not supported", True),
    9: ("ERRORS: ========= Invalid write", False),
}


@pytest.mark.parametrize("status", ENDS, ids=str)
def test_every_end_of_a_sanitizer(
    status: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("sparse_update.cu", "bag_step.cu", "sort.cu")  # sort.cu serves several ops
    for name in (
        *(f"csrc/cuda/{n}" for n in names),
        "tests/ops/test_sparse_update.py",
        "tests/ops/test_bag_step.py",
        "tests/ops/test_layout.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    lines = ("========= Invalid write",) if status == 9 else ()
    end = children.Outcome(status, lines, "Device not supported")
    asked: list[gpu_tests.Key] = []

    def answer(
        commands: Mapping[gpu_tests.Key, list[str]], limit_s: float
    ) -> dict[gpu_tests.Key, children.Outcome]:
        asked.extend(commands)
        return {key: end if key[1] in gpu_tests._SANITIZER else GREEN for key in commands}

    monkeypatch.setattr(gpu_tests.children, "run_together", answer)
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: name)
    said: list[str] = []
    ops = ["sparse_update", "bag_step", "bce_step"]
    found = gpu_tests.run_all(tmp_path, ops, 9.0, said.append)
    text, green = ENDS[status]
    ran = [key for key in asked if key[1] in gpu_tests._SANITIZER]
    # No sanitizer runs over the files that all ops share.
    assert {group for group, _ in ran} == {"sparse_update", "bag_step"} and len(ran) == 4
    assert sum(text in line for line in said) == 4
    assert [found[op].green for op in ops] == [green, green, False]


def test_an_error_beside_the_ops_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    outcomes = {("elsewhere", "memcheck"): children.Outcome(9, (), "bad")}
    gpu_tests.say_sanitizer(tmp_path, {}, outcomes, {}, 9.0, said.append)
    assert said[-1] == "  compute-sanitizer memcheck, elsewhere: ERRORS: bad"
