"""Time the figures to reach on a card, then test every op there.

    python3 benchmarks/gpu_report.py [--stage goals|card|all] [--out DIR] [--op OP …]
        [--minutes M] [--commit HASH] [--device cpu]

goals (4.75 minutes): builds the libraries, checks each op with a figure to reach against plain
PyTorch in the process that times it, then its rows and its peers'. card (4.25 minutes): the tests
marked `card`, the sanitizers, and of the other tests and rows as many as the time allows. all (9.4
minutes): one after the other, and then the rows of every op. No minute is lost where a stage ends
early. `--device cpu` tries all of it without a card on tiny shapes, whose rows are named `trial-…`,
in a tree whose CPU library is built.

Needs torch, numpy, scipy, triton and pytest; to build, setuptools, cmake, ninja, pybind11, a C++
compiler and, for the CUDA C++ ops, nvcc; pytest-xdist where the tests are to share the processors;
no network. It installs nothing: the libraries are built into this tree. Rows go to DIR/<card>.csv
as they are measured, so that a run cut short keeps them, and a roofline to DIR/<card>.png. Exit
status: 0 what was asked for was measured or tested, and nothing was wrong; 1 an op is wrong, its
tests are not green, or no row could be measured; 2 no CUDA device, or an input that cannot be used.
"""

import argparse
import datetime
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import card, cases, children, floors, gpu_session, gpu_tests, run, shapes
from xmlkernels.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
WORKER = "benchmarks/gpu_worker.py"
PLANS: dict[str, dict[str, float]] = {
    "goals": {
        "check": 95.0,  # imports, compiling and checks, of all ops together; the build beside them
        "ceilings": 15.0,
        "goal rows": 90.0,
        "library": 45.0,  # the ops of the CUDA library, whose build must have ended
        "peers": 30.0,
        "end": 10.0,
    },
    "card": {
        "tests": 140.0,  # of Triton's ops; the build beside them
        "library tests": 60.0,
        "sanitizers": 45.0,  # and what is left, to the other tests
        "end": 10.0,
    },
}
"""Seconds of each part by stage; what a quick one leaves over goes to those behind it."""
REST_S = 24.0  # of the rows without a figure to reach, at least, in stage all
LEAST_S = 8.0  # below, a worker would hardly have started


def whole_s(stage: str) -> float:
    """Return the seconds that a stage takes at most."""
    if stage == "all":
        return sum(sum(plan.values()) for plan in PLANS.values()) + REST_S
    return sum(PLANS[stage].values())


