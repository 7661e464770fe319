"""A real server in a process of its own, on a free port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import PATIENCE, limited

ROOT = Path(__file__).resolve().parents[2]
V1 = ROOT / "tests" / "fixtures" / "v1"


class Served:
    """A server that answers.

    Attributes:
        url: with / at its end.
        told: what it has said on standard output.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.told = process, ""
        self._errors = folder / "errors"
        assert process.stdout is not None
        with limited(process):
            while not (found := re.search(r"at (http://\S+/)$", self.told, re.MULTILINE)):
                line = process.stdout.readline()
                assert line, f"it does not serve: {self.told}{self.errors}"
                self.told += line
        self.url = found[1]

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask for the end, and return the exit status."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        assert self.process.stdout is not None
        with limited(self.process):
            self.told += self.process.stdout.read()
            return self.process.wait(PATIENCE)


@contextmanager
def served(folder: Path, *words: object) -> Iterator[Served]:
    """Serve what the words of the command say; what the server says goes to files in `folder`."""
    command = [sys.executable, "-m", "xmlkernels", "serve", *map(str, words), "--port", "0"]
    with (
        open(folder / "errors", "w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        ) as process,
    ):
        try:
            yield Served(process, folder)
        finally:
            if process.poll() is None:
                process.kill()
