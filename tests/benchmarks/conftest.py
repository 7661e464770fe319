"""Fixtures of the benchmarks' tests."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_machine import SHAPE, Machine

from benchmarks import card, gpu_report, shapes
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
    monkeypatch.setitem(shapes.GPU_SHAPES, "bce_step", (SHAPE,))
    return found
