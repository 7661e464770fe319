"""What a run was made of: its data, its course, its time and memory, its settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xmlkernels.data.manifest import PROFILE
from xmlkernels.data.profile import Profile, Spread, load_profile
from xmlkernels.records import read_object
from xmlkernels.report.charts import lines
from xmlkernels.report.markup import Section, folded, paragraph, shares, side_by_side, table
from xmlkernels.report.run import CHOICES, Run, log_lines
from xmlkernels.ticks import duration

_SPLITS = {"train": "training", "val": "validation", "test": "test"}


def data(run: Run) -> Section:
    """Describe the dataset, by its profile where there is one."""
    found = next((p for p in (run.folder, run.dataset.folder) if (p / PROFILE).is_file()), None)
    if found is None:
        body = paragraph(
            "There is no data profile: the dataset was prepared by a version of xmlkernels that "
            "made none. Prepare it again, and the next report has one.",
            "note",
        )
        sizes = [
            (_SPLITS.get(name, name), len(split), split.labels.nnz / max(1, len(split)))
            for name, split in run.dataset.splits.items()
        ]
        body += table("Splits", ("split", "documents", "labels per document"), sizes)
        return Section("data", "Data", body)
    return Section("data", "Data", _profiled(load_profile(found)))


def _profiled(profile: Profile) -> str:
    unseen, of = profile.labels - profile.used, profile.labels
    body = paragraph(
        f"{profile.name}: {of:,} labels, of which {unseen:,} have no training document and "
        f"{profile.once:,} have exactly one."
    )
    if profile.suspicions:
        items = "".join(
            f"<li>{paragraph(one.told)}"
            + (
                paragraph("For example: " + "; ".join(one.examples), "faint")
                if one.examples
                else ""
            )
            + "</li>"
            for one in profile.suspicions
        )
        body += f'<div class="warn"><h3>Worth a look</h3><ul>{items}</ul></div>'
    else:
        body += paragraph("Nothing in it looks wrong.", "good")
    rows = []
    for name, split in profile.splits.items():
        repeated = split.duplicates
        rows.append(
            (
                _SPLITS.get(name, name),
                split.documents,
                split.labels.mean,
                _middle(split.labels),
                _middle(split.words or split.tokens),
                split.unlabelled,
                repeated,
            )
        )
    names = (
        "split",
        "documents",
        "labels per document",
        "labels: median, largest",
        "words or tokens: median, largest",
        "without labels",
        "repeated texts",
    )
    body += table("Splits", names, rows)
    if profile.overlaps:
        body += table(
            "Texts in two splits",
            ("splits", "documents"),
            [
                (
                    f"{_SPLITS.get(o.first, o.first)} and {_SPLITS.get(o.second, o.second)}",
                    o.documents,
                )
                for o in profile.overlaps
            ],
        )
    tenths = [
        (f"{n}", d.labels, d.least, d.most, 100 * d.share) for n, d in enumerate(profile.deciles, 1)
    ]
    head = ("tenth", "labels", "rarest", "most frequent", "% of all pairs")
    caption = "Training documents per label, by tenths of the labels, the most frequent first"
    return body + folded("Documents per label", table(caption, head, tenths))


def _middle(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.p50:,}, {spread.most:,}"


def curves(run: Run) -> Section:
    """Draw how losses, rates and validation metrics went."""
    if run.linear:
        told = (
            "A linear model has no course to draw: each label's classifier is solved by itself, to "
            "the optimum of its own problem."
        )
        return Section("curves", "Course of training", paragraph(told, "note"))
    training, measured = log_lines(run.folder)
    validation = [line for line in measured if line["split"] == "validation"]
    figures = []
    if points := _of(training, "loss"):
        told = "Mean over the steps since the line before."
        figures.append(lines("Training loss", told, [("loss", *points)], x="step", y="loss"))
    if points := _of(validation, "loss"):
        told = "Per document of the validation split."
        figures.append(
            lines("Validation loss", told, [("loss", *points)], x="step", y="loss", dots=True)
        )
    kinds = [k for k in ("P@1", "P@5", "nDCG@5", "PSP@5") if _of(validation, k)]
    if kinds:
        told = "In percent, after each evaluation."
        every = [(kind, *_of(validation, kind)) for kind in kinds]
        figures.append(lines("Validation metrics", told, every, x="step", y="percent", dots=True))
    rates = [
        (name, _of(training, key))
        for name, key in (("encoder", "encoder_lr"), ("label table", "table_lr"))
    ]
    if any(points for _, points in rates):
        every = [
            (name, points[0], [value / max(*points[1], 1e-30) for value in points[1]])
            for name, points in rates
            if points
        ]
        peaks = ", ".join(f"{name} {max(p[1]):.3g}" for name, p in rates if p)
        told = f"As shares of their peaks: {peaks}."
        figures.append(lines("Learning rates", told, every, x="step", y="share", span=(0.0, 1.0)))
    if points := _of(training, "documents_per_second"):
        told = "Documents trained on per second, without evaluations and checkpoints."
        figures.append(lines("Speed", told, [("speed", *points)], x="step", y="documents/s"))
    if not figures:
        told = "log.jsonl holds no lines: the run was shorter than one line's steps."
        return Section("curves", "Course of training", paragraph(told, "note"))
    return Section("curves", "Course of training", side_by_side(*figures))


def _of(
    found: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[float], list[float]] | tuple[()]:
    pairs = [(float(x["step"]), float(x[key])) for x in found if x.get(key) is not None]
    return ([x for x, _ in pairs], [y for _, y in pairs]) if pairs else ()


def parts(run: Run) -> list[tuple[str, float]]:
    """Return the seconds of each part of the work; of a forest, summed over its trees."""
    found: dict[str, float] = {}
    for part, value in run.report.get("seconds", {}).items():
        each: Mapping[str, Any] = {part: value}
        if isinstance(value, Mapping) and "wall" not in value:
            each = value
        for name, spent in each.items():
            wall = spent.get("wall", 0.0) if isinstance(spent, Mapping) else spent
            found[name] = found.get(name, 0.0) + float(wall)
    return list(found.items())


def cost(run: Run) -> Section:
    """Tell where time and memory went."""
    rows = [(part, wall, seconds(wall)) for part, wall in parts(run)]
    body = shares("Seconds on the clock, by part", rows) if rows else ""
    training, _ = log_lines(run.folder)
    if peak := run.report.get("peak_rss_mb"):
        body += paragraph(f"At its peak the process held {peak:,.0f} MB of memory.")
    held = _of(training, "memory_mb")
    if held and len(held[0]) > 1:
        told = (
            "What the process held in memory at each line of the log, files that it maps included."
        )
        body += side_by_side(lines("Memory", told, [("MB", *held)], x="step", y="MB"))
    return Section("cost", "Time and memory", body or paragraph("Not recorded.", "note"))


def settings(run: Run) -> Section:
    """List what would make the same run again."""
    rows = [(key, _plain(value)) for key, value in run.settings.items()]
    facts = [
        ("dataset", f"{run.report.get('dataset')}, hash {run.dataset.content_hash}"),
        ("propensity", "A={}, B={}".format(*run.dataset.propensity)),
        ("source", str(run.report.get("commit", "not recorded"))),
    ]
    facts += [(key, _plain(value)) for key, value in run.report.get("environment", {}).items()]
    body = table("Data, source and versions", ("what", "value"), facts, left=2)
    body += _choices(run)
    body += folded("All settings", table("Settings", ("setting", "value"), rows, left=2))
    return Section("settings", "How it was made", body)


def _choices(run: Run) -> str:
    """Say what `xmlkernels train auto` chose, and why; nothing of other runs."""
    if not (run.folder / CHOICES).is_file():
        return ""
    found = read_object(run.folder / CHOICES, mend="train again, or remove it")
    rows = [
        tuple(str(one.get(key, "")) for key in ("what", "value", "why", "flag"))
        for one in found.get("choices", ())
    ]
    caption = f"What `xmlkernels train auto` chose, for {found.get('machine')}"
    return table(caption, ("what", "choice", "why", "flag that changes it"), rows, left=4)


def seconds(value: float) -> str:
    """Write seconds as one reads them: `0.4 s`, `12 min`, `3 h 20 min`."""
    return f"{value:.1f} s" if value < 9.95 else duration(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
