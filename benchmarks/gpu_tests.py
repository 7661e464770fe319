"""Which ops may be timed on a card: `pytest -m gpu` and compute-sanitizer, op by op.

Each test file runs in a process of its own, all at once: a kernel that breaks its context fails its
own file's tests alone, and Triton compiles on many cores.
"""

import inspect
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import cases, children
from xmlkernels import ops as package_ops

SHARED = "shared"
"""Name of the group of test files that belong to no single op."""
_VERDICT = re.compile(r"^(\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
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
    """

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    reason: str | None = None

    @property
    def green(self) -> bool:
        """Whether the op may be timed."""
        return self.passed > 0 and not self.failed and self.reason is None

    def __str__(self) -> str:
        told = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        if self.reason:
            return f"{told}; {self.reason}"
        if self.passed or self.failed:
            return told
        return f"{told}; no test of it ran on the card, which proves nothing"


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


def files_by_op(root: Path, ops: Sequence[str]) -> dict[str, list[Path]]:
    """Return the test files with tests for a card, by op.

    Outside tests/ops a file counts where it names the marker.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        room = path.relative_to(root / "tests").parts[0]
        if room in ("interpreter", "compile"):
            continue  # theirs are processes without a card
        if room == "ops" or "mark.gpu" in path.read_text("utf-8"):
            found.setdefault(owner(path.stem, ops), []).append(path)
    return found


def commands(root: Path, groups: dict[str, list[Path]]) -> dict[Key, list[str]]:
    """Return one pytest per file, and each sanitizer per op that has CUDA C++ of its own."""
    told = {
        (group, path.name): _pytest([path]) for group, files in groups.items() for path in files
    }
    tool = shutil.which("compute-sanitizer")
    for group in sanitized(root, groups) if tool else ():
        for kind in _SANITIZER:
            # The driver's own probing calls fail by design under torch; what counts is what kernels
            # touch.
            begin = [
                str(tool),
                "--tool",
                kind,
                "--report-api-errors",
                "no",
                "--error-exitcode",
                "9",
            ]
            told[group, kind] = begin + _pytest(groups[group])
    return told


def sanitized(root: Path, groups: dict[str, list[Path]]) -> list[str]:
    """Return the groups that have CUDA C++ of their own."""
    ops = [group for group in groups if group != SHARED]
    owners = {owner(path.stem, ops) for path in (root / "csrc" / "cuda").glob("*.cu")}
    return [group for group in ops if group in owners]  # sort.cu, say, is no single op's


def _pytest(files: list[Path]) -> list[str]:
    # -o addopts: the project's own would turn -v off, and the line of each test is what a run cut
    # short leaves behind.
    options = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-o", "addopts=--strict-markers"]
    return children.python("-m", "pytest", *options, *map(str, files))


def read(outcomes: Mapping[Key, children.Outcome], group: str, limit_s: float) -> Verdict:
    """Return a group's verdict from the lines of pytest over its files."""
    verdict = Verdict()
    for (name, what), outcome in outcomes.items():
        if name != group or what in _SANITIZER:
            continue
        words = [match.groups() for match in map(_VERDICT.match, outcome.lines) if match]
        failed = [test for test, word in words if word in ("FAILED", "ERROR")]
        verdict.failed += failed
        verdict.passed += sum(word == "PASSED" for _, word in words)
        verdict.skipped += sum(word == "SKIPPED" for _, word in words)
        if outcome.status is None:
            verdict.reason = f"{what} did not end within {limit_s:.0f} s"
        elif outcome.status not in (0, 1, 5):  # 1: tests failed; 5: none collected
            verdict.reason = f"{what} ended with status {outcome.status}: {outcome.last}"
        elif outcome.status == 1 and not failed:
            verdict.reason = f"{what} failed before its tests: {outcome.last}"
    return verdict


def run_all(
    root: Path, ops: Sequence[str], limit_s: float, say: Callable[[str], None]
) -> dict[str, Verdict]:
    """Run everything at once and say what was found.

    Args:
        root: the project.
        ops: that may be timed.
        limit_s: seconds of wall clock for all of it.
        say: told a line at a time.

    Returns:
        A verdict for each op, also for those that no benchmark times. A failure in a shared file
        counts against the op that its name tells of, else against all; a sanitizer that finds an
        error, against its op; one that does not end says so and decides nothing.
    """
    begin, timed, ops = time.monotonic(), ops, [*ops, *untimed()]
    # Of all, lest the files of an op left out count as shared.
    everything = files_by_op(root, [*cases.BENCHMARKS, *untimed()])
    wanted = {*ops, SHARED}
    groups = {group: files for group, files in everything.items() if group in wanted}
    outcomes = children.run_together(commands(root, groups), limit_s)
    verdicts = {op: read(outcomes, op, limit_s) for op in ops}
    if SHARED in groups:
        shared = read(outcomes, SHARED, limit_s)
        some = shared.passed or shared.failed or shared.reason
        say(f"  tests shared by the ops: {shared if some else 'none for a card'}")
        for test in shared.failed:
            guilty = owner(test.partition("::")[2], [*cases.BENCHMARKS, *untimed()])
            for op in ops if guilty == SHARED else (guilty,):
                if op in verdicts:
                    verdicts[op].failed.append(test)
        if shared.reason:
            for op in ops:
                verdicts[op].reason = verdicts[op].reason or f"shared tests: {shared.reason}"
    say_sanitizer(root, groups, outcomes, verdicts, limit_s, say)
    for op, verdict in verdicts.items():
        if op not in timed and op not in groups and not verdict.failed:
            continue
        say(f"  {op}: {verdict}{' -> not timed' if op in timed and not verdict.green else ''}")
        for test in verdict.failed[:10]:
            say(f"    failed: {test}")
        own = [outcome for (name, _), outcome in outcomes.items() if name == op]
        errors = [line for outcome in own for line in outcome.lines if line.startswith("E  ")]
        for line in errors[:10]:
            say(f"    {line}")
    say(f"  {time.monotonic() - begin:.0f} s in all")
    return verdicts


def say_sanitizer(
    root: Path,
    groups: dict[str, list[Path]],
    outcomes: Mapping[Key, children.Outcome],
    verdicts: dict[str, Verdict],
    limit_s: float,
    say: Callable[[str], None],
) -> None:
    """Say what compute-sanitizer found, and count it against the op."""
    wanted = sanitized(root, groups)
    if not wanted:
        say("  compute-sanitizer: no op has CUDA C++ of its own")
    elif not any(kind in _SANITIZER for _, kind in outcomes):
        say("  compute-sanitizer: not on this machine, so the CUDA ops ran without it")
    for (op, kind), outcome in outcomes.items():
        if kind not in _SANITIZER:
            continue
        if outcome.status is None:
            late = f"not finished within {limit_s:.0f} s, so it says nothing"
            say(f"  compute-sanitizer {kind}, {op}: {late}")
        elif outcome.status == 9:
            errors = [line for line in outcome.lines if line.startswith("=========")]
            say(f"  compute-sanitizer {kind}, {op}: ERRORS: {' '.join(errors[:2]) or outcome.last}")
            if op in verdicts:
                verdicts[op].reason = f"compute-sanitizer {kind} found errors"
        else:
            found = "no error" if outcome.status in (0, 1) else f"it did not run: {outcome.last}"
            say(f"  compute-sanitizer {kind}, {op}: {found}")
