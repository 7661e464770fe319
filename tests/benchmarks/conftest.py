"""Fixtures of the benchmarks' tests."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_machine import SHAPE, Machine

from benchmarks import card, cases, children, gpu_report


@pytest.fixture(autouse=True)
def tables_alone(caplog: pytest.LogCaptureFixture) -> None:
    """On a slow machine long work tells how far it is, among the lines that are measured."""
    caplog.set_level(logging.WARNING, "xmlkernels")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(children, "Child", found.child)
    monkeypatch.setattr(gpu_report, "time", SimpleNamespace(monotonic=found.monotonic))
    monkeypatch.setattr(card, "find", lambda: card.Card("fake-card", 80 << 30))
    only = replace(cases.BENCHMARKS["bce_step"], gpu_shapes=(SHAPE,))
    monkeypatch.setitem(cases.BENCHMARKS, "bce_step", only)
    return found
