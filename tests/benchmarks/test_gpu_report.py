"""The report of a card, driven without one: faked children, a faked clock, and what it says, writes
and returns.
"""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import card, cases, cases_gpu, floors, gpu_report, gpu_worker, plot, run, shapes
from benchmarks.children import Outcome
from benchmarks.gpu_tests import Verdict

OWN, ELMO, EAGER = "xmlkernels/sgd/bf16", "elmo/sgd/bf16", "eager/momentum/fp32"
SHAPE = shapes.GPU_SHAPES["bce_step"][0]


def row(
    key: str, ms: float, *, op: str = "bce_step", shape: shapes.Shape = SHAPE, phase: str = ""
) -> run.Row:
    """A row with the rates that belong to its time."""
    impl, plain, dtype = key.split("/")
    found = dict.fromkeys(run.COLUMNS) | {
        "op": op,
        "impl": impl,
        "phase": phase or plain,
        "dtype": dtype,
        "shape": shape.name,
    }
    case = next(c for c in cases_gpu.build(op, shape, "cuda") if c.key == (impl, plain, dtype))
    found |= {
        "date": "now",
        "commit": "abc",
        "machine": "fake-card",
        "device": "cuda",
        "torch": "2",
        "peak_mb": 120.0,
    }
    found |= {letter: getattr(shape, letter) for letter in "BLDSK"}
    found |= {
        "ms_p20": ms,
        "ms_p50": ms,
        "ms_p80": ms,
        "gbps": case.bytes / ms / 1e6,
        "tflops": case.flops / ms / 1e9,
    }
    return found


def ceiling(impl: str, dtype: str, gbps: float, tflops: float) -> run.Row:
    found = dict.fromkeys(run.COLUMNS) | {
        "op": "ceiling",
        "impl": impl,
        "phase": "ceiling",
        "dtype": dtype,
        "date": "now",
    }
    return found | {
        "commit": "abc",
        "machine": "fake-card",
        "torch": "2",
        "gbps": gbps,
        "tflops": tflops,
    }


CEILINGS = [
    ceiling("copy", "bf16", 3000, 0),
    ceiling("mm", "bf16", 400, 800),
    ceiling("mm", "fp32", 40, 50),
]


