"""Fixtures of the benchmarks' tests."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_machine import SHAPE, Machine

from benchmarks import card, cases, children, gpu_report


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(children, "Child", found.child)
    monkeypatch.setattr(gpu_report, "time", SimpleNamespace(monotonic=found.monotonic))
    monkeypatch.setattr(card, "find", lambda: card.Card("fake-card", 80 << 30))
    only = replace(cases.BENCHMARKS["bce_step"], gpu_shapes=(SHAPE,))
    monkeypatch.setitem(cases.BENCHMARKS, "bce_step", only)
    return found
