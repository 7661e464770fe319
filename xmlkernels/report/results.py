"""What a run's predictions are worth: metrics, rare labels, shortlists, calibration, documents."""

from collections.abc import Sequence
from html import escape

import numpy as np

from xmlkernels.data.text_parts import TextParts
from xmlkernels.metrics import decile_table, evaluate, macro_metrics, sentence_of
from xmlkernels.metrics.resampling import GROUPS, RESAMPLES, SEED, intervals
from xmlkernels.report.charts import Series, bars, lines, number_of
from xmlkernels.report.markup import (
    Cell,
    Raw,
    Section,
    folded,
    paragraph,
    side_by_side,
    table,
)
from xmlkernels.report.numbers import (
    PREDICTIONS,
    Calibration,
    Document,
    best_and_worst,
    calibration,
    recall_by_depth,
)
from xmlkernels.report.run import Run

SHOWN = {"val": "validation", "test": "test"}
_FIRST = ("P", "nDCG", "R", "RP", "PSP", "PSnDCG", "sampleF1", "microF1")
_TEXT = 700  # characters of a document that are shown
_LABELS = 12
_NO_SHORTLISTS = " What they keep was not recorded by the version that trained this."


def metrics(run: Run) -> Section:
    """List all metrics with intervals, each with a sentence."""
    assert run.split is not None
    found = evaluate(run.rows, run.split.labels, run.weight)
    span = intervals(run.sums)
    rows: list[tuple[Cell | Raw, ...]] = []
    for kind in _FIRST:
        for k in (1, 3, 5):
            name = f"{kind}@{k}"
            low, high = span[name]
            rows.append(
                (name, found[name], low, high, _whisker(found[name], low, high), sentence_of(name))
            )
    n = len(run.split)
    drawn = "documents" if n <= GROUPS else f"{GROUPS:,} random groups of documents"
    split = SHOWN.get(run.split.name, run.split.name)
    told = (
        f"Measured on the {n:,} documents of the {split} split, in percent. The intervals hold 95% "
        f"of {RESAMPLES:,} resamples of {drawn} (percentile bootstrap, seed {SEED}): how far a "
        "number would move with other documents of the same kind, with this very model."
    )
    names = ("metric", "value", "from", "to", "0 to 100", "what it says")
    body = paragraph(told) + _told("told", table("Metrics and 95% intervals", names, rows))
    macro = macro_metrics(run.rows, run.split.labels)
    over = [
        (name, macro[name], sentence_of(name))
        for kind in ("macroP", "macroR", "macroF1", "coverage", "abandonment")
        for name in (f"{kind}@1", f"{kind}@5")
    ]
    body += folded("Averages over labels", _sentences("Averages over labels, percent", over))
    if "annif" in run.report:
        rest = [
            (name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}", sentence_of(name))
            for name, value in run.report["annif"].items()
        ]
        title = "As annif eval has them: fractions, of ten labels per document"
        body += folded("The metrics of annif eval", _sentences(title, rest))
    return Section("metrics", "Metrics", body)


def _sentences(caption: str, rows: Sequence[tuple[str, Cell, str]]) -> str:
    return _told("told two", table(caption, ("metric", "value", "what it says"), list(rows)))


def _told(kind: str, text: str) -> str:
    """Mark a table whose last column is a sentence: narrow pages put it below its row."""
    return text.replace('<div class="wide"', f'<div class="wide {kind}"', 1)


def _whisker(value: float, low: float, high: float) -> Raw:
    """Draw an interval on the line from 0 to 100."""
    return Raw(
        '<svg class="whisker" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="grid" x1="0" x2="100" y1="5" y2="5"/>'
        f'<line class="line c1" x1="{low:.2f}" x2="{max(high, low + 0.6):.2f}" y1="5" y2="5"/>'
        f'<line class="mark" x1="{value:.2f}" x2="{value:.2f}" y1="1" y2="9"/></svg>'
    )


