"""Plant faults in the source, one at a time, and run the tests: which faults do they let pass?

    python tests/mutants.py [--seeded 60] [--seed 0] [--only TEXT] [--list] [--report FILE]

Run it by hand: it takes from minutes to hours, and pytest does not collect it. The faults are those
of mutants_by_hand.py and, for --seeded, as many drawn at random from the syntax trees of the files
in mutants_drawn.TESTS. Each is planted in a working tree of HEAD in a temporary folder, with the
libraries built in this checkout. The tests of its file run there, narrow stages first, until one
fails. A process that has imported torch forks for each stage, so that time goes into tests and not
into imports. test_mutants.py checks in seconds that every fault still applies.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutants_by_hand import BY_HAND, Fault
from mutants_drawn import TESTS, drawn

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 400.0  # seconds of one stage of tests, on a machine that others use too
MISUSED, NO_TESTS = 4, 5  # pytest's exit statuses
# Faults that change nothing a user can see, by their description: why they do not matter.
EQUIVALENT: dict[str, str] = {
    "xmlkernels/nn/encoder.py: "
    "'torch.cat([pooled[j] for j in level], 1) if len(level) > 1 else pooled[level[0]]' -> "
    "'torch.cat([pooled[j] for j in level], 1) if (len(level) >= 1) else pooled[level[0]]'": (
        "one vector concatenated is itself"
    ),
    "xmlkernels/reference/shortlist_select.py: "
    "'keep = (top >= 0) & ((top >= FORCED) | (number < k))' -> "
    "'keep = (top >= 0) & (((top > FORCED)) | (number < k))'": (
        "a key of that bit alone would be the last of 2^30 places, and its score a certain NaN"
    ),
}


@dataclass(frozen=True)
class Verdict:
    """How the tests took a fault.

    Attributes:
        outcome: "killed", "survived", "timeout", or "stale" where the fault no longer applies or a
            stage selects no test.
        by: the first failure.
    """

    fault: Fault
    outcome: str
    seconds: float
    by: str = ""


# ---- planting ----


def stages(fault: Fault) -> tuple[str, ...]:
    """The tests of a fault, narrow to wide: a line of pytest arguments each."""
    return (fault.tests,) if fault.tests else TESTS[fault.path]


def planted(root: Path, fault: Fault) -> str | None:
    """The text of the fault's file with the fault in it; None unless its old text occurs once."""
    file = root / fault.path
    text = file.read_text("utf-8") if file.exists() else ""
    return text.replace(fault.old, fault.new) if text.count(fault.old) == 1 else None


def run_tests(tree: Path, arguments: str, limit: float) -> tuple[str, str]:
    """Run tests in a forked process.

    Returns:
        The outcome, as in Verdict, and the first failure.
    """
    log = tree / ".mutant.log"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.dont_write_bytecode = True
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.path[:] = [
            str(tree),
            *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")),
        ]
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        os._exit(int(pytest.main([*options, *shlex.split(arguments)])))
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return judge(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", arguments


def judge(code: int, output: str) -> tuple[str, str]:
    """The outcome and the first failure, from pytest's exit status and output."""
    if code == 0:
        return "survived", ""
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # A status of its own says that no test was selected; a missing file shares one with a
    # conftest.py that the fault breaks.
    if code == NO_TESTS or (code == MISUSED and "not found: " in output):
        return "stale", (failed or ["no test was selected"])[0]
    return "killed", (failed or [f"exit {code}"])[0]


def verdict(tree: Path, fault: Fault, limit: float) -> Verdict:
    """Plant a fault, run its stages until one fails, and take it out again."""
    began = time.monotonic()
    faulty = planted(tree, fault)
    if faulty is None:
        return Verdict(fault, "stale", 0.0)
    file = tree / fault.path
    sound = file.read_text("utf-8")
    file.write_text(faulty, "utf-8")
    try:
        for arguments in stages(fault):
            outcome, by = run_tests(tree, arguments, limit)
            if outcome != "survived":
                return Verdict(fault, outcome, time.monotonic() - began, by)
        return Verdict(fault, "survived", time.monotonic() - began)
    finally:
        file.write_text(sound, "utf-8")


def working_tree(folder: Path) -> Path:
    """Check out HEAD into a folder of its own, with the libraries built in this checkout."""
    tree = folder / "tree"
    subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), "HEAD"],
        check=True,
        timeout=300,
    )
    for library in (ROOT / "xmlkernels").glob("_*.so"):
        shutil.copy(library.resolve(), tree / "xmlkernels" / library.name)
    return tree


def describe(fault: Fault) -> str:
    """One line: the file, the old text and the new."""
    old, new = (" ".join(text.split()) for text in (fault.old, fault.new))
    return f"{fault.path}: {old!r} -> {new!r}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeded", type=int, default=60, help="faults drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose description contains this")
    parser.add_argument(
        "--sound", action="store_true", help="first run every stage without a fault"
    )
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one stage of tests")
    parser.add_argument(
        "--report",
        type=Path,
        help="JSON lines, one per fault; faults in it already are not tried again",
    )
    options = parser.parse_args()
    faults = [
        fault
        for fault in (*BY_HAND, *drawn(ROOT, options.seeded, options.seed))
        if options.only in describe(fault)
    ]
    if options.list:
        print("\n".join(map(describe, faults)))
        return
    done = set()
    if options.report and options.report.exists():
        done = {json.loads(line)["fault"] for line in options.report.read_text().splitlines()}
    os.environ |= {
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    import scipy.sparse  # noqa: F401
    import sklearn.feature_extraction.text  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import BertModel  # noqa: F401

    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = working_tree(Path(folder))
        os.environ["PYTHONPATH"] = str(tree)
        try:
            if options.sound:
                for arguments in sorted({stage for fault in faults for stage in stages(fault)}):
                    outcome, by = run_tests(tree, arguments, options.limit)
                    print(f"without a fault: {outcome} {by}  {arguments}", flush=True)
            for number, fault in enumerate(faults, 1):
                if describe(fault) in done:
                    continue
                found = verdict(tree, fault, options.limit)
                outcome = found.outcome
                if outcome == "survived" and describe(fault) in EQUIVALENT:
                    outcome = "equivalent"
                counts[outcome] += 1
                seen = f"{outcome:10} {found.seconds:5.1f} s  {describe(fault)}  {found.by[:90]}"
                print(f"{number}/{len(faults)} {seen}", flush=True)
                if options.report:
                    line = {"fault": describe(fault), "outcome": outcome, "by": found.by}
                    with options.report.open("a") as file:
                        file.write(json.dumps(line) + "\n")
        finally:
            subprocess.run(
                ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)],
                check=False,
                timeout=300,
            )
    # A timeout may be the machine's fault: it does not count as caught.
    caught, tried = counts["killed"], counts["killed"] + counts["survived"] + counts["timeout"]
    share = 100 * caught / max(1, tried)
    print(f"{caught} of {tried} faults caught ({share:.1f} %): {dict(counts)}")


if __name__ == "__main__":
    main()
