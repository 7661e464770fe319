"""Parts of a run: started alone or by torchrun's agent, hit by a signal, and how they ended.

Every process is forked from this one, which has imported everything: starting Python and torch
takes seconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from moments import EVALUATION, OPENING, RUNNING, SAVE, STEP, Moments
from patience import PATIENCE, status_of
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# What torchrun imports when it starts.
import torch.distributed.elastic.agent.server.local_elastic_agent  # isort: skip
import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend  # isort: skip

from xmlkernels import dist
from xmlkernels.checkpoint import CheckpointFolder
from xmlkernels.cli import console
from xmlkernels.training.loop import train
from xmlkernels.training.stops import done

HOW = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESTARTS = 3  # by torchrun, of one part
STOPPED = re.compile(
    r"stopped at step ([\d,]+), whose checkpoint is written: go on from it with --resume \((\w+)\)"
    r"|stopped by (\w+); (?:no checkpoint was written yet|the checkpoints? .*|the run had finished)"
    r"|interrupted \((\w+)\)"  # before the run was opened
)


@dataclass(frozen=True)
class Blow:
    """A signal at a moment.

    Attributes:
        how: the signal.
        moment, number: when the run does this for so many times, from 1 on.
        wait: of the moment's usual length, how much goes by before.
        rank: of the process that is watched.
        alone: whether that process alone is hit, and torchrun restarts all; otherwise all are.
    """

    how: signal.Signals
    moment: str
    number: int
    wait: float
    rank: int = 0
    alone: bool = False

    @classmethod
    def draw(cls, chance: random.Random, usual: Moments, processes: int, **given: Any) -> Blow:
        """Draw a blow; `usual` are the moments of a run that nobody touched."""
        moment = given.get("moment") or chance.choice((STEP, STEP, SAVE, EVALUATION, OPENING))
        most = max(usual.count(moment) // 2, 1)
        drawn: dict[str, Any] = {
            "how": chance.choice(HOW),
            "moment": moment,
            "number": 0 if moment == OPENING else chance.randint(1, most),
            "wait": 0.8 * chance.random(),
            "rank": chance.randrange(processes),
            "alone": processes > 1 and chance.random() < 0.5,
        }
        return cls(**drawn | given)

    def __str__(self) -> str:
        return self.how.name + (f" to process {self.rank} alone" if self.alone else "")


class Part:
    """One start of a run, by one process or by torchrun's agent with several.

    Args:
        config: of the run.
        processes: how many train it.
        log: what they print is added to this file.
    """

    def __init__(self, config: Any, processes: int, log: Path) -> None:
        self.config, self.processes, self.log = config, processes, log
        self.moments = Moments(processes)
        self._begin = log.stat().st_size if log.exists() else 0
        self._status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run() if processes == 1 else self._launch()

    # In the children

    def _run(self) -> NoReturn:
        status = 70
        try:
            self._train(0)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            self.moments.ends(0, status)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _train(self, rank: int) -> None:
        _print_to(self.log)

        def work() -> None:
            self.moments.watch(rank)  # here a signal is answered
            if self.processes > 1:
                torch.set_num_threads(1)
                dist.start(torch.device("cpu"), self.config.timeout)
            train(self.config)
            done()
            dist.wait()

        console.command(work, several=True)

    def _launch(self) -> NoReturn:
        """Run as torchrun does, but fork the workers."""
        status = 1
        try:
            _print_to(self.log.with_name("torchrun"))
            how = LaunchConfig(
                1,
                1,
                self.processes,
                run_id=str(os.getpid()),
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                max_restarts=RESTARTS,
                monitor_interval=0.05,
                start_method="fork",
                logs_specs=DefaultLogsSpecs(log_dir=tempfile.mkdtemp(dir=self.log.parent)),
            )
            elastic_launch(how, self._work)()
            status = 0
        except SignalException as stop:
            status = 128 + stop.sigval
        finally:
            os._exit(status)

    def _work(self) -> None:
        """Be a worker: the agent waits for the end of this function, or for another status."""
        rank, leave = int(os.environ["RANK"]), os._exit

        def told(status: int) -> NoReturn:
            self.moments.ends(rank, status)
            if status == 0:
                raise _Done
            leave(status)

        os._exit = told  # type: ignore[assignment]
        try:
            self._train(rank)
        except _Done:
            pass
        except SystemExit as end:
            self.moments.ends(rank, int(end.code or 0))
            raise
        finally:
            os._exit = leave

    # In the process that started them

    def runs(self) -> bool:
        """Whether it has not ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is None

    def end(self) -> int:
        """Wait for its end; return the status."""
        if self._status is None:
            self._status = status_of(self.pid, told=self.told)
        return self._status

    def told(self) -> str:
        """Return what its processes have printed."""
        with open(self.log, "rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def strike(self, blow: Blow, usual: float, attempt: int) -> str | None:
        """Hit it.

        Args:
            usual: seconds that the blow's moment takes.
            attempt: hit this start or a later one.

        Returns:
            The moment that was hit; None where the run ended before.
        """
        look = self.moments
        if not look.reach(blow.moment, blow.number, blow.rank, attempt, self.runs):
            return None
        time.sleep(blow.wait * usual)
        if not self.runs() or look.statuses()[blow.rank] != RUNNING:
            return None
        moment, pids = look.now(blow.rank), look.pids()
        if blow.alone:
            targets = [pids[blow.rank]]
        elif blow.how == signal.SIGKILL:
            targets = [self.pid, *pids] if self.processes > 1 else [self.pid]
        else:
            targets = [self.pid]
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, blow.how)
        if blow.how == signal.SIGKILL:
            until(lambda: _gone(pids[blow.rank]), "a killed process has not gone")
            moment = look.now(blow.rank)
        return moment

    def check(self, blow: Blow, attempt: int) -> None:
        """Assert that the part ended, or began anew, as it must after a blow that hit it.

        Args:
            attempt: which start was hit.
        """
        look, stops = self.moments, blow.how != signal.SIGKILL
        if blow.alone:
            # torchrun starts all again; a run that had nothing left to do has ended.
            until(lambda: look.attempts() > attempt or not self.runs(), self.told)
            if look.attempts() == attempt and self.end() == 0:
                return  # its work was done
        else:
            status = self.end()
            if self.processes > 1 and not stops:
                until(lambda: all(map(_gone, look.pids())), "a killed process has not gone")
            if status == 0:
                return  # its work was done
            assert status == (128 + blow.how if stops else -blow.how), (status, self.told())
            if stops:
                assert set(look.statuses()) <= {128 + blow.how, 0}, (look.statuses(), self.told())
                if look.statuses()[0] == 0:
                    return  # its work was done: the first writes it, and ends last but for a wait
        told = self.told()
        assert "Traceback" not in told, told
        # Where one alone is stopped, torchrun may end the first before it has said so.
        if stops and not blow.alone:
            self._check_stop(blow, told)

    def _check_stop(self, blow: Blow, told: str) -> None:
        found = list(STOPPED.finditer(told))
        assert found, (self.moments.statuses(), told)
        step, how, early, earlier = found[-1].groups()
        assert (how or early or earlier) == blow.how.name, told
        assert not earlier or blow.moment == OPENING, told
        if step:
            state = CheckpointFolder(Path(self.config.output) / "checkpoint").load()[1]
            assert state["steps"] == int(step.replace(",", "")), told


class _Done(BaseException):
    """A worker's work is done."""


def _print_to(path: Path) -> None:
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _gone(pid: int) -> bool:
    """Whether a process has ended, also where nobody has asked for its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def until(true: Callable[[], bool], told: str | Callable[[], str]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, told if isinstance(told, str) else told()
        time.sleep(0.002)
