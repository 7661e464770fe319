"""What a card's report is made of, without one: the worker on the CPU, children under a time limit,
and tests op by op.
"""

import json
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, children, gpu_tests, gpu_worker, run, shapes
from xmlkernels.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = shapes.Shape("tiny", 4, 300, 16, K=7)


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "ROUNDS", 2)
    monkeypatch.setattr(gpu_worker, "BUDGET_S", 0)
    monkeypatch.setattr(cases, "CEILING_SIZE", {"cpu": 64})
    monkeypatch.setattr(gpu_worker, "COPY_BYTES", {"cpu": 1 << 16})
    only = replace(cases.BENCHMARKS["bce_step"], gpu_shapes=(TINY,))
    monkeypatch.setitem(cases.BENCHMARKS, "bce_step", only)


def fake(impl: str, act: object = None, phase: str = "sgd") -> cases.Case:
    """A case whose step raises `act` where that is an exception."""

    def step() -> None:
        if isinstance(act, Exception):
            raise act

    return cases.Case(impl, phase, "bf16", 10**6, 10**6, lambda: None, lambda held: step)


def test_rows_of_a_worker(capsys: pytest.CaptureFixture[str]) -> None:
    only = ["xmlkernels/sgd/bf16", "elmo/sgd/bf16", "renee/momentum/bf16"]
    arguments = [word for name in only for word in ("--only", name)]
    arguments += ["--op", "bce_step", "--shape", "tiny", "--device", "cpu"]
    arguments += ["--date", "now", "--commit", "abc"]
    assert gpu_worker.main(arguments) == 0
    found = told(capsys)
    # This shape has no figure to reach: all own cases first.
    assert found[0] == {"todo": [only[0], only[2], only[1]]}
    rows = [message["row"] for message in found if "row" in message]
    assert [r["impl"] for r in rows] == ["xmlkernels", "renee", "elmo"]  # type: ignore[index]
    for row in rows:
        assert isinstance(row, dict) and list(row) == list(run.COLUMNS)
        assert (row["date"], row["commit"]) == ("now", "abc")
        assert (row["B"], row["L"], row["K"]) == (4, 300, 7)
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["peak_mb"] is None
        assert "+graph" not in row["phase"]
    assert found[-1]["again"] == only[0] and float(str(found[-1]["ms"])) > 0


def test_what_has_a_figure_to_reach_and_its_peers_come_in_the_first_round() -> None:
    todo = cases.build_for_card("bce_step", TINY, "cpu")
    first = gpu_worker.in_turn(todo, "bce_step", "B128-L8.6M-D768", rest=False)
    rest = gpu_worker.in_turn(todo, "bce_step", "B128-L8.6M-D768", rest=True)
    assert first[0].key == ("xmlkernels", "sgd", "fp8")
    assert first[-1].impl == "compile"
    assert len(first) + len(rest) == len(todo)
    assert {case.impl for case in first[1:]} == {"eager", "compile", "renee", "elmo"}
    assert {case.impl for case in rest} == {"xmlkernels", "reference"}
    aimless = gpu_worker.in_turn(todo, "bce_step", "another", rest=True)
    assert {case.impl for case in aimless} == {"reference"}


