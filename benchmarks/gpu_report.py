"""Build, test and time every op on a card, beside its peers and the card's ceilings.

    python3 benchmarks/gpu_report.py [--out DIR] [--op OP …] [--minutes 8.6] [--commit HASH]

Needs torch, numpy, scipy, triton and pytest; to build, setuptools, cmake, ninja, pybind11, a C++
compiler and, for the CUDA C++ ops, nvcc; no network. It installs nothing: the libraries are built
into this tree. Rows go to DIR/<card>.csv as they are measured, so that a run cut short keeps them,
and a roofline to DIR/<card>.png. Only ops whose tests pass on the card are timed. Exit status: 0
rows were measured and every op that was to be timed was green; 1 an op's tests are not green, or no
row could be measured; 2 no CUDA device, or an input that cannot be used.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import card, cases, children, floors, gpu_tests, gpu_worker, run, shapes
from xmlkernels.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
WORKER = "benchmarks/gpu_worker.py"
# Seconds that a stage may take at most; what a quick one leaves over goes to the measuring.
BUILD_S, TESTS_S, CEILINGS_S, END_S = 150.0, 180.0, 45.0, 20.0
LEAST_S = 12.0  # below, a worker would hardly have started


@dataclass
class Report:
    """What the stages share and find; `deadline` is in seconds of `time.monotonic`."""

    card: card.Card
    out: Path
    deadline: float
    date: str
    commit: str | None = None
    only: Sequence[str] | None = None
    rows: list[run.Row] = field(default_factory=list)
    ceilings: floors.Ceilings = field(default_factory=floors.Ceilings)

    @property
    def path(self) -> Path:
        """The file of the rows."""
        return self.out / f"{self.card.machine}.csv"

    def left(self, at_most: float = float("inf")) -> float:
        """Return the seconds of a stage.

        They are its own limit, or what is left of the whole less the end's share.
        """
        return max(0.0, min(at_most, self.deadline - END_S - time.monotonic()))

    def keep(self, row: run.Row) -> None:
        """Write a row to the file at once."""
        run.append(self.path, [row])
        self.rows.append(row)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def build(report: Report) -> None:
    """Build the CPU and CUDA libraries in place.

    A failure is told and ends nothing: Triton's ops need no library.
    """
    limit = report.left(BUILD_S)
    outcome = children.run(children.python("setup.py", "-q", "build_ext", "--inplace"), limit)
    if outcome.status is None:
        say(f"  not finished within {limit:.0f} s: ops of the libraries are missing or old")
    elif outcome.status:
        say(f"  failed with status {outcome.status}: {outcome.last}")
    else:
        for line in outcome.errors.splitlines():
            say(f"  {line}")
    loaded = children.run(children.python("-m", "xmlkernels.ops"), report.left(60))
    for line in loaded.lines or (f"the package cannot be loaded: {loaded.last}",):
        say(f"  {line}")


def worker(report: Report, *arguments: str) -> list[str]:
    """Return the command of a worker."""
    told = ["--device", report.card.device, "--date", report.date, *arguments]
    return children.python(WORKER, *told, *(["--commit", report.commit] if report.commit else []))


def measure_ceilings(report: Report) -> None:
    """Measure the card's own rates, as far as the time goes."""

    def read(line: str) -> None:
        row = parsed(line).get("row")
        if isinstance(row, dict):
            report.keep(row)
            report.ceilings.add(row)
            copy = f"{row['gbps']} GB/s read and written"
            rate = copy if row["impl"] == "copy" else f"{row['tflops']} TFLOP/s"
            say(f"  {row['impl']} {row['dtype']}: {rate}")

    limit = report.left(CEILINGS_S)
    outcome = children.run(worker(report, "--ceilings"), limit, read)
    if outcome.status != 0:
        why = f"not finished within {limit:.0f} s" if outcome.status is None else outcome.last
        say(
            "  some ceilings are missing, and so are the shares of the floor that need them: " + why
        )


