"""Rows are appended and machines named; nothing is timed before its tests are green."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_rows import TINY, row

import benchmarks
from benchmarks import cases, floors, run, shapes, timing
from xmlkernels import ops
from xmlkernels.errors import InputError


def test_append_writes_the_header_once(tmp_path: Path) -> None:
    path = tmp_path / "results" / "m.csv"
    run.append(path, [row(op="bce_step", B=64), row(op="bce_step", B=256)])
    run.append(path, [row(op="matmul_topk", ms_p50=1.5)])
    lines = path.read_text().splitlines()
    assert lines[0] == (
        "date,commit,machine,device,threads,torch,triton,op,impl,phase,dtype,shape,B,L,D,S,K,ms_p20,ms_p50,ms_p80,"
        "peak_mb,gbps,tflops"
    )
    assert len(lines) == 4 and lines[3] == ",,,,,,,matmul_topk,,,,,,,,,,,1.5,,,,"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,commit\n", "line 1: expected the columns"),
        ("", "got an empty line"),
        (",".join(run.COLUMNS) + "\n" + "," * 22 + "\n1,2\n", "line 3: expected 23 fields, got 2"),
        (",".join(run.COLUMNS) + "\n" + "," * 22, "last line"),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        run.append(path, [row(op="bce_step")])
    assert path.read_text() == text


def test_machine_names() -> None:
    assert timing.slug("AMD EPYC 9454 48-Core Processor") == "amd-epyc-9454"
    assert (
        timing.slug("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz") == "intel-xeon-platinum-8481c"
    )
    assert timing.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert timing.instruction_set({"avx2", "avx512f", "avx512_bf16"}) == "avx512bf16"
    assert timing.instruction_set({"avx2", "fma"}) == "avx2"
    assert timing.instruction_set(set()) == "scalar"
    assert timing.machine_name("cpu") == timing.slug(timing.machine_name("cpu"))


def test_commit_outside_git_is_unknown(tmp_path: Path) -> None:
    assert run.commit(tmp_path) == "unknown"


# --- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "def test_a():\n    assert 1 == 2\n",
        "import pytest\n@pytest.mark.skip\ndef test_a():\n    pass\n",
        "def test_a(:\n",
        "x = 1\n",
    ],
    ids=["red", "all skipped", "broken", "empty"],
)
def test_no_timing_without_green_tests(tmp_path: Path, body: str) -> None:
    tests = tmp_path / "test_op.py"
    tests.write_text(body)
    with pytest.raises(run.RedTests, match=r"nothing is timed"):
        run.require_green(tests)


def test_green_tests_are_counted(tmp_path: Path) -> None:
    tests = tmp_path / "test_op.py"
    tests.write_text(
        "import pytest\ndef test_a():\n    pass\n@pytest.mark.skip\ndef test_b():\n    pass\n"
    )
    assert run.require_green(tests) == "1 tests passed, 1 skipped"
    with pytest.raises(run.RedTests, match="does not exist"):
        run.require_green(tmp_path / "test_none.py")


def test_red_tests_end_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    (tmp_path / "tests" / "ops" / "test_bce_step.py").write_text(
        "def test_a():\n    assert False\n"
    )
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(cases, "require_op", lambda op, device: None)
    monkeypatch.setattr(run, "make_rows", lambda *_: pytest.fail("timed in spite of red tests"))
    assert run.main(["--op", "bce_step", "--out", str(tmp_path)]) == 1
    assert "test_bce_step.py is not green" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


def test_an_op_that_does_not_exist_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(cases.BENCHMARKS["cluster_step"], functions=("no_such_op_",))
    monkeypatch.setitem(cases.BENCHMARKS, "cluster_step", absent)
    assert run.main(["--op", "cluster_step", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "got no_such_op_, not in xmlkernels.ops; choose one of bce_step" in told


def test_a_reference_is_never_timed_as_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.raises(InputError, match="a kernel of bce_step_ for cpu, got the reference alone"):
        cases.require_op("bce_step", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="use --device cpu"):
        cases.require_op("bce_step", "cuda")


# --- every op --------------------------------------------------------------------------------

MODULE = """
from benchmarks.case import Benchmark
from benchmarks.shapes import Shape
BENCHMARK = Benchmark(("row_norms",), lambda *_: [], (Shape("B1", 1, 2, 3),))
"""


def test_a_module_of_cases_is_all_that_an_op_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cases_row_norms.py").write_text(MODULE)
    monkeypatch.setattr(cases, "__file__", str(tmp_path / "cases.py"))
    monkeypatch.setattr(benchmarks, "__path__", [str(tmp_path)])
    found = cases.find_benchmarks()
    monkeypatch.delitem(sys.modules, "benchmarks.cases_row_norms")
    assert list(found) == ["row_norms"]
    assert found["row_norms"].functions == ("row_norms",)
    assert found["row_norms"].for_card() == (shapes.Shape("B1", 1, 2, 3),)


def test_benchmarks_time_ops_that_exist_and_begin_with_the_figures_to_reach() -> None:
    assert "bce_step" in cases.BENCHMARKS
    for op, benchmark in cases.BENCHMARKS.items():
        assert (run.ROOT / "tests" / "ops" / f"test_{op}.py").exists()
        assert benchmark.functions and set(benchmark.functions) <= set(ops.__all__)
    aims = dict.fromkeys(goal.op for goal in floors.GOALS)
    assert list(cases.BENCHMARKS)[: len(aims)] == list(aims)


def test_all_ops_run_one_after_another_up_to_the_first_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def act(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int(command[-1] == failing))

    monkeypatch.setattr(run.subprocess, "run", act)
    arguments = ["--op", "all", "--no-compile", "--out", str(tmp_path)]
    failing = ""
    assert run.main(arguments) == 0
    assert [command[-1] for command in commands] == list(cases.BENCHMARKS)
    options = ["--device", "cpu", "--out", str(tmp_path), "--no-compile", "--op", "bce_step"]
    assert commands[0] == [sys.executable, run.__file__, *options]
    failing, commands[:] = list(cases.BENCHMARKS)[1], []
    assert run.main(arguments) == 1
    assert [command[-1] for command in commands] == list(cases.BENCHMARKS)[:2]
    assert run.main([*arguments, "--shape", "tiny"]) == 2
    assert "--op all: expected no --shape, got tiny" in capsys.readouterr().err


# --- the whole command -----------------------------------------------------------------------


def test_rows_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = replace(cases.BENCHMARKS["matmul_topk"], shapes=(TINY,))
    monkeypatch.setitem(cases.BENCHMARKS, "matmul_topk", only)
    # Native or not, the rows are made alike.
    monkeypatch.setattr(cases, "require_op", lambda op, device: None)
    monkeypatch.setattr(run, "require_green", lambda tests: "1 tests passed")
    monkeypatch.setattr(timing, "alternate", partial(timing.alternate, rounds=2, budget_s=0))
    peaks = run.peak_mb
    # One case through the real child process: the others would only repeat its start-up.
    monkeypatch.setattr(
        run,
        "peak_mb",
        lambda *a: peaks(*a) if a[-1].key == ("xmlkernels", "topk", "bf16") else None,
    )
    arguments = ["--op", "matmul_topk", "--shape", "tiny", "--json", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert all(list(found) == list(run.COLUMNS) for found in rows)
    by_key = {(found["impl"], found["phase"], found["dtype"]): found for found in rows}
    assert {key[0] for key in by_key} == {"xmlkernels", "reference", "eager", "matmul", "mm"}
    own = by_key["xmlkernels", "topk", "bf16"]
    assert (own["B"], own["L"], own["D"], own["S"], own["K"]) == (4, 300, 16, None, 7)
    assert own["ms_p20"] <= own["ms_p50"] <= own["ms_p80"]
    assert (own["peak_mb"] is not None) == (sys.platform == "linux")
    assert by_key["mm", "ceiling", "bf16"]["B"] == 2048
    with open(next(tmp_path.glob("*.csv")), newline="") as file:
        stored = list(csv.DictReader(file))
    assert stored == [
        {key: "" if v is None else str(v) for key, v in found.items()} for found in rows
    ]
    assert "load average" in told.err and "x eager" in told.err and "share" in told.err


def test_a_failing_compiler_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> timing.Step:
        def step() -> None:
            raise RuntimeError("no compiler\nmore")

        return step

    told: list[str] = []
    case = cases.Case("compile", "momentum", "fp32", 1, 1, lambda: None, broken)
    assert run.start_all([case], told.append) == {}
    assert told == ["compile is left out: torch.compile failed here: no compiler"]
