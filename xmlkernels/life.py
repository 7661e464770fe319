"""Beat for a process from beside it: a child that lives and stands still with its parent.

A thread of the process itself beats no more while a call keeps Python's lock (a large sort, a
compiler), though it works. The child has a lock of its own. It beats as long as the parent lives
and is not stopped (SIGSTOP, a debugger), which it reads from Linux's /proc, and is killed with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STILL = "TtZX"  # states of proc_pid_stat(5): stopped, traced, ended
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Beater:
    """A child process that beats for this one.

    Start it before there are threads, a card or large tensors: it is a fork, which holds what the
    process held then and uses none of it.

    Args:
        connect: makes, in the child, what to call with each number, from 1 on.
        interval: seconds between two beats.
    """

    @staticmethod
    def possible() -> bool:
        """Return whether this system tells how a process fares."""
        return Path("/proc/self/stat").exists()

    def __init__(self, connect: Callable[[], Callable[[int], None]], interval: float) -> None:
        parent, library = os.getpid(), ctypes.CDLL(None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which the child does not have
            self._pid = os.fork()
        if self._pid == 0:
            try:
                library.prctl(_DEATH_SIGNAL, signal.SIGKILL)
                _beat(parent, connect, interval)
            finally:
                os._exit(0)

    def stop(self) -> None:
        """End the child."""
        pid, self._pid = self._pid, 0
        if pid:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _beat(parent: int, connect: Callable[[], Callable[[int], None]], interval: float) -> None:
    # A signal to the group is the parent's; what it holds open ends with it.
    os.setsid()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 4096)
    told, number = connect(), 0
    while os.getppid() == parent:
        if moves(parent):
            number += 1
            told(number)
        time.sleep(interval)


def moves(pid: int) -> bool:
    """Return whether a process lives and is not stopped."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return told.rpartition(")")[2].split()[0] not in _STILL
