"""Plants faults in the source, one at a time, and asks the tests: which ones let a fault pass?

    python tests/mutants.py [--seeded 60] [--seed 0] [--only TEXT] [--list] [--report FILE]

By hand, not by pytest: minutes. The faults are those of mutants_by_hand.py and, for --seeded, as
many drawn at random from the syntax trees of the files in TESTS. Each is planted in a working tree
of HEAD in a temporary folder, with this checkout's libraries; the tests of its file run there until
one fails, the narrow ones first, and only what survives them meets the wide ones. A process that
has imported torch forks for each fault: seconds are spent on tests, not on imports.
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
# Faults that change nothing a user can see: what they would change, and why it does not matter.
EQUIVALENT: dict[str, str] = {}


@dataclass(frozen=True)
class Verdict:
    fault: Fault
    outcome: str  # killed, timeout, survived, stale
    seconds: float
    by: str = ""


# ---- planting ----


def stages(fault: Fault) -> tuple[str, ...]:
    own = TESTS.get(fault.path, ())
    return (fault.tests,) if fault.tests else own


def plant(tree: Path, fault: Fault) -> bool:
    """Whether the text to change stood there, once."""
    file = tree / fault.path
    text = file.read_text()
    if text.count(fault.old) != 1:
        return False
    file.write_text(text.replace(fault.old, fault.new))
    return True


def tested(tree: Path, arguments: str, limit: float) -> tuple[str, str]:
    """(killed, survived or timeout, the first failure) of a forked process that runs these
    tests.
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

        os._exit(
            int(
                pytest.main(
                    ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *shlex.split(arguments)]
                )
            )
        )
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            failed = [
                line
                for line in log.read_text(errors="replace").splitlines()
                if line.startswith(("FAILED", "ERROR"))
            ]
            return ("survived" if code == 0 else "killed"), (failed or [f"exit {code}"])[
                0
            ] if code else ""
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", arguments


def verdict(tree: Path, fault: Fault, limit: float) -> Verdict:
    began = time.monotonic()
    held = (tree / fault.path).read_text()
    if not plant(tree, fault):
        return Verdict(fault, "stale", 0.0)
    try:
        for arguments in stages(fault):
            outcome, by = tested(tree, arguments, limit)
            if outcome != "survived":
                return Verdict(fault, outcome, time.monotonic() - began, by)
        return Verdict(fault, "survived", time.monotonic() - began)
    finally:
        (tree / fault.path).write_text(held)


def working_tree(folder: Path) -> Path:
    """HEAD in a folder of its own, with the libraries that this checkout has built."""
    tree = folder / "tree"
    subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), "HEAD"], check=True
    )
    for library in (ROOT / "xmlkernels").glob("_*.so"):
        shutil.copy(library.resolve(), tree / "xmlkernels" / library.name)
    return tree


def told(fault: Fault) -> str:
    old, new = (" ".join(text.split()) for text in (fault.old, fault.new))
    return f"{fault.path}: {old!r} -> {new!r}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeded", type=int, default=60, help="faults drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose line holds this text")
    parser.add_argument(
        "--sound", action="store_true", help="run every stage of tests without a fault first"
    )
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one stage of tests")
    parser.add_argument(
        "--report",
        type=Path,
        help="JSON lines, one for each fault; those in it already are not tried again",
    )
    options = parser.parse_args()
    faults = [
        fault
        for fault in (*BY_HAND, *drawn(ROOT, options.seeded, options.seed))
        if options.only in told(fault)
    ]
    if options.list:
        print("\n".join(map(told, faults)))
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
                    print(
                        f"without a fault: {' '.join(tested(tree, arguments, options.limit))}  "
                        f"{arguments}",
                        flush=True,
                    )
            for number, fault in enumerate(faults, 1):
                if told(fault) in done:
                    continue
                found = verdict(tree, fault, options.limit)
                outcome = (
                    "equivalent"
                    if found.outcome == "survived" and told(fault) in EQUIVALENT
                    else found.outcome
                )
                counts[outcome] += 1
                print(
                    f"{number}/{len(faults)} {outcome:10} {found.seconds:5.1f} s  {told(fault)}  "
                    f"{found.by[:90]}",
                    flush=True,
                )
                if options.report:
                    with options.report.open("a") as file:
                        file.write(
                            json.dumps({"fault": told(fault), "outcome": outcome, "by": found.by})
                            + "\n"
                        )
        finally:
            subprocess.run(
                ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=False
            )
    # A timeout may be the machine's: it is not counted as caught.
    caught, tried = counts["killed"], counts["killed"] + counts["survived"] + counts["timeout"]
    print(
        f"{caught} of {tried} faults caught ({100 * caught / max(1, tried):.1f} %): {dict(counts)}"
    )


if __name__ == "__main__":
    main()
