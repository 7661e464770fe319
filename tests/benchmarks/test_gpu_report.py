"""A whole run on a card: its floors, peers and missed figures."""

import re
from pathlib import Path

import pytest
from gpu_machine import CEILINGS, EAGER, ELMO, OWN, SHAPE, Machine, messages, row, stored

from benchmarks import cases, floors, gpu_report


def test_a_whole_run(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = {"row": row(EAGER, 40.0, phase="momentum+graph")}
    machine.measuring([*messages(OWN), {"again": OWN, "ms": 4.1}])
    peers = [*messages(ELMO, ms=8.0), {"begin": EAGER}, graph]
    machine.scripts["bce_step", SHAPE.name, "peers"] = [peers]
    out = ["--out", str(tmp_path), "--commit", "feedbeef", "--stage", "goals"]
    assert gpu_report.main(out) == 0
    told = capsys.readouterr().out
    names = ["copy", "mm", "mm", "xmlkernels", "elmo", "eager"]
    assert [r["impl"] for r in stored(tmp_path)] == names
    assert (tmp_path / "fake-card.png").read_bytes().startswith(b"\x89PNG")
    assert told.index("checks against") < told.index("ceilings") < told.index(SHAPE.name)
    for text in (
        "build: done",
        f"bce_step {OWN}: checked, 1.0e-03 from plain PyTorch",
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
    assert header.endswith("ours faster  model x floor  model GB memory  GB L2")
    assert own.split()[5:11] == ["4.000", "4.000", "4.000", "120.0", "1.39", "-"]
    assert eager.split()[3] == "momentum+graph"
    assert eager.split()[-4:] == ["10.00x", "-", "-", "-"]
    workers = [command for command in machine.commands if "--op" in command]
    # One process per op with a figure to reach, whatever it does.
    started = [command[command.index("--op") + 1] for command in workers]
    assert sorted(started) == sorted({goal.op for goal in floors.GOALS})
    assert all(c[c.index("--commit") + 1] == "feedbeef" for c in workers)
    # Every figure before any peer; what needs the library once it is built.
    rounds = [str(order.get("round")) for _, order in machine.orders]
    assert rounds[:4] == ["None", "goal", "goal", "goal"]
    asked = [(op, order.get("round")) for op, order in machine.orders]
    assert asked.index(("sparse_update", "goal")) > asked.index(("bce_step", "goal"))


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
        shape = next(s for s in cases.BENCHMARKS[op].for_card() if s.name == name)
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
    told = floors.verdicts([row("xmlkernels/sgd/fp32", 9.0)], found)[0]
    assert re.search(r": not measured; model, H200: \d+\.\d x floor$", told)
