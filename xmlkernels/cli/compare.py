"""Compare finished runs: `xmlkernels compare RUN RUN [RUN …]`.

All must be of one dataset, by its content. The first is what the others are compared with, document
by document: a difference comes with its 95% interval (paired bootstrap, 1,000 resamples) and with
p, how often one as large comes out where the answers of each document are exchanged by a coin
(approximate randomisation, 10,000 times); seed 0. Of twenty metrics one is below 0.05 by chance: p
is not corrected for their number, nor does it know of other training runs.

Settings that differ, seconds and peak memory stand below. --json prints all as JSON.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from xmlkernels.cli.arguments import parse
from xmlkernels.cli.console import print_rows, say
from xmlkernels.metrics import sentence_of
from xmlkernels.report.comparison import Comparison, compare

SHOWN = ("P@1", "P@3", "P@5", "nDCG@5", "R@5", "RP@5", "sampleF1@5", "microF1@5", "PSP@1", "PSP@5")


@dataclass(frozen=True)
class Options:
    """Which runs."""

    runs: tuple[str, ...]
    """Output folders of finished runs of one dataset."""
    dataset: str = ""
    """Their dataset folder, where that is no longer at its place."""
    json: bool = False
    """Print JSON instead of tables: every metric, unrounded."""


def main(words: Sequence[str]) -> None:
    """Compare the runs that the arguments name."""
    options = parse(Options, "xmlkernels compare", __doc__ or "", positional=True, words=words)
    found = compare(options.runs, options.dataset)
    if options.json:
        json.dump(found.as_json(), sys.stdout, indent=1)
        print()
        return
    show(found)


def show(found: Comparison) -> None:
    """Print a comparison as tables."""
    title = f"{found.documents:,} documents of {found.split}, percent"
    rows = [
        [name, *(f"{run[name]:.2f}" for run in found.metrics), sentence_of(name)] for name in SHOWN
    ]
    print_rows(title, ["metric", *found.names, "what it says"], rows)
    for name, differences in zip(found.names[1:], found.differences, strict=True):
        told = [
            [
                metric,
                f"{one.difference:+.2f}",
                f"{one.low:+.2f} to {one.high:+.2f}",
                f"{one.p:.4f}",
                "differ" if one.p < 0.05 else "no difference shown",
            ]
            for metric, one in ((metric, differences[metric]) for metric in SHOWN)
        ]
        names = ["metric", "difference", "95% interval", "p", "at p < 0.05"]
        print_rows(f"{name} less {found.names[0]}", names, told)
    changed = [
        [name, *("–" if value is None else str(value) for value in values)]
        for name, values in found.settings.items()
    ]
    if changed:
        print_rows("settings that differ", ["setting", *found.names], changed, words=False)
    else:
        say("no setting differs")
    cost = [
        [name, *("–" if value is None else f"{value:,.1f}" for value in values)]
        for name, values in found.cost.items()
    ]
    print_rows("cost", ["what", *found.names], cost, words=False)
