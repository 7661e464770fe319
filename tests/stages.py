"""All tests, as `make test` runs them: three runs of pytest beside each other.

    python tests/stages.py [--if-triton]

The suite is printed as it comes. The GPU kernels, in Triton's interpreter and compiled ahead of
time, are tested by processes of their own, which leave it the processor where it wants it; what
they print follows when it has ended. A test that stands still ends its run after LIMIT seconds,
with the stacks of all threads; one that stands still outside of tests is killed after LONGEST.

Exit status: 0, or 1 if a run failed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO

LIMIT = 1200  # seconds of one test with its fixtures; what tests wait for has shorter limits
GUARD = ["-o", f"faulthandler_timeout={LIMIT}", "-o", "faulthandler_exit_on_timeout=true"]
PYTEST = [sys.executable, "-m", "pytest", *GUARD]
LONGEST = 4500.0  # seconds of a whole run, which takes a third of it on two cores
NICE = 5  # that the suite goes before the others


@dataclass(frozen=True)
class Stage:
    """One run: what it is called, its command, and what its environment has besides."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


SUITE = Stage("the suite", PYTEST)
KERNELS = (
    Stage(
        "GPU kernels in Triton's interpreter",
        [*PYTEST, "tests/interpreter"],
        {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    ),
    Stage(
        "GPU kernels compiled ahead of time, no card is needed",
        [*PYTEST, "tests/compile"],
        {"OMP_NUM_THREADS": "1"},
    ),
)


@dataclass
class Running:
    """A run that has begun, and what it has printed so far."""

    stage: Stage
    process: subprocess.Popen[bytes]
    told: IO[bytes] | None
    begin: float = field(default_factory=time.monotonic)

    def end(self) -> bool:
        """Wait for its end and print what it told; return whether it passed."""
        try:
            status = self.process.wait(max(0.0, self.begin + LONGEST - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(60)
        minutes = (time.monotonic() - self.begin) / 60
        if self.told is not None:
            print(f"\n{self.stage.name}", flush=True)
            self.told.seek(0)
            shutil.copyfileobj(self.told, sys.stdout.buffer)
            sys.stdout.flush()
        how = "passed" if status == 0 else f"FAILED with status {status}"
        print(f"{self.stage.name}: {how} within {minutes:.1f} minutes", flush=True)
        return status == 0


def run(first: Stage, beside: Sequence[Stage]) -> bool:
    """Run all stages at once, and wait for each in turn; return whether all passed.

    The first prints for itself and has the processor before the others.
    """
    with ExitStack() as stack:

        def start(stage: Stage, told: IO[bytes] | None = None) -> Running:
            urgency = [] if told is None else ["nice", "-n", str(NICE)]
            process = subprocess.Popen(
                [*urgency, *stage.command],
                env=os.environ | stage.environment,
                stdout=told,
                stderr=told and subprocess.STDOUT,
            )
            stack.callback(process.kill)  # of what still runs when this one is interrupted
            return Running(stage, process, told)

        begun = [start(first)]
        begun += [start(one, stack.enter_context(tempfile.TemporaryFile())) for one in beside]
        passed = [one.end() for one in begun]
        return all(passed)


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--if-triton",
        action="store_true",
        help="leave the GPU kernels out, and say so, where this Python has no Triton",
    )
    kernels = KERNELS
    if parser.parse_args().if_triton and importlib.util.find_spec("triton") is None:
        print("GPU kernels: not tested, this Python has no Triton (requirements-dev.txt has it)")
        kernels = ()
    return int(not run(SUITE, kernels))


if __name__ == "__main__":
    sys.exit(main())
