"""What a card's report is made of, without one: the worker on the CPU, children under a time limit,
and checks.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, children, gpu_check, gpu_worker, run, shapes
from xmlkernels import ops
from xmlkernels.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = shapes.Shape("tiny", 4, 300, 16, K=7)


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "ROUNDS", 2)
    monkeypatch.setattr(gpu_worker, "BUDGET_S", 0)
    monkeypatch.setattr(gpu_check, "ROWS", 300)
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


def obey(monkeypatch: pytest.MonkeyPatch, *orders: dict[str, object]) -> None:
    monkeypatch.setattr(sys, "stdin", [json.dumps(order) for order in orders])


def test_rows_of_a_worker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["xmlkernels/sgd/bf16", "elmo/sgd/bf16", "renee/momentum/bf16"]
    every = map(gpu_worker.name_of, cases.build_for_card("bce_step", TINY, "cpu"))
    order = {"shape": "tiny", "skip": [name for name in every if name not in kept]}
    rounds = ({"round": name} | order for name in ("goal", "peers"))
    obey(monkeypatch, {"ceilings": True}, *rounds)
    arguments = ["--op", "bce_step", "--device", "cpu", "--date", "now", "--commit", "abc"]
    assert gpu_worker.main(arguments) == 0
    found = told(capsys)
    kinds = [next(iter(message)) for message in found]
    assert kinds[: kinds.index("ready")] == ["checked"] * kinds.index("ready")
    assert kinds.count("done") == 3 and kinds[-1] == "done"
    rows = [message["row"] for message in found if "row" in message]
    ceilings = [(r["op"], r["impl"], r["dtype"]) for r in rows[:3]]  # type: ignore[index]
    names = [("copy", "bf16"), ("mm", "bf16"), ("mm", "fp32")]
    assert ceilings == [("ceiling", *name) for name in names]
    assert all(float(r["gbps"]) > 0 for r in rows[:3])  # type: ignore[index]
    impls = [str(r["impl"]) for r in rows[3:]]  # type: ignore[index]
    assert impls[0] == "xmlkernels" and set(impls[1:]) == {"elmo", "renee"}
    for row in rows[3:]:
        assert isinstance(row, dict) and list(row) == list(run.COLUMNS)
        assert (row["date"], row["commit"]) == ("now", "abc")
        assert (row["B"], row["L"], row["K"]) == (4, 300, 7)
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["peak_mb"] is None
        assert "+graph" not in row["phase"]
    again = [message for message in found if "again" in message]
    assert len(again) == 1 and float(str(again[0]["ms"])) > 0


def test_what_has_a_figure_to_reach_comes_first_and_then_its_peers() -> None:
    todo = cases.build_for_card("bce_step", TINY, "cpu")
    rounds = {
        name: gpu_worker.in_turn(todo, "bce_step", "B128-L2.8M-D768", name)
        for name in ("goal", "peers", "rest")
    }
    assert [case.key for case in rounds["goal"]] == [("xmlkernels", "sgd", "bf16")]
    impls = [case.impl for case in rounds["peers"]]
    # Those that the figure names, the same phase and format before others; the compiled one last.
    assert impls[:4] == ["elmo", "renee", "renee", "eager"] and impls[-1] == "compile"
    assert {case.impl for case in rounds["rest"]} == {"xmlkernels", "reference"}
    assert sum(map(len, rounds.values())) == len(todo)
    aimless = gpu_worker.in_turn(todo, "bce_step", "another", "rest")
    assert {case.impl for case in aimless} == {"reference"}


def test_an_op_that_cannot_be_timed_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(op: str, device: str) -> None:
        raise InputError(op, "a kernel", "none", "build it")

    monkeypatch.setattr(cases, "require_op", require)
    assert gpu_worker.main(["--op", "matmul_topk", "--device", "cpu"]) == 0
    assert told(capsys) == [{"untimed": "matmul_topk: expected a kernel, got none; build it"}]


# What a broken kernel may do to its results, by op: the check must find it.
BROKEN = {
    "bce_step": lambda out, call: (out[0] * 1.1, out[1]),
    "cluster_step": lambda out, call: (out[0] * 1.1, *out[1:]),
    "matmul_topk": lambda out, call: (out[0], out[1].roll(1, 0)),
    "bce_loss": lambda out, call: out * 1.2,
    "shortlist_matmul": lambda out, call: out + 1,
    "sparse_update": lambda out, call: call[0].mul_(1.5),
    "bag_step": lambda out, call: call[0].mul_(1.5),
}


@pytest.mark.parametrize("op", cases.BENCHMARKS)
def test_every_op_is_checked_against_plain_torch(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(shapes.tiny(cases.BENCHMARKS[op].for_card()[0]), name="tiny", L=120, D=16)
    if shape.S and shape.K:
        shape = replace(shape, S=40, K=10)  # the check takes a tenth of both
    monkeypatch.setattr(gpu_check, "ROWS", 120)
    assert gpu_worker.check(op, [shape], "cpu") == 0
    checked = told(capsys)
    assert checked and all(float(str(m["error"])) < 0.05 for m in checked)
    module = sys.modules[f"benchmarks.cases_{op}"]

    class Room:
        def __getattr__(self, name: str) -> Callable[..., object]:
            function = getattr(ops, name)
            return lambda *a, **k: BROKEN[op](function(*a, **k), a)

    monkeypatch.setattr(module, "ops", Room())
    assert gpu_worker.check(op, [shape], "cpu") == gpu_worker.WRONG
    assert "wrong" in told(capsys)[-1]


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
    "datasets pytest hypothesis huggingface_hub accelerate pydantic requests IPython ruff".split()
)
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
import xmlkernels, xmlkernels.ops
from dataclasses import replace
from benchmarks import cases, gpu_report, gpu_session, gpu_tests, gpu_worker, plot, run
from benchmarks.shapes import Shape
for op, benchmark in cases.BENCHMARKS.items():
    cases.build_for_card(op, benchmark.for_card()[0], "cuda")
tiny = replace(cases.BENCHMARKS["matmul_topk"], gpu_shapes=(Shape("tiny", 4, 300, 16, K=7),))
cases.BENCHMARKS["matmul_topk"] = tiny
gpu_worker.ROUNDS, gpu_worker.BUDGET_S = 1, 0
sys.stdin = ['{"shape": "tiny", "round": "goal"}']
sys.exit(gpu_worker.main(["--op", "matmul_topk", "--device", "cpu"]))
"""


def test_nothing_but_torch_numpy_and_scipy_is_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSE], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0 and '"impl": "xmlkernels"' in done.stdout, done.stderr[-3000:]
