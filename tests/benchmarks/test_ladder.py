"""The speed ladder: every rung trains the same table, runs on a tiny shape, and fills its rows."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import ladder, ladder_rungs, plot, run, timing

LOSSES = {"plain", "accumulated", "compiled", "sparse", "sampled"}


@pytest.fixture(scope="module")
def stepped() -> dict[tuple[str, str], tuple[Tensor, float | None, Tensor, Tensor]]:
    """dx, loss, table and momentum of each rung after three steps from the same start."""
    found = {}
    start = ladder_rungs.make_held(ladder_rungs.TINY, "cpu", ("fp32", "bf16"))
    rungs = [rung for rung in ladder_rungs.rungs_of("cpu") if rung.name != "compiled"]
    known = {rung.key for rung in rungs}
    rungs += [
        rung for rung in ladder_rungs.rungs_of("cuda", compiled=False) if rung.key not in known
    ]
    for rung in rungs:
        held = copy.copy(start)
        held.encoder = copy.deepcopy(start.encoder)
        held.optimizer = torch.optim.SGD(held.encoder.parameters(), 1e-3)
        held.tables = copy.deepcopy(start.tables)
        step = ladder.start(rung, held)
        for number in range(3):
            torch.manual_seed(number)  # of the encoder's dropout
            dx, loss = step()
        table = held.table(rung.table)
        rows = table.rows(0, table.labels)
        found[rung.key] = dx, None if loss is None else float(loss), rows, table.momentum
    return found


def test_exact_rungs_agree(stepped: dict) -> None:
    dx, loss, weight, momentum = stepped["plain", "fp32"]
    assert loss == pytest.approx(8 * 37 * 0.69, rel=0.05)  # fresh tables know nothing
    for (name, dtype), (own, own_loss, rows, held) in stepped.items():
        if dtype == "fp32":
            torch.testing.assert_close(own, dx, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(rows, weight, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(held, momentum, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(own, dx, rtol=0.1, atol=0.02)
        assert (own_loss is not None) == (name in LOSSES)
        if own_loss is not None:
            assert own_loss == pytest.approx(loss, rel=1e-5 if dtype == "fp32" else 1e-3)


def test_the_compiled_loss_is_the_plain_one() -> None:
    """By the same function, uncompiled: compiling takes minutes on some machines."""
    rung = next(rung for rung in ladder_rungs.rungs_of("cpu") if rung.name == "compiled")
    with pytest.MonkeyPatch.context() as patch:
        compiled: list[object] = []
        patch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
        dx, loss = ladder.start(rung, ladder_rungs.make_held(ladder_rungs.TINY, "cpu"))()
    assert compiled == [ladder_rungs.dense_loss]
    plain, *_ = ladder_rungs.rungs_of("cpu")
    expected, total = ladder.start(plain, ladder_rungs.make_held(ladder_rungs.TINY, "cpu"))()
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(loss, total)


def test_rows_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "require_green", lambda tests: "green")
    monkeypatch.setattr(run, "commit", lambda root: "abc")
    monkeypatch.setattr(ladder.cases, "CEILING_SIZE", {"cpu": 16})
    monkeypatch.setattr(ladder, "peaks", lambda *_: {("sparse", "fp32"): 2.5})
    arguments = ["--shape", "tiny", "--out", str(tmp_path), "--no-compile"]
    assert ladder.main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    ceiling, *rest = rows
    assert ceiling["impl"] == "mm" and {row["op"] for row in rows} == {"ladder"}
    names = ["plain", "accumulated", "sparse", "sampled", "none", "fused", "fused"]
    assert [row["impl"] for row in rest[::4]] == names
    assert [row["phase"] for row in rest] == ["step", "encoder", "table", "optimizer"] * 7
    by = {(row["impl"], row["dtype"], row["phase"]): row for row in rest}
    for name, dtype in {(row["impl"], row["dtype"]) for row in rest}:
        whole = float(by[name, dtype, "step"]["ms_p50"])
        parts = [float(by[name, dtype, part]["ms_p50"]) for part in ladder.PARTS]
        assert min(parts) > 0 and 0.2 * whole < sum(parts) < 5 * whole
        assert by[name, dtype, "table"]["tflops"] and not by[name, dtype, "step"]["tflops"]
    assert by["sampled", "fp32", "step"]["peak_mb"] == "2.5"
    told = capsys.readouterr().out
    assert "load average" in told and "at commit abc" in told
    table = [line[2:-2].split(" | ") for line in told.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in table[1:]] == names and {len(cells) for cells in table} == {9}
    assert table[1][-1] == "1.00×" and table[3][7] == "2.5" and table[1][7] == "-"
    assert plot.shares(plot.read_rows(path, dirty=True))  # rows without a rate are passed by


def test_a_sampled_loss_costs_its_share() -> None:
    assert ladder._mixed([1.0, 2.0], [101.0, 2.0]) == pytest.approx([2.0, 2.0])


def test_the_peak_counts_the_table_and_what_a_step_holds() -> None:
    setting = ladder_rungs.Setting(ladder_rungs.Shape("small", 64, 16_384, 64), 1, 4)
    (rung,) = (rung for rung in ladder_rungs.rungs_of("cpu") if rung.key == ("fused", "fp32"))
    found = ladder.peaks(setting, "cpu", [rung])
    if not found:
        pytest.skip("the platform cannot reset the mark")
    table = 4 * 2 * 16_384 * 64 / 1e6  # with its momentum
    logits = 4 * 16_384 * 64 / 1e6
    assert table < found[rung.key] < table + 2 * logits + 2


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.main(["--shape", "huge"]) == 2
    assert "--shape: expected one of 64k-L3-t16, tiny, got huge" in capsys.readouterr().err


def test_marks_add_up_what_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0, 1, 3, 7, 15])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(now) * 1_000_000)
    marks = ladder.Marks("cpu")
    marks.begin()
    for part in ("encoder", "table", "encoder", "optimizer"):
        marks.reach(part)
    assert marks.times() == {"encoder": [5.0], "table": [2.0], "optimizer": [8.0]}
