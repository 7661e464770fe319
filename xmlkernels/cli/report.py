"""Write the report of a finished run again: `xmlkernels report RUN`.

RUN is the output folder of `xmlkernels train` or `xmlkernels rank`, which write one themselves.
RUN/report.html is one file that any browser shows: nothing is fetched, and nothing runs in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xmlkernels.cli.arguments import parse
from xmlkernels.locks import own_place
from xmlkernels.report.page import REPORT, write_report
from xmlkernels.report.run import open_run


@dataclass(frozen=True)
class Options:
    """Which run."""

    run: str
    """The output folder of a finished run."""
    dataset: str = ""
    """Its dataset folder, where that is no longer at its place."""


def main(words: Sequence[str]) -> None:
    """Write the report of the run that the arguments name."""
    options = parse(Options, "xmlkernels report", __doc__ or "", positional=True, words=words)
    run = open_run(options.run, options.dataset or None)
    with own_place(str(Path(options.run) / REPORT), "RUN"):
        write_report(run)
