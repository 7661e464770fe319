"""The tests of a card, read and counted: whatever they and the sanitizers return, the report goes
on.
"""

import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import children, gpu_report, gpu_tests

ROOT = Path(__file__).resolve().parents[2]
OPS = ["bce_step", "cluster_step", "sparse_update", "bag_step"]
LINES = (
    "tests/ops/test_bce_step.py::test_x[a b-cuda] PASSED [ 50%]",
    "[gw3] [  9%] PASSED tests/ops/test_bce_step_bits.py::test_x[a b-cuda] ",
    "tests/ops/test_bce_step.py::test_y FAILED [ 90%]",
    "[gw1] [ 12%] SKIPPED tests/ops/test_cluster_step.py::test_z ",
    "[gw1] [ 14%] PASSED tests/ops/test_graphs.py::test_two[sparse_adam_ adam] ",
    "FAILED tests/ops/test_bce_step.py::test_y - AssertionError",
)


def read(
    status: int | None, lines: tuple[str, ...], errors: str = ""
) -> dict[str, gpu_tests.Verdict]:
    return gpu_tests.read({"tests": children.Outcome(status, lines, errors)}, OPS)


def test_verdicts() -> None:
    found = read(1, LINES)
    step = found["bce_step"]
    assert (step.passed, step.failed) == (2, ["tests/ops/test_bce_step.py::test_y"])
    assert not step.green and found["sparse_update"].green
    assert found["cluster_step"].skipped == 1 and not found["cluster_step"].green
    assert "which proves nothing" in str(found["cluster_step"])
    # Cut short, what passed stands, and the note says so.
    cut = read(None, LINES[:2])["bce_step"]
    assert cut.green and str(cut).endswith("tests did not end in time")
    assert not read(None, LINES[2:3])["bce_step"].green and not read(None, ())["bce_step"].green
    assert "failed before its tests: boom" in str(read(1, (), "boom")["bce_step"])
    assert "status -11" in str(read(-11, LINES[:1])["bce_step"])
    assert read(5, ())["bce_step"].note is None


def test_a_shared_file_takes_no_ops_rows() -> None:
    lines = (
        "tests/ops/test_layout.py::test_opcheck[1] FAILED [ 1%]",
        "tests/ops/test_layout.py::test_cluster_step_e FAILED [ 2%]",
        *(f"tests/ops/test_{op}.py::test_a PASSED" for op in OPS),
    )
    found = read(1, lines)
    assert [op for op in OPS if not found[op].green] == ["cluster_step"]
    assert found[gpu_tests.SHARED].failed == ["tests/ops/test_layout.py::test_opcheck[1]"]


def test_files_belong_to_the_op_that_their_name_tells() -> None:
    owner = gpu_tests.owner
    names = ("test_sparse_adam", "test_bce_step_bits", "test_layout")
    found = ["sparse_update", "bce_step", gpu_tests.SHARED]
    assert [owner(name, OPS) for name in names] == found
    assert owner("test_bce_edges", ["bce_step", "bce_loss"]) == gpu_tests.SHARED
    assert "rescale_rows" in gpu_tests.untimed()
    assert not {"bce_step", "sparse_adam", "missing"} & set(gpu_tests.untimed())
    assert set(gpu_tests.library_ops(ROOT)) == {"sparse_update", "bag_step"}
    triton, library = gpu_tests.card_files(ROOT)
    assert all(path.exists() for path in (*triton, *library))
    late = {path.name.removeprefix("test_").split("_")[0].split(".")[0] for path in library}
    assert late == {"sparse", "bag", "graphs", "bce"}
    assert [path.name for path in library if "bce" in path.name] == ["test_bce_pass.py"]
    command = gpu_tests.pytest(triton[:1], "card", share=False)
    assert "-n" not in command and command[command.index("-m", 2) + 1] == "card"


MARK = "import pytest\npytestmark = [pytest.mark.gpu, pytest.mark.card]\n"
SANITIZER = (
    '#!/bin/sh\ncase "$*" in *memcheck*) echo "========= Invalid write"; exit 9;; esac\nexit 0\n'
)
TREE = {
    "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["gpu: x", "card: y"]\n',
    "csrc/cuda/sparse_update.cu": "",
    "csrc/cuda/sort.cu": "",  # of several ops
    "tests/ops/card.py": "FILES = ['test_bce_step.py', 'test_sparse_update.py']\n",
    "tests/ops/test_bce_step.py": MARK + "def test_c():\n    pass\n",
    "tests/ops/test_sparse_update.py": MARK
    + "def test_a():\n    pass\ndef test_b():\n    assert 1 == 2\n",
    # Not marked `card`: run at the end.
    "tests/ops/test_matmul_topk.py": "import pytest\npytestmark = pytest.mark.gpu\n"
    "def test_d():\n    pass\n",
}


