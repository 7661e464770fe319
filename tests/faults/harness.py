"""Run readers on damaged files and count how they end, each batch in a forked process with limits.

An end is good when the reader refuses the file in a sentence (InputError on one line), or takes it
and what it returns is consistent. Everything else is bad: another exception, a signal, too much
time, too much memory.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import resource
import select
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mutate import mutate
from patience import killed, status_of

from xmlkernels import InputError

AT_ONCE = 40  # mutations of one process


@dataclass(frozen=True)
class Kind:
    """One kind of file or folder.

    Attributes:
        name: of the kind.
        make: writes a good one into a folder, by the project's own writers.
        consume: reads it and passes it to its user; asserts what must be true of what it accepted.
        reseal: renews sizes and checksums that the folder itself contains, so that half of the
            damages are met behind those checks; None where there are none.
    """

    name: str
    make: Callable[[Path], None]
    consume: Callable[[Path], Any]
    reseal: Callable[[Path], None] | None = None


@dataclass
class Report:
    """How damaged files ended: counts by kind and end, and a line per bad end."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{kind:24} {end:10} {count}" for (kind, end), count in sorted(self.ends.items())]
        return "\n".join([*lines, f"bad: {len(self.bad)}", *self.bad])


def run(
    kinds: Sequence[Kind],
    count: int,
    seed: int,
    work: Path,
    *,
    seconds: float = 20,
    megabytes: int = 768,
) -> Report:
    """Damage good files `count` times, kind by kind.

    Args:
        kinds: what to damage.
        count: damages in all.
        seed: of the damages.
        work: an empty folder.
        seconds: of processor time per damaged file.
        megabytes: address space beyond what the process has at its start.
    """
    report = Report()
    before = _threads()  # of whoever calls; no reader has to do with them
    for kind in kinds:
        # A good one is taken, and what it needs is imported and compiled before the first fork.
        torch.set_num_threads(1)  # whatever the kind before has left
        _consume(kind, make_good(kind, work))
        torch.set_num_threads(1)
        limit = time.monotonic() + 10  # what has been joined may still be listed
        while len(names := _threads()) > len(before) and time.monotonic() < limit:
            time.sleep(0.01)
        if len(names) > len(before):
            raise AssertionError(f"{kind.name}: a fork may wait for ever for threads: {names}")
    # What the children inherit is theirs to read: to collect it would copy every page of it.
    gc.collect()
    gc.freeze()
    for number, kind in enumerate(kinds):
        share = range(count * number // len(kinds), count * (number + 1) // len(kinds))
        for first in range(share.start, share.stop, AT_ONCE):
            _batch(
                kind,
                range(first, min(first + AT_ONCE, share.stop)),
                seed,
                work,
                seconds,
                megabytes,
                report,
            )
    return report


def _threads() -> list[str]:
    """Return the names of this process's threads."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def make_good(kind: Kind, work: Path) -> Path:
    """Write the good files of a kind; return their folder."""
    good = work / "good" / kind.name.replace(" ", "-")
    good.mkdir(parents=True)
    kind.make(good)
    return good


def damage(kind: Kind, case: int, seed: int, work: Path) -> tuple[Path, str]:
    """Damage a copy of the good files.

    Returns:
        Its folder, and what was done: the same for the same kind, case and seed.
    """
    target = work / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / "good" / kind.name.replace(" ", "-"), target)
    own = random.Random(f"{seed} {kind.name} {case}")
    done = mutate(target, own)
    if kind.reseal is not None and own.random() < 0.5:
        kind.reseal(target)
        done += ", sealed again"
    return target, done


def _batch(
    kind: Kind, cases: range, seed: int, work: Path, seconds: float, megabytes: int, report: Report
) -> None:
    """Run cases in a process; where it dies, run the rest in a new one."""
    while cases:
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(kind, cases, seed, work, megabytes, os.fdopen(writer, "wb"))
        os.close(writer)
        with os.fdopen(
            reader, "rb", buffering=0
        ) as answers:  # select must see what was not yet taken
            done = _listen(kind, cases, seed, child, answers, seconds, report)
        cases = cases[done:]


def _listen(
    kind: Kind,
    cases: range,
    seed: int,
    child: int,
    answers: IO[bytes],
    seconds: float,
    report: Report,
) -> int:
    """Read the answers of a process.

    Returns:
        How many cases it finished, including one that killed it.
    """
    done, end, what, began, used = 0, "", "", time.monotonic(), 0.0
    while done < len(cases):
        if not select.select([answers], [], [], 0.2)[0]:
            # Of the processor, so that a busy machine is no fault; by the clock, where a reader
            # waits for ever.
            if _processor(child) - used > seconds or time.monotonic() - began > 6 * seconds:
                end = "time"
                break
            continue
        if not (line := answers.readline()):
            break
        what, end = json.loads(line)
        if end:
            _count(report, kind, cases[done], seed, what, end)
            done, what, end, began, used = done + 1, "", "", time.monotonic(), _processor(child)
    status = killed(child) if end == "time" else status_of(child)
    if done < len(cases):
        _count(
            report,
            kind,
            cases[done],
            seed,
            what,
            end or f"signal {status}",
        )
        done += 1
    return done


def _processor(child: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _count(report: Report, kind: Kind, case: int, seed: int, what: str, end: str) -> None:
    good = end in ("refused", "taken")
    report.ends[kind.name, end if good else "bad"] += 1
    if not good:
        report.bad.append(f"{kind.name} {case} (seed {seed}), {what}: {end}")


def _child(
    kind: Kind, cases: range, seed: int, work: Path, megabytes: int, answers: IO[bytes]
) -> None:
    try:
        faulthandler.disable()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for case in cases:
            folder, done = damage(kind, case, seed, work)
            _tell(answers, done, "")  # what was done, before the reader may die of it
            _tell(answers, done, end_of(kind, folder))
    finally:
        os._exit(0)


def _tell(answers: IO[bytes], done: str, end: str) -> None:
    answers.write(json.dumps([done, end]).encode() + b"\n")
    answers.flush()


def end_of(kind: Kind, folder: Path) -> str:
    """Return "refused" or "taken", or what was bad."""
    try:
        _consume(kind, folder)
    except InputError as error:
        text = str(error)
        if "\n" in text:
            return f"a message of several lines: {text!r}"
        # Good files need next to nothing: one that asks for all the memory there is should not have
        # got so far.
        return (
            f"memory: {text}"
            if "fits into memory" in text or "memory that are free" in text
            else "refused"
        )
    except MemoryError:
        return f"memory: {_place()}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!r} {_place()}"
    return "taken"


def _consume(kind: Kind, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.consume(folder)


def _place() -> str:
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if "xmlkernels" in Path(frame.filename).parts]
    return " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed((ours or frames)[-4:])
    )
