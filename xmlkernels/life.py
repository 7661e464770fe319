"""Beat for a process from beside it: a child that lives and stands still with its parent.

A thread of the process itself beats no more while a call keeps Python's lock (a large sort, a
compiler), though it works. The child has a lock of its own. It beats as long as the parent lives
and is not stopped (SIGSTOP, a debugger), which it reads from Linux's /proc, and is killed with it.

A process may live and stand still all the same: in a lock, in a sleep. `Turn` and `Idleness` say
where it stands and for how long it has done nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STILL = "TtZX"  # states of proc_pid_stat(5): stopped, traced, ended
_AT_WORK = "RD"  # of the same: it runs or wants to, it waits for a disk
_UNSEEN = 5.0  # seconds
_WORK = 0.02  # of a processor's time; below it nothing is done
# Threads that only serve the others: of gloo, and of torch's store.
_SERVANTS = ("gloo", "pt_gloo", "pt_tcpstore")
_PLACE = struct.Struct("Q")
_TICK = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
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


class Turn:
    """Where a process stands among the others, on a page that its child sees too.

    Attributes:
        count: messages of all processes that this one has come to.
        abreast: whether all processes do the same now, so that none may stand still.
        watcher: number of a thread that does no work of the process's own; 0 for none.
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def count(self) -> int:
        """Messages of all processes that this one has come to."""
        return self._read(0)

    @property
    def abreast(self) -> bool:
        """Whether all processes do the same now."""
        return bool(self._read(1))

    @property
    def watcher(self) -> int:
        """Number of a thread that does no work of the process's own."""
        return self._read(2)

    def arrive(self) -> None:
        """Come to the next message."""
        self._write(0, self.count + 1)

    def go(self, *, abreast: bool) -> bool:
        """Say whether all processes do the same from here on; return what was said before."""
        before = self.abreast
        self._write(1, abreast)
        return before

    def watched_by(self, thread: int) -> None:
        """Name the thread that does no work of the process's own."""
        self._write(2, thread)

    def _read(self, place: int) -> int:
        return int(_PLACE.unpack_from(self._page, place * _PLACE.size)[0])

    def _write(self, place: int, value: int) -> None:
        _PLACE.pack_into(self._page, place * _PLACE.size, value)


class Idleness:
    """How long a process and its children have done nothing where all processes do the same.

    Linux's /proc shows it. Work is a fiftieth of a processor's time or more, wanting it, or waiting
    for a disk. Threads that serve the other processes are not looked at, nor is the process that
    looks.

    Args:
        pid: the process.
        turn: of the process.
    """

    def __init__(self, pid: int, turn: Turn) -> None:
        self._pid, self._turn = pid, turn
        self._mark = self._looked = time.monotonic()
        self._spent = 0.0

    def seconds(self) -> float:
        """Return the seconds since it last worked; it must be called about once a second."""
        now = time.monotonic()
        spent, busy = self._look(self._pid)
        since, done = now - self._looked, spent - self._spent
        # Where nobody has looked for long, the process was stopped, and goes on.
        fresh = since > _UNSEEN or not self._turn.abreast
        if fresh or busy or done < 0 or done >= max(_TICK, _WORK * since):
            self._mark = now
        self._looked, self._spent = now, spent
        return now - self._mark

    def _look(self, pid: int) -> tuple[float, bool]:
        """Return the processor time of a process and its children, and whether one is at work."""
        spent, busy = 0.0, False
        for task in _listed(Path(f"/proc/{pid}/task")):
            told = _text(task / "stat")
            name, _, rest = told.partition("(")[2].rpartition(")")
            if not rest or name.startswith(_SERVANTS) or task.name == str(self._turn.watcher):
                continue
            places = rest.split()
            busy = busy or places[0] in _AT_WORK
            spent += _TICK * (int(places[11]) + int(places[12]))
            for child in _text(task / "children").split():
                if int(child) != os.getpid():
                    more, works = self._look(int(child))
                    spent, busy = spent + more, busy or works
        return spent, busy


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    """Read a file of a process, which may end meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""