def tree(folder: Path) -> Path:
    for path, text in TREE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_a_run_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pytest on files of its own; a sanitizer that finds an error in one of them."""
    tool = tree(tmp_path) / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    said: list[str] = []
    found = gpu_tests.run_card(tmp_path, lambda s: True, lambda part: lambda: 100.0, said.append)
    assert [op for op in found if found[op].green] == ["bce_step", "matmul_topk"]
    text = "\n".join(said)
    told = "sparse_update: 1 passed, 1 failed, 0 skipped; compute-sanitizer memcheck found errors"
    assert told in text
    assert "test_sparse_update.py::test_b" in text and "E   assert 1 == 2" in text
    assert "memcheck, sparse_update: ERRORS: ========= Invalid write" in text
    assert "racecheck, sparse_update: no error" in text


# status: (the line it is told by, whether the op stays green)
ENDS = {
    None: ("not finished in time, so it says nothing", True),
    0: ("no error", True),
    1: ("no error", True),  # tests failed: pytest's own run of them says so
    5: ("it did not run: Device not supported", True),
    127: ("it did not run: Device not supported", True),
    -11: ("it did not run: Device not supported", True),
    9: ("ERRORS: ========= Invalid write", False),
}


@pytest.mark.parametrize("status", ENDS, ids=str)
def test_every_end_of_a_sanitizer(status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("========= Invalid write",) if status == 9 else ()
    end = children.Outcome(status, lines, "Device not supported")
    asked: list[gpu_tests.Key] = []

    def together(commands: dict[gpu_tests.Key, list[str]], limit_s: float) -> object:
        asked.extend(commands)
        return dict.fromkeys(commands, end)

    passed = tuple(f"tests/ops/test_{op}.py::test_a PASSED" for op in OPS)
    monkeypatch.setattr(gpu_tests.children, "run_together", together)
    monkeypatch.setattr(
        gpu_tests.children, "run", lambda command, limit_s: children.Outcome(0, passed, "")
    )
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: name)
    said: list[str] = []
    found = gpu_tests.run_card(ROOT, lambda s: True, lambda part: lambda: 9.0, said.append)
    text, green = ENDS[status]
    # No sanitizer runs over the files that all ops share.
    assert {op for op, _ in asked} == {"sparse_update", "bag_step"} and len(asked) == 4
    assert sum(text in line for line in said) == 4
    assert [found[op].green for op in OPS] == [True, True, green, green]


def test_a_sanitizer_beside_the_ops_and_a_missing_one() -> None:
    said: list[str] = []
    outcomes = {("elsewhere", "memcheck"): children.Outcome(9, (), "bad")}
    gpu_tests.say_sanitizer(ROOT, outcomes, {}, said.append)
    assert said[-1] == "  compute-sanitizer memcheck, elsewhere: ERRORS: bad"
    gpu_tests.say_sanitizer(ROOT, {}, {}, said.append)
    assert "not on this machine" in said[-1]


@pytest.mark.parametrize("build", [1.0, 100.0, 1e9])
@pytest.mark.parametrize("slow", [0.1, 100.0, 1e9])
def test_the_tests_end_in_time(slow: float, build: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a faked clock, with tests and a build of any length."""
    now = [0.0]

    def spend(seconds: float, limit_s: float) -> int | None:
        now[0] += min(seconds, limit_s)
        return 0 if seconds <= limit_s else None

    def run(command: Sequence[str], limit_s: float) -> children.Outcome:
        return children.Outcome(spend(slow, limit_s), LINES[:2], "")

    def together(commands: dict[gpu_tests.Key, list[str]], limit_s: float) -> object:
        return dict.fromkeys(commands, children.Outcome(spend(slow, limit_s), (), ""))

    ends, at = {}, 0.0
    for part, seconds in gpu_report.PLANS["card"].items():
        ends[part] = at = at + seconds

    def until(part: str) -> Callable[[], float]:
        return lambda: max(0.0, ends[part] - now[0])

    def built(limit_s: float) -> bool:
        return spend(max(0.0, build - now[0]), limit_s) == 0

    monkeypatch.setattr(gpu_tests.children, "run", run)
    monkeypatch.setattr(gpu_tests.children, "run_together", together)
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: name)
    found = gpu_tests.run_card(ROOT, built, until, lambda text: None)
    assert now[0] <= ends["sanitizers"] + 1e-6 and found["bce_step"].green