@dataclass
class Report:
    """What the stages share and find; times are in seconds of `time.monotonic`.

    Attributes:
        pace: times by which all parts take longer than planned.
        ends: when each part of the plan that is running ends.
    """

    card: card.Card
    out: Path
    date: str
    commit: str | None = None
    only: Sequence[str] | None = None
    pace: float = 1.0
    rows: list[run.Row] = field(default_factory=list)
    ceilings: floors.Ceilings = field(default_factory=floors.Ceilings)
    ends: dict[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file of the rows."""
        return self.out / f"{self.card.machine}.csv"

    @property
    def trial(self) -> bool:
        """Whether there is no card."""
        return self.card.device != "cuda"

    def begin(self, stage: str) -> None:
        """Begin a stage's plan."""
        at = time.monotonic()
        for name, seconds in PLANS[stage].items():
            at += seconds * self.pace
            self.ends[name] = at

    def until(self, name: str) -> Callable[[], float]:
        """Return what tells the seconds that are left until the end of a part."""
        return lambda: max(0.0, self.ends[name] - time.monotonic())

    def keep(self, row: run.Row) -> None:
        """Write a row to the file at once, and say it."""
        run.append(self.path, [row])
        self.rows.append(row)
        if row["op"] == floors.CEILING:
            self.ceilings.add(row)
            copy = f"{float(str(row['gbps'])):.0f} GB/s read and written"
            rate = copy if row["impl"] == "copy" else f"{float(str(row['tflops'])):.4g} TFLOP/s"
            say(f"  {row['impl']} {row['dtype']}: {rate}")
            return
        over = self.ceilings.times_floor(row)
        times = f"{row['ms_p50']:.3f} ms (p20 {row['ms_p20']:.3f}, p80 {row['ms_p80']:.3f})"
        multiple = "" if over is None else f", {over:.2f} x floor"
        say(f"  {row['impl']} {row['phase']} {row['dtype']}: {times}{multiple}")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


class Build:
    """The build of the CPU and CUDA libraries in place, beside all else.

    A failure is told and ends nothing: Triton's ops need no library.
    """

    def __init__(self, trial: bool) -> None:
        command = children.python("setup.py", "-q", "build_ext", "--inplace")
        if trial:  # as they are: a trial changes nothing in the tree
            command = children.python("-m", "xmlkernels.ops")
        # It gives way to the processes that time.
        self._child, self._told = children.Child(command, nice=True), False
        self._done = "left as it was" if trial else "done"

    def ended(self, limit_s: float = 0.0) -> bool:
        """Wait for its end; say how it ended, once."""
        ends = time.monotonic() + limit_s
        while self._child.read(ends - time.monotonic()) is not None:
            pass
        status = self._child.status
        if status is not None and not self._told:
            self._told = True
            lines = [line for line in self._child.end().splitlines() if line.strip()]
            how = self._done if status == 0 else f"failed with status {status}"
            say("\n  ".join([f"build: {how}", *(lines if status == 0 else lines[-1:])]))
        return status is not None

    def stop(self) -> None:
        """End it where it still runs."""
        if not self._told:
            self._told = True
            say("build: not finished in time: ops of the libraries are missing or old")
            self._child.end()


def session_of(report: Report) -> gpu_session.Session:
    """Return a session whose rows go to the report."""
    memory = report.card.memory
    told = ["--device", report.card.device, "--date", report.date]
    told += ["--commit", report.commit] if report.commit else []
    told += ["--trial"] if report.trial else []

    def command(op: str, checked: bool) -> list[str]:
        names = [s.name for _, s in card.plan([op], memory, lambda _: None)]
        words = [word for name in names for word in ("--shape", name)]
        return children.python(WORKER, "--op", op, *words, *told, *["--checked"] * checked)

    return gpu_session.Session(command, say, report.keep)


def measure(
    report: Report,
    session: gpu_session.Session,
    op: str,
    shape: shapes.Shape,
    round_: str,
    left: Callable[[], float],
) -> None:
    """Measure one of the rounds of one op at one shape, where the time is there."""
    if op in session.out:
        return
    what = f"{op} {shape.name}, {round_}"
    if left() < LEAST_S * min(1.0, report.pace):
        say(f"{what}: not measured, the time is up")
        return
    say(f"{what} (B {shape.B}, L {shape.L:,}, D {shape.D})")
    session.order(op, {"shape": shape.name, "round": round_}, left)


def measure_ceilings(report: Report, session: gpu_session.Session, op: str) -> None:
    """Measure the card's own rates in an op's worker, once."""
    if report.ceilings.gbps is None and op not in session.out:
        say("ceilings")
        session.order(op, {"ceilings": True}, report.until("ceilings"))


def goals(report: Report) -> bool:
    """Measure the figures to reach and the peers; return whether nothing was wrong."""
    report.begin("goals")
    build, session = Build(report.trial), session_of(report)
    try:
        wanted = [op for op in cases.BENCHMARKS if any(goal.op == op for goal in floors.GOALS)]
        wanted = list(report.only or wanted)
        library = [op for op in wanted if op in gpu_tests.library_ops(ROOT)]
        first = [op for op in wanted if op not in library]
        items = card.plan(wanted, report.card.memory, say)
        say("checks against plain PyTorch, op by op")
        for op in first:
            session.start(op)
        ready = [op for op in first if session.ready(op, report.until("check"))]
        for op in ready[:1]:
            measure_ceilings(report, session, op)
        for op, shape in items:
            if op in first:
                measure(report, session, op, shape, "goal", report.until("goal rows"))
        peers = [(op, shape) for op, shape in items if op in first]
        while library or peers:
            spare = report.until("goal rows")() >= LEAST_S
            if library and (build.ended() or not peers or not spare):
                # Past this, no worker of theirs would have time to start.
                build.ended(max(0.0, report.until("library")() - 25.0 * report.pace))
                measure_library(report, session, library, items)
                peers += [(op, shape) for op, shape in items if op in library]
                library = []
            elif peers:
                until = report.until("goal rows" if library else "peers")
                measure(report, session, *peers.pop(0), "peers", until)
        return not session.wrong
    finally:
        session.close()
        build.ended()
        build.stop()


def measure_library(
    report: Report,
    session: gpu_session.Session,
    library: Sequence[str],
    items: Sequence[tuple[str, shapes.Shape]],
) -> None:
    """Check and measure the figures to reach of the CUDA library's ops."""
    for op in library:
        session.start(op)
    for op in library:
        if session.ready(op, report.until("library")):
            measure_ceilings(report, session, op)
    for op, shape in items:
        if op in library:
            measure(report, session, op, shape, "goal", report.until("library"))


def test_on_card(report: Report) -> dict[str, gpu_tests.Verdict]:
    """Run the tests marked `card`, the sanitizers and of the others what the time allows."""
    report.begin("card")
    build = Build(report.trial)
    say("tests on the card")
    try:
        return gpu_tests.run_card(ROOT, build.ended, report.until, say)
    finally:
        build.ended()
        build.stop()


def rest(report: Report, green: Sequence[str], ends: float) -> bool:
    """Measure what has no figure to reach, in ops whose tests are green, while there is time."""
    session = session_of(report)

    def left() -> float:
        return max(0.0, ends - time.monotonic())

    aims = {goal.op for goal in floors.GOALS}
    items = card.plan([op for op in cases.BENCHMARKS if op in green], report.card.memory, say)
    try:
        for rounds in (("goal", "peers"), ("rest",)):
            for op, shape in items:
                for round_ in rounds:
                    if round_ != "rest" and op in aims:
                        continue
                    if left() >= LEAST_S and not session.started(op):
                        session.start(op)
                    if session.started(op):
                        measure(report, session, op, shape, round_, left)
        return not session.wrong
    finally:
        session.close()


def finish(report: Report) -> None:
    """Show the table and the figures to reach, and draw the chart."""
    measured = [row for row in report.rows if row["op"] != floors.CEILING]
    say(
        "\nresults; x floor: median over the floor of this run's ceilings; +graph: replayed from "
        "one captured CUDA graph;"
    )
    say(
        "model x floor, GB memory, GB L2: by the bytes that the kernel's schedule moves between "
        "memory and L2, and between L2 and the processors (benchmarks/model.py): a model, never "
        "measured"
    )
    found = importlib.util.find_spec("benchmarks.model")
    model = importlib.import_module("benchmarks.model") if found else None
    for line in floors.table(measured, report.ceilings, model):
        say(line)
    for line in ("", *floors.verdicts(measured, report.ceilings)):
        say(line)
    say(f"rows in {report.path}")
    if importlib.util.find_spec("matplotlib") is None:
        say("no chart: matplotlib is not installed")
    elif measured and report.ceilings.gbps:
        from benchmarks import plot

        plot.roofline(report.rows, report.path.with_suffix(".png"))
        say(f"chart in {report.path.with_suffix('.png')}")


def stages(report: Report, stage: str) -> int:
    """Do what was asked for and return the exit status."""
    begin, right, green = time.monotonic(), True, True
    if stage in ("goals", "all"):
        right = goals(report)
    if stage in ("card", "all"):
        verdicts = test_on_card(report)
        green = bool(verdicts) and all(verdict.green for verdict in verdicts.values())
        for op, verdict in verdicts.items():
            if not verdict.green and any(row["op"] == op for row in report.rows):
                say(f"{op} is not green: its rows of this run are not to be used")
        if stage == "all":
            ends = begin + whole_s("all") * report.pace - PLANS["goals"]["end"]
            right &= rest(report, [op for op in verdicts if verdicts[op].green], ends)
    if stage == "card":
        return 0 if green else 1
    finish(report)
    measured = any(row["op"] != floors.CEILING for row in report.rows)
    return 0 if measured and right and green else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, out = (__doc__ or "").split("\n")[0], ROOT / "benchmarks" / "results"
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_report.py", description=summary)
    add = parser.add_argument
    add("--stage", default="all", choices=["goals", "card", "all"])
    add("--out", type=Path, default=out, help="folder of <card>.csv and <card>.png")
    add(
        "--op",
        action="append",
        choices=list(cases.BENCHMARKS),
        help="of stage goals, one op; may be repeated",
    )
    add("--minutes", type=float, help="for all of it, in place of the stage's own")
    add("--commit", help="the tree's commit, for the rows, where the tree has no git folder")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a trial on tiny shapes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse(arguments)
    try:
        minutes = options.minutes
        if minutes is None:
            minutes = whole_s(options.stage) / 60
        if not 0 < minutes < float("inf"):
            raise InputError(
                "--minutes", "a number above 0", str(minutes), "leave it out for the stage's own"
            )
        found = card.find() if options.device == "cuda" else card.trial()
        card.check_out(options.out)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        pace = 60 * minutes / whole_s(options.stage)
        report = Report(found, options.out, now, options.commit, options.op, pace)
        run.check_results(report.path)
        memory = f"{found.memory / 2**30:.0f} GiB"
        say(f"{found.machine}, {memory}, torch {torch.__version__}, {minutes:.2f} minutes")
        return stages(report, options.stage)
    except InputError as error:
        print(f"benchmarks/gpu_report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