class Machine:
    """Answers `children.run` from a script; each call takes `seconds` of the faked clock."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.now, self.seconds = 0.0, seconds
        self.commands: list[list[str]] = []
        self.limits: list[float] = []
        self.measuring: list[tuple[int | None, list[dict[str, object]]]] = []
        self.answers: dict[str, tuple[int | None, list[str], str]] = {
            "setup.py": (0, [], ""),
            "xmlkernels.ops": (0, ["native library: loaded", "CUDA library: loaded"], ""),
            "--ops": (
                0,
                ['{"op": "bce_step", "why": null}', '{"op": "cluster_step", "why": "no kernel"}'],
                "",
            ),
            "--ceilings": (0, [json.dumps({"row": r}) for r in CEILINGS], ""),
        }

    def monotonic(self) -> float:
        return self.now

    def run(
        self, command: Sequence[str], limit_s: float, on_line: Callable[[str], None] | None = None
    ) -> Outcome:
        self.commands.append(list(command))
        self.limits.append(limit_s)
        asked = next((name for name in self.answers if name in command), None)
        if asked is not None:
            status, lines, errors = self.answers[asked]
        else:
            status, messages = (
                self.measuring.pop(0) if "--rest" not in command else (0, [{"todo": []}])
            )
            lines = ["a library's warning", *map(json.dumps, messages)]
            errors = "Segmentation fault"
        self.now += limit_s if status is None else min(self.seconds, limit_s)
        for line in lines if on_line else ():
            on_line(line)  # type: ignore[misc]
        return Outcome(status, tuple(lines), errors)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(gpu_report.children, "run", found.run)
    monkeypatch.setattr(gpu_report, "time", SimpleNamespace(monotonic=found.monotonic))
    monkeypatch.setattr(card, "find", lambda: card.Card("fake-card", 80 << 30))
    monkeypatch.setattr(
        gpu_report.gpu_tests,
        "run_all",
        lambda *_: {"bce_step": Verdict(passed=3), "bce_loss": Verdict()},
    )
    monkeypatch.setitem(shapes.GPU_SHAPES, "bce_step", (SHAPE,))
    return found


def messages(
    *keys: str, ms: float = 4.0, todo: Sequence[str] | None = None
) -> list[dict[str, object]]:
    told: list[dict[str, object]] = [{"todo": list(todo or keys)}]
    for place, key in enumerate(keys):
        told += [{"begin": key}, {"row": row(key, ms * (place + 1))}]
    return told


def stored(tmp_path: Path) -> list[dict[str, str]]:
    with open(tmp_path / "fake-card.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_whole_run(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = {"row": row(EAGER, 40.0, phase="momentum+graph")}
    again = [{"begin": EAGER}, graph, {"again": OWN, "ms": 4.1}]
    machine.measuring = [(0, messages(OWN, ELMO, todo=[OWN, ELMO, EAGER]) + again)]
    assert gpu_report.main(["--out", str(tmp_path), "--commit", "feedbeef"]) == 0
    told = capsys.readouterr().out
    assert [r["impl"] for r in stored(tmp_path)] == [
        "copy",
        "mm",
        "mm",
        "xmlkernels",
        "elmo",
        "eager",
    ]
    assert (tmp_path / "fake-card.png").read_bytes().startswith(b"\x89PNG")
    assert told.index("tests on the card") < told.index("ceilings") < told.index(SHAPE.name)
    for text in (
        "native library: loaded",
        "CUDA library: loaded",
        "cluster_step is not timed: no kernel",
        "copy bf16: 3000 GB/s",
        "xmlkernels sgd bf16: 4.000 ms",
        "once more at the end: 4.1 ms",
        "at most 1.7 x floor: 1.39, reached",
        "2 x faster than elmo: 2.00, reached",
        "5 x faster than renee: not measured",
        "at most 256 MB beyond the table: 120.00, reached",
        "B512-L2.8M-D768 topk bf16, at most 1.6 x floor: not measured",
    ):
        assert text in told
    header, own, _, eager = told.split("never measured\n")[1].splitlines()[:4]
    assert header.split() == [
        "op",
        "shape",
        "impl",
        "phase",
        "dtype",
        "ms",
        "p50",
        "p20",
        "p80",
        "peak",
        "MB",
        "x",
        "floor",
        "ours",
        "faster",
        "model",
        "x",
        "floor",
    ]
    assert own.split()[5:-1] == ["4.000", "4.000", "4.000", "120.0", "1.39", "-"]
    assert eager.split()[3] == "momentum+graph" and eager.split()[-2:] == ["10.00x", "-"]
    worker, rest = machine.commands[-2:]
    assert rest[-3:-1] == ["--rest", "--commit"] and "--rest" not in worker
    assert worker[worker.index("--commit") + 1] == "feedbeef"
    assert worker[worker.index("--shape") + 1] == SHAPE.name


def test_the_floors_are_those_of_the_published_table() -> None:
    found = floors.Ceilings()
    for one in CEILINGS:
        found.add(one)
    expected = {
        ("bce_step", "B128-L2.8M-D768", OWN): 2.88,
        ("bce_step", "B512-L1.3M-D768", OWN): 3.85,
        ("bce_step", "B128-L8.6M-D768", "xmlkernels/sgd/fp8"): 6.36,
        ("matmul_topk", "B512-L2.8M-D768", "xmlkernels/topk/bf16"): 2.76,
        ("cluster_step", "B64-K400-L670k-D768", "xmlkernels/adam/bf16"): 0.71,
        ("sparse_update", "N100k-L670k-D768", "xmlkernels/adam/bf16"): 0.41,
    }
    assert {(goal.op, goal.shape) for goal in floors.GOALS} <= {
        (op, name) for op, name, _ in expected
    }
    for (op, name, key), ms in expected.items():
        if op not in cases.BUILDERS:
            continue  # its cases come with the op
        shape = next(s for s in shapes.for_card(op) if s.name == name)
        assert found.times_floor(row(key, 10.0, op=op, shape=shape)) == pytest.approx(
            10 / ms, rel=0.01
        )
    # No torch.mm of that format was measured.
    assert found.times_floor(row("xmlkernels/sgd/fp16", 1.0)) is None


def test_a_peer_is_held_against_the_row_that_does_the_same() -> None:
    own = [
        row(OWN, 4.0),
        row("xmlkernels/momentum/bf16", 6.0),
        row("xmlkernels/momentum/fp32", 9.0),
    ]
    held = {
        key: floors.own_row(own, row(key, 20.0)) for key in (ELMO, EAGER, "renee/momentum/fp16")
    }
    # A figure to reach names elmo and renee.
    assert held == {
        ELMO: own[0],
        EAGER: own[2],
        "renee/momentum/fp16": own[0],
    }
    assert floors.own_row(own[:1], row(EAGER, 20.0)) is own[0]
    assert floors.own_row([], row(EAGER, 20.0)) is None


def test_a_missed_figure_is_told() -> None:
    found = floors.Ceilings(3000, {"bf16": 800})
    lines = floors.verdicts(
        [row(OWN, 9.0) | {"peak_mb": 700}, row("renee/momentum/fp16", 28.0)], found
    )
    assert sum("MISSED" in line for line in lines) == 3
    assert "at least 5 x faster than renee: 3.11, MISSED" in "\n".join(lines)
    # Another format's row.
    assert floors.verdicts([row("xmlkernels/sgd/fp32", 9.0)], found)[0].endswith("not measured")


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
    monkeypatch.setitem(shapes.SHAPES, "another", (SHAPE,))
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
        return {"memory": 3 * SHAPE.L * SHAPE.D * 2, "cache": 0}  # half as much again as must be

    model = ModuleType("model")
    model.bce_step_bytes = bce_step_bytes  # type: ignore[attr-defined]
    rows = [row(OWN, 4.0), row(ELMO, 9.0), row("xmlkernels/momentum/fp32", 9.0)]
    lines = floors.table(rows, floors.Ceilings(3000, {"bf16": 800}), model)
    assert lines[1].split()[-3:] == ["1.39", "-", "1.50"]
    assert lines[2].split()[-2:] == [
        "2.25x",
        "-",
    ]
    assert asked[0] == (
        (128, SHAPE.L, 768),
        {"element": 2, "state_element": 2, "states": 0, "loss": False},
    )
    # No fp32 ceiling.
    assert asked[1][1]["states"] == 1
    assert asked[1][1]["element"] == 4
    assert lines[3].split()[-1] == "-"
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
