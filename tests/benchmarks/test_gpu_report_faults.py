"""A run on a card goes on whatever fails, and tells it."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from gpu_machine import CEILINGS, EAGER, ELMO, HANGS, OWN, SHAPE, Machine, messages, row, stored

from benchmarks import card, cases, floors, gpu_report, gpu_worker, plot, run
from benchmarks.gpu_tests import Verdict


def test_without_a_card_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card.torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "expected a CUDA device, got none" in told.err


def test_a_folder_that_cannot_be_written_ends_it_before_it_begins(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert gpu_report.main(["--out", str(tmp_path / "file" / "results")]) == 2
    assert "--out: expected a folder that can be written" in capsys.readouterr().err
    (tmp_path / "fake-card.csv").write_text("another,table\n")
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert "line 1: expected the columns" in capsys.readouterr().err and machine.commands == []


def goals(tmp_path: Path, *more: str) -> int:
    return gpu_report.main(["--stage", "goals", "--out", str(tmp_path), *more])


def test_stages_that_fail_end_nothing(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.build = (30.0, 1)
    machine.ceilings = [HANGS]
    machine.measuring(messages(OWN))
    assert goals(tmp_path) == 0
    told = capsys.readouterr().out
    assert "build: failed with status 1\n  nvcc fatal" in told
    assert "at most 1.7 x floor: not measured" in told and len(stored(tmp_path)) == 1
    assert not (tmp_path / "fake-card.png").exists()


def test_a_wrong_op_is_not_timed_and_takes_no_other(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"wrong": "xmlkernels/topk/bf16", "why": "result 0: 3e-01 from plain PyTorch"}
    machine.starts = {"matmul_topk": [[wrong, 5]], "cluster_step": [[{"untimed": "no kernel"}, 0]]}
    machine.measuring(messages(OWN))
    assert goals(tmp_path) == 1
    told = capsys.readouterr().out
    assert "matmul_topk is not timed: xmlkernels/topk/bf16 is WRONG: result 0" in told
    assert "cluster_step is not timed: no kernel" in told
    assert {op for op, _ in machine.orders} == {"bce_step", "sparse_update"}
    assert stored(tmp_path)[-1]["op"] == "bce_step"
    # Without the wrong one, what has no kernel is no fault.
    machine.starts = {"cluster_step": [[{"untimed": "no kernel"}, 0]]}
    machine.measuring(messages(OWN))
    assert goals(tmp_path / "b") == 0


def test_a_worker_that_dies_is_started_again_without_its_case(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renee = "renee/momentum/fp16"
    capture = {"capture_failed": EAGER, "why": "a sync"}
    machine.scripts["bce_step", SHAPE.name, "peers"] = [
        [*messages(OWN), {"begin": ELMO}, -11],
        [{"begin": EAGER}, capture, gpu_worker.CAPTURE_FAILED],
        [
            *messages(EAGER),
            {"begin": renee},
            {"left_out": renee, "why": "RuntimeError: launch failed"},
            gpu_worker.BROKE,
        ],
    ]
    assert goals(tmp_path) == 0
    told = capsys.readouterr().out
    assert f"{ELMO} ended the process with status -11: Segmentation fault" in told
    assert f"{EAGER} cannot be captured in a graph (a sync)" in told
    assert "left out: RuntimeError: launch failed" in told
    peers = [o for op, o in machine.orders if op == "bce_step" and o.get("round") == "peers"]
    assert [order["skip"] for order in peers] == [
        [],
        [OWN, ELMO],
        [OWN, ELMO],
        [OWN, ELMO, EAGER, renee],
    ]
    assert [order["plain"] for order in peers] == [[], [], [EAGER], [EAGER]]
    again = [c for c in machine.commands if "bce_step" in c]
    assert ["--checked" in command for command in again] == [False, True, True, True]
    assert [r["impl"] for r in stored(tmp_path)][3:] == ["xmlkernels", "eager"]


def test_a_worker_that_cannot_begin_is_told(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.starts["bce_step"] = [[1]]
    assert goals(tmp_path) == 1
    assert "bce_step is not timed: its worker ended: Segmentation fault" in capsys.readouterr().out


def test_the_plans_leave_the_start_of_a_machine() -> None:
    assert gpu_report.whole_s("goals") <= 290 and gpu_report.whole_s("card") <= 260
    assert gpu_report.whole_s("all") <= 570
    for plan in gpu_report.PLANS.values():
        assert all(seconds > 0 for seconds in plan.values()) and list(plan)[-1] == "end"


@pytest.mark.parametrize("seconds", [0.1, 2.0, 12.0, 70.0, 1e9])
@pytest.mark.parametrize("build", [5.0, 150.0, 1e9])
@pytest.mark.parametrize("hangs", ["nothing", "start", "goal", "peers"])
def test_whatever_hangs_it_ends_in_time_with_its_rows(
    machine: Machine, tmp_path: Path, seconds: float, build: float, hangs: str
) -> None:
    machine.seconds, machine.build = seconds, (build, 0)
    machine.measuring(messages(OWN))
    if hangs == "start":
        machine.starts = {"matmul_topk": [[HANGS]]}
    else:
        for op, benchmark in cases.BENCHMARKS.items():
            for shape in benchmark.gpu_shapes:
                script = [*(messages(OWN) if op == "bce_step" else []), HANGS]
                machine.scripts.setdefault((op, shape.name, hangs), []).insert(0, script)
    status = goals(tmp_path)
    plan = gpu_report.PLANS["goals"]
    assert machine.now <= sum(plan.values()) - plan["end"] + 1e-6
    rows = stored(tmp_path) if (tmp_path / "fake-card.csv").exists() else []
    own = [row for row in rows if row["impl"] == "xmlkernels"]
    assert (status == 0) == bool(own)
    # What is quick enough has its row, whatever hangs beside it.
    assert bool(own) == (seconds <= 12.0)


def test_stage_all_goes_on_to_the_rest(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.measuring(messages(OWN))
    verdicts = {"bce_step": Verdict(passed=1), "bag_step": Verdict(passed=1)}
    monkeypatch.setattr(gpu_report.gpu_tests, "run_card", lambda *_: verdicts)
    assert gpu_report.main(["--out", str(tmp_path)]) == 0
    rounds = {(op, order.get("round")) for op, order in machine.orders}
    assert {("bag_step", "goal"), ("bag_step", "rest"), ("bce_step", "rest")} <= rounds
    verdicts["bce_step"] = Verdict(passed=3, failed=["t"])
    machine.measuring(messages(OWN))
    assert gpu_report.main(["--out", str(tmp_path / "b")]) == 1
    assert gpu_report.main(["--out", str(tmp_path / "c"), "--stage", "card"]) == 1
    assert not (tmp_path / "c" / "fake-card.csv").exists()


def test_shapes_that_do_not_fit_give_way_to_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    everything = card.plan(["bce_step", "matmul_topk"], 80 << 30, told.append)
    assert [(op, s.name) for op, s in everything] == [
        ("bce_step", "B128-L2.8M-D768"),
        ("matmul_topk", "B512-L2.8M-D768"),
        ("bce_step", "B512-L1.3M-D768"),
        ("bce_step", "B128-L8.6M-D768"),
    ]
    some = [s.name for op, s in card.plan(["bce_step"], 6 << 30, told.append)]
    assert some == ["B128-L2.8M-D768", "B512-L1.3M-D768", "B128-L131k-D768", "B512-L131k-D768"]
    assert told == ["  bce_step B128-L8.6M-D768 is left out: its table does not fit 6 GiB"]
    another = replace(cases.BENCHMARKS["bag_step"], shapes=(SHAPE,), gpu_shapes=())
    monkeypatch.setitem(cases.BENCHMARKS, "another", another)
    # An op without shapes of a card has those of the CPU.
    assert card.plan(["another"], 1 << 30, told.append) == [("another", SHAPE)]


def test_one_op_alone(machine: Machine, tmp_path: Path) -> None:
    assert goals(tmp_path, "--op", "bag_step") == 1  # the script has no row of it
    assert {op for op, _ in machine.orders} == {"bag_step"}
    assert goals(tmp_path, "--minutes", "-1") == 2


def test_the_model_is_shown_beside_the_row_it_models() -> None:
    asked = []

    def bce_step_bytes(*sizes: int, **options: int) -> dict[str, int]:
        asked.append((sizes, options))
        return {
            "memory": 3 * SHAPE.L * SHAPE.D * 2,
            "cache": 9 * 10**9,
        }  # half as much again as must be

    model = ModuleType("model")
    model.bce_step_bytes = bce_step_bytes  # type: ignore[attr-defined]
    rows = [row(OWN, 4.0), row(ELMO, 9.0), row("xmlkernels/momentum/fp32", 9.0)]
    lines = floors.table(rows, floors.Ceilings(3000, {"bf16": 800}), model)
    assert lines[1].split()[-5:] == ["1.39", "-", "1.50", "12.96", "9.00"]
    assert lines[2].split()[-4:] == ["2.25x", "-", "-", "-"]
    assert asked[0] == (
        (128, SHAPE.L, 768),
        {"element": 2, "state_element": 2, "states": 0, "loss": False},
    )
    # No fp32 ceiling.
    assert asked[1][1]["states"] == 1
    assert asked[1][1]["element"] == 4
    assert lines[3].split()[-3:] == ["-", "12.96", "9.00"]
    assert floors.table(rows, floors.Ceilings(3000, {"bf16": 800}), None)[1].split()[-1] == "-"


def test_without_matplotlib_no_chart(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine.measuring(messages(OWN))
    found = gpu_report.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_report.importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else found(name),
    )
    assert goals(tmp_path) == 0
    assert "no chart: matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_the_chart_of_a_file_is_that_of_its_last_run(tmp_path: Path) -> None:
    path = tmp_path / "card.csv"
    run.append(path, [row(OWN, 9.0) | {"date": "before"}, *CEILINGS, row(OWN, 4.0), row(ELMO, 8.0)])
    rows = plot.latest(plot.read_rows(path, dirty=False))
    assert len(rows) == 5 and {r["date"] for r in rows} == {"now"}
    assert plot.main([str(path)]) == 0
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")
    run.append(path, [row(OWN, 4.0) | {"date": "later"}])
    assert plot.main([str(path), "--out", str(tmp_path / "b.png")]) == 2
    assert not (tmp_path / "b.png").exists()
