"""Clocks: where the time of a run goes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


class Clock:
    """Wall clock of a run by part; every moment after `start` belongs to exactly one.

    Attributes:
        spent: seconds of each part up to its last change; `seconds()` is up to now.
    """

    def __init__(self) -> None:
        self.spent = {"train": 0.0, "evaluate": 0.0, "save": 0.0}
        self._part: str | None = None
        self._since = 0.0

    def start(self, part: str | None) -> str | None:
        """Count from now on for `part` (None: for nothing); return the part before."""
        before, now = self._part, time.perf_counter()
        if before is not None:
            self.spent[before] += now - self._since
        self._part, self._since = part, now
        return before

    def go_on(self, spent: Mapping[str, Any]) -> None:
        """Count on from the seconds of a run that was stopped."""
        self.spent |= {part: float(value) for part, value in spent.items() if part in self.spent}

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the block's time for `part`, and what follows for the part before."""
        before = self.start(part)
        try:
            yield
        finally:
            self.start(before)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, up to now."""
        self.start(self._part)
        return dict(self.spent)


class Deadline:
    """The end of the time that a command was given: one clock for all that it does.

    Args:
        seconds: from now on.
        now: what tells the time, in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._now = seconds, now
        self._begun = now()

    def left(self) -> float:
        """Return the seconds that are left; below 0 beyond the end."""
        return self._begun + self.seconds - self._now()

    @property
    def told(self) -> str:
        """What the user gave: `--minutes 10`."""
        return f"--minutes {self.seconds / 60:.3g}"


class Seconds:
    """Wall and CPU seconds of each part of the work; on a shared machine they differ."""

    def __init__(self) -> None:
        self.spent: dict[str, dict[str, float]] = {}

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Measure and log the block's time."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.spent[part] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        log.info(
            f"{part}: {self.spent[part]['wall']:.1f} s, {self.spent[part]['cpu']:.1f} s of CPU time"
        )