def deciles(run: Run) -> tuple[Section, list[dict[str, float | int]]]:
    """Tell how rare labels fare beside frequent ones."""
    assert run.split is not None
    train = run.dataset.splits["train"].labels
    found = decile_table(run.rows, run.split.labels, train)
    names = [str(row["decile"]) for row in found]
    recall = [float(row["R@5"]) for row in found]
    figures = side_by_side(
        bars(
            "Recall by frequency",
            "R@5 of each tenth of the labels: 1 the rarest, 10 the most frequent.",
            names,
            recall,
            x="tenth of the labels",
            y="R@5, percent",
        ),
        bars(
            "What P@5 is made of",
            "Points of P@5 that each tenth earns; they add up to P@5.",
            names,
            [float(row["P@5"]) for row in found],
            x="tenth of the labels",
            y="points of P@5",
        ),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            str(row["decile"]),
            row["labels"],
            f"{row['min_frequency']:,} to {row['max_frequency']:,}",
            row["positives"],
            float(row["share"]),
            *(float(row[key]) for key in ("R@1", "R@3", "R@5")),
        )
        for row in found
    ]
    head = (
        "tenth", "labels", "training documents each", "true here", "% of all", "R@1", "R@3", "R@5",
    )  # fmt: skip
    told = (
        "Labels are sorted by the training documents that they have and cut into ten groups of "
        "equally many labels. Frequent labels carry P@k; rare ones are where models differ."
    )
    body = paragraph(told) + figures
    return Section(
        "frequency",
        "Rare and frequent labels",
        body + folded("The numbers", table("By label frequency", head, rows)),
    ), found


def shortlists(run: Run) -> Section:
    """Tell what the tree and the shortlists keep."""
    assert run.split is not None
    depth = recall_by_depth(run)
    deepest = max(depth)
    told = (
        f"Of the true labels of a document, {depth[deepest]:.1f}% are among the {deepest} "
        "predictions that were kept: what no re-ranking of them can exceed."
    )
    figure = lines(
        "Recall by depth",
        "True labels among the k best predictions, mean over documents.",
        [("recall", list(depth), list(depth.values()))],
        x="k, predictions per document",
        y="R@k, percent",
        dots=True,
        span=(0.0, 100.0),
        logarithmic=True,
    )
    body = paragraph(told) + side_by_side(figure)
    levels = run.report.get(SHOWN.get(run.split.name, ""), {}).get("levels")
    if levels:
        rows = [
            (
                f"{x['level']}",
                x["clusters"],
                float(x["kept"]),
                float(x["shortlist_recall"]),
                float(x["P@1"]),
                float(x["R@5"]),
            )
            for x in levels
        ]
        head = (
            "level",
            "clusters",
            "kept per document",
            "true labels still there, %",
            "P@1",
            "R@5",
        )
        body += paragraph(
            "The label tree, coarse to fine. A label whose cluster is dropped cannot be predicted: "
            "the last level's share is the ceiling of the recall."
        ) + table("Levels of the label tree", head, rows)
    elif run.settings.get("tree") or run.settings.get("depths"):
        beam = run.settings.get("beam")
        body += paragraph(
            f"The labels of the {beam} best clusters of the label tree make the shortlist of a "
            "document." + ("" if run.report.get("shortlists") else _NO_SHORTLISTS)
        )
    else:
        body += paragraph("Every label is scored for every document: there is no tree.")
    if listed := run.report.get("shortlists"):
        listed_rows = [(name, one["labels"], one["recall"]) for name, one in listed.items()]
        names = ("shortlists of", "labels per document", "true labels on them, %")
        body += table("What the shortlists keep, test split", names, listed_rows) + paragraph(
            "A label that is not on the shortlist of a document cannot be predicted for it."
        )
    return Section("shortlists", "Tree and shortlists", body)


