"""What `pytest` and compute-sanitizer say of the ops on a card.

The tests marked `card` run first, in two calls: those of Triton's ops while the libraries are
built, then those that need a library. Tests of one file share a process; where pytest-xdist is
installed, the files' tests share the processors.
"""

import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import cases, children
from xmlkernels import ops as package_ops

SHARED = "shared"
"""Name of the group of test files that belong to no single op."""
_WORD = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# A line of pytest, and one of pytest-xdist: [gw3] [ 12%] PASSED tests/…
_LINES = (
    re.compile(rf"^(?P<test>\S+?\.py::.+?) (?P<word>{_WORD})\b"),
    re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<word>{_WORD}) (?P<test>\S+?\.py::.+?) *$"),
)
MOST_WORKERS = 14
_SANITIZER = ("memcheck", "racecheck")
Key = tuple[str, str]
"""The group, and the name of the test file or of the sanitizer's tool."""


@dataclass
class Verdict:
    """What one op's tests did.

    Attributes:
        passed, skipped: counts of tests.
        failed: test ids.
        reason: why it is not green beyond its tests, if so.
        note: what is to be known of a green one.
    """

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    reason: str | None = None
    note: str | None = None

    @property
    def green(self) -> bool:
        """Whether the op's rows may be used."""
        return self.passed > 0 and not self.failed and self.reason is None

    def __str__(self) -> str:
        told = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        if not self.passed and not self.failed:
            told += "; no test of it ran on the card, which proves nothing"
        return "; ".join([told, *filter(None, (self.reason, self.note))])


def stems(op: str) -> tuple[str, ...]:
    """Return how the names of an op's test files may begin, behind `test_`."""
    benchmark = cases.BENCHMARKS.get(op)
    return (op, *(name.rstrip("_") for name in (benchmark.functions if benchmark else ())))


def untimed() -> list[str]:
    """Return the public functions that no benchmark times: their failures are their own."""
    timed = {stem for op in cases.BENCHMARKS for stem in stems(op)}
    functions = (n for n in package_ops.__all__ if inspect.isfunction(getattr(package_ops, n)))
    public = [name.rstrip("_") for name in functions]
    return [name for name in public if name not in timed]


def owner(name: str, ops: Sequence[str]) -> str:
    """Return the op that the name of a file or test is about, else `SHARED`.

    Of several that fit it is the longest. An op's first word names it too where it is no other's:
    `test_sparse_layout` is of sparse_update.
    """
    fits = [(len(stem), op) for op in ops for stem in stems(op) if stem in name]
    words = [op.split("_")[0] for op in ops]
    fits = fits or [
        (0, op)
        for op, word in zip(ops, words, strict=True)
        if words.count(word) == 1 and word in name.split("_")
    ]
    return max(fits)[1] if fits else SHARED


def library_ops(root: Path) -> list[str]:
    """Return the ops that have CUDA C++ of their own; sort.cu, say, is no single op's."""
    ops = [*cases.BENCHMARKS, *untimed()]
    owners = {owner(path.stem, ops) for path in (root / "csrc" / "cuda").glob("*.cu")}
    return [op for op in ops if op in owners]


