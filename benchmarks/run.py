"""Time ops against their peers and append the rows to `benchmarks/results/<machine>.csv`.

    python benchmarks/run.py --op bce_step --device cpu [--shape B64-L131k] [--json]
    python benchmarks/run.py --op all --device cpu [--json]

An op's own tests run first; nothing is timed unless they pass. All implementations of a shape take
turns in one process, torch.mm of the same format among them. `--op all` runs one process per op and
ends at the first that fails. Exit status: 0 done, 1 tests not green, 2 an input that cannot be
used.
"""

import argparse
import csv
import datetime
import importlib.metadata
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

# The tree's own package is timed, installed or not: the commit in the row is the tree's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import cases, shapes, timing
from benchmarks.floors import OWN
from xmlkernels.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
_RUN = ("date", "commit", "machine", "device", "threads", "torch", "triton")
_CASE = ("op", "impl", "phase", "dtype", "shape", "B", "L", "D", "S", "K")
_MEASURED = ("ms_p20", "ms_p50", "ms_p80", "peak_mb", "gbps", "tflops")
COLUMNS = (*_RUN, *_CASE, *_MEASURED)
ALL = "all"
Row = dict[str, str | int | float | None]
Key = tuple[str, str, str]


class RedTests(Exception):
    """The op's tests did not all pass, so there is nothing to time."""


def require_green(tests: Path) -> str:
    """Run an op's tests to their end, in a process of their own.

    Returns:
        What passed, in words.

    Raises:
        RedTests: the file is missing, a test failed, or none passed (skipped tests prove nothing).
    """
    if not tests.exists():
        raise RedTests(f"{tests} does not exist: an op without tests is not timed")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(tests)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        if done.returncode != 0 or not report.exists():
            raise RedTests(f"{tests.name} is not green, so nothing is timed:\n{tail}")
        counts = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            counts = {name: count + int(suite.get(name, "0")) for name, count in counts.items()}
    passed = counts["tests"] - counts["skipped"] - counts["failures"] - counts["errors"]
    if passed < 1 or counts["failures"] or counts["errors"]:
        raise RedTests(f"{tests.name}: {passed} tests passed, so nothing is timed:\n{tail}")
    return f"{passed} tests passed, {counts['skipped']} skipped"


def commit(root: Path) -> str:
    """Return the short hash of HEAD, or `unknown` outside a git checkout.

    It ends in `-dirty` where the tree differs from it.

    The results folder is left aside: appending one op's rows must not mark the next op's.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def check_results(path: Path) -> None:
    """Refuse a file to which no rows can be appended.

    Raises:
        InputError: it is there and no whole table of these columns.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    header = text.split("\n", 1)[0]
    if header != ",".join(COLUMNS):
        raise InputError(
            f"{path}, line 1",
            f"the columns {','.join(COLUMNS)}",
            header or "an empty line",
            "move the file away or give another folder with --out",
        )
    for number, fields in enumerate(csv.reader(io.StringIO(text)), 1):
        if len(fields) != len(COLUMNS):
            raise InputError(
                f"{path}, line {number}",
                f"{len(COLUMNS)} fields",
                str(len(fields)),
                "delete the broken line",
            )
    if not text.endswith("\n"):
        raise InputError(
            f"{path}, last line",
            "an end of line",
            "none: the row was cut short",
            "delete that line",
        )


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows, and the header where the file is new.

    It is one write: a reader or a crash sees all of them or none.
    """
    check_results(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    with open(path, "ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def measure_peak(op: str, shape: shapes.Shape, device: str, key: Key) -> int | None:
    """Build one case again and measure its memory, in bytes; to be run in a fresh process.

    A peer takes two steps of a tiny shape before, so that what torch imports and sets up once is
    not held against it. The op itself has no such head start: buffers that it would keep from one
    call to the next count.
    """

    def find(shape: shapes.Shape) -> cases.Case:
        return next(case for case in cases.build(op, shape, device) if case.key == key)

    if key[0] not in OWN:
        tiny = find(shapes.tiny(shape))
        step = tiny.start(tiny.inputs())
        for _ in range(2):
            step()
    case = find(shape)
    return timing.peak_bytes(device, case.inputs, case.start)


def peak_mb(op: str, shape: shapes.Shape, device: str, case: cases.Case) -> float | None:
    """Measure a case's memory beyond table and batch, in 10⁶ bytes.

    None for the ceiling, and for `compile`, whose compiler would be counted.
    """
    if case.impl in ("mm", "compile"):
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(measure_peak, op, shape, device, case.key).result()
    return None if found is None else round(found / 1e6, 2)


def start_all(todo: Sequence[cases.Case], say: Callable[[str], None]) -> dict[Key, timing.Step]:
    """Return the calls to time; cases of one table format share the table and the batch."""
    held: dict[Callable[[], object], object] = {}
    steps: dict[Key, timing.Step] = {}
    for case in todo:
        if case.inputs not in held:
            held[case.inputs] = case.inputs()
        step = case.start(held[case.inputs])
        if case.impl == "compile":
            try:
                step()
            # The compiler's failures share no base class, and are the compiler's alone.
            except Exception as error:
                why = str(error).strip().splitlines()[0]
                say(f"compile is left out: torch.compile failed here: {why}")
                continue
        steps[case.key] = step
    return steps


def setting(op: str, device: str) -> Row:
    """Return the columns that all rows of a run share."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "commit": commit(ROOT),
        "machine": timing.machine_name(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "op": op,
    }


