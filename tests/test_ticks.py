"""Progress of long work: a line every ten seconds, or one a second where they replace another."""

import io
import logging

import pytest

from xmlkernels import ticks
from xmlkernels.cli import console
from xmlkernels.ticks import LIVE, Ticks

LOG = logging.getLogger("xmlkernels.ticks")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr(ticks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ticks, "resident_memory", lambda: 3 << 20)
    return now


@pytest.mark.parametrize(("level", "every"), [(logging.INFO, 10), (LIVE, 1)])
def test_lines_come_by_time(level, every, clock, monkeypatch):
    told: list[tuple[int, str]] = []
    monkeypatch.setattr(LOG, "log", lambda *record: told.append(record))
    monkeypatch.setattr(logging.getLogger("xmlkernels"), "level", level)
    LOG.manager._clear_cache()  # type: ignore[attr-defined]
    some = Ticks(LOG, "test", 1000, "documents")
    for _ in range(40):
        clock[0] += every / 4
        some.add(25)
    assert len(told) == 9  # the end is told by what comes next
    assert {number for number, _ in told} == {level}
    speed = 100 / every
    assert told[0][1].startswith(
        f"test: 100 of 1,000 documents (10%)  {speed:,.0f} documents/s  3 MB  about "
    )


def test_on_a_terminal_one_line_changes(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(console, "_console", console._Console(file=shown, force_terminal=True))
    handler = console._Printed()
    for number, text in ((LIVE, "step [1]"), (LIVE, "step [2]"), (logging.INFO, "done")):
        handler.emit(logging.LogRecord("x", number, "", 0, text, None, None))
        assert (handler.live is None) == (number == logging.INFO)
    assert "step [2]" in shown.getvalue() and shown.getvalue().rstrip().endswith("done")
