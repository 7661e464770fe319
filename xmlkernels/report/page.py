"""The whole page: a summary in words, and the sections."""

from __future__ import annotations

import logging
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from xmlkernels.files import replacing
from xmlkernels.metrics import evaluate
from xmlkernels.metrics.resampling import intervals
from xmlkernels.report import background, results
from xmlkernels.report.markup import Section, paragraph, tiles
from xmlkernels.report.numbers import Calibration, calibration
from xmlkernels.report.run import Run

log = logging.getLogger(__name__)

REPORT = "report.html"
_TILES = {
    "P@1": "first label right",
    "P@5": "right among five",
    "R@5": "true labels found in five",
    "RP@5": "R-precision at five",
    "microF1@5": "F1 of all pairs",
    "PSP@5": "rare labels weighed up",
}
_MODELS = {"end_to_end": "an end-to-end model", "cascade": "a cascade"}


def write_report(run: Run, *, told: bool = True) -> Path:
    """Write report.html into a run's folder, whole or not at all, and return its place.

    Args:
        run: the run.
        told: log the place.
    """
    place = run.folder / REPORT
    with replacing(place) as file:
        file.write(page_of(run).encode())
    if told:
        log.info(f"report: {place}")
    return place


def page_of(run: Run) -> str:
    """Return the report as a page of HTML.

    Everything that depends on predictions is left out, with a sentence, where the run has none.
    """
    made: list[Section] = []
    told = [what(run), *time_over(run)]
    head = ""
    if run.split is None:
        told.append("It has neither test nor validation documents: there is nothing to measure.")
    else:
        found, span = evaluate(run.rows, run.split.labels, run.weight), intervals(run.sums)
        head = tiles(
            [
                (name, f"{found[name]:.1f}", f"{span[name][0]:.1f} to {span[name][1]:.1f}; {word}")
                for name, word in _TILES.items()
            ]
        )
        frequency, tenths = results.deciles(run)
        reliability = calibration(run, run.given)
        told += measured(run, found, span, tenths, reliability)
        made = [
            results.metrics(run),
            frequency,
            results.shortlists(run),
            results.calibrated(run, reliability),
            results.documents(run),
        ]
    made = [
        background.data(run),
        background.curves(run),
        *made,
        background.cost(run),
        background.settings(run),
    ]
    summary = Section("summary", "Summary", head + "".join(paragraph(text) for text in told))
    sections = [summary, *made]
    menu = "".join(f'<li><a href="#{x.name}">{escape(x.title)}</a></li>' for x in sections)
    body = "".join(
        f'<section id="{x.name}" aria-labelledby="h-{x.name}"><h2 id="h-{x.name}">'
        f"{escape(x.title)}</h2>{x.body}</section>"
        for x in sections
    )
    frame = Template((files("xmlkernels.report") / "page.html").read_text("utf-8"))
    name = run.folder.resolve().name
    source = run.report.get("commit")
    about = f"{run.report.get('dataset')}" + (f", made by xmlkernels, {source}" if source else "")
    return frame.substitute(title=escape(name), about=escape(about), menu=menu, body=body)


def what(run: Run) -> str:
    """Say what the run is, in a sentence or two."""
    train = run.dataset.splits["train"]
    kind = _MODELS.get(str(run.settings.get("model")), "an end-to-end model")
    if run.linear:
        trees = len(run.report.get("rankers", ())) or 1
        kind = f"a forest of {trees} linear rankers" if trees > 1 else "a linear ranker"
        if run.settings.get("checkpoint"):
            kind += " over a model's shortlists"
    elif run.settings.get("encoder") == "bow":
        kind += " on a bag of words"
    else:
        kind += f" with the encoder {run.settings.get('encoder')}"
    total = sum(wall for _, wall in background.parts(run))
    return (
        f"This is {kind}, trained on {len(train):,} documents of {run.report.get('dataset')} with "
        f"{run.dataset.num_labels:,} labels"
        + (f" in {background.seconds(total)}." if total else ".")
    )


def time_over(run: Run) -> list[str]:
    """Say of a run that a deadline has ended how far it came."""
    found = run.report.get("time_over")
    if not found:
        return []
    unit = "trees" if "trees" in found else "epochs"
    return [
        f"Its time was over (--minutes {found['minutes']:.3g}) after {found[unit]:.3g} of "
        f"{found['planned']} {unit}; --resume and more minutes train the rest."
    ]


def measured(
    run: Run,
    found: dict[str, float],
    span: dict[str, tuple[float, float]],
    tenths: list[dict[str, float | int]],
    reliability: Calibration,
) -> list[str]:
    """Say what its predictions are worth, in a few sentences."""
    assert run.split is not None
    split = results.SHOWN.get(run.split.name, run.split.name)
    low, high = span["P@1"]
    told = [
        f"On the {len(run.split):,} {split} documents the first label is right in "
        f"{found['P@1']:.1f} of 100 (95% interval {low:.1f} to {high:.1f}), and the first five "
        f"hold {found['R@5']:.1f}% of a document's true labels."
    ]
    asked = [row for row in tenths if row["positives"] and row["max_frequency"]]
    if len(asked) > 1:
        rare, often = asked[0], asked[-1]
        told.append(
            f"Rare labels are found less often: of the true labels with {_spread(rare)} training "
            f"documents {rare['R@5']:.1f}% are among the first five, of those with "
            f"{_spread(often)} {often['R@5']:.1f}%."
            if rare["R@5"] < often["R@5"]
            else f"Rare labels are found as often as frequent ones: {rare['R@5']:.1f}% of the true "
            f"labels with {_spread(rare)} training documents are among the first five, "
            f"{often['R@5']:.1f}% of those with {_spread(often)}."
        )
    promised = float((reliability.count * np.nan_to_num(reliability.said)).sum())
    kept = float((reliability.count * np.nan_to_num(reliability.right)).sum())
    way = "too much" if promised > kept else "too little"
    told.append(
        f"Probabilities promise {way} by {abs(promised - kept) / max(promised, 1e-12):.0%} in sum; "
        f"on average they are {100 * reliability.error:.1f} points of 100 from the share that is "
        f"right (expected calibration error {reliability.error:.3f})."
    )
    return told


def _spread(row: dict[str, float | int]) -> str:
    low, high = row["min_frequency"], row["max_frequency"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