def make_rows(
    about: Row, shape: shapes.Shape, with_compile: bool, say: Callable[[str], None]
) -> list[Row]:
    """Measure one shape and say what was found; rows of one date took turns with each other."""
    op, device = str(about["op"]), str(about["device"])
    todo = cases.build(op, shape, device, with_compile)
    formats = {cases.ceiling_dtype(case.dtype, device) for case in todo}
    todo += [cases.ceiling(dtype, device) for dtype in sorted(formats)]
    peaks = {case.key: peak_mb(op, shape, device, case) for case in todo}
    steps = start_all(todo, say)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = about | {"date": now, "shape": shape.name}
    load = timing.Load()
    samples = timing.alternate(steps, timing.Clock(device))
    others, average = load.others(), timing.load_average()
    if others is not None and others > 0.1:
        say(
            f"WARNING: other processes kept {others:.2f} processors busy: these timings are not to "
            "be reported"
        )
    median = {key: statistics.median(times) for key, times in samples.items()}
    about_load = f"load average {shown(average)}, other processes {shown(others)} processors"
    say(f"{op} {shape.name}: {about_load}")
    rows = []
    for case in (case for case in todo if case.key in samples):
        n = cases.CEILING_SIZE[device]
        sizes = shapes.Shape("", n, n, n) if case.impl == "mm" else shape
        row = about | measured(case, sizes, samples[case.key], peaks[case.key])
        rows.append({column: row[column] for column in COLUMNS})
        say(line(case, samples[case.key], peaks[case.key], median, device, average))
    return rows


def measured(case: cases.Case, sizes: shapes.Shape, times: list[float], peak: float | None) -> Row:
    """Return the columns that one case and its milliseconds fill."""
    p20, p50, p80 = timing.quantiles(times)
    row: Row = {"impl": case.impl, "phase": case.phase, "dtype": case.dtype, "peak_mb": peak}
    row |= {letter: getattr(sizes, letter) for letter in "BLDSK"}
    row |= {"ms_p20": round(p20, 4), "ms_p50": round(p50, 4), "ms_p80": round(p80, 4)}
    gbps, tflops = round(case.bytes / p50 / 1e6, 2), round(case.flops / p50 / 1e9, 4)
    return row | {"gbps": gbps, "tflops": tflops}


def line(
    case: cases.Case,
    times: list[float],
    peak: float | None,
    median: dict[Key, float],
    device: str,
    average: float | None,
) -> str:
    """Return one result for people.

    Min, median and max; rate, and its share of the mm rate; ratio to eager; load.
    """
    mid = statistics.median(times)
    rate = case.flops / mid / 1e9
    mm = cases.ceiling(cases.ceiling_dtype(case.dtype, device), device)
    mm_rate = mm.flops / median[mm.key] / 1e9
    peers = [(phase, ms) for (impl, phase, _), ms in median.items() if impl == "eager"]
    # The eager version of the same phase, where there is one.
    eager = next((ms for phase, ms in peers if phase == case.phase), peers[0][1] if peers else None)
    ratio = "" if eager is None or case.impl == "mm" else f", {eager / mid:.2f}x eager"
    spread = f"(min {min(times):.3f}, max {max(times):.3f}, {len(times)} rounds)"
    return (
        f"  {case.impl:<10} {case.phase:<8} {case.dtype}  {mid:9.3f} ms {spread}, peak "
        f"{shown(peak)} MB, {case.bytes / mid / 1e6:.1f} GB/s, {rate * 1e3:.1f} GFLOP/s, mm "
        f"{mm.dtype} {mm_rate * 1e3:.1f}, share {rate / mm_rate:.3f}{ratio}, load {shown(average)}"
    )


def shown(value: float | None) -> str:
    """Return a number with two places, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=summary)
    add, out = parser.add_argument, ROOT / "benchmarks" / "results"
    add("--op", required=True, choices=[ALL, *cases.BENCHMARKS])
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--shape", help="one shape of the op, by name; without it, all of them")
    add("--json", action="store_true", help="rows as JSON lines on stdout, all else on stderr")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--out", type=Path, default=out, help="folder of <machine>.csv")
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> int:
    """Time every op in a process of its own, up to the first that fails.

    Returns:
        The exit status of the last process.

    Raises:
        InputError: one shape is asked for.
    """
    if options.shape is not None:
        raise InputError(
            f"--op {ALL}", "no --shape", options.shape, "name the op that has it, or leave it out"
        )
    command = [sys.executable, __file__, "--device", options.device, "--out", str(options.out)]
    command += ["--json"] * options.json + ["--no-compile"] * options.no_compile
    for op in cases.BENCHMARKS:
        if status := subprocess.run([*command, "--op", op], check=False).returncode:
            return status
    return 0


def run(options: argparse.Namespace) -> None:
    """Time one op.

    Raises:
        InputError: see `cases.require_op`, `cases.pick` and `check_results`.
        RedTests: the op's tests are not green.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    before = timing.load_average()  # taken before the tests and the timing themselves raise it
    cases.require_op(options.op, options.device)
    wanted = cases.pick(options.op, options.shape)
    about = setting(options.op, options.device)
    path = options.out / f"{about['machine']}.csv"
    check_results(path)
    if before is not None and before > 0.5:
        say(
            f"WARNING: load average {before:.2f} at the start: something else is running, or was a "
            "minute ago"
        )
    tests = ROOT / "tests" / "ops" / f"test_{options.op}.py"
    say(f"{tests.name}: {require_green(tests)}")
    for shape in wanted:
        rows = make_rows(about, shape, not options.no_compile, say)
        append(path, rows)
        if options.json:
            for row in rows:
                print(json.dumps(row), flush=True)
    say(f"rows appended to {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        options = parse(arguments)
        if options.op == ALL:
            return run_all(options)
        run(options)
    except InputError as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 2
    except RedTests as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