def calibrated(run: Run, found: Calibration) -> Section:
    """Tell whether probabilities mean what they say.

    Args:
        run: the run.
        found: of the probabilities that predictions give.
    """
    told = (
        f"The expected calibration error is {found.error:.3f}: so far, on average, is the "
        f"probability of a prediction from the share of such predictions that is right. It is that "
        f"of the {PREDICTIONS} best labels of each document, in ten bins of equal width."
    )
    series = [_reliability("as given", found)]
    if run.calibrated is None:
        told += " Probabilities are as the model scores: the run has no calibration."
    else:
        raw = calibration(run, run.values)
        series.append(_reliability("before calibration", raw))
        told += f" Before calibration on the validation split it was {raw.error:.3f}."
    figure = lines(
        "Reliability",
        "On the dashed line probabilities mean what they say; below it they promise too much.",
        series,
        x="probability given, percent",
        y="right, percent",
        dots=True,
        diagonal=True,
        span=(0.0, 100.0),
        both=True,
    )
    edges = [f"{10 * n}" for n in range(len(found.count))]
    total = max(1, int(found.count.sum()))
    counts = bars(
        "Where predictions are",
        "Share of the predictions in each bin of probability, by its lower end in percent.",
        edges,
        (100 * found.count / total).tolist(),
        x="probability given, percent",
        y="predictions, percent",
    )
    rows = [
        (
            f"{10 * n} to {10 * n + 10}%",
            int(found.count[n]),
            *(
                (100 * float(x) if found.count[n] else None)
                for x in (found.said[n], found.right[n])
            ),
        )
        for n in range(len(found.count))
    ]
    head = ("probability", "predictions", "mean probability, %", "right, %")
    body = paragraph(told) + side_by_side(figure, counts)
    return Section(
        "calibration",
        "Calibration",
        body + folded("The numbers", table("Predictions by probability", head, rows)),
    )


def _reliability(name: str, found: Calibration) -> Series:
    bins = np.flatnonzero(found.count)
    return name, (100 * found.said[bins]).tolist(), (100 * found.right[bins]).tolist()


def documents(run: Run) -> Section:
    """Show documents that went best and worst."""
    assert run.split is not None
    best, worst = best_and_worst(run)
    texts = run.split.some_texts({one.number for one in (*best, *worst)})
    shown = {number: TextParts().plain(text) for number, text in texts.items()}
    body = ""
    if not texts:
        body += paragraph(
            "The dataset keeps no texts (prepare it with --keep-texts to see them here).", "note"
        )
    if run.calibrated is not None:
        body += paragraph(
            "Labels stand in the order of the model's scores, as they are measured; calibrated "
            "probabilities, which also look at a label's frequency, may order them otherwise."
        )
    for title, told, found in (
        ("Worst", "Nothing right among the first five, or little; the surest first.", worst),
        ("Best", "Most labels right among the first five; those with most labels first.", best),
    ):
        each = "".join(_document(run, one, shown.get(one.number)) for one in found)
        body += f"<h3>{title}</h3>{paragraph(told)}<ol class='documents'>{each}</ol>"
    return Section("documents", "Documents that stand out", body)


def _document(run: Run, one: Document, text: str | None) -> str:
    names = run.dataset.label_names

    def named(label: int) -> str:
        return escape(names[label] if names else f"label {label}")

    head = f"Document {one.number:,}, nDCG@5 {one.gain:.1f}"
    told = ""
    if text is not None:
        cut = text if len(text) <= _TEXT else text[:_TEXT].rstrip() + " …"
        told = f"<blockquote>{escape(cut)}</blockquote>"
    predicted = (
        "".join(
            f'<li class="{"right" if right else "wrong"}"><span>{named(label)}</span> '
            f"<small>{100 * p:.1f}% {'right' if right else 'wrong'}</small></li>"
            for label, p, right in one.predicted
        )
        or "<li>nothing</li>"
    )
    true = "".join(f"<li>{named(label)}</li>" for label in one.true[:_LABELS])
    if len(one.true) > _LABELS:
        true += f"<li>and {number_of(len(one.true) - _LABELS)} more</li>"
    return (
        f"<li><p class='head'>{head}</p>{told}<div class='pair'><div><h4>Predicted</h4>"
        f"<ul>{predicted}</ul></div><div><h4>True</h4><ul>{true}</ul></div></div></li>"
    )