def test_ceilings(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_worker.main(["--ceilings", "--device", "cpu", "--date", "now"]) == 0
    rows = [message["row"] for message in told(capsys)]
    assert [(r["op"], r["impl"], r["dtype"]) for r in rows] == [  # type: ignore[index]
        ("ceiling", "copy", "bf16"),
        ("ceiling", "mm", "bf16"),
        ("ceiling", "mm", "fp32"),
    ]
    assert all(float(r["gbps"]) > 0 for r in rows)  # type: ignore[index]


def test_ops_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(op: str, device: str) -> None:
        if op != "bce_step":
            raise InputError(op, "a kernel", "none", "build it")

    monkeypatch.setattr(cases, "require_op", require)
    assert gpu_worker.main(["--ops", "--device", "cpu"]) == 0
    found = {str(message["op"]): message["why"] for message in told(capsys)}
    assert set(found) == set(cases.BENCHMARKS)
    assert [op for op, why in found.items() if why is None] == ["bce_step"]
    assert found["matmul_topk"] == "matmul_topk: expected a kernel, got none; build it"


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [
        (torch.OutOfMemoryError("x"), 0, "it does not fit the card's memory"),
        (InputError("a", "b", "c", "d"), 0, "a: expected b, got c; d"),
        (RuntimeError("launch failed\nmore"), gpu_worker.BROKE, "RuntimeError: launch failed"),
        (RuntimeError(), gpu_worker.BROKE, "RuntimeError: RuntimeError"),
    ],
    ids=["memory", "refused", "broken", "wordless"],
)
def test_a_case_that_fails_is_told(
    error: Exception, status: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [fake("xmlkernels", error), fake("elmo")]
    about = run.setting("bce_step", "cpu") | {"date": ""}
    assert gpu_worker.measure_all(todo, TINY, about, []) == status
    found = told(capsys)
    assert {"left_out": "xmlkernels/sgd/bf16", "why": why} in found
    # After a broken launch nothing more is timed here.
    assert any("row" in message for message in found) == (status == 0)


def test_a_step_that_cannot_be_captured_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def broken(step: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_worker, "captured", broken)
    with pytest.raises(gpu_worker.CaptureFailed, match="not permitted"):
        gpu_worker.measure(fake("elmo"), gpu_worker.timing.Clock("cpu"), graph=True)
    monkeypatch.setattr(
        gpu_worker, "measure", lambda case, clock, graph: asked.append(case.impl) or ([1.0], None)
    )
    monkeypatch.setattr(gpu_worker.timing, "Clock", lambda device: None)
    syncing = replace(cases.BENCHMARKS["bce_step"], syncing={("SparseAdam", "sgd")})
    monkeypatch.setitem(cases.BENCHMARKS, "bce_step", syncing)
    about = run.setting("bce_step", "cpu") | {"date": "", "device": "cuda"}
    monkeypatch.setattr(gpu_worker, "free", lambda device: None)
    todo = [fake("elmo"), fake("SparseAdam"), fake("renee")]
    assert gpu_worker.measure_all(todo, TINY, about, ["renee/sgd/bf16"]) == 0
    phases = [message["row"]["phase"] for message in told(capsys) if "row" in message]  # type: ignore[index]
    # Captured; one that waits for the device; one that failed before.
    assert phases == ["sgd+graph", "sgd", "sgd"]
    assert asked == ["elmo", "SparseAdam", "renee", "elmo"]


# --- children --------------------------------------------------------------------------------


def test_a_child_is_read_as_it_writes_and_ended_with_all_it_started() -> None:
    code = (
        "import subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('first', flush=True); print(other.pid, flush=True); sys.stderr.write('trouble\\n'); "
        "sys.stderr.flush()\n"
        "time.sleep(60)\n"
    )
    seen: list[tuple[str, float]] = []
    begin = time.monotonic()
    outcome = children.run(
        children.python("-c", code), 3.0, lambda line: seen.append((line, time.monotonic()))
    )
    assert outcome.status is None and time.monotonic() - begin < 20
    assert outcome.lines[0] == "first" and outcome.errors == "trouble" and outcome.last == "trouble"
    assert seen[0][1] - begin < time.monotonic() - begin and len(seen) == 2
    state, until = Path(f"/proc/{outcome.lines[1]}/stat"), time.monotonic() + 10

    def ended() -> bool:
        try:
            return state.read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # It was killed, but on a busy machine it may die a moment later.
    while not ended() and time.monotonic() < until:
        time.sleep(0.05)
    assert ended()


def test_children_together() -> None:
    code = "import os; print(int(os.environ['OMP_NUM_THREADS']) >= 1)"
    commands = {
        "a": children.python("-c", code),
        "b": children.python("-c", "import sys; sys.exit(3)"),
    }
    found = children.run_together(commands, 60)
    assert [(name, outcome.status) for name, outcome in found.items()] == [("a", 0), ("b", 3)]
    assert found["a"].last == "True"
    assert found["b"].last == "it said nothing"
    assert children.run_together({}, 1) == {}


REFUSE = """
import sys
from importlib.abc import MetaPathFinder
refused = set(
    "tyro rich sklearn pyarrow tokenizers transformers numba matplotlib safetensors pandas "
    "datasets pytest hypothesis huggingface_hub accelerate pydantic requests IPython".split()
)
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
import xmlkernels, xmlkernels.ops
from dataclasses import replace
from benchmarks import cases, gpu_report, gpu_tests, gpu_worker, plot, run
from benchmarks.shapes import Shape
for op, benchmark in cases.BENCHMARKS.items():
    cases.build_for_card(op, benchmark.for_card()[0], "cuda")
tiny = replace(cases.BENCHMARKS["matmul_topk"], gpu_shapes=(Shape("tiny", 4, 300, 16, K=7),))
cases.BENCHMARKS["matmul_topk"] = tiny
gpu_worker.ROUNDS, gpu_worker.BUDGET_S = 1, 0
sys.exit(gpu_worker.main(["--op", "matmul_topk", "--shape", "tiny", "--device", "cpu"]))
"""


def test_nothing_but_torch_numpy_and_scipy_is_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSE], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0 and '"impl": "xmlkernels"' in done.stdout, done.stderr[-3000:]


# --- tests op by op --------------------------------------------------------------------------