def card_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the files with tests marked `card`: of Triton's ops, and those that need a library.

    tests/ops/card.py has the table.
    """
    path = root / "tests" / "ops" / "card.py"
    spec = importlib.util.spec_from_file_location("card_table", path)
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    library, ops = library_ops(root), [*cases.BENCHMARKS, *untimed()]
    files: tuple[list[Path], list[Path]] = ([], [])
    for name in table.FILES:
        # test_graphs has tests of every op; bce_pass_ is of the library, but no op.
        late = owner(name, ops) in library or name in ("test_graphs.py", "test_bce_pass.py")
        files[late].append(path.with_name(name))
    return files


def pytest(files: Sequence[Path], mark: str, share: bool = True) -> list[str]:
    """Return the command of the tests with a mark; `share`: among the processors."""
    # -o addopts: the project's own would turn -v off, and the line of each test is what a run cut
    # short leaves behind.
    options = ["-m", mark, "-v", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-o", "addopts=--strict-markers"]
    if share and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    return children.python("-m", "pytest", *options, *map(str, files))


def read(outcomes: Mapping[str, children.Outcome], ops: Sequence[str]) -> dict[str, Verdict]:
    """Return each op's verdict from the lines of pytest, by what was run.

    A test is its file's op's, else that op's which its name tells; one of neither is `SHARED`'s and
    takes no op's rows. A run cut short leaves green what passed until then, with a note.
    """
    verdicts = {op: Verdict() for op in (*ops, SHARED)}
    for what, outcome in outcomes.items():
        here: set[str] = set()
        for line in outcome.lines:
            match = next(filter(None, (pattern.match(line) for pattern in _LINES)), None)
            if match is None:
                continue
            test, word = match["test"], match["word"]
            path, _, name = test.partition("::")
            op = owner(Path(path).stem, ops)
            op = owner(name, ops) if op == SHARED else op
            here.add(op)
            verdict = verdicts[op]
            verdict.passed += word == "PASSED"
            verdict.skipped += word == "SKIPPED"
            if word in ("FAILED", "ERROR") and test not in verdict.failed:
                verdict.failed.append(test)
        note = None
        if outcome.status is None:
            note = f"{what} did not end in time"
        elif outcome.status not in (0, 1, 5):  # 1: tests failed; 5: none collected
            note = f"{what} ended with status {outcome.status}: {outcome.last}"
        elif outcome.status == 1 and not any(verdicts[op].failed for op in here):
            note = f"{what} failed before its tests: {outcome.last}"
        for op in verdicts if note else ():
            verdicts[op].note = "; ".join(filter(None, (verdicts[op].note, note)))
    return verdicts


def run_card(
    root: Path,
    built: Callable[[float], bool],
    until: Callable[[str], Callable[[], float]],
    say: Callable[[str], None],
) -> dict[str, Verdict]:
    """Run the tests of a card, the sanitizers, and then the other tests while there is time.

    Args:
        root: the project.
        built: waits so many seconds for the build; returns whether it has ended.
        until: by part of the plan, what tells the seconds left.
        say: told a line at a time.

    Returns:
        A verdict for each op.
    """
    ops = [*cases.BENCHMARKS, *untimed()]
    triton, library = card_files(root)
    outcomes = {"tests": children.run(pytest(triton, "card"), until("tests")())}
    # Those of a library that is not there would say nothing: half of their time is left to them.
    built(until("library tests")() / 2)
    late = children.run(pytest(library, "card"), until("library tests")())
    outcomes["library tests"] = late
    sanitizers = children.run_together(sanitizer_commands(root), until("sanitizers")())
    if until("sanitizers")() > 10:
        every = sorted((root / "tests" / "ops").glob("test_*.py"))
        more = children.run(pytest(every, "gpu and not card"), until("sanitizers")())
        outcomes["the other tests"] = more
    verdicts = read(outcomes, ops)
    shared = verdicts.pop(SHARED)
    say_sanitizer(root, sanitizers, verdicts, say)
    for op, verdict in (*verdicts.items(), ("tests of no single op", shared)):
        say(f"  {op}: {verdict}")
        for test in verdict.failed[:10]:
            say(f"    failed: {test}")
    errors = [line for o in outcomes.values() for line in o.lines if line.startswith("E  ")]
    for line in errors[:40]:
        say(f"    {line}")
    return verdicts


def sanitizer_commands(root: Path) -> dict[Key, list[str]]:
    """Return each sanitizer per op that has CUDA C++ of its own, where there are any."""
    tool = shutil.which("compute-sanitizer")
    _, files = card_files(root) if tool else ([], [])
    ops = [*cases.BENCHMARKS, *untimed()]
    told: dict[Key, list[str]] = {}
    for op in library_ops(root):
        mine = [path for path in files if owner(path.stem, ops) == op]
        for kind in _SANITIZER if mine else ():
            # The driver's own probing calls fail by design under torch; what counts is what kernels
            # touch.
            words = ["--report-api-errors", "no", "--error-exitcode", "9"]
            told[op, kind] = [str(tool), "--tool", kind, *words, *pytest(mine, "card", False)]
    return told


def say_sanitizer(
    root: Path,
    outcomes: Mapping[Key, children.Outcome],
    verdicts: dict[str, Verdict],
    say: Callable[[str], None],
) -> None:
    """Say what compute-sanitizer found, and count it against the op."""
    if not library_ops(root):
        say("  compute-sanitizer: no op has CUDA C++ of its own")
    elif not outcomes:
        say("  compute-sanitizer: not on this machine, so the CUDA ops ran without it")
    for (op, kind), outcome in outcomes.items():
        if outcome.status is None:
            late = "not finished in time, so it says nothing"
            say(f"  compute-sanitizer {kind}, {op}: {late}")
        elif outcome.status == 9:
            errors = [line for line in outcome.lines if line.startswith("=========")]
            say(f"  compute-sanitizer {kind}, {op}: ERRORS: {' '.join(errors[:2]) or outcome.last}")
            if op in verdicts:
                verdicts[op].reason = f"compute-sanitizer {kind} found errors"
        else:
            found = "no error" if outcome.status in (0, 1) else f"it did not run: {outcome.last}"
            say(f"  compute-sanitizer {kind}, {op}: {found}")
