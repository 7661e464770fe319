"""No test waits without a limit: a child that does not end is killed, and the test says so."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 300.0  # seconds for what takes a few on an idle machine


def status_of(
    pid: int, seconds: float = PATIENCE, told: Callable[[], str] = lambda: "it said nothing"
) -> int:
    """Wait for a forked child and return its exit status, -N where signal N ended it.

    Args:
        pid: of the child.
        seconds: after which it is killed and the test fails.
        told: what it printed; asked for where it does not end.
    """
    end = time.monotonic() + seconds
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            killed(pid)
            raise AssertionError(f"process {pid} still ran after {seconds:g} s: {told()}")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


def killed(pid: int) -> int:
    """Kill a forked child and return its exit status."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(true: Callable[[], object], seconds: float = PATIENCE, *, pause: float = 0.01) -> None:
    """Wait for what a loaded machine may take long to do: fail only after so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"it did not come within {seconds:g} s"
        time.sleep(pause)


@contextmanager
def limited(process: subprocess.Popen, seconds: float = PATIENCE) -> Iterator[None]:
    """Kill a process that the block waits for too long: what is read from it then ends."""
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