def parsed(line: str) -> dict[str, object]:
    """Return a worker's message; {} for a line that is none, such as a library's own warning."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


@dataclass
class Progress:
    """How far the measuring of one op at one shape has come.

    Attributes:
        only: cases still to measure; None before the first, which are all.
        plain: cases that are never captured.
        begun: the case that is being measured.
    """

    only: list[str] | None = None
    plain: list[str] = field(default_factory=list)
    begun: str | None = None


def measure(report: Report, op: str, shape: shapes.Shape, rest: bool) -> None:
    """Measure one op at one shape, one of its two rounds.

    A worker that dies is started again without the case that ended it.
    """
    progress = Progress()
    sizes = f"(B {shape.B}, L {shape.L:,}, D {shape.D})"
    say(f"{op} {shape.name} {sizes}{', the rest' if rest else ''}")
    while progress.only is None or progress.only:
        limit = report.left()
        if limit < LEAST_S:
            missing = ", ".join(progress.only) if progress.only else "any case of it"
            say(f"  the time is up: not measured: {missing}")
            return
        arguments = ["--op", op, "--shape", shape.name, *(["--rest"] if rest else [])]
        for flag, names in (("--only", progress.only or []), ("--plain", progress.plain)):
            arguments += [word for name in names for word in (flag, name)]
        outcome = children.run(
            worker(report, *arguments), limit, lambda line: read(report, progress, line)
        )
        begun, progress.begun = progress.begun, None
        if outcome.status == 0:
            return
        if outcome.status is None:
            where = f" within {begun}" if begun else ""
            say(f"  the time is up{where}: what is missing above was not measured")
            return
        if progress.only is None:
            say(f"  not measured: {outcome.last}")
            return
        told = outcome.status in (gpu_worker.CAPTURE_FAILED, gpu_worker.BROKE)
        if begun is not None and not told:
            say(f"  {begun} ended the process with status {outcome.status}: {outcome.last}")
        elif begun is None:  # it died after its last case: nothing is left to try again
            return


def read(report: Report, progress: Progress, line: str) -> None:
    """Take one message of a worker."""
    message = parsed(line)
    if isinstance(todo := message.get("todo"), list) and progress.only is None:
        progress.only = [str(name) for name in todo]
    elif begin := message.get("begin"):
        progress.begun = str(begin)
        progress.only = [name for name in progress.only or [] if name != begin]
    elif isinstance(row := message.get("row"), dict):
        report.keep(row)
        over = report.ceilings.times_floor(row)
        times = f"{row['ms_p50']:.3f} ms (p20 {row['ms_p20']:.3f}, p80 {row['ms_p80']:.3f})"
        multiple = "" if over is None else f", {over:.2f} x floor"
        say(f"  {row['impl']} {row['phase']} {row['dtype']}: {times}{multiple}")
    elif name := message.get("capture_failed"):
        progress.plain.append(str(name))
        progress.only = [str(name), *(progress.only or [])]
        why = message.get("why")
        say(f"  {name} cannot be captured in a graph ({why}): timed launch by launch")
    elif name := message.get("left_out"):
        say(f"  {name} is left out: {message.get('why')}")
    elif name := message.get("again"):
        say(f"  {name} once more at the end: {message.get('ms')} ms")


def ops_to_time(report: Report) -> list[str]:
    """Return the ops that have a kernel for the device, and say why the others are not timed."""
    found: list[str] = []

    def read(line: str) -> None:
        message = parsed(line)
        if message.get("why"):
            say(f"  {message['op']} is not timed: {message['why']}")
        elif "op" in message and (report.only is None or message["op"] in report.only):
            found.append(str(message["op"]))

    outcome = children.run(worker(report, "--ops"), report.left(60), read)
    if outcome.status != 0:
        say(f"  the ops cannot be asked for: {outcome.last}")
    return found


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


def stages(report: Report) -> int:
    """Do all of it and return the exit status."""
    say("build")
    build(report)
    say("tests on the card")
    ops = ops_to_time(report)
    verdicts = gpu_tests.run_all(ROOT, ops, report.left(TESTS_S), say)
    green = [op for op in ops if verdicts[op].green]
    say("ceilings")
    measure_ceilings(report)
    wanted = card.plan(green, report.card.memory, say)
    # What has a figure to reach, and its peers, of every shape before the rest of any.
    for rest in (False, True):
        for op, shape in wanted:
            measure(report, op, shape, rest)
    finish(report)
    measured = any(row["op"] != floors.CEILING for row in report.rows)
    return 0 if measured and green == ops else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, out = (__doc__ or "").split("\n")[0], ROOT / "benchmarks" / "results"
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_report.py", description=summary)
    add = parser.add_argument
    add("--out", type=Path, default=out, help="folder of <card>.csv and <card>.png")
    add(
        "--op",
        action="append",
        choices=list(cases.BENCHMARKS),
        help="one op, with the whole time; may be repeated",
    )
    add("--minutes", type=float, default=8.6, help="for all of it")
    add("--commit", help="the tree's commit, for the rows, where the tree has no git folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    begin = time.monotonic()
    options = parse(arguments)
    try:
        if not 0 < options.minutes < float("inf"):
            raise InputError(
                "--minutes", "a number above 0", str(options.minutes), "leave it out for 8.6"
            )
        found = card.find()
        card.check_out(options.out)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        deadline = begin + 60 * options.minutes
        report = Report(found, options.out, deadline, now, options.commit, options.op)
        run.check_results(report.path)
        memory = f"{found.memory / 2**30:.0f} GiB"
        say(f"{found.machine}, {memory}, torch {torch.__version__}, {options.minutes} minutes")
        return stages(report)
    except InputError as error:
        print(f"benchmarks/gpu_report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
