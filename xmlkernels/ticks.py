"""How far a long piece of work has come: a line now and then, told through `logging`.

At level INFO a line comes every ten seconds at most. Whoever sets the package's logger to LIVE gets
one every second, to show it in one place; the command line does so on a terminal.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from xmlkernels.memory import resident_memory

LIVE = 15  # between DEBUG and INFO: lines that replace one another
_INTERVAL, _LIVELY = 10.0, 1.0
_AT_ONCE = 32  # items that are counted together: a look at the clock for each would be dear

T = TypeVar("T")
_over: ContextVar[Callable[[], bool] | None] = ContextVar("over", default=None)


class TimeOver(Exception):
    """The time for a piece of work is over: what it has done so far is of no use."""


@contextmanager
def given_up(over: Callable[[], bool]) -> Iterator[None]:
    """Let the work that is counted inside the block end by `TimeOver` as soon as `over` says so.

    It ends between two of its pieces.
    """
    token = _over.set(over)
    try:
        yield
    finally:
        _over.reset(token)


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
        total: pieces of it; None where nobody knows.
        unit: what the pieces are.
        share: how much of the work is done, from 0 to 1, where there is no total; it may not know
            either.
    """

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        total: int | None,
        unit: str,
        *,
        share: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.log, self.what, self.total, self.unit, self._share = log, what, total, unit, share
        self.done, self._lock = 0, threading.Lock()
        self._over = _over.get()  # here: threads that count have no such context
        self._began = self._told = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count pieces that are done, and tell where it is time to.

        Of 0 it tells that the work still goes on.

        Raises:
            TimeOver: inside `given_up`, when its time is over and pieces are left.
        """
        every, level = interval(self.log)
        with self._lock:
            self.done += count
            now = time.monotonic()
            ended = self.total is not None and self.done >= self.total
            if not ended and self._over is not None and self._over():
                raise TimeOver
            if ended or now - self._told < every:
                return
            self._told = now
            line = self._line(now - self._began)
        self.log.log(level, line)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count them as they are taken."""
        waiting = 0
        for item in items:
            yield item
            waiting += 1
            if waiting == _AT_ONCE:
                self.add(waiting)
                waiting = 0
        if waiting:
            self.add(waiting)

    def _line(self, spent: float) -> str:
        share = self._share() if self.total is None else self.done / max(self.total, 1)
        of = "" if self.total is None else f" of {self.total:,}"
        told = "" if share is None else f" ({100 * share:.0f}%)"
        speed = self.done / max(spent, 1e-9)
        rate = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        left = "" if not share else f"  about {duration(spent / share - spent)} left"
        return (
            f"{self.what}: {self.done:,}{of} {self.unit}{told}  {rate} {self.unit}/s"
            f"{memory_held()}{left}"
        )