def test_files_belong_to_the_op_that_their_name_tells(tmp_path: Path) -> None:
    ops = "bce_step_bits", "sparse_adam", "sparse_layout", "layout"
    for name in (*(f"ops/test_{name}.py" for name in ops), "compile/test_bce_step.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    (tmp_path / "tests" / "test_train.py").touch()
    (tmp_path / "tests" / "test_full_head.py").write_text("@pytest.mark.gpu\n")
    found = gpu_tests.files_by_op(tmp_path, ["bce_step", "sparse_update"])
    assert {op: [path.name for path in paths] for op, paths in found.items()} == {
        "bce_step": ["test_bce_step_bits.py"],
        "sparse_update": ["test_sparse_adam.py", "test_sparse_layout.py"],
        "shared": ["test_layout.py", "test_full_head.py"],
    }
    assert gpu_tests.owner("test_bce_edges", ["bce_step", "bce_loss"]) == "shared"
    assert "rescale_rows" in gpu_tests.untimed()
    assert not {"bce_step", "sparse_adam", "missing"} & set(gpu_tests.untimed())


def test_verdicts() -> None:
    lines = (
        "tests/a.py::test_x[a b-cuda] PASSED [ 50%]",
        "tests/a.py::test_y FAILED [ 90%]",
        "t/a.py::test_z SKIPPED (no)",
    )

    def read(status: int | None, lines: tuple[str, ...], errors: str = "") -> gpu_tests.Verdict:
        other = {("b", "t.py"): children.Outcome(1, ("tests/b.py::test_b FAILED",), "")}
        return gpu_tests.read(
            other | {("a", "a.py"): children.Outcome(status, lines, errors)}, "a", 9
        )

    found = read(1, lines)
    assert (found.passed, found.skipped) == (1, 1)
    assert found.failed == ["tests/a.py::test_y"] and not found.green
    assert read(0, lines[:1]).green
    cut = read(None, lines[:1])
    assert not cut.green and "a.py did not end within 9 s" in str(cut)
    assert not read(0, lines[2:]).green  # skipped tests prove nothing
    assert "which proves nothing" in str(read(5, ()))
    assert "failed before its tests: boom" in str(read(1, (), "boom"))
    assert "status -11" in str(read(-11, lines[:1]))
    both = {("a", f"{i}.py"): children.Outcome(0, lines[:1], "") for i in range(2)}
    both["a", "memcheck"] = children.Outcome(9, lines, "")
    assert gpu_tests.read(both, "a", 9).passed == 2


MARK = "import pytest\npytestmark = pytest.mark.gpu\n"
SANITIZER = (
    '#!/bin/sh\ncase "$*" in *memcheck*) echo "========= Invalid write"; exit 9;; esac\nexit 0\n'
)


def test_a_run_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pytest on files of its own; a sanitizer that finds an error in one of them."""
    failing = "def test_b():\n    assert 1 == 2\n"
    for path, text in {
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "-q"\nmarkers = ["gpu: x"]\n',
        "csrc/cuda/sparse_update.cu": "",
        "tests/ops/test_sparse_update.py": MARK + "def test_a():\n    pass\n" + failing,
        "tests/ops/test_bce_step.py": MARK + "def test_c():\n    pass\n",
        "bin/compute-sanitizer": SANITIZER,
        # Of an op that is not to be timed now: it is not run.
        "tests/ops/test_matmul_topk.py": MARK + failing,
        "tests/ops/test_layout.py": MARK
        + "def test_topk_d():\n    pass\ndef test_cluster_step_e():\n    assert False\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bin" / "compute-sanitizer").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    said: list[str] = []
    ops = ["bce_step", "cluster_step", "sparse_update"]
    found = gpu_tests.run_all(tmp_path, ops, 100, said.append)
    assert [op for op in ops if found[op].green] == ["bce_step"]
    text = "\n".join(said)
    assert (
        "sparse_update: 1 passed, 1 failed, 0 skipped; compute-sanitizer memcheck found errors -> "
        "not timed" in text
    )
    assert "test_sparse_update.py::test_b" in text and "E   assert 1 == 2" in text
    assert "memcheck, sparse_update: ERRORS: ========= Invalid write" in text
    assert "racecheck, sparse_update: no error" in text
    # A shared file's test that tells its op.
    assert found["cluster_step"].failed[0].endswith("test_cluster_step_e")
    assert "tests shared by the ops: 1 passed, 1 failed" in text and "bce_loss" not in text


def test_a_missing_sanitizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "sparse_update.cu").touch()
    said: list[str] = []
    groups: dict[str, list[Path]] = {"sparse_update": []}
    gpu_tests.say_sanitizer(tmp_path, groups, {}, {}, 9, said.append)
    assert said == ["  compute-sanitizer: not on this machine, so the CUDA ops ran without it"]
    cut = {("sparse_update", "racecheck"): children.Outcome(None, (), "")}
    gpu_tests.say_sanitizer(tmp_path, groups, cut, {}, 9, said.append)
    assert said[1:] == [
        "  compute-sanitizer racecheck, sparse_update: not finished within 9 s, so it says nothing"
    ]
    gpu_tests.say_sanitizer(tmp_path, {"bce_step": []}, {}, {}, 9, said.append)
    assert said[2:] == ["  compute-sanitizer: no op has CUDA C++ of its own"]
