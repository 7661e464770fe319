"""How far a long piece of work has come: a line now and then, told through `logging`.

At level INFO a line comes every ten seconds at most. Whoever sets the package's logger to LIVE gets
one every second, to show it in one place; the command line does so on a terminal.
"""

import logging
import threading
import time

from xmlkernels.memory import resident_memory

LIVE = 15  # between DEBUG and INFO: lines that replace one another
_INTERVAL, _LIVELY = 10.0, 1.0


def interval(log: logging.Logger) -> tuple[float, int]:
    """Return the seconds between lines, and the level that they are told at."""
    return (_LIVELY, LIVE) if log.isEnabledFor(LIVE) else (_INTERVAL, logging.INFO)


def memory_held() -> str:
    """Say what the process holds in memory, after two spaces; nothing where it is not known."""
    held = resident_memory()
    return "" if held is None else f"  {held / 2**20:,.0f} MB"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Ticks:
    """The lines of one piece of work; several threads may count.

    Args:
        log: the logger that tells them.
        what: is done.
        total: pieces of it.
        unit: what the pieces are.
    """

    def __init__(self, log: logging.Logger, what: str, total: int, unit: str) -> None:
        self.log, self.what, self.total, self.unit = log, what, total, unit
        self.done, self._lock = 0, threading.Lock()
        self._began = self._told = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count pieces that are done, and tell where it is time to."""
        every, level = interval(self.log)
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self.done >= self.total or now - self._told < every:
                return
            self._told = now
            line = self._line(now - self._began)
        self.log.log(level, line)

    def _line(self, spent: float) -> str:
        share, speed = self.done / max(self.total, 1), self.done / max(spent, 1e-9)
        left = (self.total - self.done) / max(speed, 1e-9)
        return (
            f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({100 * share:.0f}%)  "
            f"{speed:,.0f} {self.unit}/s{memory_held()}  about {duration(left)} left"
        )
