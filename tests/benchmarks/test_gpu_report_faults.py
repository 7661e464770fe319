"""A run on a card goes on whatever fails, and tells it."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from gpu_machine import CEILINGS, EAGER, ELMO, OWN, SHAPE, Machine, messages, row, stored

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


def test_stages_that_fail_end_nothing(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.answers["setup.py"] = (1, [], "nvcc fatal: no such file")
    machine.answers["--ceilings"] = (None, [], "")
    machine.measuring = [(0, messages(OWN))]
    assert gpu_report.main(["--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "failed with status 1: nvcc fatal" in told
    assert "some ceilings are missing" in told
    assert "not finished within" in told
    assert "at most 1.7 x floor: not measured" in told and len(stored(tmp_path)) == 1
    assert not (tmp_path / "fake-card.png").exists()


def test_red_ops_are_not_timed(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        gpu_report.gpu_tests, "run_all", lambda *_: {"bce_step": Verdict(passed=3, failed=["t"])}
    )
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert all(r["op"] == "ceiling" for r in stored(tmp_path))
    assert not any("--op" in c for c in machine.commands)
    # A failure elsewhere, in an op that nothing times, is no reason to fail.
    machine.measuring = [(0, messages(OWN))]
    verdicts = {"bce_step": Verdict(passed=1), "bce_loss": Verdict(failed=["t"])}
    monkeypatch.setattr(gpu_report.gpu_tests, "run_all", lambda *_: verdicts)
    assert gpu_report.main(["--out", str(tmp_path / "b")]) == 0


def test_a_worker_that_dies_is_started_again_without_its_case(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = [OWN, ELMO, EAGER, "renee/momentum/fp16"]
    machine.measuring = [
        (-11, [*messages(OWN, todo=everything), {"begin": ELMO}]),
        (
            gpu_worker.CAPTURE_FAILED,
            [
                {"todo": everything[2:]},
                {"begin": EAGER},
                {"capture_failed": EAGER, "why": "a sync"},
            ],
        ),
        (
            gpu_worker.BROKE,
            [
                {"todo": everything[2:]},
                {"begin": EAGER},
                {"row": row(EAGER, 9.0)},
                {"begin": everything[3]},
                {"left_out": everything[3], "why": "RuntimeError: launch failed"},
            ],
        ),
    ]
    assert gpu_report.main(["--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"{ELMO} ended the process with status -11: Segmentation fault" in told
    assert f"{EAGER} cannot be captured in a graph (a sync)" in told
    assert "left out: RuntimeError: launch failed" in told
    asked = [
        [c[i + 1] for i, word in enumerate(c) if word == "--only"]
        for c in machine.commands
        if "--op" in c
    ]
    assert asked == [[], everything[2:], everything[2:], []]
    assert machine.commands[-2].count("--plain") == 1
    assert [r["impl"] for r in stored(tmp_path)][3:] == ["xmlkernels", "eager"]


def test_a_worker_that_cannot_begin_is_told(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.measuring = [(1, [])]
    gpu_report.main(["--out", str(tmp_path)])
    assert "not measured: Segmentation fault" in capsys.readouterr().out


def test_the_deadline_keeps_what_was_measured(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.measuring = [(None, [*messages(OWN, todo=[OWN, ELMO]), {"begin": ELMO}])]
    machine.seconds = 100
    assert gpu_report.main(["--out", str(tmp_path), "--minutes", "8"]) == 0
    assert f"the time is up within {ELMO}" in capsys.readouterr().out
    assert stored(tmp_path)[-1]["impl"] == "xmlkernels"
    assert machine.limits[0] == gpu_report.BUILD_S
    assert machine.limits[-1] == 8 * 60 - gpu_report.END_S - 265
    machine.now, machine.seconds, machine.limits = 0.0, 1e9, []
    assert gpu_report.main(["--out", str(tmp_path / "b"), "--minutes", "3"]) == 1
    # And no worker was started for it.
    assert "the time is up: not measured: any case of it" in capsys.readouterr().out
    assert machine.now <= 3 * 60


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
    # The script's only op is another.
    assert gpu_report.main(["--out", str(tmp_path), "--op", "matmul_topk"]) == 1
    assert not any("--shape" in command for command in machine.commands)
    assert gpu_report.main(["--out", str(tmp_path), "--minutes", "-1"]) == 2


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
    machine.measuring = [(0, messages(OWN))]
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert gpu_report.main(["--out", str(tmp_path)]) == 0
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
