"""Commands in processes of their own, each under a time limit."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

ROOT = Path(__file__).resolve().parents[1]
_TAIL = 40
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: exit status, negative for a signal; None where the time limit ended it.
        lines: everything it wrote to its standard output.
        errors: the last lines of its standard error.
    """

    status: int | None
    lines: tuple[str, ...]
    errors: str

    @property
    def last(self) -> str:
        """Return the last line that is not empty, of standard error if it has one."""
        told = [line.strip() for line in (*self.lines, *self.errors.splitlines()) if line.strip()]
        return told[-1] if told else "it said nothing"


class Child:
    """A command in the project's folder that is read line by line, and may be written to.

    Attributes:
        status: exit status once all that it wrote has been read; None before.
    """

    def __init__(
        self, command: Sequence[str], *, threads: int | None = None, nice: bool = False
    ) -> None:
        """Start it.

        Args:
            command: the program and its arguments.
            threads: of its arithmetic on the CPU; its own choice when not given.
            nice: whether it gives way to other processes.
        """
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.status: int | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [*(["nice"] if nice else []), *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._waiting: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        arguments = (self._process.stdout, self._waiting)
        threading.Thread(target=_read, args=arguments, daemon=True).start()

    def send(self, line: str) -> None:
        """Write one line to it; a command that has ended does not hear it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def read(self, limit_s: float) -> str | None:
        """Return its next line; None where it has ended (see `status`) or the time is up."""
        if self.status is not None:
            return None
        try:
            line = self._waiting.get(timeout=max(0.0, limit_s))
            if line is None:
                self.status = self._process.wait(timeout=max(0.1, limit_s))
            return line
        except (queue.Empty, subprocess.TimeoutExpired):
            return None

    def end(self) -> str:
        """End it with all that it started, and return the last lines of its standard error."""
        # Its own session: what it started (pytest's children, a sanitizer's target) ends with it,
        # and nothing else does.
        _kill(self._process)
        if self._errors.closed:
            return ""
        with self._errors:
            self._errors.seek(0)
            return "\n".join(self._errors.read().decode(errors="replace").splitlines()[-_TAIL:])


def run(
    command: Sequence[str],
    limit_s: float,
    on_line: Callable[[str], None] | None = None,
    threads: int | None = None,
) -> Outcome:
    """Run a command in the project's folder and hand on its output line by line.

    Past the limit the command is killed with all that it started, and what it wrote until then is
    kept.

    Args:
        command: the program and its arguments.
        limit_s: seconds of wall clock.
        on_line: called with each line, in this thread.
        threads: of its arithmetic on the CPU; its own choice when not given.
    """
    ends = time.monotonic() + limit_s
    lines: list[str] = []
    child = Child(command, threads=threads)
    try:
        while (line := child.read(ends - time.monotonic())) is not None:
            lines.append(line)
            if on_line is not None:
                on_line(line)
    finally:
        tail = child.end()
    return Outcome(child.status, tuple(lines), tail)


def run_together(commands: Mapping[Name, Sequence[str]], limit_s: float) -> dict[Name, Outcome]:
    """Run several commands at once, each under the same limit and on its share of the processors.

    Returns:
        Outcomes by the given names, in the given order.
    """
    if not commands:
        return {}
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    with ThreadPoolExecutor(len(commands)) as pool:
        started = {
            name: pool.submit(run, command, limit_s, None, threads)
            for name, command in commands.items()
        }
        return {name: future.result() for name, future in started.items()}


def python(*arguments: str) -> list[str]:
    """Return the command that runs this same Python."""
    return [sys.executable, *arguments]


def _read(stream: IO[str], waiting: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            waiting.put(line.rstrip("\n"))
    waiting.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
