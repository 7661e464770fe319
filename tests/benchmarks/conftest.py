"""Fixtures of the benchmarks' tests."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_machine import SHAPE, Machine

from benchmarks import card, cases, gpu_report
from benchmarks.gpu_tests import Verdict


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
    only = replace(cases.BENCHMARKS["bce_step"], gpu_shapes=(SHAPE,))
    monkeypatch.setitem(cases.BENCHMARKS, "bce_step", only)
    return found
