"""Runs side by side: metrics with paired significance, settings that differ, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xmlkernels.errors import InputError
from xmlkernels.metrics import evaluate
from xmlkernels.metrics.resampling import EXCHANGES, RESAMPLES, SEED, Difference, differences
from xmlkernels.report.background import parts
from xmlkernels.report.run import open_run

# Settings that say where a run is, not what it is.
_PLACES = {"output", "cache", "resume", "overwrite", "report", "show", "tensorboard"}


@dataclass(frozen=True)
class Comparison:
    """Runs of one dataset, the first of which the others are compared with.

    Attributes:
        names: of their folders, as given.
        documents: of the split that was measured.
        split: its name, "test" or "val".
        metrics: per run, percent.
        differences: per run but the first, to the first.
        settings: that differ, per run; None where a run's model has no such setting.
        cost: per run, wall seconds of all parts, and peak memory in MB, None where not recorded.
    """

    names: list[str]
    documents: int
    split: str
    metrics: list[dict[str, float]]
    differences: list[dict[str, Difference]]
    settings: dict[str, list[Any]]
    cost: dict[str, list[float | None]]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values, with how it was computed."""
        how = {"seed": SEED, "resamples": RESAMPLES, "exchanges": EXCHANGES}
        return asdict(self) | {"paired": how}


def compare(folders: Sequence[str], dataset: str = "") -> Comparison:
    """Compare finished runs on the same documents.

    Args:
        folders: output folders, two or more.
        dataset: theirs, where it is not where the first run says.

    Raises:
        InputError: fewer than two runs, one that is not finished, without predictions or of
            another dataset or split.
    """
    if len(folders) < 2:
        mend = "name two output folders or more"
        raise InputError("arguments", "two runs or more", str(len(folders)), mend)
    first = open_run(folders[0], dataset or None)
    mend = "only runs of one dataset, by its content, can be compared"
    runs = [first, *(open_run(folder, first.dataset, mend=mend) for folder in folders[1:])]
    for folder, run in zip(folders, runs, strict=True):
        if run.split is None:
            mend = "train it on data with a test split"
            raise InputError(folder, "a run with predictions.npz", "none", mend)
        if first.split is not None and run.split.name != first.split.name:
            mend = "compare runs that were measured on one split"
            raise InputError(folder, f"predictions of {first.split.name}", run.split.name, mend)
    assert first.split is not None
    peaks = [run.report.get("peak_rss_mb") for run in runs]
    return Comparison(
        names=list(folders),
        documents=len(first.split),
        split=first.split.name,
        metrics=[evaluate(run.rows, first.split.labels, first.weight) for run in runs],
        differences=[_of_shown(differences(first.sums, run.sums)) for run in runs[1:]],
        settings=_differing([run.settings for run in runs]),
        cost={
            "seconds": [sum(wall for _, wall in parts(run)) for run in runs],
            "peak memory, MB": [None if peak is None else float(peak) for peak in peaks],
        },
    )


def _of_shown(found: Mapping[str, Difference]) -> dict[str, Difference]:
    return {name: value for name, value in found.items() if not name.startswith("PSR")}


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ."""
    names = dict.fromkeys(name for one in settings for name in one if name not in _PLACES)
    every = {name: [one.get(name) for one in settings] for name in names}
    return {name: values for name, values in every.items() if _differ(values)}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])
