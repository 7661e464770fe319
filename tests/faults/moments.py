"""What a run is doing, told to the process that stops it: memory that both share.

A run's clock says what each moment belongs to. `Moments.watch`, called in a forked child, passes
that on; `Moments.reach`, called in the process that forked it, waits for a moment.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

import numpy as np
from patience import PATIENCE

from xmlkernels.training.clock import Clock

OPENING, STEP, SAVE, EVALUATION, END = MOMENTS = ("opening", "step", "save", "evaluation", "end")
PARTS = {"train": STEP, "save": SAVE, "evaluate": EVALUATION, None: END}
RUNNING = -1  # the status of a process that has not ended
_ATTEMPT, _PID, _STATUS, _NOW, _SINCE, _COUNTS = range(6)
_TIMES = _COUNTS + len(MOMENTS)
_WAIT = 0.0002  # seconds between two looks; a save of a tiny run takes a few milliseconds


class Moments:
    """What each process of a run does, how often it began to, and for how long.

    Args:
        processes: of the run.
    """

    def __init__(self, processes: int) -> None:
        width = _TIMES + len(MOMENTS)
        shared = mmap.mmap(-1, processes * width * 8)  # anonymous, and shared with every fork
        self._rows = np.frombuffer(shared, np.int64).reshape(processes, width)
        self._rows[:, _STATUS] = RUNNING

    # In the run

    def watch(self, rank: int) -> None:
        """Tell of this process from now on; each start of it counts as one attempt."""
        row, start = self._rows[rank], Clock.start
        row[_COUNTS:] = 0
        row[_NOW], row[_SINCE] = MOMENTS.index(OPENING), time.monotonic_ns()
        row[_STATUS], row[_PID] = RUNNING, os.getpid()
        row[_ATTEMPT] += 1  # last: from now on the others look at the rest

        def told(clock: Clock, part: str | None) -> str | None:
            now = MOMENTS.index(PARTS[part])
            if now != row[_NOW]:
                self._enter(row, now)
            return start(clock, part)

        Clock.start = told  # type: ignore[method-assign]

    def ends(self, rank: int, status: int) -> None:
        """Tell with which status this process ends."""
        self._rows[rank, _STATUS] = status

    @staticmethod
    def _enter(row: np.ndarray, now: int) -> None:
        time_ns = time.monotonic_ns()
        row[_TIMES + row[_NOW]] += time_ns - row[_SINCE]
        row[_NOW], row[_SINCE] = now, time_ns
        row[_COUNTS + now] += 1

    # In the process that started it

    def now(self, rank: int = 0) -> str:
        """Return what the process does, or did when it died."""
        return MOMENTS[self._rows[rank, _NOW]]

    def attempts(self, rank: int = 0) -> int:
        """Return how often the process was started."""
        return int(self._rows[rank, _ATTEMPT])

    def pids(self) -> list[int]:
        """Return the ids of the processes."""
        return self._rows[:, _PID].tolist()

    def statuses(self) -> list[int]:
        """Return with which status each process ended by itself; RUNNING where it did not."""
        return self._rows[:, _STATUS].tolist()

    def count(self, moment: str, rank: int = 0) -> int:
        """Return how often the process came to a moment."""
        return int(self._rows[rank, _COUNTS + MOMENTS.index(moment)])

    def length(self, moment: str, rank: int = 0) -> float:
        """Return how many seconds a moment took on average."""
        spent = self._rows[rank, _TIMES + MOMENTS.index(moment)] / 1e9
        return float(spent / max(self.count(moment, rank), 1))

    def reach(
        self, moment: str, number: int, rank: int, attempt: int, runs: Callable[[], bool]
    ) -> bool:
        """Wait until a process comes to a moment for so many times.

        Args:
            moment, number: which, and for which time, from 1 on.
            rank: of the process.
            attempt: that it does so in this start or in a later one.
            runs: whether it still runs.

        Returns:
            Whether it came there, before patience ended.
        """
        end = time.monotonic() + PATIENCE
        while self.attempts(rank) < attempt or self.count(moment, rank) < number:
            if not runs() or time.monotonic() > end:
                return False
            time.sleep(_WAIT)
        return True
