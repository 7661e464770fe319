"""A finished run, read from its folder: settings, metrics, log, predictions and their dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xmlkernels.data.dataset import Dataset, Split
from xmlkernels.data.formats import read_npz
from xmlkernels.data.manifest import MANIFEST
from xmlkernels.errors import InputError
from xmlkernels.metrics import inverse_propensity, top_rows_from_csr
from xmlkernels.metrics.resampling import Sums, grouped_sums
from xmlkernels.predict.calibration import CALIBRATION, Calibration
from xmlkernels.records import parse_json, read_object

KEPT = 100  # places of the predictions that are looked at
CHOICES = "choices.json"  # of `xmlkernels train auto`, each with its reason
_MEND = "name the output folder of a finished run"


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        folder: its output folder.
        report: what metrics.json holds.
        settings: of config.json, or those that a ranker was trained with.
        dataset: whose split the predictions are of.
        split: that split; None where the run had none to predict.
        values, rows: fp32 and int64 [N, K], predictions by falling log-odds; -inf and -1 pad.
    """

    folder: Path
    report: Mapping[str, Any]
    settings: Mapping[str, Any]
    dataset: Dataset
    split: Split | None
    values: np.ndarray
    rows: np.ndarray

    @property
    def linear(self) -> bool:
        """Whether it is a ranker or a forest of them, without epochs."""
        return "epochs" not in self.settings

    @cached_property
    def weight(self) -> np.ndarray:
        """Inverse propensities of the labels, float64 [L]."""
        return inverse_propensity(self.dataset.splits["train"].labels, *self.dataset.propensity)

    @cached_property
    def calibrated(self) -> np.ndarray | None:
        """Log-odds [N, K] that predictions give after calibration; None without one."""
        for place in (self.folder, self.folder / "checkpoint"):
            if (place / CALIBRATION).exists():
                found = Calibration.load(place, self.dataset.num_labels)
                return found.log_odds(self.values, self.rows)
        return None

    @property
    def given(self) -> np.ndarray:
        """Log-odds that predictions give: calibrated where they can be."""
        return self.values if self.calibrated is None else self.calibrated

    @cached_property
    def sums(self) -> Sums:
        """The terms of all metrics of the split, summed over groups of documents."""
        assert self.split is not None
        return grouped_sums(self.rows, self.split.labels, self.weight)


def open_run(
    folder: str | Path,
    dataset: Dataset | str | Path | None = None,
    *,
    mend: str = "name the run's own by --dataset",
) -> Run:
    """Read a run.

    Args:
        folder: the output folder of training.
        dataset: that of the run, opened or where it is; by default where the run says.
        mend: what to do where it is another's.

    Raises:
        InputError: no finished run, another dataset than its own, or predictions of other shape.
    """
    folder = Path(folder)
    report = read_object(folder / "metrics.json", mend=_MEND)
    settings = report.get("options") or read_object(folder / "config.json", mend=_MEND)
    if not isinstance(dataset, Dataset):
        dataset = Dataset.open(_place(folder, report, settings) if dataset is None else dataset)
    if dataset.content_hash != report.get("dataset_hash"):
        raise InputError(
            str(folder),
            f"predictions for {dataset.folder} (hash {dataset.content_hash[:12]})",
            f"those for another (hash {str(report.get('dataset_hash'))[:12]})",
            mend,
        )
    # As training writes them: of the test split or, of a model without one, of validation.
    split = dataset.splits.get("test")
    if split is None and "options" not in report:
        split = dataset.splits.get("val")
    file = folder / "predictions.npz"
    if split is None or not file.exists():
        nothing = np.empty((0, 0), np.float32)
        return Run(folder, report, settings, dataset, None, nothing, nothing.astype(np.int64))
    scores = read_npz(file, rows=len(split), cols=dataset.num_labels, keep_zeros=True)
    deepest = int(np.diff(scores.indptr).max(initial=1))
    values, rows = top_rows_from_csr(scores, max(1, min(KEPT, deepest)))
    return Run(folder, report, settings, dataset, split, values, rows)


def log_lines(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read log.jsonl: lines of training, and of measurements; none of a ranker, which has no steps.

    Lines that a kill cut short are left out.
    """
    training: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    path = folder / "log.jsonl"
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                try:
                    found = parse_json(line, str(path), _MEND)
                except InputError:
                    continue
                if isinstance(found, dict):
                    (measured if "split" in found else training).append(found)
    return training, measured


def _place(folder: Path, report: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return where the run says that its dataset is."""
    for named in (report.get("dataset_folder"), settings.get("dataset")):
        if named and (Path(named) / MANIFEST).exists():
            return str(named)
    raise InputError(
        str(folder),
        "the dataset of the run, where it was",
        f"none in {report.get('dataset_folder') or settings.get('dataset')}",
        "name its folder by --dataset",
    )
